"""Lenses: Gaussians are rasterised as a pinhole sees them, and a photo's own lens says where each of its pixels lies in that
picture. Photos thus keep their pixels, for features, masks and evaluation alike, whatever geometry is taught."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.cameras.camera_utils import radial_and_tangential_undistort
from nerfstudio.cameras.cameras import Cameras, CameraType
from numpy import ndarray
from torch import Tensor

from ovs3d_nerfstudio.errors import UserError

WIDEST = math.radians(70)
"""Angle from the axis up to which a lens is followed: the pinhole's picture would grow beyond all bounds towards 90°."""
KINDS = (CameraType.PERSPECTIVE.value, CameraType.FISHEYE.value)
"""What Gaussians are rendered with."""
KEPT = 8
"""Lenses that are kept: most scenes have one."""


class LensError(UserError):
    """Gaussians cannot be rendered with such a camera."""


@dataclass(frozen=True, eq=False)
class Lens:
    """How the picture of a lens follows from that of a pinhole at the same place."""

    focal: tuple[float, float]
    principal: tuple[float, float]
    size: tuple[int, int]
    """Of the pinhole's picture: in pixels, of x and y; as sharp in the middle as the lens's own."""
    places: Float[Tensor, "H W 2"]
    """Where each pixel of the lens's picture lies (x, y) in the pinhole's, whose first pixel has its centre at (0.5, 0.5)."""
    covered: Bool[Tensor, "H W"]
    """False where the lens sees farther from its axis than `WIDEST`: nothing is rendered there."""

    def intrinsics(self) -> Float[Tensor, "1 3 3"]:
        """The pinhole's matrix."""
        (fx, fy), (cx, cy) = self.focal, self.principal
        return torch.tensor([[[fx, 0, cx], [0, fy, cy], [0, 0, 1]]], device=self.places.device)

    def seen_through(self, picture: Float[Tensor, "h w x"]) -> Float[Tensor, "H W x"]:
        """The lens's picture, between the pixels of the pinhole's; 0 where nothing is covered."""
        grid = self.places / self.places.new_tensor(self.size) * 2 - 1
        bent = F.grid_sample(picture.movedim(-1, 0)[None], grid[None], padding_mode="border", align_corners=False)
        return bent[0].movedim(0, -1) * self.covered[..., None]


def has_lens(cameras: Cameras) -> bool:
    """Whether a pinhole's picture is not what some of the cameras take. Raises LensError for what is neither perspective nor
    fisheye."""
    kinds = set(cameras.camera_type.flatten().tolist())
    if strange := kinds.difference(KINDS):
        raise LensError(
            f"Gaussians are rendered with perspective and fisheye cameras, not with {CameraType(strange.pop()).name}; choose "
            "another camera type, or train a NeRF on such photos: ovs3d or ovs3d-lite."
        )
    bends = cameras.distortion_params
    return CameraType.FISHEYE.value in kinds or (bends is not None and bool(bends.any()))


def lens_of(camera: Cameras) -> Lens | None:
    """The lens of one camera, on its device; None for a pinhole. Raises LensError as `has_lens` does."""
    if not has_lens(camera):
        return None
    bends = camera.distortion_params
    distortion = (0.0,) * 6 if bends is None else tuple(bends.flatten().tolist())
    numbers = (float(getattr(camera, name)) for name in ("fx", "fy", "cx", "cy"))
    size = int(camera.width), int(camera.height)
    fisheye = int(camera.camera_type) == CameraType.FISHEYE.value
    return _lens(*numbers, *size, distortion, fisheye, str(camera.device))


def tangents_of(camera: Cameras) -> Float[Tensor, "H W 2"]:
    """x / z and y / z of what each pixel of one camera looks at, x to the right, y down and z along its axis."""
    lens = lens_of(camera)
    if lens is not None:
        places = lens.places
        focal, principal = places.new_tensor(lens.focal), places.new_tensor(lens.principal)
    else:
        rows, cols = (torch.arange(int(side), device=camera.device) + 0.5 for side in (camera.height, camera.width))
        places = torch.stack(torch.meshgrid(cols, rows, indexing="xy"), -1)
        focal, principal = (torch.cat([getattr(camera, n + axis).flatten() for axis in "xy"]) for n in ("f", "c"))
    return (places - principal) / focal


def directions(
    pixels: Float[ndarray, "N 2"],
    focal: Float[ndarray, "2"],
    principal: Float[ndarray, "2"],
    distortion: Float[ndarray, "6"],
    fisheye: bool,
) -> Float[ndarray, "N 3"]:
    """Unit vectors along which pixels of a camera look, x to the right, y down, z along its axis: those of nerfstudio's cameras.

    `distortion` has nerfstudio's order: k1, k2, k3, k4, p1, p2.
    """
    flat = (pixels - principal) / focal
    if distortion.any():
        # In double precision and to its end: nerfstudio's own rays stop a little earlier.
        flat = radial_and_tangential_undistort(torch.from_numpy(flat), torch.from_numpy(distortion)).numpy()
    radius = np.linalg.norm(flat, axis=-1, keepdims=True)
    if fisheye:
        angle = radius.clip(1e-12, math.pi)
        return np.concatenate([flat / radius.clip(1e-12) * np.sin(angle), np.cos(angle)], -1)
    return np.concatenate([flat, np.ones_like(radius)], -1) / np.sqrt(1 + radius**2)


@lru_cache(maxsize=KEPT)
def _lens(
    fx: float,
    fy: float,
    cx: float,
    cy: float,
    width: int,
    height: int,
    distortion: tuple[float, ...],
    fisheye: bool,
    device: str,
) -> Lens:
    centres = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1).reshape(-1, 2)
    local = directions(centres, np.array([fx, fy]), np.array([cx, cy]), np.array(distortion), fisheye)
    covered = local[:, 2] >= math.cos(WIDEST)
    if not covered.any():
        raise LensError(
            f"The lens with focal lengths {fx:g}, {fy:g} and distortion {distortion} sees nothing within 70° of its axis; check "
            "the intrinsics of the data."
        )
    beside = local[:, :2] / local[:, 2:].clip(math.cos(WIDEST)) * (fx, fy)
    low, high = beside[covered].min(0) - 0.5, beside[covered].max(0) + 0.5
    sides = np.ceil(high - low).astype(int).tolist()
    places = torch.from_numpy((beside - low).astype(np.float32)).view(height, width, 2)
    return Lens(
        (fx, fy),
        (float(-low[0]), float(-low[1])),
        (sides[0], sides[1]),
        places.to(device),
        torch.from_numpy(covered).view(height, width).to(device),
    )
