"""The NeRF: nerfacto's colour and density, and where a ray's weight lies for the semantic field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components import renderers
from nerfstudio.model_components.scene_colliders import NearFarCollider
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.utils.math import intersect_obb
from torch import Tensor

from ovs3d_nerfstudio.data.capture import NERFACTO_NEAR, THIN_DENSITY
from ovs3d_nerfstudio.engine.option_checks import COUNT, POSITIVE, SIZE, Range
from ovs3d_nerfstudio.fields.compositing import top_samples
from ovs3d_nerfstudio.fields.hash_grid import FastHashEncoding, use_fast_hash_grids
from ovs3d_nerfstudio.fields.semantic_field import LInfContraction
from ovs3d_nerfstudio.losses.depth import depth_loss
from ovs3d_nerfstudio.memory import filled_in_chunks, free_memory
from ovs3d_nerfstudio.models.lpips import lpips_optional
from ovs3d_nerfstudio.models.semantics import SemanticModel, SemanticModelConfig
from ovs3d_nerfstudio.precision import single_precision
from ovs3d_nerfstudio.prompts.answers import packed
from ovs3d_nerfstudio.prompts.segmentation import in_parts

LEAST_DENSITY = 0.1
"""What is thinner, in the model's units, is air that a picture does not show: it is not asked whether it is hidden."""

MISSED = 1e9
"""Where nothing of a scene is, and rays begin that miss a crop box."""


@dataclass
class OVS3DModelConfig(SemanticModelConfig, NerfactoModelConfig):
    """Nerfacto with a semantic field."""

    _target: type = field(default_factory=lambda: OVS3DModel)
    implementation: Literal["auto", "tcnn", "torch"] = "auto"  # type: ignore[assignment]
    """Hash grids and networks: tiny-cuda-nn, or torch with our own fast grid; auto takes tiny-cuda-nn when it imports."""

    average_init_density: float | None = None  # type: ignore[assignment]
    """Density at the start. Default: by the capture (see `capture`), 0.3 from the front, about 1 all around."""
    near_plane: float | None = None  # type: ignore[assignment]
    """Where rays begin. Default: by the capture, nerfacto's 0.05 from the front, 0.4 of the way to the subject all around."""
    depth_loss_mult: float = 0.03
    """Weight of the depth loss in the first step: rays to points that were found in the photos end there."""
    opacity_loss_mult: float = 0.03
    """Weight of the opacity loss in the first step: the share of a ray that ends on nothing, in photos without transparency. Else
    what is plain or dark may stay transparent, as nerfacto paints a ray's last colour behind it."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        **SemanticModelConfig.RANGES,
        "depth_loss_mult": COUNT,
        "opacity_loss_mult": COUNT,
        "eval_num_rays_per_chunk": SIZE,
        "average_init_density": POSITIVE,
        "near_plane": COUNT,
    }


class OVS3DModel(SemanticModel, NerfactoModel):
    """Nerfacto with a semantic field, rendered with nerfacto's own weights."""

    config: OVS3DModelConfig

    def populate_modules(self) -> None:
        config = self.config
        if config.implementation == "auto":
            config.implementation = "tcnn" if tcnn_imports() else "torch"
        self._choose_start()
        with lpips_optional():
            super().populate_modules()  # type: ignore[no-untyped-call]
        # nerfstudio renders from the lens on, but what lies before the near plane was never trained.
        if isinstance(self.collider, NearFarCollider):
            self.collider.reset_near_plane = False
        if not config.disable_scene_contraction:
            for part in (self.field, *self.proposal_networks):
                part.spatial_distortion = LInfContraction()
        self.populate_semantics(self.field.spatial_distortion, config.implementation)
        if config.implementation == "torch":
            use_fast_hash_grids(self)
            needed = config.predict_normals or config.camera_optimizer.mode != "off"
            for module in self.modules():
                if isinstance(module, FastHashEncoding):
                    module.position_gradients = needed
        # What is hidden has no density, for the proposals neither: samples then lie on what is behind.
        self.density_fns = [self._thinned(density) for density in self.density_fns]
        get_density = self.field.get_density

        def thinned(samples: RaySamples) -> tuple[Tensor, Tensor]:
            density, embedding = get_density(samples)
            return self._without_hidden(density, samples.frustums.get_positions()), embedding

        self.field.get_density = thinned  # type: ignore[method-assign, assignment]
        # Corrected in half precision, rays of a 4K photo would miss their pixels by one.
        correct = self.camera_optimizer.apply_to_raybundle
        self.camera_optimizer.apply_to_raybundle = single_precision()(correct)  # type: ignore[method-assign]
        # Nerfacto keeps the samples and weights of its last pass to itself at test time.
        self.renderer_expected_depth.register_forward_pre_hook(
            lambda _module, _args, kwargs: setattr(self._call, "last_pass", kwargs), with_kwargs=True
        )

    def _choose_start(self) -> None:
        """Sets what the config leaves to the capture."""
        config = self.config
        capture = self.kwargs["metadata"].get("capture")  # none where no datamanager of ours made the model
        density, near = capture.start() if capture is not None else (THIN_DENSITY, NERFACTO_NEAR)
        given = config.average_init_density, config.near_plane
        config.average_init_density = density if given[0] is None else given[0]
        config.near_plane = near if given[1] is None else given[1]
        if capture is None:
            return
        self.remarks = capture.warnings(*given)
        if None in given:
            self.remarks = [
                *self.remarks,
                f"Captured {capture.described}: geometry starts with density "
                f"{config.average_init_density:.2g} from the near plane {config.near_plane:.2g} on. Choose otherwise with "
                "--pipeline.model.average-init-density and --pipeline.model.near-plane.",
            ]

    def photo_of(self, image: Float[Tensor, "H W c"]) -> Float[Tensor, "H W 3"]:
        return self.renderer_rgb.blend_background(image)

    def step_state(self) -> Any:
        return self.proposal_sampler._step, self.proposal_sampler._steps_since_update

    def load_step_state(self, state: Any) -> None:
        self.proposal_sampler._step, self.proposal_sampler._steps_since_update = state

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

    def get_loss_dict(self, outputs, batch, metrics_dict=None) -> dict[str, Tensor]:
        loss_dict = super().get_loss_dict(outputs, batch, metrics_dict)
        config, share = self.config, batch.get("start_share", 0.0)
        if "distances" in batch and config.depth_loss_mult:
            loss_dict["depth_loss"] = config.depth_loss_mult * share * self._depth_loss(outputs, batch["distances"])
        if share and config.opacity_loss_mult and batch["image"].shape[-1] == 3:
            loss_dict["opacity_loss"] = config.opacity_loss_mult * share * (1 - outputs["accumulation"]).mean()
        return loss_dict

    def _depth_loss(self, outputs: dict, distances: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Of the last rays, in the field and in the proposals, which decide where it is looked at."""
        told, losses = slice(-len(distances), None), []
        for weights, samples in zip(outputs["weights_list"], outputs["ray_samples_list"], strict=True):
            starts, ends = (edges[told, :, 0] for edges in (samples.frustums.starts, samples.frustums.ends))
            losses.append(depth_loss(weights[told, :, 0], starts, ends, distances))
        return torch.stack(losses).sum()

    def features_along(
        self, origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"], box: OrientedBox | None = None
    ) -> dict:
        rays = RayBundle(
            origins=origins,
            directions=directions,
            pixel_area=torch.full_like(origins[:, :1], 1e-6),
            camera_indices=torch.zeros_like(origins[:, :1], dtype=torch.long),
        )
        if box is not None:
            rays.nears, rays.fars = (end[:, None] for end in intersect_obb(origins, directions, box))
            cut_to_box(rays, self.config.near_plane or 0.0)
        with self.features_wanted():
            return self(rays)

    @torch.no_grad()
    def get_outputs_for_camera_ray_bundle(self, camera_ray_bundle: RayBundle) -> dict:
        """As nerfacto's, in chunks of `eval_num_rays_per_chunk` rays, or of fewer where memory is short; features are `packed`.

        Raises MemoryShortage where the picture itself does not fit.
        """
        if camera_ray_bundle.nears is not None:
            cut_to_box(camera_ray_bundle, self.config.near_plane or 0.0)
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
        # Behind what is hidden there may be nothing, which a NeRF paints with the colour of its last sample.
        hides = self.hider is not None and renderers.BACKGROUND_COLOR_OVERRIDE is None
        black = torch.zeros(3, device=ray_bundle.origins.device)
        with renderers.background_color_override_context(black) if hides else nullcontext():
            outputs = super().get_outputs(ray_bundle)
        samples = call.__dict__.pop("last_pass")
        if not call.semantics:
            return outputs
        positions, weights = self._heaviest(samples["ray_samples"], samples["weights"])
        if not self.training:
            semantics = self.composited(positions, weights)
            return outputs | self.shown(semantics, outputs["rgb"], outputs["accumulation"])
        if call.window_rays is None:
            return outputs | {"semantics": self.composited(positions, weights)}
        # One call of the semantic field for both: the gradient of its table is made once. The windows come second, as the
        # proposal sampler trains its networks on the first rays of a step.
        rays = len(positions)
        window_positions, window_weights = self._heaviest_of_windows(call.window_rays)
        semantics = self.composited(torch.cat([positions, window_positions]), torch.cat([weights, window_weights]))
        return outputs | {"semantics": semantics[:rays], "window_semantics": semantics[rays:]}

    def _thinned(self, density_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda positions: self._without_hidden(density_of(positions), positions)

    def _without_hidden(self, density: Float[Tensor, "*n 1"], positions: Float[Tensor, "*n 3"]) -> Tensor:
        """Densities, 0 where this thread's renders hide what is there."""
        question = self.hider
        if question is None:
            return density
        there = (density[..., 0] > LEAST_DENSITY).nonzero(
            as_tuple=True
        )  # most of space is empty, and need not be asked
        kept = in_parts(
            positions[there], lambda part: question.keeps(F.normalize(self.semantic_field(part)[0], dim=-1))
        )
        return density.index_put(there, density[there] * kept[:, None])

    def _heaviest(
        self, samples: RaySamples, weights: Float[Tensor, "*R n 1"]
    ) -> tuple[Float[Tensor, "*R k 3"], Float[Tensor, "*R k 1"]]:
        """Positions and weights of the samples at which semantics are looked up."""
        if self.config.detach_density:
            weights = weights.detach()
        return top_samples(samples.frustums.get_positions().detach(), weights, self.config.semantic_samples)

    def _heaviest_of_windows(self, rays: RayBundle) -> tuple[Float[Tensor, "n k 3"], Float[Tensor, "n k 1"]]:
        """As `_heaviest`, of rays that carry no colour: density only, and without gradients when it is detached."""
        if self.collider is not None:
            rays = self.collider(rays)
        with torch.set_grad_enabled(not self.config.detach_density):
            samples, _, _ = self.proposal_sampler(rays, density_fns=self.density_fns)
            density, _ = self.field.get_density(samples)
            return self._heaviest(samples, samples.get_weights(density))


def cut_to_box(rays: RayBundle, near_plane: float) -> None:
    """Mends rays that nerfstudio cut to a crop box. Those that miss it begin and end at 1e10, where positions are no numbers
    any more: they get no length, at the farthest end of the others. None begins before the near plane."""
    assert rays.nears is not None and rays.fars is not None
    missed = rays.nears >= MISSED
    farthest = torch.where(missed, near_plane, rays.fars).amax()
    rays.nears = torch.where(missed, farthest, rays.nears.clamp(min=near_plane))
    rays.fars = torch.where(missed, farthest, torch.maximum(rays.fars, rays.nears))


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
