"""What every geometry shares: the semantic field and what is made of it, whatever says where a pixel's weight lies.

A geometry joins by handing over, for each pixel, positions and weights (`composited`) or channels that it has composited
itself (`Semantics.of_channels`); the losses, the pictures and the metrics of a view are the same for all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.field_components.spatial_distortions import SpatialDistortion
from nerfstudio.models.base_model import Model
from torch import Tensor, nn

from ovs3d_nerfstudio.engine.option_checks import COUNT, POSITIVE, SHARE, SIZE, Range
from ovs3d_nerfstudio.features.teachers import Windows
from ovs3d_nerfstudio.fields.compositing import SOMETHING, Semantics, composite
from ovs3d_nerfstudio.fields.semantic_field import SemanticField
from ovs3d_nerfstudio.losses import color, paper, patches
from ovs3d_nerfstudio.losses.apart import told_apart
from ovs3d_nerfstudio.losses.mixing import PatchMixture
from ovs3d_nerfstudio.precision import single_precision
from ovs3d_nerfstudio.prompts.answers import Answering, Answers, Question
from ovs3d_nerfstudio.prompts.segmentation import ClassScores, Segmenter, stretched


@dataclass
class SemanticModelConfig:
    """The semantic field, its losses and their schedule, beside whatever a geometry has."""

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
    fda_divergence: paper.Divergence = "js"
    """js as in the paper, or kl as in the authors' code."""
    fda_rebalance: bool = True
    """Divide each part of FDA by its own count of pairs (3D-OVS §3.3)."""
    fda_apart_start: int | None = None
    """Step from which on unlike pairs weigh by how probably the two are of different classes already, and by how their colours differ,
    brightness apart; None: never, as in the paper. Before classes have settled it would tear them."""
    fda_apart_gain: float = 3.0
    """How many times the weight of FDA's negative part is from `fda_apart_start` on."""
    fda_pairs: int = 16384
    """Pairs drawn in each window; memory of FDA is windows × pairs × classes."""
    class_scores: ClassScores = "cosine"
    """What classes are compared by: cosines (3D-OVS); centred cosines, less the middle of each prompt's range over the scene;
    relevancies, which are cosines stretched by that range; or auto: centred cosines where a prompt would lose its own place to others,
    else cosines."""
    overlay_opacity: float = 0.6
    """Opacity of the segmentation over the photo in `segmentation_overlay`."""
    learned_scales: bool = True
    """Select scales by the learned scale logits; otherwise all scales weigh the same."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "num_scales": SIZE,
        "basis_dim": COUNT,
        "basis_energy": Range(0, 1, closed=False),
        "semantic_samples": SIZE,
        "semantic_levels": SIZE,
        "semantic_base_res": SIZE,
        "semantic_max_res": SIZE,
        "semantic_log2_hashmap_size": Range(1, 30),
        "semantic_features_per_level": SIZE,
        "semantic_hidden_dim": COUNT,
        "semantics_start": COUNT,
        "fda_start": COUNT,
        "fda_apart_start": COUNT,
        "fda_apart_gain": COUNT,
        "feature_loss_mult": COUNT,
        "patch_loss_mult": COUNT,
        "unmixing_loss_mult": COUNT,
        "color_loss_mult": COUNT,
        "color_bandwidth": POSITIVE,
        "unmixing_temperature": POSITIVE,
        "rda_loss_mult": COUNT,
        "fda_positive_mult": COUNT,
        "fda_negative_mult": COUNT,
        "fda_temperature": POSITIVE,
        "fda_shift": Range(-1, 1),
        "fda_pairs": SIZE,
        "overlay_opacity": SHARE,
    }
    """What each number may be."""
    SEVERAL_PROCESSES: ClassVar[bool] = True
    """Whether the processes of several devices can train it together."""
    MIXED_PRECISION: ClassVar[bool] = True
    """Whether it can be trained in half precision."""

    @property
    def refines(self) -> bool:
        """Whether a loss on the classes of windows takes part."""
        return any((self.unmixing_loss_mult, self.color_loss_mult, self.fda_positive_mult, self.fda_negative_mult))


class LabelReader(Protocol):
    """What the labels of evaluated views are reported to."""

    def record(self, image_idx: int, labels: Int[Tensor, "H W"], prompts: Sequence[str]) -> None: ...


class SemanticModel(Model):
    """A nerfstudio model with a semantic field; stands before the model of a geometry in the order of bases."""

    config: Any
    """Of the geometry, and a SemanticModelConfig."""
    evaluator: LabelReader | None = None
    """Set by the pipeline where the data has masks."""
    remarks: Sequence[str] = ()
    """What was chosen for the data, in sentences for the log."""
    batches: int = 0
    """Batches trained on by this object: tells whether a view kept by the viewer is of today's weights."""

    def populate_semantics(self, spatial_distortion: SpatialDistortion | None, implementation: str) -> None:
        """Builds what is learned of semantics; called once the geometry stands."""
        config = self.config
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
            spatial_distortion=spatial_distortion,
            implementation=implementation,
        )
        # What the current call is about: one for each thread, as the viewer renders in threads of its own.
        self._call = threading.local()
        self.segmenter = Segmenter()
        if config.class_scores != "auto":
            self.segmenter.scores = config.class_scores
        self.mixture = PatchMixture()

    def get_param_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = super().get_param_groups()  # type: ignore[safe-super]
        groups["semantic_grid"] = list(self.semantic_field.grid.parameters())
        groups["semantic_head"] = [*self.semantic_field.hidden.parameters(), *self.semantic_field.last.parameters()]
        groups["patch_mixture"] = list(self.mixture.parameters())
        return groups

    def step_state(self) -> Any:
        """What the next step depends on beside parameters and buffers; plain values and tensors, for the checkpoint."""
        return None

    def load_step_state(self, state: Any) -> None:
        """Takes up what `step_state` returned."""

    def photo_of(self, image: Float[Tensor, "H W c"]) -> Float[Tensor, "H W 3"]:
        """A photo as this model would render it: transparent pixels show its background."""
        raise NotImplementedError

    # What a view is asked for.

    @torch.no_grad()
    def get_features_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict:
        """As `get_outputs_for_camera`, with features in place of pictures (see `shown`); directions may be `packed`."""
        with self.features_wanted():
            return self.get_outputs_for_camera(camera, obb_box)

    def features_along(
        self, origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"], box: OrientedBox | None = None
    ) -> dict:
        """What rays (with unit directions) meet in evaluation, inside a box alone if one is given: `depth` (R×1, distance along
        the ray) and, once there are features, `directions` and `scales` (see `shown`)."""
        raise NotImplementedError

    @contextmanager
    def features_wanted(self) -> Iterator[None]:
        """This thread's renders give features in place of pictures."""
        try:
            self._call.features = True
            yield
        finally:
            self._call.features = False

    @contextmanager
    def hiding(self, question: Question | None) -> Iterator[None]:
        """This thread's renders leave out what `question` does not show, as if it were not there, and answer it."""
        try:
            self._call.question = question
            yield
        finally:
            self._call.question = None

    @property
    def hider(self) -> Question | None:
        """The question that has something hidden in this thread's renders."""
        question = getattr(self._call, "question", None)
        return question if question is not None and question.kept is not None and not self.training else None

    def state_of_weights(self) -> Hashable:
        """Equal as long as no weight has changed."""
        # torch counts the writes into a parameter, though not those of fused optimizers, which `batches` tells of.
        weights = tuple((parameter.data_ptr(), parameter._version) for parameter in self.parameters())
        return weights, self.batches, self.segmenter.ready

    def shown(
        self, semantics: Semantics, rgb: Float[Tensor, "*R 3"], accumulation: Float[Tensor, "*R 1"]
    ) -> dict[str, Tensor]:
        """The outputs that are made of rendered semantics: pictures that a person looks at (see `Answers`); or, where features
        are wanted, `directions` (normalised coefficients, R×K) and `scales` (R×S), which stay whatever the prompts are. Both
        are zeros where there is nothing, so that nothing has no class, whoever asks."""
        there = accumulation >= SOMETHING
        directions = torch.where(there, F.normalize(semantics.coefficients, dim=-1), 0)
        scales = torch.where(there, semantics.scales, 0)
        if getattr(self._call, "features", False):
            return {"directions": directions, "scales": scales}
        question = self.hider or Question(self.segmenter, Answering(opacity=self.config.overlay_opacity))
        return dict(Answers(question, directions, scales, rgb))

    def labels_in(self, outputs: Mapping[str, Tensor]) -> Int[Tensor, "*R"]:
        """The prompt of each pixel of rendered outputs; −1 where there is nothing, so that what is missing counts as wrong."""
        labels = self.segmenter.labels_of(outputs["segmentation"])
        return torch.where(outputs["accumulation"][..., 0] >= SOMETHING, labels, -1)

    # From a geometry to semantics.

    def composited(self, positions: Float[Tensor, "*R k 3"], weights: Float[Tensor, "*R k 1"]) -> Semantics:
        """Composites the semantic field over the given samples of each ray."""
        coefficients, logits, saliency = self.semantic_field(positions)
        return self.semantics_of(
            composite(coefficients, weights), composite(saliency * coefficients, weights), composite(logits, weights)
        )

    def semantics_of(
        self, coefficients: Float[Tensor, "*R K"], salient: Float[Tensor, "*R K"], logits: Float[Tensor, "*R S"]
    ) -> Semantics:
        """The semantics of rays along which coefficients, salient coefficients and scale logits have been composited."""
        scales = logits.softmax(-1)
        if not self.config.learned_scales:
            scales = torch.full_like(scales, 1 / scales.shape[-1])
        return Semantics(coefficients, salient, scales)

    def class_scores(self, coefficients: Float[Tensor, "*n K"]) -> Float[Tensor, "*n C"]:
        """What the argmax over classes is taken of, see `Segmenter.class_scores`."""
        return self.segmenter.class_scores(self.segmenter.similarities(coefficients))

    # Losses and metrics.

    def get_loss_dict(self, outputs, batch, metrics_dict=None) -> dict[str, Tensor]:
        colored = "rgb" in outputs  # a step may be about semantics alone
        loss_dict = super().get_loss_dict(outputs, batch, metrics_dict) if colored else {}  # type: ignore[safe-super]
        if "teachers" in batch:
            # In single precision: half of it holds a cosine to three digits, and no salient feature beyond 65 504.
            with single_precision():
                loss_dict |= self.semantic_losses(outputs, batch)
        return loss_dict

    def semantic_losses(self, outputs: dict, batch: dict) -> dict[str, Tensor]:
        """Feature loss, RDA and FDA (3D-OVS §3.2–3.3), the patch and the unmixing loss, each times its weight."""
        config, segmenter = self.config, self.segmenter
        teachers = F.normalize(batch["teachers"], dim=-1)
        rays: Semantics = outputs["semantics"]
        target = (rays.scales[..., None] * teachers).sum(-2)
        result = {"feature_loss": config.feature_loss_mult * paper.cosine_loss(rays.coefficients, target)}
        scores = None
        if segmenter.prompts and config.rda_loss_mult:
            similarities = segmenter.similarities(teachers)
            if config.rda_range == "scene":
                relevancies = segmenter.relevancies(similarities)
            else:
                relevancies = stretched(similarities, *batch["ranges"].unbind(-2))
            scores = self.class_scores(rays.coefficients)
            relevancy = (rays.scales[..., None] * relevancies).sum(-2)
            result["rda_loss"] = config.rda_loss_mult * paper.rda_loss(scores, relevancy)
        windows: Windows | None = batch.get("windows")
        if windows is None:
            return result
        semantics: Semantics = outputs["window_semantics"]
        if not batch["class_losses"]:
            scores = None
        elif scores is None or semantics is not rays:
            scores = self.class_scores(semantics.coefficients)
        if config.patch_loss_mult or config.unmixing_loss_mult:
            answers = [semantics.salient]
            if scores is not None and config.unmixing_loss_mult:
                p = (scores / (config.unmixing_temperature * segmenter.spread)).softmax(-1)
                answers.append(self.mixture.rays(p))
            free, *mixed = patches.patch_distances(answers, windows, self.mixture.aperture)
            result["patch_loss"] = config.patch_loss_mult * patches.patch_loss(free)
            for distances in mixed:
                result["unmixing_loss"] = config.unmixing_loss_mult * patches.unmixing_loss(distances, free)
        if scores is None:
            return result
        tokens = windows.tokens
        log_p = (scores / self.fda_temperature()).log_softmax(-1).view(*tokens.shape[:2], -1)
        if config.color_loss_mult:
            assert windows.colors is not None, "the pipeline asks for them"
            alike = color.color_loss(log_p, windows.colors, config.color_bandwidth, windows.seen)
            result["color_loss"] = config.color_loss_mult * alike
        if config.fda_positive_mult or config.fda_negative_mult:
            pairs = paper.sample_pairs(len(tokens), tokens.shape[1], config.fda_pairs, tokens.device)
            apart = None
            if batch["told_apart"]:
                assert windows.colors is not None, "the pipeline asks for them"
                apart = config.fda_apart_gain * told_apart(log_p, windows.colors, pairs, config.color_bandwidth)
            positive, negative = paper.fda_loss(
                log_p,
                tokens,
                pairs,
                config.fda_shift,
                config.fda_divergence,
                config.fda_rebalance,
                windows.seen,
                apart,
            )
            result["fda_positive_loss"] = config.fda_positive_mult * positive
            result["fda_negative_loss"] = config.fda_negative_mult * negative
        return result

    def fda_temperature(self) -> Float[Tensor, ""] | float:
        """τ of FDA; in units of the spread of similarities over the scene unless it is to be taken as it stands."""
        unit = self.segmenter.spread if self.config.fda_temperature_unit == "spread" else 1.0
        return self.config.fda_temperature * unit

    def get_image_metrics_and_images(self, outputs, batch) -> tuple[dict[str, float], dict[str, Tensor]]:
        metrics, images = super().get_image_metrics_and_images(outputs, batch)  # type: ignore[safe-super]
        if math.isnan(metrics["lpips"]):
            del metrics["lpips"]
        if "segmentation" in outputs:
            photo = self.photo_of(batch["image"].to(self.device))
            images["segmentation"] = torch.cat([photo, outputs["segmentation"]], 1)
            if self.evaluator is not None:
                labels = self.labels_in(outputs)
                self.evaluator.record(int(batch["image_idx"]), labels.cpu(), self.segmenter.prompts)
        return metrics, images
