"""Scenes for the geometry benchmark that nobody chose anything on: the demo's blocks, captured and covered otherwise.

    python benchmarks/generated.py FOLDER
    python benchmarks/geometry.py --scene FOLDER/near-stripes --scene FOLDER/turn …

Makes one nerfstudio dataset with true depth for each entry of `SCENES` in FOLDER, and prints the command that measures all
of them. Equal arguments give equal files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from seeds import UNIT

from ovs3d_nerfstudio.demo.raycast import Box, Camera, Cylinder, Floor, Solid, Texture, cast, render
from ovs3d_nerfstudio.demo.scene import TARGET, blocks, demo_solids, direction, transforms

WIDTH, HEIGHT, FOCAL = 320, 240, 350.0
METRES = 0.5
"""Of a unit of the ray caster: depth pictures end at 6.5 m."""


@dataclass(frozen=True)
class Capture:
    """Where cameras stand: one after the other by azimuth, at heights and distances that never repeat."""

    azimuth: tuple[float, float] = (-46.0, 46.0)
    """Degrees right of the front."""
    elevation: tuple[float, float] = (25.0, 38.0)
    """Degrees above the target, as seen from it."""
    distance: tuple[float, float] = (3.4, 4.0)
    """From the target; negative: cameras stand in the middle and look outwards."""
    covered: Callable[[list[Solid]], list[Solid]] = list
    """What is done to the demo's solids."""

    def cameras(self, count: int, start: float) -> list[Camera]:
        """`count` of them; those of another `start` stand between them."""
        along = (np.arange(count) + start) / count
        up, out = ((np.arange(count) + start) * step % 1 for step in (0.618034, 0.754878))
        ranges = ((along, self.azimuth), (up, self.elevation), (out, self.distance))
        places = [low + share * (high - low) for share, (low, high) in ranges]
        return [self._camera(*place) for place in zip(*places, strict=True)]

    @staticmethod
    def _camera(azimuth: float, elevation: float, distance: float) -> Camera:
        away = direction(azimuth, elevation)
        eye = np.array(TARGET) + abs(distance) * away
        target = eye + away * (1, 1, -1) if distance < 0 else TARGET
        return Camera.looking_at(eye.tolist(), tuple(target), WIDTH, HEIGHT, FOCAL)


def drawn(solids: list[Solid], kind: type, picture: UInt8[ndarray, "h w 3"], tile: float) -> list[Solid]:
    """The solids, those of a kind covered with `picture`."""
    return [
        replace(solid, texture=Texture(picture), tile=(tile, tile)) if isinstance(solid, kind) else solid
        for solid in solids
    ]


def striped(solids: list[Solid]) -> list[Solid]:
    """A floor of stripes a tenth wide, dark and bright."""
    across = (np.arange(64) // 8 % 2)[None, :, None]
    picture = np.where(across, np.array([150, 105, 60]), np.array([45, 30, 20])) + np.zeros((64, 1, 1), int)
    return drawn(solids, Floor, picture.astype(np.uint8), 0.8)


def plain(solids: list[Solid]) -> list[Solid]:
    """A floor and boxes of one colour, hardly any texture."""
    grain = np.random.default_rng(0).normal(0, 1.5, (64, 64, 1))
    solids = drawn(solids, Floor, (grain + np.array([176, 170, 160])).astype(np.uint8), 1.0)
    return drawn(solids, Box, (grain + np.array([90, 120, 160])).astype(np.uint8), 1.0)


def walled(solids: list[Solid]) -> list[Solid]:
    """A wall around the middle, for cameras that go all the way round."""
    return [
        replace(solid, centre=(0.0, 0.0), radius=6.0) if isinstance(solid, Cylinder) and solid.hollow else solid
        for solid in solids
    ]


def around(solids: list[Solid]) -> list[Solid]:
    """The blocks along the wall, the middle free."""
    standing = blocks(solids)
    angles = np.linspace(0, 2 * np.pi, len(standing), endpoint=False)
    moved = [
        replace(solid, centre=(3 * np.sin(a), -3 * np.cos(a)))  # type: ignore[call-arg]
        for solid, a in zip(standing, angles, strict=True)
    ]
    return [*moved, *(solid for solid in walled(solids) if solid not in standing)]


SCENES = {
    "near-stripes": Capture(elevation=(18, 45), distance=(1.9, 3.0), covered=striped),
    "far-plain": Capture(azimuth=(-30, 30), distance=(4.2, 5.0), covered=lambda solids: plain(walled(solids))),
    "low": Capture(elevation=(4, 12)),
    "high": Capture(elevation=(50, 68), distance=(3.0, 3.6)),
    "turn": Capture(azimuth=(0, 360), elevation=(15, 40), covered=walled),
    "outwards": Capture(azimuth=(0, 360), elevation=(-6, 6), distance=(-0.8, -0.3), covered=around),
}


def make(folder: Path, capture: Capture, train: int, test: int) -> None:
    """Writes one scene of so many views to train with, and held out."""
    solids = capture.covered(demo_solids())
    cameras = {f"train_{i:02d}": camera for i, camera in enumerate(capture.cameras(train, 0.0))}
    cameras |= {f"test_{i:02d}": camera for i, camera in enumerate(capture.cameras(test, 0.5))}
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stem, camera in cameras.items():
        Image.fromarray(render(solids, camera)).save(folder / "images" / f"{stem}.png")
        steps = (cast(solids, camera)[1] * METRES / UNIT).round()
        Image.fromarray(np.where(steps < 2**16, steps, 0).astype(np.uint16)).save(folder / "depth" / f"{stem}.png")
    content = transforms(cameras)
    for frame in content["frames"]:
        pose = np.array(frame["transform_matrix"])
        pose[:3, 3] *= METRES
        frame["transform_matrix"] = pose.tolist()
    (folder / "transforms.json").write_text(json.dumps(content, indent=1) + "\n")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--views", type=int, nargs=2, default=(36, 6), help="to train with, and held out")
    arguments = parser.parse_args(words)
    folder = arguments.folder
    for name, capture in SCENES.items():
        make(folder / name, capture, *arguments.views)
    scenes = " ".join(f"--scene {folder / name}" for name in SCENES)
    print(f"python benchmarks/geometry.py {scenes} --seeds 0 1 2 3 4")


if __name__ == "__main__":
    main()
