"""What the training cameras see as depth along their axes, by pinhole cameras without distortion: what a fusion takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track
from torch import Tensor

from ovs3d_nerfstudio.fields.compositing import SOMETHING
from ovs3d_nerfstudio.gaussians.shown import view_matrix
from ovs3d_nerfstudio.memory import filled_in_chunks
from ovs3d_nerfstudio.models.nerf import OVS3DModel
from ovs3d_nerfstudio.models.splat import OVS3DSplatModel
from ovs3d_nerfstudio.pipeline import OVS3DPipeline

NERF_SIDE, SPLAT_SIDE = 240, 640
"""Longer side in pixels to which pictures are reduced by default: a NeRF's cost minutes on a CPU, Gaussians' seconds."""
MOST_PIXELS = 1e8
"""Of all pictures together, which are held at once."""
BETWEEN = 0.02
"""Pixels are of no surface when they are farther than this share of their depth from the nearest and the farthest pixel
around: at an edge, what is before and what is behind are mixed."""
SIDES = (0, 90, 180, 270)
"""What is looked at of a panorama as pinhole pictures: its sides, by their turn about its upward axis in degrees."""


@dataclass
class DepthView:
    """What one pinhole camera sees, in the model's units."""

    depth: Float[np.ndarray, "h w"]
    """Along the camera's axis; 0 where there is no surface."""
    colors: UInt8[np.ndarray, "h w 3"]
    intrinsics: Float[np.ndarray, "3 3"]
    """The centre of the first pixel is 0, 0."""
    world_to_camera: Float[np.ndarray, "4 4"]
    """Of a camera that looks along z, y down."""

    def points(self, stride: int = 1) -> Float[np.ndarray, "n 3"]:
        """What every so manieth pixel of the rows and columns sees, in the model's frame."""
        rows, columns = (np.arange(0, size, stride) for size in self.depth.shape)
        x, y = np.meshgrid(columns, rows)
        depth = self.depth[::stride, ::stride].ravel()
        rays = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], -1) @ np.linalg.inv(self.intrinsics).T
        seen = depth > 0
        turn, shift = self.world_to_camera[:3, :3], self.world_to_camera[:3, 3]
        return (rays[seen] * depth[seen, None] - shift) @ turn

    def before(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
        """By how much points lie before what the view sees at their pixels, below 0 behind; not a number where it sees none."""
        x, y, z = self.world_to_camera[:3, :3] @ points.T + self.world_to_camera[:3, 3:]
        found = np.full(len(points), np.nan)
        ahead = np.flatnonzero(z > 0)
        pixels = self.intrinsics[:2] @ np.stack([x[ahead] / z[ahead], y[ahead] / z[ahead], np.ones(len(ahead))])
        height, width = self.depth.shape
        within = ((pixels > -0.5) & (pixels < np.array([[width], [height]]) - 0.5)).all(0)
        column, row = np.rint(pixels[:, within]).astype(int)
        depth = self.depth[row, column]
        found[ahead[within]] = np.where(depth > 0, depth - z[ahead[within]], np.nan)
        return found

    @property
    def place(self) -> Float[np.ndarray, "3"]:
        """Where the camera stands."""
        return -self.world_to_camera[:3, 3] @ self.world_to_camera[:3, :3]


@torch.no_grad()
def depth_views(pipeline: OVS3DPipeline, downscale: float | None) -> list[DepthView]:
    """The training cameras' views, one after the other, so that they may have any sizes.

    Args:
        downscale: how many times smaller than the photos; None takes `NERF_SIDE` or `SPLAT_SIDE`.
    """
    pipeline.eval()
    nerf = isinstance(pipeline.model, OVS3DModel)
    cameras = pipeline.datamanager.train_dataset.cameras
    longer = torch.maximum(cameras.width, cameras.height)
    shrink = downscale or max(1.0, float(longer.max()) / (NERF_SIDE if nerf else SPLAT_SIDE))
    pixels = float((cameras.width * cameras.height).sum()) / shrink**2
    shrink *= max(1.0, math.sqrt(pixels / MOST_PIXELS))
    pinholes = [pinhole for i in range(len(cameras)) for pinhole in _pinholes(cameras[i : i + 1], shrink)]
    sizes = sorted({f"{int(view.width)}×{int(view.height)}" for view in pinholes})
    said = ", ".join(sizes[:3]) + (", …" if len(sizes) > 3 else "")
    CONSOLE.print(f"Depth is rendered {shrink:.3g} times smaller than the photos, {said} pixels (--downscale).")
    render: Any = _along_rays if nerf else _of_gaussians
    return [
        _view(camera, *render(pipeline.model, camera.to(pipeline.device)))
        for camera in track(pinholes, "Rendering depth", console=CONSOLE)
    ]


def _pinholes(camera: Cameras, shrink: float) -> Iterator[Cameras]:
    """The same view without distortion; four sides of a panorama. A fisheye's has its focal length, and sees less."""
    width, height = (max(1, round(int(size) / shrink)) for size in (camera.width, camera.height))
    pose = camera.camera_to_worlds
    if int(camera.camera_type) == CameraType.EQUIRECTANGULAR.value:
        side = max(1, height // 2)
        for angle in map(math.radians, SIDES):
            sine, cosine = math.sin(angle), math.cos(angle)
            turn = pose.new_tensor([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
            turned = torch.cat([pose[..., :3] @ turn, pose[..., 3:]], -1)
            yield Cameras(turned, side / 2, side / 2, side / 2, side / 2, side, side)
        return
    across, down = width / int(camera.width), height / int(camera.height)
    focal, centre = (camera.fx * across, camera.fy * down), (camera.cx * across, camera.cy * down)
    yield Cameras(pose, float(focal[0]), float(focal[1]), float(centre[0]), float(centre[1]), width, height)


def _along_rays(model: OVS3DModel, camera: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """Depth along the axis, accumulation and colour of a NeRF's view: its depth is the median one along each ray."""
    rays = camera.generate_rays(0)
    axis = -camera.camera_to_worlds[0, :, 2]

    def render(start: int, stop: int) -> dict[str, Tensor]:
        part = rays.get_row_major_sliced_ray_bundle(start, stop)
        outputs = model(part, semantics=False)
        along = (part.directions * axis).sum(-1, keepdim=True)
        return {"z": outputs["depth"] * along} | {name: outputs[name] for name in ("accumulation", "rgb")}

    outputs = filled_in_chunks(len(rays), model.config.eval_num_rays_per_chunk, render, model.device)
    return tuple(outputs[name].view(*rays.shape, -1) for name in ("z", "accumulation", "rgb"))  # type: ignore[return-value]


def _of_gaussians(model: OVS3DSplatModel, camera: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """The same of Gaussians, whose depth is along the axis: the mean by what each adds to the pixel."""
    outputs = model(camera, semantics=False)
    return outputs["depth"], outputs["accumulation"], outputs["rgb"]


def _view(camera: Cameras, depth: Tensor, accumulation: Tensor, rgb: Tensor) -> DepthView:
    depth = torch.where((accumulation > SOMETHING) & depth.isfinite(), depth, 0)[..., 0].float()
    intrinsics = camera.get_intrinsics_matrices()[0].cpu().double().numpy()
    intrinsics[:2, 2] -= 0.5
    return DepthView(
        (depth * ~mixed(depth)).cpu().numpy(),
        (rgb.clamp(0, 1) * 255).byte().cpu().numpy(),
        intrinsics,
        view_matrix(camera.camera_to_worlds)[0].cpu().double().numpy(),
    )


def mixed(depth: Float[Tensor, "h w"]) -> Tensor:
    """Whether a pixel lies between what is before and behind it, and so on neither."""
    nearest = -F.max_pool2d(-depth[None], 3, 1, 1)[0]
    farthest = F.max_pool2d(depth[None], 3, 1, 1)[0]
    apart = BETWEEN * depth
    return (depth - nearest > apart) & (farthest - depth > apart)
