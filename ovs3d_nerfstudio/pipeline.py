"""The pipeline: owns the prompts and the encoders' names, and tells datamanager and model what they need of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ovs3d_nerfstudio.data.rays import OVS3DDataManagerConfig
from ovs3d_nerfstudio.data.teaching import TeachingConfig
from ovs3d_nerfstudio.encoders.base import encoders
from ovs3d_nerfstudio.engine import ranks
from ovs3d_nerfstudio.engine.anomaly import LossGuard
from ovs3d_nerfstudio.engine.checkpoints import CheckpointError, check_implementation
from ovs3d_nerfstudio.engine.option_checks import (
    OptionError,
    check_config,
    check_device,
    check_fields,
    check_finer,
    check_scales,
    coarse_scales,
)
from ovs3d_nerfstudio.errors import CommandError, reason, user_errors
from ovs3d_nerfstudio.evaluation.evaluation import Evaluator
from ovs3d_nerfstudio.evaluation.metrics import FIGURES
from ovs3d_nerfstudio.features.basis import Basis, fit_basis
from ovs3d_nerfstudio.memory import told_what_to_lower
from ovs3d_nerfstudio.models.brought import begin_from
from ovs3d_nerfstudio.models.nerf import OVS3DModelConfig
from ovs3d_nerfstudio.models.semantics import SemanticModel, SemanticModelConfig
from ovs3d_nerfstudio.models.splat import OVS3DSplatModel
from ovs3d_nerfstudio.precision import single_precision
from ovs3d_nerfstudio.prompts.palette import save_legend
from ovs3d_nerfstudio.prompts.prompts import choose_prompts
from ovs3d_nerfstudio.viewer.panel import PromptPanel

# nerfstudio 1.1.5 indexes its cameras in a way that torch ≥ 2.9 warns of, several lines at every step.
warnings.filterwarnings("ignore", message="Using a non-tuple sequence for multidimensional indexing")
# Its successor is not in the torch versions that nerfstudio supports.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")

# Of what other packages do among themselves.
warnings.filterwarnings(
    "ignore",
    message=r"Importing `.*` from `torchmetrics|`torch.jit.script` is deprecated|`torch.cuda.amp.GradScaler",
    category=FutureWarning,
)
warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")
warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")

WITHOUT_PROMPTS = (
    "The field learns the features alone, and words can be asked of it afterwards: in the viewer's group Prompts, by --prompts of "
    "`ovs3d render`, `objects` and `export`, or from Python; the output features_pca shows what it has learned."
)
"""What a run without prompts is good for."""
OF_VIEWS = {"_model.camera_optimizer.pose_adjustment", "_model.field.embedding_appearance.embedding.weight"}
"""Parameters with a row for each training view."""
SAMPLE_CELLS = 8192
"""Cells kept in a run to know the range of similarities in its scene."""


@dataclass
class OVS3DPipelineConfig(VanillaPipelineConfig):
    """Prompts, encoders, and what nerfstudio's pipeline has."""

    _target: type = field(default_factory=lambda: OVS3DPipeline)
    datamanager: TeachingConfig = field(default_factory=OVS3DDataManagerConfig)  # type: ignore[assignment]
    model: SemanticModelConfig = field(default_factory=OVS3DModelConfig)  # type: ignore[assignment]
    prompts: str = ""
    """What to segment, separated by semicolons: "red apple; banana; white mattress". Name the background too."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, in place of `prompts`; without either, the scene's segmentations/classes.txt."""
    image_text_encoder: str = "open_clip:ViT-B-16@openai"
    """What embeds patches and prompts: open_clip:MODEL@TAG_OR_FILE, offline (no download; knows little), or a plugin's."""
    token_encoder: str = "dino:facebook/dino-vitb8"
    """What FDA compares pixels by: dino:NAME_OR_FOLDER (DINO, DINOv2, DINOv3), offline, or a plugin's."""


class OVS3DPipeline(VanillaPipeline):
    """Extracts features when training asks for its first batch; everything else opens without features or encoders."""

    config: OVS3DPipelineConfig
    datamanager: Any
    """CheckedData and Teaching, whatever draws its pixels."""

    def __init__(
        self,
        config: OVS3DPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ):
        with user_errors():
            check_options(config)
            if test_mode == "val":
                check_read(config)
            check_device("--machine.device-type", str(device))
            if test_mode == "val":
                encoders(config.image_text_encoder, config.token_encoder, device)  # before the data are read
        config.model.num_scales = len(config.datamanager.scales)
        if _brought(config) is not None:
            config.datamanager.find_seeds = False  # type: ignore[attr-defined]
        # As if alone: nerfstudio would wrap the model for gradients to be averaged right away, when its parameters do not
        # have their sizes yet, and for CUDA only. See `prepare_features`.
        super().__init__(config, device, test_mode, grad_scaler=grad_scaler)
        self.datamanager.to(device)  # what makes rays of pixels; nerfstudio's main branch does so no more
        self.world_size = world_size
        self.loss_guard = LossGuard(
            late=torch.device(device).type != "cpu" and bool(grad_scaler and grad_scaler.is_enabled())
        )
        self.chosen_prompts: list[str] = []
        self.last_miou: float | None = None
        """Of the held-out view that was last looked at in training."""
        self.run_folder: Path | None = None
        self.optimizers: Optimizers | None = None
        self.prompt_panel = PromptPanel(self.model)
        """nerfstudio's viewer looks for such attributes, and sets them up when it opens."""
        with user_errors():
            if test_mode == "val":
                data = self.datamanager.config.data
                self.chosen_prompts, origin = choose_prompts(config.prompts, config.prompts_file, Path(data or "."))
                CONSOLE.print(
                    escape(origin if self.chosen_prompts or _brought(config) else f"{origin} {WITHOUT_PROMPTS}")
                )
                coarse = coarse_scales("--pipeline.datamanager.scales", config.datamanager.scales)
                for remark in [*self.model.remarks, *coarse]:
                    CONSOLE.print(escape(remark))
            evaluator = self.evaluator = self.model.evaluator = self._evaluator()
            if test_mode == "val" and evaluator is not None:
                cameras = self.datamanager.eval_dataset.cameras
                evaluator.check(torch.cat([cameras.height, cameras.width], -1).tolist())

    def _evaluator(self) -> Evaluator | None:
        datamanager = self.datamanager
        data = datamanager.config.data
        if data is None:
            return None
        split = datamanager.eval_dataset.image_filenames
        return Evaluator.of_scene(Path(data), split, [*datamanager.train_dataset.image_filenames, *split])

    def _begin(self, resumed: bool) -> None:
        """Takes up what is brought along, unless a checkpoint holds it already; prompts where none are given."""
        source = _brought(self.config)
        if source is None:
            return
        if not resumed:
            assert isinstance(self.model, OVS3DSplatModel), "no other model has the option"
            for sentence in begin_from(source, self.model, self.datamanager):
                CONSOLE.print(escape(sentence))
        config, known = self.config, self.model.segmenter.trained_prompts
        if known and not config.prompts and config.prompts_file is None:
            self.chosen_prompts, config.prompts = list(known), "; ".join(known)
            CONSOLE.print(escape(f"Prompts of what training begins with: {config.prompts}."))

    @property
    def has_masks(self) -> bool:
        """Whether held-out views have masks that prompts can be compared with."""
        return self.evaluator is not None and bool(self.chosen_prompts)

    @property
    def model(self) -> SemanticModel:
        return super().model  # type: ignore[return-value]

    @single_precision()
    def prepare_features(self) -> None:
        """Extract, fit the basis, embed the prompts. A resumed run keeps the basis of its checkpoint.

        Of several ranks the first fits and embeds for all; from then on their gradients are averaged.
        """
        config, segmenter = self.config, self.model.segmenter
        encoder, tokens = encoders(config.image_text_encoder, config.token_encoder, self.device)
        if segmenter.ready and segmenter.fingerprint != encoder.fingerprint:
            raise CommandError(
                f"The checkpoint was trained with {segmenter.encoder} ({segmenter.fingerprint}), but {config.image_text_encoder} "
                f"is {encoder.fingerprint}; go on with the encoder of the run, or start a new one."
            )
        views = self.datamanager.extract_features(encoder, tokens)
        with told_what_to_lower("loading the encoder"):
            text = ranks.from_first(
                lambda: encoder.embed_text(self.chosen_prompts) if self.chosen_prompts else torch.zeros(0, encoder.dim)
            )
        # The encoders drew as many random numbers as it took to load what the cache lacked: the run shall not depend on it.
        torch.manual_seed(torch.initial_seed())
        known = segmenter.ready and segmenter.prompts == self.chosen_prompts
        if segmenter.ready:
            basis = Basis(segmenter.basis.cpu(), float("nan"))
        else:
            basis, _ = ranks.from_first(
                lambda: fit_basis(views, text, config.model.basis_dim, config.model.basis_energy)
            )
            CONSOLE.print(
                f"Features: {basis.vectors.shape[1]} of {basis.vectors.shape[0]} dimensions hold {basis.energy:.1%} of the scene."
            )
        teachers = self.datamanager.teach(views, basis)
        segmenter.configure(
            self.chosen_prompts,
            text,
            basis.vectors,
            ranks.from_first(lambda: teachers.sample(SAMPLE_CELLS)),
            encoder.spec,
            encoder.fingerprint,
            config.model.class_scores,
        )
        prompts = segmenter.project(segmenter.text)
        teachers.measure_ranges(prompts)
        if not known:
            self._start_mixture(prompts)
        self.model.semantic_field.resize(basis.vectors.shape[1])
        if self.world_size > 1:
            # All go on from rank 0's buffers (which never change) and parameters (DDP copies them), whatever each drew
            # itself until here. Before the semantic losses begin, their parameters take no part in a step.
            ranks.copy_first(self.model.buffers())
            self._model = DistributedDataParallel(self.model, find_unused_parameters=True, broadcast_buffers=False)  # type: ignore[assignment]
        if self.run_folder is not None and self.chosen_prompts and ranks.rank() == 0:
            save_legend(self.run_folder / "legend.png", self.chosen_prompts, segmenter.colors.cpu())

    def _start_mixture(self, prompts: Float[Tensor, "K C"]) -> None:
        """Start the mixture for new prompts, and its optimizer with it: its state has the sizes of the old ones."""
        self.model.mixture.configure(prompts)
        state = self.optimizers.optimizers["patch_mixture"].state if self.optimizers is not None else {}
        if state:
            state.clear()
            CONSOLE.print("The prompts are not the checkpoint's: how the encoder mixes classes is learned anew.")

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """As nerfstudio's, which would leave at random what a checkpoint lacks: here one of another version or another config
        ends the command with a sentence."""
        with user_errors():
            check_implementation(loaded_state, self.model.state_dict())
            try:
                self.model.update_to_step(step)
                state = {key.removeprefix("module."): value for key, value in loaded_state.items()}
                views = state.pop("datamanager._extra_state", None)  # a run of version 0.2 has none
                if views is not None:
                    self.datamanager.set_extra_state(views)
                    for name in OF_VIEWS & state.keys():
                        state[name] = self.datamanager.of_each_view(state[name])
                self.load_state_dict(state, strict=True)
                known, basis = self.model.semantic_field.dim, self.model.segmenter.basis
                if basis.numel() and known != basis.shape[1]:
                    raise ValueError(
                        f"it has {known} coefficients for a basis of {basis.shape[1]}: the number of scales differs"
                    )
            except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
                raise CheckpointError(
                    f"The checkpoint of step {step} does not fit its config ({reason(error, 3)}); open it with the config.yml that "
                    "was written beside it and the version of ovs3d_nerfstudio that trained it, or train again."
                ) from error

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        trainer = training_callback_attributes.trainer
        self.optimizers = training_callback_attributes.optimizers
        with user_errors():
            self._begin(resumed=trainer is not None and trainer._start_step > 0)
        if trainer is not None:
            self.run_folder = trainer.base_dir
            if ranks.rank() == 0:
                # ns-train wrote it before the data was read; what was chosen by the capture belongs to the run.
                trainer.config.save_config()
        return super().get_training_callbacks(training_callback_attributes)

    def ready_to_train(self) -> None:
        """Makes the features ready where they are not; the random numbers of the training stay what they are."""
        if self.datamanager.teachers is None:
            device = torch.device(self.device)
            with user_errors(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                self.prepare_features()

    def get_train_loss_dict(self, step: int):
        self.ready_to_train()
        model = self.config.model
        semantics = step >= model.semantics_start
        class_losses = bool(self.chosen_prompts and model.refines and step >= model.fda_start)
        told_apart = class_losses and model.fda_apart_start is not None and step >= model.fda_apart_start
        with user_errors(), single_precision():
            pixels, windows, batch = self.datamanager.next_step(
                step, semantics, bool(model.patch_loss_mult) or class_losses, bool(model.color_loss_mult) or told_apart
            )
        batch["class_losses"], batch["told_apart"] = class_losses, told_apart
        # Everything that is learned goes through one call: DDP sees only parameters that are used inside it.
        outputs, loss_dict, metrics_dict = self._model(pixels, semantics, windows, batch)
        with user_errors():
            self.loss_guard.check(step, loss_dict)
        return outputs, loss_dict, metrics_dict

    def get_eval_image_metrics_and_images(self, step: int):
        with user_errors(), told_what_to_lower("rendering"):
            metrics, images = super().get_eval_image_metrics_and_images(step)
        segmentation = self._segmentation_metrics()
        self.last_miou = segmentation.get("miou", self.last_miou)
        return metrics | segmentation, images

    def get_average_eval_image_metrics(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with user_errors(), told_what_to_lower("rendering"):
            if not len(self.datamanager.eval_dataset):
                raise CommandError(
                    f"No photo of {self.datamanager.config.data} is held out, so there is nothing to evaluate; split the data "
                    "otherwise, as with nerfstudio-data --eval-mode interval at the end of the training command."
                )
            metrics = super().get_average_eval_image_metrics(*args, **kwargs)
        CONSOLE.print(escape(told_figures(metrics)))
        return metrics

    def get_average_image_metrics(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with user_errors(), told_what_to_lower("rendering"):
            self.datamanager.require_eval_photos()
            metrics = super().get_average_image_metrics(*args, **kwargs)
        return metrics | self._segmentation_metrics()

    def _segmentation_metrics(self) -> dict[str, float]:
        """What the model's evaluator has gathered since the last call."""
        evaluator = self.evaluator
        if evaluator is None:
            return {}
        metrics = evaluator.flat_summary()
        evaluator.records.clear()
        return metrics


def told_figures(metrics: Mapping[str, Any]) -> str:
    """What an evaluation found, as lines for people."""
    names = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", **FIGURES}
    units = {"psnr": " dB"}
    said = [
        f"{label} {float(metrics[name]):.{2 if name in units else 3}f}{units.get(name, '')}"
        for name, label in names.items()
        if name in metrics
    ]
    classes = [
        f"{name.removeprefix('iou_')} {float(value):.3f}"
        for name, value in metrics.items()
        if name.startswith("iou_") and not name.endswith("_std")
    ]
    return "\n".join([", ".join(said), *(["IoU: " + ", ".join(classes)] if classes else [])])


def _brought(config: OVS3DPipelineConfig) -> Path | None:
    """What training begins with, if something is brought along."""
    return getattr(config.model, "init_from", None)


def check_options(config: OVS3DPipelineConfig) -> None:
    """Raises OptionError for the first option of `config` that cannot work."""
    model, datamanager = config.model, config.datamanager
    if getattr(model, "prompt", None):
        raise OptionError("--prompt belongs to other methods; give what to segment with --pipeline.prompts.")
    check_fields("--pipeline.", config, {})
    check_config("--pipeline.datamanager.", datamanager)
    check_config("--pipeline.model.", model)
    check_scales("--pipeline.datamanager.scales", datamanager.scales)
    check_finer("--pipeline.datamanager.finer", datamanager.finer)
    if model.semantic_max_res < model.semantic_base_res:
        raise OptionError(
            f"--pipeline.model.semantic-max-res {model.semantic_max_res} is less than "
            f"--pipeline.model.semantic-base-res {model.semantic_base_res}; give at least that."
        )


def check_read(config: OVS3DPipelineConfig) -> None:
    """Raises OptionError for an option of nerfstudio's that was given and that nobody reads."""
    indices = getattr(config.datamanager, "eval_image_indices", (0,))
    if indices != (0,):
        raise OptionError(
            f"--pipeline.datamanager.eval-image-indices {' '.join(map(str, indices or ['None']))} does nothing, as nerfstudio has "
            "the option and reads it nowhere; leave it out. All held-out photos are evaluated."
        )
