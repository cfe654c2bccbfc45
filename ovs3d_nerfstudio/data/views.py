"""Photos with known cameras as geometry needs them: pixels, what of them counts, and the way from pixels to rays and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from nerfstudio.cameras.cameras import Cameras, CameraType
from numpy import ndarray
from PIL import Image

from ovs3d_nerfstudio.gaussians.lenses import directions
from ovs3d_nerfstudio.pictures import open_picture

EDGE = 3
"""Pixels beside ignored ones that are ignored too: what is seen there is the edge of something that does not count."""


@dataclass(frozen=True)
class View:
    """A photo and its camera, which looks along its z axis with x to the right and y down. Pixel centres lie at halves."""

    pixels: UInt8[ndarray, "H W 3"]
    seen: Bool[ndarray, "H W"]
    """False where a mask or transparency says that nothing is to be learnt."""
    rotation: Float[ndarray, "3 3"]
    """From the world to the camera."""
    centre: Float[ndarray, "3"]
    focal: Float[ndarray, "2"]
    principal: Float[ndarray, "2"]
    """In pixels, of x and y."""
    distortion: Float[ndarray, "6"]
    """nerfstudio's order: k1, k2, k3, k4, p1, p2."""
    fisheye: bool

    @property
    def forward(self) -> Float[ndarray, "3"]:
        return self.rotation[2]

    @property
    def size(self) -> Float[ndarray, "2"]:
        """Width and height in pixels."""
        return np.array(self.pixels.shape[1::-1], float)

    def rays(self, pixels: Float[ndarray, "N 2"]) -> Float[ndarray, "N 3"]:
        """Unit vectors in the world along which pixels look: those of nerfstudio's cameras."""
        lens = (self.focal, self.principal, self.distortion, self.fisheye)
        return directions(pixels, *lens) @ self.rotation

    def project(self, points: Float[ndarray, "N 3"]) -> tuple[Float[ndarray, "N 2"], Float[ndarray, " N"]]:
        """Pixels and depths (along the axis) of world points; the pixels are NaN for what the picture cannot hold."""
        local = (points - self.centre) @ self.rotation.T
        depth, beside = local[:, 2], np.linalg.norm(local[:, :2], axis=-1)
        angle = np.arctan2(beside, depth)
        with np.errstate(divide="ignore", invalid="ignore"):
            flat = local[:, :2] * (angle / beside.clip(1e-12) if self.fisheye else 1 / depth)[:, None]
            # Beyond the corners' angle a polynomial may come back into the picture.
            flat[angle > self._reach] = np.nan
            x, y = flat.T
            k1, k2, k3, k4, p1, p2 = self.distortion
            r = x**2 + y**2
            radial = 1 + r * (k1 + r * (k2 + r * (k3 + r * k4)))
            x, y = (
                x * radial + 2 * p1 * x * y + p2 * (r + 2 * x**2),
                y * radial + 2 * p2 * x * y + p1 * (r + 2 * y**2),
            )
        return np.stack([x, y], -1) * self.focal + self.principal, depth

    def inside(self, pixels: Float[ndarray, "N 2"]) -> Bool[ndarray, " N"]:
        """Which pixels lie in the picture and count."""
        inside = ((pixels >= 0) & (pixels < self.size)).all(-1)
        x, y = np.where(inside[:, None], pixels, 0).astype(int).T
        return inside & self.seen[y, x]

    def colours(self, pixels: Float[ndarray, "N 2"]) -> UInt8[ndarray, "N 3"]:
        """Colours of pixels that are `inside`."""
        x, y = pixels.astype(int).T
        return self.pixels[y, x]

    def smaller(self, max_side: int) -> View:
        """The view with no side above `max_side` pixels."""
        factor = min(1.0, max_side / max(self.size))
        if factor == 1:
            return self
        width, height = (max(1, round(side * factor)) for side in self.size)
        scale = np.array([width, height]) / self.size
        seen = cv2.resize(self.seen.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
        pixels = cv2.resize(self.pixels, (width, height), interpolation=cv2.INTER_AREA)
        return replace(self, pixels=pixels, seen=seen, focal=self.focal * scale, principal=self.principal * scale)

    def border(self) -> Float[ndarray, "N 2"]:
        """Pixels all round the edge of the picture."""
        t = np.linspace(0, 1, 33)
        zero, one = np.zeros_like(t), np.ones_like(t)
        return np.concatenate([np.stack(side, -1) for side in ((t, zero), (t, one), (zero, t), (one, t))]) * self.size

    @cached_property
    def _reach(self) -> float:
        """The widest angle from the axis at which the picture sees, in radians."""
        return float(np.arccos((self.rays(self.border()) @ self.forward).clip(-1, 1)).max()) + 1e-6


def read_view(photo: Path, mask: Path | None, cameras: Cameras, index: int) -> View:
    """A photo and its camera, number `index` of `cameras`: perspective or fisheye.

    Raises PictureError when a file is no picture.
    """
    picture = open_picture(photo)
    alpha = picture.getchannel("A") if picture.mode == "RGBA" else Image.new("L", picture.size, 255)
    seen = np.asarray(alpha) > 127
    if mask is not None:
        seen = seen & (np.asarray(open_picture(mask).convert("L").resize(picture.size, Image.Resampling.NEAREST)) > 0)
    if not seen.all():
        seen = cv2.erode(seen.astype(np.uint8), np.ones((2 * EDGE + 1,) * 2, np.uint8)) > 0
    pose = cameras.camera_to_worlds[index].double().cpu().numpy()
    fx, fy, cx, cy, width, height = (
        float(getattr(cameras, name)[index]) for name in ("fx", "fy", "cx", "cy", "width", "height")
    )
    scale = np.array(picture.size) / (width, height)
    distortion = cameras.distortion_params
    return View(
        np.asarray(picture.convert("RGB")),
        seen,
        # nerfstudio's cameras have y up and look along −z.
        (pose[:, :3] * [1, -1, -1]).T,
        pose[:, 3],
        scale * (fx, fy),
        scale * (cx, cy),
        np.zeros(6) if distortion is None else distortion[index].double().cpu().numpy(),
        int(cameras.camera_type[index]) == CameraType.FISHEYE.value,
    )
