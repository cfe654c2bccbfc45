"""Gaussians: splatfacto's geometry and colour, and the semantic field asked at their centres and rasterised as channels.

Geometry comes first and stands still once the semantic losses begin: a step of theirs then costs what its windows do.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int16
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.model_components import renderers
from nerfstudio.models.splatfacto import RGB2SH, SplatfactoModel, SplatfactoModelConfig, num_sh_bases
from scipy.spatial import cKDTree
from torch import Tensor

from ovs3d_nerfstudio.engine.option_checks import SHARE, SIZE, Range
from ovs3d_nerfstudio.features.teachers import Windows
from ovs3d_nerfstudio.fields.semantic_field import LInfContraction
from ovs3d_nerfstudio.gaussians.lenses import Lens, lens_of
from ovs3d_nerfstudio.gaussians.plan import Plan, Window, plan_views
from ovs3d_nerfstudio.gaussians.rasterization import harmonics, rasterization
from ovs3d_nerfstudio.gaussians.shown import view_matrix
from ovs3d_nerfstudio.gaussians.splats import Splat
from ovs3d_nerfstudio.models.lpips import lpips_optional
from ovs3d_nerfstudio.models.semantics import SemanticModel, SemanticModelConfig
from ovs3d_nerfstudio.prompts.answers import packed, unpacked
from ovs3d_nerfstudio.prompts.segmentation import in_parts

LEAST_ALPHA = 1e-3
"""What is composited is divided by the opacity of a pixel, or by this where there is hardly any."""
CLICK_FOCAL = 500.0
"""Focal length in pixels of the camera that looks along a ray: a pixel is as wide as in an ordinary view."""


@dataclass
class OVS3DSplatModelConfig(SemanticModelConfig, SplatfactoModelConfig):
    """Splatfacto with a semantic field."""

    _target: type = field(default_factory=lambda: OVS3DSplatModel)
    init_from: Path | None = None
    """What training begins with: the PLY of a splat by any trainer, or a run of ours of either geometry (its folder or
    config.yml), whose semantics and prompts come along. Needed once: a checkpoint holds what was taken from it."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        **SemanticModelConfig.RANGES,
        "ssim_lambda": SHARE,
        "num_random": SIZE,
    }
    SEVERAL_PROCESSES: ClassVar[bool] = False
    MIXED_PRECISION: ClassVar[bool] = False


class OVS3DSplatModel(SemanticModel, SplatfactoModel):
    """Splatfacto with a semantic field, on any device (see `gaussians.rasterization`)."""

    config: OVS3DSplatModelConfig
    _known: tuple[Hashable, Tensor] | None = None
    """What `directions_of_gaussians` found, and for which weights."""

    def populate_modules(self) -> None:
        config = self.config
        seeds = self.seed_points
        if seeds is not None:
            self.seed_points = seeds[0], seeds[1][:0]  # nerfstudio puts colours on CUDA, present or not
        with lpips_optional():
            super().populate_modules()
        if seeds is not None and not config.random_init:
            colors = (seeds[1] / 255).clamp(1e-3, 1 - 1e-3)
            self.gauss_params["features_dc"].data = RGB2SH(colors) if config.sh_degree > 0 else torch.logit(colors)
        self.strategy.verbose = False
        self.populate_semantics(LInfContraction(), "torch")

    def photo_of(self, image: Float[Tensor, "H W c"]) -> Float[Tensor, "H W 3"]:
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        return self.composite_with_background(image, self.background_color.to(image))

    # What training begins with, where that is brought along (see `brought`).

    @property
    def splat(self) -> Splat:
        """The Gaussians as they are now, their colours as spherical harmonics."""
        parts = (self.means, self.scales, self.quats, self.opacities, self.shs_0, self.shs_rest)
        return Splat(*(part.detach() for part in parts))

    def begin_with(self, splat: Splat) -> None:
        """Takes up other Gaussians, in the model's frame. The parameters stay the objects that optimizers know."""
        config = self.config
        # Degree 0 is not harmonics to splatfacto, but colours behind a sigmoid, which does not reach all that a splat may have.
        config.sh_degree = max(1, config.sh_degree, splat.degree)
        wanted = num_sh_bases(config.sh_degree) - 1 - splat.rest.shape[1]
        self._take(replace(splat, rest=F.pad(splat.rest, (0, 0, 0, wanted))))

    def begin_at(self, points: Float[Tensor, "n 3"], colors: Float[Tensor, "n 3"]) -> None:
        """Begins at points with their colours in [0, 1], as splatfacto does: round, as wide as to the three nearest others."""
        config, count = self.config, len(points)
        places = points.cpu().numpy()
        distances = cKDTree(places).query(places, k=4)[0][:, 1:]  # the nearest is the point itself
        scales = torch.from_numpy(np.log(distances.mean(-1, keepdims=True).clip(1e-7))).float().expand(-1, 3)
        colors = colors.clamp(1e-3, 1 - 1e-3)
        base = RGB2SH(colors) if config.sh_degree > 0 else torch.logit(colors)
        quats = F.normalize(torch.randn(count, 4), dim=-1)
        rest = torch.zeros(count, num_sh_bases(config.sh_degree) - 1, 3)
        opacities = torch.logit(torch.full((count, 1), 0.1))
        self._take(Splat(points, scales, quats, opacities, base, rest))

    def _take(self, parts: Splat) -> None:
        """Has these very numbers for parameters."""
        names = {"base": "features_dc", "rest": "features_rest"}
        for name, value in vars(parts).items():
            parameter = self.gauss_params[names.get(name, name)]
            parameter.data = value.detach().to(self.device, torch.float32, copy=True).contiguous()

    # What a checkpoint holds beside parameters.

    def step_state(self) -> Any:
        return {name: value for name, value in self.strategy_state.items() if name != "scene_scale"}

    def load_step_state(self, state: Any) -> None:
        self.strategy_state |= {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in state.items()
        }

    def load_state_dict(self, dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As nerfstudio's, which takes up any number of Gaussians; but the parameters stay the objects that optimizers know."""
        for name, parameter in self.gauss_params.items():
            saved = dict.get(f"gauss_params.{name}")
            if saved is not None:
                parameter.data = torch.empty_like(saved, device=parameter.device)
                if name == "features_rest":  # what was brought along has as many as it had
                    self.config.sh_degree = math.isqrt(saved.shape[1] + 1) - 1
        return torch.nn.Module.load_state_dict(self, dict, **kwargs)

    def update_to_step(self, step: int) -> None:
        self.step = step

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        before, after = super().get_training_callbacks(training_callback_attributes)
        densify = after.func

        def while_it_moves(step: int) -> None:
            if step < self.config.semantics_start:
                densify(step)

        after.func = while_it_moves
        return [before, after]

    # Rendering.

    def forward(
        self,
        camera: Cameras,
        semantics: bool = True,
        windows: Windows | None = None,
        batch: dict | None = None,
    ):
        """Outputs of `camera`; or, with `windows`, the semantics of their pixels, `camera` being the camera of each.

        With a `batch` to learn from: the outputs, the losses and the metrics.
        """
        self.batches += self.training
        if windows is not None:
            outputs = self._outputs_of(windows, camera)
        else:
            outputs = self._training_outputs(camera) if self.training else self._view_outputs(camera, semantics)
        if batch is None:
            return outputs
        metrics = self.get_metrics_dict(outputs, batch) if windows is None else {}
        return outputs, self.get_loss_dict(outputs, batch, metrics), metrics

    def get_outputs(self, camera: Cameras) -> dict:
        """`rgb`, `depth` (along the camera's axis), `accumulation` and `background` of one camera; in evaluation what is made
        of semantics too (see `shown`)."""
        return self._training_outputs(camera) if self.training else self._view_outputs(camera)

    @torch.no_grad()
    def features_along(
        self, origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"], box: OrientedBox | None = None
    ) -> dict:
        self.set_crop(box)
        views = [self._looking(*ray) for ray in zip(origins, directions, strict=True)]
        with self.features_wanted():
            outputs = [self._view_outputs(view) for view in views]
        wanted = [name for name in ("depth", "accumulation", "directions", "scales") if name in outputs[0]]
        found = {name: torch.cat([output[name].flatten(0, 1) for output in outputs]) for name in wanted}
        return found | {"directions": unpacked(found["directions"])} if "directions" in found else found

    def _looking(self, origin: Float[Tensor, "3"], direction: Float[Tensor, "3"]) -> Cameras:
        """A camera of one pixel that looks along a ray."""
        axis = torch.eye(3, device=self.device)[direction.abs().argmin()]
        right = F.normalize(torch.linalg.cross(direction, axis), dim=0)
        pose = torch.stack([right, torch.linalg.cross(right, direction), -direction, origin], -1)
        return Cameras(pose[None], CLICK_FOCAL, CLICK_FOCAL, 0.5, 0.5, 1, 1).to(self.device)

    def _training_outputs(self, camera: Cameras) -> dict:
        """As splatfacto's, which says `.cuda()`."""
        shrink = self._get_downscale_factor()
        camera.rescale_output_resolution(1 / shrink)
        pose = self.camera_optimizer.apply_to_camera(camera)
        lens, size, intrinsics = self._seen_by(camera)
        depth = self.config.output_depth_during_training
        render, alpha, self.info = rasterization(
            self.means,
            self.quats,
            self.scales.exp(),
            self.opacities.sigmoid().squeeze(-1),
            self._coefficients(None),
            view_matrix(pose),
            intrinsics.to(self.device),
            *size,
            packed=False,
            render_mode="RGB+ED" if depth else "RGB",
            sh_degree=self._sh_degree(),
            absgrad=self.strategy.absgrad,
            rasterize_mode=self.config.rasterize_mode,
        )
        camera.rescale_output_resolution(shrink)
        self.strategy.step_pre_backward(self.gauss_params, self.optimizers, self.strategy_state, self.step, self.info)
        background = self._get_background_color()
        image, alpha = (part[0] if lens is None else lens.seen_through(part[0]) for part in (render, alpha))
        return {
            "rgb": (image[..., :3] + (1 - alpha) * background).clamp(0, 1),
            "depth": image[..., 3:] if depth else None,
            "accumulation": alpha,
            "background": background,
        }

    def _seen_by(self, camera: Cameras) -> tuple[Lens | None, tuple[int, int], Float[Tensor, "1 3 3"]]:
        """The lens of a camera, if it has one; width, height and matrix of the pinhole to rasterise for."""
        # Where no training photo has a lens, nothing is there to be looked at: a step waits for no device.
        lens = None if self.training and camera.distortion_params is None else lens_of(camera)
        if lens is not None:
            return lens, lens.size, lens.intrinsics()
        return None, (int(camera.width), int(camera.height)), camera.get_intrinsics_matrices()

    @torch.no_grad()
    def _view_outputs(self, camera: Cameras, semantics: bool = True) -> dict:
        """Colour, depth and, where they are wanted and there are some, all channels of the semantics in one go."""
        width, height = int(camera.width), int(camera.height)
        chosen = self._chosen()
        lens, size, intrinsics = self._seen_by(camera)
        plan = self._plan(view_matrix(camera.camera_to_worlds), intrinsics.to(self.device), size, chosen=chosen)
        seen = plan.gaussians if chosen is None else chosen[plan.gaussians]
        channels = [self._colors(seen, camera.camera_to_worlds[0, :, 3]), plan.visible(plan.depths[..., None])]
        semantics = semantics and self.segmenter.ready
        if semantics:
            coefficients, logits, _ = self.semantic_field(self.means[seen])
            channels += [coefficients, logits]
        render, alphas = plan.composite_visible(torch.cat(channels, -1))
        image, alpha = (part[0] if lens is None else lens.seen_through(part[0]) for part in (render, alphas))
        background = self._get_background_color()
        solid = alpha.clamp(min=LEAST_ALPHA)
        depth = image[..., 3:4] / solid
        depth = torch.where(alpha > 0, depth, depth.max())
        outputs = {
            "rgb": (image[..., :3] + (1 - alpha) * background).clamp(0, 1),
            "depth": depth,
            "accumulation": alpha,
            "background": background.expand(height, width, 3),
        }
        if not semantics:
            return outputs
        dim = self.semantic_field.dim
        coefficients = image[..., 4 : 4 + dim]  # of which only the direction counts
        rendered = self.semantics_of(coefficients, coefficients, image[..., 4 + dim :] / solid)
        shown = self.shown(rendered, outputs["rgb"], alpha)
        if "directions" in shown:
            shown["directions"] = packed(shown["directions"])
        return outputs | shown

    def get_rgba_image(self, outputs: dict[str, Tensor], output_name: str = "rgb") -> Float[Tensor, "H W 4"]:
        """The colour of what is there, without the background, and how much is there."""
        alpha = outputs["accumulation"]
        color = outputs[output_name] - (1 - alpha) * outputs["background"]
        return torch.cat([(color / alpha.clamp(min=LEAST_ALPHA)).clamp(0, 1), alpha], -1)

    def _get_background_color(self) -> Float[Tensor, "3"]:
        """As splatfacto's, which does not hear of the colour that a crop box brings along."""
        brought = renderers.BACKGROUND_COLOR_OVERRIDE
        return super()._get_background_color() if brought is None else brought.to(self.device)

    def _chosen(self) -> Int[Tensor, " m"] | None:
        """The Gaussians inside the crop box that this thread's renders do not hide; None for all."""
        inside = None if self.crop_box is None else self.crop_box.within(self.means).squeeze(-1)
        question = self.hider
        if question is not None:
            shown = in_parts(self.directions_of_gaussians(), lambda part: question.keeps(unpacked(part)))
            inside = shown if inside is None else inside & shown
        return None if inside is None else inside.nonzero()[:, 0]

    @torch.no_grad()
    def directions_of_gaussians(self) -> Int16[Tensor, "n K"]:
        """What the semantic field says at the centre of each Gaussian, normalised and `packed`; kept for the weights of now."""
        state = self.state_of_weights()
        if self._known is None or self._known[0] != state:
            directions = in_parts(self.means, lambda part: packed(F.normalize(self.semantic_field(part)[0], dim=-1)))
            self._known = state, directions
        return self._known[1]

    def _outputs_of(self, windows: Windows, cameras: Cameras) -> dict:
        """The semantics of each ray of the windows, composited over the Gaussians that meet a window; `cameras` on the CPU."""
        assert windows.pixels is not None, "windows are drawn on the CPU"
        poses = view_matrix(cameras.camera_to_worlds)
        seen_by = [self._seen_by(cameras[i : i + 1]) for i in range(len(cameras))]
        pixels = [part[:, 1:] for part in windows.pixels.split(windows.side**2)]
        pixels = [
            part if lens is None else lens.places[part[:, 0], part[:, 1]].flip(-1).long()
            for (lens, _, _), part in zip(seen_by, pixels, strict=True)
        ]
        # Windows of pictures of one size are seen at once.
        together: dict[tuple[int, int], list[int]] = {}
        for i, (_, size, _) in enumerate(seen_by):
            together.setdefault(size, []).append(i)
        plans, places = [], []
        for size, mine in together.items():
            corners = torch.stack([pixels[i].amin(0) for i in mine])
            ends = torch.stack([pixels[i].amax(0) for i in mine])
            down, across = ((ends - corners).amax(0) + 1).tolist()
            parts = [(left, top, across, down) for top, left in corners.tolist()]
            # What cameras are is known on the CPU, so that no window has the device waited for.
            pose = poses[mine].to(self.device, non_blocking=True)
            intrinsics = torch.cat([seen_by[i][2] for i in mine]).to(self.device, non_blocking=True)
            with torch.set_grad_enabled(not self.config.detach_density):
                plans.append(self._plan(pose, intrinsics, size, parts))
            place = torch.stack([pixels[i] for i in mine]) - corners[:, None]
            row = torch.arange(len(mine))[:, None] * down + place[..., 0]
            places.append((row * across + place[..., 1]).flatten().to(self.device, non_blocking=True))
        coefficients, logits, saliency = self.semantic_field(
            self.means[torch.cat([plan.gaussians for plan in plans])].detach()
        )
        channels = torch.cat([coefficients, saliency * coefficients, logits], -1)
        shares, rays = channels.split([len(plan.gaussians) for plan in plans]), []
        for plan, values, place in zip(plans, shares, places, strict=True):
            image, alpha = (part.flatten(0, 2).index_select(0, place) for part in plan.composite_visible(values))
            rays.extend((image / alpha.clamp(min=LEAST_ALPHA)).split(windows.side**2))
        order = [i for mine in together.values() for i in mine]
        rays = [rays[order.index(i)] for i in range(len(order))]
        dim, scales = self.semantic_field.dim, self.config.num_scales
        semantics = self.semantics_of(*torch.cat(rays).split([dim, dim, scales], -1))
        seen = semantics if windows.seen is None else semantics[windows.seen.flatten()]
        return {"semantics": seen, "window_semantics": semantics}

    def _plan(
        self,
        viewmats: Float[Tensor, "c 4 4"],
        intrinsics: Float[Tensor, "c 3 3"],
        size: tuple[int, int],
        windows: Sequence[Window] | None = None,
        chosen: Int[Tensor, " m"] | None = None,
    ) -> Plan:
        """The Gaussians, or the chosen ones, as cameras whose pictures have `size` (width and height) see them, or windows of these."""
        shape = (self.means, self.quats, self.scales.exp(), self.opacities.sigmoid().squeeze(-1))
        if chosen is not None:
            shape = tuple(part[chosen] for part in shape)
        mode = self.config.rasterize_mode
        return plan_views(*shape, viewmats, intrinsics, *size, rasterize_mode=mode, windows=windows)

    def _sh_degree(self) -> int | None:
        config = self.config
        if config.sh_degree == 0:
            return None
        known = config.sh_degree if config.init_from is not None else self.step // config.sh_degree_interval
        return min(known, config.sh_degree)

    def _coefficients(self, chosen: Int[Tensor, " m"] | None) -> Float[Tensor, "..."]:
        """Spherical harmonics of Gaussians, or their colours where there are none."""
        base, rest = self.features_dc, self.features_rest
        if chosen is not None:
            base, rest = base[chosen], rest[chosen]
        return torch.cat([base[:, None], rest], 1) if self.config.sh_degree > 0 else base.sigmoid()

    def _colors(self, seen: Int[Tensor, " m"], centre: Float[Tensor, "3"]) -> Float[Tensor, "m 3"]:
        """The colours of Gaussians as a camera at `centre` sees them."""
        coefficients, degree = self._coefficients(seen), self._sh_degree()
        if degree is None:
            return coefficients
        return harmonics(degree, self.means[seen] - centre, coefficients)
