"""The training camera that sees an object best, and the part of its picture where the object is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras

OCCLUDERS = 50_000
"""Most points that may hide an object."""
MEMBERS = 500
"""Most points by which an object is looked for."""
CAMERAS = 100
"""Most cameras that are tried, evenly chosen."""
CELLS = 64
"""Cells across a picture in which the nearest point hides what lies behind."""
BEHIND = 1.05
"""A point is hidden that lies so many times as far as the nearest of its cell."""
MARGIN = 0.15
"""Of the crop around an object, as a share of its longer side."""
EDGE = 0.01
"""Share of the points that a crop may leave out at each side."""
LONGER_SIDE = 256
"""Of a thumbnail, in pixels."""


@dataclass(frozen=True)
class Crop:
    """A camera of the model's frame, in the form that `Run.render_view` takes."""

    camera_to_world: Float[np.ndarray, "3 4"]
    intrinsics: Float[np.ndarray, "3 3"]
    size: tuple[int, int]


def crops(
    positions: Float[np.ndarray, "N 3"], objects: Sequence[Int[np.ndarray, " n"]], cameras: Cameras
) -> list[Crop | None]:
    """For each object, given by its members among `positions`, the crop of the camera that sees most of it at the largest; None
    where no camera sees it."""
    rng = np.random.default_rng(0)
    hiding = positions[_some(np.arange(len(positions)), OCCLUDERS, rng)]
    things = [positions[_some(members, MEMBERS, rng)] for members in objects]
    best: list[tuple[float, Crop | None]] = [(0.0, None)] * len(things)
    for index in np.unique(np.linspace(0, len(cameras) - 1, min(CAMERAS, len(cameras))).astype(int)):
        camera = _Pinhole(cameras, int(index))
        nearest = camera.nearest(hiding)
        for i, thing in enumerate(things):
            pixels, depth = camera.project(thing)
            seen = camera.inside(pixels, depth)
            seen[seen] = depth[seen] <= BEHIND * nearest[camera.cells(pixels[seen])]
            if not seen.any():
                continue
            low, high = np.quantile(pixels[seen], [EDGE, 1 - EDGE], axis=0)
            score = seen.mean() * np.sqrt(max(1.0, (high - low).prod()))
            if score > best[i][0]:
                best[i] = score, camera.crop(low, high)
    return [crop for _, crop in best]


def _some(chosen: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return chosen if len(chosen) <= most else rng.choice(chosen, most, replace=False)


class _Pinhole:
    """One of some cameras, without its lens."""

    def __init__(self, cameras: Cameras, index: int):
        self.pose = cameras.camera_to_worlds[index].double().cpu().numpy()
        self.focal, self.middle, self.size = (
            np.array([float(one[index]), float(other[index])])
            for one, other in ((cameras.fx, cameras.fy), (cameras.cx, cameras.cy), (cameras.width, cameras.height))
        )

    def project(self, points: Float[np.ndarray, "n 3"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
        """Column and row, and the depth along the axis."""
        there = (points - self.pose[:, 3]) @ self.pose[:, :3]
        depth = -there[:, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            return there[:, :2] * [1, -1] / depth[:, None] * self.focal + self.middle, depth

    def inside(self, pixels: Float[np.ndarray, "n 2"], depth: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return (depth > 0) & (pixels >= 0).all(-1) & (pixels < self.size).all(-1)

    def cells(self, pixels: Float[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
        """The cell of each pixel of the picture."""
        col, row = (pixels / self.size * CELLS).astype(int).T
        return row * CELLS + col

    def nearest(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " cells"]:
        """The depth of the nearest point of each cell."""
        pixels, depth = self.project(points)
        seen = self.inside(pixels, depth)
        found = np.full(CELLS * CELLS, np.inf)
        np.minimum.at(found, self.cells(pixels[seen]), depth[seen])
        return found

    def crop(self, low: Float[np.ndarray, " 2"], high: Float[np.ndarray, " 2"]) -> Crop:
        """The part of the picture between two pixels, with a margin, enlarged or reduced to the size of a thumbnail."""
        margin = MARGIN * max(8.0, float((high - low).max()))
        low, high = (low - margin).clip(0, self.size), (high + margin).clip(0, self.size)
        zoom = LONGER_SIDE / float((high - low).max())
        width, height = (max(1, round(float(edge))) for edge in (high - low) * zoom)
        focal, middle = self.focal * zoom, (self.middle - low) * zoom
        intrinsics = np.array([[focal[0], 0, middle[0]], [0, focal[1], middle[1]], [0, 0, 1]])
        return Crop(self.pose, intrinsics, (width, height))
