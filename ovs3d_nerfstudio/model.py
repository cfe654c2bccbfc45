"""The model: nerfacto's colour and density, and a semantic field rendered with nerfacto's own weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components.scene_colliders import NearFarCollider
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from torch import Tensor, nn

from ovs3d_nerfstudio import losses
from ovs3d_nerfstudio.answers import Answering, Answers, Question, packed
from ovs3d_nerfstudio.capture import NERFACTO_NEAR, THIN_DENSITY
from ovs3d_nerfstudio.evaluation import Evaluator
from ovs3d_nerfstudio.features.teachers import Windows
from ovs3d_nerfstudio.field import LInfContraction, SemanticField
from ovs3d_nerfstudio.hash_grid import FastHashEncoding, use_fast_hash_grids
from ovs3d_nerfstudio.memory import filled_in_chunks, free_memory
from ovs3d_nerfstudio.mixing import PatchMixture
from ovs3d_nerfstudio.renderers import Semantics, composite, top_samples
from ovs3d_nerfstudio.segmentation import ClassScores, Segmenter, stretched


@dataclass
class OVS3DModelConfig(NerfactoModelConfig):
    """Nerfacto and the semantic field, its losses and their schedule."""

    _target: type = field(default_factory=lambda: OVS3DModel)
    implementation: Literal["auto", "tcnn", "torch"] = "auto"  # type: ignore[assignment]
    """Hash grids and networks: tiny-cuda-nn, or torch with our own fast grid; auto takes tiny-cuda-nn when it imports."""

    average_init_density: float | None = None  # type: ignore[assignment]
    """Density at the start. Default: by the capture (see `capture`), 0.3 from the front, about 1 all around."""
    near_plane: float | None = None  # type: ignore[assignment]
    """Where rays begin. Default: by the capture, nerfacto's 0.05 from the front, 0.4 of the way to the subject all around."""

    num_scales: int = 3
    """Scales of the pyramid; set by the pipeline."""
    basis_dim: int = 64
    """Most coefficients `K` a point may carry; 0 keeps all of the encoder's D dimensions."""
    basis_energy: float = 0.99
    """Share of the features' energy that the basis must hold, if `basis_dim` allows."""
    semantic_samples: int = 8
    """Samples of a ray at which semantics are looked up: the ones with most weight."""
    semantic_levels: int = 16
    """Levels of the semantic hash grid."""
    semantic_base_res: int = 16
    """Resolution of the coarsest level of the semantic hash grid."""
    semantic_max_res: int = 512
    """Resolution of the finest level of the semantic hash grid."""
    semantic_log2_hashmap_size: int = 19
    """Size of each level of the semantic hash grid, as a power of two."""
    semantic_features_per_level: int = 2
    """Features a level of the semantic hash grid."""
    semantic_hidden_dim: int = 64
    """Width of the hidden layer behind the semantic grid; 0 makes features linear in the grid, as in the paper's code."""

    semantics_start: int = 1000
    """Step at which the semantic losses begin: geometry comes first."""
    fda_start: int = 2000
    """Step at which FDA and the unmixing loss begin: features come first (3D-OVS: 5 000 of 15 000 iterations)."""
    detach_density: bool = True
    """Keep the gradients of the semantic losses from the density (3D-OVS default)."""
    feature_loss_mult: float = 1.0
    """Weight of the feature loss (3D-OVS: 1)."""
    patch_loss_mult: float = 0.0
    """Weight of the patch loss: the mean of the features inside a patch should be the patch's embedding."""
    unmixing_loss_mult: float = 0.0
    """Weight of the unmixing loss: the classes inside a patch, mixed as the encoder mixes them, should be its embedding."""
    unmixing_temperature: float = 0.3
    """Temperature of the class probabilities in the unmixing loss, in units of the spread of the scene's similarities."""
    color_loss_mult: float = 0.0
    """Weight of the colour loss: neighbouring pixels of like colour should agree on the class."""
    color_bandwidth: float = 0.05
    """Distance of colours (of three channels in [0, 1]) from which on neighbours may differ in the colour loss."""
    rda_loss_mult: float = 1.0
    """Weight of RDA (3D-OVS: 1)."""
    rda_range: Literal["view", "scene"] = "view"
    """What stretches RDA's relevancies: each view's minimum and maximum (3D-OVS), or percentiles 1 and 99 over the scene."""
    fda_positive_mult: float = 200.0
    """Weight of FDA's positive part (3D-OVS: 200)."""
    fda_negative_mult: float = 0.2
    """Weight of FDA's negative part (3D-OVS: 0.2)."""
    fda_temperature: float = 8.0
    """Temperature τ of the class probabilities in FDA (3D-OVS: 0.2, which is about 8 spreads of CLIP's similarities)."""
    fda_temperature_unit: Literal["absolute", "spread"] = "spread"
    """Whether τ is a number (3D-OVS), or a multiple of the standard deviation over classes that the scene's similarities
    have: a fixed τ with an encoder of several times CLIP's spread makes FDA collapse to one class."""
    fda_shift: float = 0.7
    """Cosine of two tokens above which they should agree (3D-OVS: 0.7)."""
    fda_divergence: losses.Divergence = "js"
    """js as in the paper, or kl as in the authors' code."""
    fda_rebalance: bool = True
    """Divide each part of FDA by its own count of pairs (3D-OVS §3.3)."""
    fda_pairs: int = 16384
    """Pairs drawn in each window; memory of FDA is windows × pairs × classes."""
    class_scores: ClassScores = "cosine"
    """What classes are compared by: cosines (3D-OVS); relevancies, which are cosines stretched by each prompt's range over
    the scene; or auto: relevancies where the encoder hardly answers to a prompt, else cosines."""
    overlay_opacity: float = 0.6
    """Opacity of the segmentation over the photo in `segmentation_overlay`."""
    learned_scales: bool = True
    """Select scales by the learned scale logits; otherwise all scales weigh the same."""


class OVS3DModel(NerfactoModel):
    """Nerfacto with a semantic field."""

    config: OVS3DModelConfig
    evaluator: Evaluator | None = None
    """Set by the pipeline where the data has masks: what `get_image_metrics_and_images` reports labels to."""
    batches: int = 0
    """Batches of rays trained on by this object: tells whether a view kept by the viewer is of today's weights."""

    def populate_modules(self) -> None:
        config = self.config
        if config.implementation == "auto":
            config.implementation = "tcnn" if tcnn_imports() else "torch"
        self._choose_start()
        with _lpips_optional():
            super().populate_modules()  # type: ignore[no-untyped-call]
        # nerfstudio renders from the lens on, but what lies before the near plane was never trained.
        if isinstance(self.collider, NearFarCollider):
            self.collider.reset_near_plane = False
        if not config.disable_scene_contraction:
            for part in (self.field, *self.proposal_networks):
                part.spatial_distortion = LInfContraction()
        self.semantic_field = SemanticField(
            self.scene_box.aabb,
            dim=max(1, config.basis_dim),
            num_scales=config.num_scales,
            num_levels=config.semantic_levels,
            base_res=config.semantic_base_res,
            max_res=config.semantic_max_res,
            log2_hashmap_size=config.semantic_log2_hashmap_size,
            features_per_level=config.semantic_features_per_level,
            hidden_dim=config.semantic_hidden_dim,
            spatial_distortion=self.field.spatial_distortion,
            implementation=config.implementation,
        )
        if config.implementation == "torch":
            use_fast_hash_grids(self)
            needed = config.predict_normals or config.camera_optimizer.mode != "off"
            for module in self.modules():
                if isinstance(module, FastHashEncoding):
                    module.position_gradients = needed
        # What the current call of `forward` is about: one for each thread, as the viewer renders in threads of its own.
        self._call = threading.local()
        # Nerfacto keeps the samples and weights of its last pass to itself at test time.
        self.renderer_expected_depth.register_forward_pre_hook(
            lambda _module, _args, kwargs: setattr(self._call, "last_pass", kwargs), with_kwargs=True
        )
        self.segmenter = Segmenter()
        if config.class_scores != "auto":
            self.segmenter.scores = config.class_scores
        self.mixture = PatchMixture()

    def _choose_start(self) -> None:
        """Sets what the config leaves to the capture."""
        config = self.config
        capture = self.kwargs["metadata"].get("capture")  # none where no datamanager of ours made the model
        density, near = capture.start() if capture is not None else (THIN_DENSITY, NERFACTO_NEAR)
        config.average_init_density = density if config.average_init_density is None else config.average_init_density
        config.near_plane = near if config.near_plane is None else config.near_plane

    def get_param_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = super().get_param_groups()
        groups["semantic_grid"] = list(self.semantic_field.grid.parameters())
        groups["semantic_head"] = [*self.semantic_field.hidden.parameters(), *self.semantic_field.last.parameters()]
        groups["patch_mixture"] = list(self.mixture.parameters())
        return groups

    def forward(
        self,
        ray_bundle: RayBundle,
        semantics: bool = True,
        window_rays: RayBundle | None = None,
        batch: dict | None = None,
    ):
        """Outputs of `ray_bundle`; with `window_rays`, their Semantics too, as `window_semantics`.

        With a `batch` to learn from: the outputs, the losses and the metrics.
        """
        self.batches += self.training
        self._call.semantics = semantics and self.segmenter.ready
        self._call.window_rays = window_rays
        outputs = super().forward(ray_bundle)
        if batch is None:
            return outputs
        metrics = self.get_metrics_dict(outputs, batch)
        return outputs, self.get_loss_dict(outputs, batch, metrics), metrics

    @torch.no_grad()
    def get_features_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict:
        """As `get_outputs_for_camera`, with features in place of pictures (see `get_features`; directions are `packed`)."""
        with self._features_wanted():
            return self.get_outputs_for_camera(camera, obb_box)

    def get_features(self, ray_bundle: RayBundle) -> dict:
        """As `forward` in evaluation, with `directions` (normalised coefficients, R×K) and `scales` (R×S) in place of the
        pictures that are made of them: whatever the prompts are, these stay."""
        with self._features_wanted():
            return self(ray_bundle)

    @contextmanager
    def _features_wanted(self) -> Iterator[None]:
        try:
            self._call.features = True
            yield
        finally:
            self._call.features = False

    @torch.no_grad()
    def get_outputs_for_camera_ray_bundle(self, camera_ray_bundle: RayBundle) -> dict:
        """As nerfacto's, in chunks of `eval_num_rays_per_chunk` rays, or of fewer where memory is short; features are `packed`.

        Raises MemoryShortage where the picture itself does not fit.
        """
        chunk = min(self.config.eval_num_rays_per_chunk, rays_that_fit(self.config, free_memory(self.device)))

        def render(start: int, stop: int) -> dict:
            outputs = self.forward(camera_ray_bundle.get_row_major_sliced_ray_bundle(start, stop).to(self.device))
            if "directions" in outputs:
                outputs["directions"] = packed(outputs["directions"])
            return outputs

        outputs = filled_in_chunks(len(camera_ray_bundle), chunk, render, camera_ray_bundle.directions.device)
        return {name: output.view(*camera_ray_bundle.shape, -1) for name, output in outputs.items()}

    def get_outputs(self, ray_bundle: RayBundle) -> dict:
        call = self._call
        outputs = super().get_outputs(ray_bundle)
        samples = call.__dict__.pop("last_pass")
        if not call.semantics:
            return outputs
        positions, weights = self._heaviest(samples["ray_samples"], samples["weights"])
        if not self.training:
            semantics = self.render_semantics(positions, weights)
            if not getattr(call, "features", False):
                return outputs | self.pictures(semantics, outputs["rgb"])
            return outputs | {"directions": F.normalize(semantics.coefficients, dim=-1), "scales": semantics.scales}
        if call.window_rays is None:
            return outputs | {"semantics": self.render_semantics(positions, weights)}
        # One call of the semantic field for both: the gradient of its table is made once. The windows come second, as the
        # proposal sampler trains its networks on the first rays of a step.
        rays = len(positions)
        window_positions, window_weights = self._heaviest_of_windows(call.window_rays)
        semantics = self.render_semantics(
            torch.cat([positions, window_positions]), torch.cat([weights, window_weights])
        )
        return outputs | {"semantics": semantics[:rays], "window_semantics": semantics[rays:]}

    def _heaviest(
        self, samples: RaySamples, weights: Float[Tensor, "*R n 1"]
    ) -> tuple[Float[Tensor, "*R k 3"], Float[Tensor, "*R k 1"]]:
        """Positions and weights of the samples at which semantics are looked up."""
        if self.config.detach_density:
            weights = weights.detach()
        return top_samples(samples.frustums.get_positions().detach(), weights, self.config.semantic_samples)

    def render_semantics(self, positions: Float[Tensor, "*R k 3"], weights: Float[Tensor, "*R k 1"]) -> Semantics:
        """Composites the semantic field over the given samples of each ray."""
        coefficients, logits, saliency = self.semantic_field(positions)
        scales = composite(logits, weights).softmax(-1)
        if not self.config.learned_scales:
            scales = torch.full_like(scales, 1 / scales.shape[-1])
        return Semantics(composite(coefficients, weights), composite(saliency * coefficients, weights), scales)

    def _heaviest_of_windows(self, rays: RayBundle) -> tuple[Float[Tensor, "n k 3"], Float[Tensor, "n k 1"]]:
        """As `_heaviest`, of rays that carry no colour: density only, and without gradients when it is detached."""
        if self.collider is not None:
            rays = self.collider(rays)
        with torch.set_grad_enabled(not self.config.detach_density):
            samples, _, _ = self.proposal_sampler(rays, density_fns=self.density_fns)
            density, _ = self.field.get_density(samples)
            return self._heaviest(samples, samples.get_weights(density))

    def pictures(self, semantics: Semantics, rgb: Float[Tensor, "*R 3"]) -> dict[str, Tensor]:
        """What a person looks at, per ray (see `Answers`)."""
        answering = Answering(opacity=self.config.overlay_opacity)
        question = Question(self.segmenter, answering)
        return dict(Answers(question, F.normalize(semantics.coefficients, dim=-1), semantics.scales, rgb))

    def class_scores(self, coefficients: Float[Tensor, "*n K"]) -> Float[Tensor, "*n C"]:
        """What the argmax over classes is taken of: cosines (3D-OVS) or relevancies over the scene."""
        return self.segmenter.class_scores(self.segmenter.similarities(coefficients))

    def get_loss_dict(self, outputs, batch, metrics_dict=None) -> dict[str, Tensor]:
        loss_dict = super().get_loss_dict(outputs, batch, metrics_dict)
        if "teachers" in batch:
            # In single precision: half of it holds a cosine to three digits, and no salient feature beyond 65 504.
            with torch.autocast(self.device.type, enabled=False):
                loss_dict |= self.semantic_losses(outputs, batch)
        return loss_dict

    def semantic_losses(self, outputs: dict, batch: dict) -> dict[str, Tensor]:
        """Feature loss, RDA and FDA (3D-OVS §3.2–3.3), the patch and the unmixing loss, each times its weight."""
        config, segmenter = self.config, self.segmenter
        teachers = F.normalize(batch["teachers"], dim=-1)
        scales = outputs["semantics"].scales[..., None]
        target = (scales * teachers).sum(-2)
        result = {
            "feature_loss": config.feature_loss_mult * losses.cosine_loss(outputs["semantics"].coefficients, target)
        }
        if segmenter.prompts and config.rda_loss_mult:
            similarities = segmenter.similarities(teachers)
            if config.rda_range == "scene":
                relevancies = segmenter.relevancies(similarities)
            else:
                relevancies = stretched(similarities, *batch["ranges"].unbind(-2))
            result["rda_loss"] = config.rda_loss_mult * losses.rda_loss(
                self.class_scores(outputs["semantics"].coefficients), (scales * relevancies).sum(-2)
            )
        windows: Windows | None = batch.get("windows")
        if windows is None:
            return result
        semantics: Semantics = outputs["window_semantics"]
        if config.patch_loss_mult or config.unmixing_loss_mult:
            free = losses.patch_distances(semantics.salient, windows, self.mixture.aperture)
            result["patch_loss"] = config.patch_loss_mult * losses.patch_loss(free)
        if not batch["class_losses"]:
            return result
        scores = self.class_scores(semantics.coefficients)
        if config.unmixing_loss_mult:
            p = (scores / (config.unmixing_temperature * segmenter.spread)).softmax(-1)
            mixed = losses.patch_distances(self.mixture.rays(p), windows, self.mixture.aperture)
            result["unmixing_loss"] = config.unmixing_loss_mult * losses.unmixing_loss(mixed, free)
        tokens = windows.tokens
        log_p = (scores / self.fda_temperature()).log_softmax(-1).view(*tokens.shape[:2], -1)
        if config.color_loss_mult:
            assert windows.colors is not None, "the pipeline asks for them"
            alike = losses.color_loss(log_p, windows.colors, config.color_bandwidth, windows.seen)
            result["color_loss"] = config.color_loss_mult * alike
        if config.fda_positive_mult or config.fda_negative_mult:
            pairs = losses.sample_pairs(len(tokens), tokens.shape[1], config.fda_pairs, tokens.device)
            positive, negative = losses.fda_loss(
                log_p,
                tokens,
                pairs,
                config.fda_shift,
                config.fda_divergence,
                config.fda_rebalance,
                windows.seen,
            )
            result["fda_positive_loss"] = config.fda_positive_mult * positive
            result["fda_negative_loss"] = config.fda_negative_mult * negative
        return result

    def fda_temperature(self) -> float:
        """τ of FDA; in units of the spread of similarities over the scene unless it is to be taken as it stands."""
        unit = float(self.segmenter.spread) if self.config.fda_temperature_unit == "spread" else 1.0
        return self.config.fda_temperature * unit

    def get_image_metrics_and_images(self, outputs, batch) -> tuple[dict[str, float], dict[str, Tensor]]:
        metrics, images = super().get_image_metrics_and_images(outputs, batch)
        if math.isnan(metrics["lpips"]):
            del metrics["lpips"]
        if "segmentation" in outputs:
            photo = self.renderer_rgb.blend_background(batch["image"].to(self.device))
            images["segmentation"] = torch.cat([photo, outputs["segmentation"]], 1)
            if self.evaluator is not None:
                labels = self.segmenter.labels_of(outputs["segmentation"])
                self.evaluator.record(int(batch["image_idx"]), labels.cpu(), self.segmenter.prompts)
        return metrics, images


def rays_that_fit(config: OVS3DModelConfig, free: int) -> int:
    """Rays whose rendering takes at most half of `free` bytes: a power of two, 256 at least."""
    light, heavy = 256, 1024  # bytes of a proposal sample; of one with colour or semantics
    samples = config.num_nerf_samples_per_ray + config.semantic_samples
    per_ray = light * sum(config.num_proposal_samples_per_ray) + heavy * samples
    return 1 << max(8, int(math.log2(max(1, free / 2 / per_ray))))


def tcnn_imports() -> bool:
    """Whether tiny-cuda-nn is installed and works here."""
    from nerfstudio.utils.external import TCNN_EXISTS

    return bool(TCNN_EXISTS) and torch.cuda.is_available()


class _OptionalLpips(nn.Module):
    """LPIPS where its weights are on disk already; never a download, never needed for training."""

    def __init__(self, normalize: bool):
        super().__init__()
        self.normalize = normalize

    def forward(self, prediction: Float[Tensor, "1 3 H W"], truth: Float[Tensor, "1 3 H W"]) -> Float[Tensor, ""]:
        """LPIPS, or NaN without its weights."""
        if not (Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth").exists():
            return torch.tensor(torch.nan)
        from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

        return learned_perceptual_image_patch_similarity(prediction, truth, normalize=self.normalize)


@contextmanager
def _lpips_optional() -> Iterator[None]:
    """Nerfacto builds LPIPS whether it is used or not, and its constructor downloads AlexNet: offline it dies."""
    with mock.patch("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", _OptionalLpips):
        yield
