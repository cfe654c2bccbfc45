"""Gaussians: splatfacto's geometry and colour, and the semantic field asked at their centres and rasterised as channels.

Geometry comes first and stands still once the semantic losses begin: a step of theirs then costs what its windows do.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int16
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.models.splatfacto import RGB2SH, SplatfactoModel, SplatfactoModelConfig
from torch import Tensor

from ovs3d_nerfstudio.engine.option_checks import SHARE, SIZE, Range
from ovs3d_nerfstudio.features.teachers import Windows
from ovs3d_nerfstudio.fields.semantic_field import LInfContraction
from ovs3d_nerfstudio.gaussians.plan import Plan, Window, plan_views
from ovs3d_nerfstudio.gaussians.rasterization import harmonics, rasterization
from ovs3d_nerfstudio.models.lpips import lpips_optional
from ovs3d_nerfstudio.models.semantics import SemanticModel, SemanticModelConfig
from ovs3d_nerfstudio.prompts.answers import packed, unpacked
from ovs3d_nerfstudio.prompts.segmentation import in_parts

LEAST_ALPHA = 1e-3
"""What is composited is divided by the opacity of a pixel, or by this where there is hardly any."""
CLICK_FOCAL = 500.0
"""Focal length in pixels of the camera that looks along a ray: a pixel is as wide as in an ordinary view."""
FLIPPED = (1.0, -1.0, -1.0)
"""From nerfstudio's axes of a camera (y up, looking along −z) to gsplat's (y down, looking along z)."""


@dataclass
class OVS3DSplatModelConfig(SemanticModelConfig, SplatfactoModelConfig):
    """Splatfacto with a semantic field."""

    _target: type = field(default_factory=lambda: OVS3DSplatModel)

    RANGES: ClassVar[Mapping[str, Range]] = {
        **SemanticModelConfig.RANGES,
        "semantics_start": SIZE,
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
    def features_along(self, origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"]) -> dict:
        views = [self._looking(*ray) for ray in zip(origins, directions, strict=True)]
        with self.features_wanted():
            outputs = [self._view_outputs(view) for view in views]
        wanted = [name for name in ("depth", "directions", "scales") if name in outputs[0]]
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
        width, height = int(camera.width), int(camera.height)
        depth = self.config.output_depth_during_training
        render, alpha, self.info = rasterization(
            self.means,
            self.quats,
            self.scales.exp(),
            self.opacities.sigmoid().squeeze(-1),
            self._coefficients(None),
            view_matrix(pose),
            camera.get_intrinsics_matrices().to(self.device),
            width,
            height,
            packed=False,
            render_mode="RGB+ED" if depth else "RGB",
            sh_degree=self._sh_degree(),
            absgrad=self.strategy.absgrad,
            rasterize_mode=self.config.rasterize_mode,
        )
        camera.rescale_output_resolution(shrink)
        self.strategy.step_pre_backward(self.gauss_params, self.optimizers, self.strategy_state, self.step, self.info)
        background = self._get_background_color()
        return {
            "rgb": (render[0, ..., :3] + (1 - alpha[0]) * background).clamp(0, 1),
            "depth": render[0, ..., 3:] if depth else None,
            "accumulation": alpha[0],
            "background": background,
        }

    @torch.no_grad()
    def _view_outputs(self, camera: Cameras, semantics: bool = True) -> dict:
        """Colour, depth and, where they are wanted and there are some, all channels of the semantics in one go."""
        width, height = int(camera.width), int(camera.height)
        chosen = self._chosen()
        plan = self.plan_of(camera, chosen)
        seen = plan.gaussians if chosen is None else chosen[plan.gaussians]
        channels = [self._colors(seen, camera.camera_to_worlds[0, :, 3]), plan.visible(plan.depths[..., None])]
        semantics = semantics and self.segmenter.ready
        if semantics:
            coefficients, logits, _ = self.semantic_field(self.means[seen])
            channels += [coefficients, logits]
        render, alphas = plan.composite_visible(torch.cat(channels, -1))
        image, alpha = render[0], alphas[0]
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
        plans, places = [], []
        # What cameras are is known on the CPU, so that no window has the device waited for.
        poses = view_matrix(cameras.camera_to_worlds).to(self.device, non_blocking=True)
        intrinsics = cameras.get_intrinsics_matrices().to(self.device, non_blocking=True)
        sizes = torch.cat([cameras.width, cameras.height], -1).tolist()
        with torch.set_grad_enabled(not self.config.detach_density):
            for i, pixels in enumerate(windows.pixels.split(windows.side**2)):
                low, high = pixels[:, 1:].amin(0), pixels[:, 1:].amax(0)
                top, left, down, right = (int(edge) for edge in (*low, *high))
                window = (left, top, right - left + 1, down - top + 1)
                plans.append(self._plan(poses[i : i + 1], intrinsics[i : i + 1], (sizes[i][0], sizes[i][1]), window))
                places.append((pixels[:, 1] - top) * window[2] + pixels[:, 2] - left)
        coefficients, logits, saliency = self.semantic_field(
            self.means[torch.cat([plan.gaussians for plan in plans])].detach()
        )
        channels = torch.cat([coefficients, saliency * coefficients, logits], -1)
        rays = []
        parts = channels.split([len(plan.gaussians) for plan in plans])
        for plan, values, place in zip(plans, parts, places, strict=True):
            image, alpha = plan.composite_visible(values)
            there = (image / alpha.clamp(min=LEAST_ALPHA)).flatten(0, 2)
            rays.append(there[place.to(self.device, non_blocking=True)])
        dim, scales = self.semantic_field.dim, self.config.num_scales
        semantics = self.semantics_of(*torch.cat(rays).split([dim, dim, scales], -1))
        seen = semantics if windows.seen is None else semantics[windows.seen.flatten()]
        return {"semantics": seen, "window_semantics": semantics}

    def _plan(
        self,
        viewmat: Float[Tensor, "1 4 4"],
        intrinsics: Float[Tensor, "1 3 3"],
        size: tuple[int, int],
        window: Window | None = None,
        chosen: Int[Tensor, " m"] | None = None,
    ) -> Plan:
        """The Gaussians, or the chosen ones, as a camera whose pictures have `size` (width and height) sees them."""
        shape = (self.means, self.quats, self.scales.exp(), self.opacities.sigmoid().squeeze(-1))
        if chosen is not None:
            shape = tuple(part[chosen] for part in shape)
        mode = self.config.rasterize_mode
        return plan_views(*shape, viewmat, intrinsics, *size, rasterize_mode=mode, window=window)

    def plan_of(self, camera: Cameras, chosen: Int[Tensor, " m"] | None = None) -> Plan:
        """The Gaussians, or the chosen ones, as one camera sees them: what does not depend on what is composited."""
        intrinsics = camera.get_intrinsics_matrices().to(self.device)
        size = int(camera.width), int(camera.height)
        return self._plan(view_matrix(camera.camera_to_worlds), intrinsics, size, chosen=chosen)

    def _sh_degree(self) -> int | None:
        config = self.config
        return min(self.step // config.sh_degree_interval, config.sh_degree) if config.sh_degree > 0 else None

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


def view_matrix(poses: Float[Tensor, "c 3 4"]) -> Float[Tensor, "c 4 4"]:
    """World to camera in gsplat's axes, from nerfstudio's camera to world."""
    rotation = (poses[:, :3, :3] * poses.new_tensor(FLIPPED)).mT
    shift = -rotation @ poses[:, :3, 3:]
    return F.pad(torch.cat([rotation, shift], -1), (0, 0, 0, 1)) + poses.new_tensor([0.0, 0, 0, 1]).diag()
