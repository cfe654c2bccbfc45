"""Where Gaussians begin: how many points are found in a scene's photos, how long it takes and how near the surfaces they lie.

    python benchmarks/seeds.py SCENE…

Prints one Markdown table. Scenes with a folder `depth` (pictures of 16 bits in steps of 0.1 mm along the viewing axis, named
as the photos) have errors too. In a view, a point's error is how far it lies off the surface at its pixel, or one beside it,
as a share of the surface's distance; behind is positive. What is hidden from some views lies behind in those and nowhere
before, so a point's error is the least of its errors in all views: of a true point 0, of one that floats far below. The
random points are those that would begin where nothing is found.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from rich.console import Console

from ovs3d_nerfstudio.data.seeds import RANDOM, depth_range, random_points, seed_points
from ovs3d_nerfstudio.data.triangulation import NO_POINTS
from ovs3d_nerfstudio.data.views import View, read_view

UNIT = 1e-4
"""Metres a step of the depth pictures."""
HEADER = "| scene | points | seconds | median error | within 1 % | within 5 % | behind | before |\n" + "|---" * 8 + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="+", type=Path)
    rows = [row for scene in parser.parse_args().scenes for row in measure(scene)]
    print("\n".join([HEADER, *rows]))


def measure(scene: Path) -> list[str]:
    """The rows of a scene: points that are found, and random ones where the truth is known."""
    console = Console(stderr=True)
    outputs = NerfstudioDataParserConfig(data=scene).setup().get_dataparser_outputs("train")
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        seeds = seed_points(outputs, outputs.image_filenames, outputs.cameras, Path(cache), console)
        seconds = time.perf_counter() - start
    console.print(seeds.origin)
    views = [read_view(photo, None, outputs.cameras, i) for i, photo in enumerate(outputs.image_filenames)]
    rows = [(f"{scene.name}", seeds.positions, f"{seconds:.1f}")]
    if (scene / "depth").is_dir():
        chance, _ = random_points(views, depth_range(views, outputs.cameras, NO_POINTS), RANDOM)
        rows.append((f"{scene.name}, random points", chance, ""))
    depths = [read_depth(scene, photo.stem) * outputs.dataparser_scale for photo in outputs.image_filenames]
    return [
        f"| {name} | {len(points):,} | {took} | {judged(points.astype(float), views, depths)} |"
        for name, points, took in rows
    ]


def read_depth(scene: Path, stem: str) -> np.ndarray:
    """True depth of a view in the units of the data, NaN where there is none or it is not known."""
    path = scene / "depth" / f"{stem}.png"
    if not path.is_file():
        return np.full((1, 1), np.nan)
    steps = np.asarray(Image.open(path)).astype(float)
    return np.where(steps > 0, steps * UNIT, np.nan)


def judged(points: np.ndarray, views: list[View], depths: list[np.ndarray]) -> str:
    """The cells of the errors; dashes where no truth is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of points that no view sees
        errors = np.nanmin([errors_in(points, *both) for both in zip(views, depths, strict=True)], 0)
    errors = errors[np.isfinite(errors)]
    if not len(errors):
        return " | ".join("–" * 5)
    off = np.abs(errors)
    shares = ((off < 0.01).mean(), (off < 0.05).mean(), (errors > 0.05).mean(), (errors < -0.05).mean())
    return " | ".join([f"{np.median(off):.2%}", *(f"{share:.1%}" for share in shares)])


def errors_in(points: np.ndarray, view: View, depth: np.ndarray) -> np.ndarray:
    """The error of each point in a view, NaN where the view does not show its place."""
    pixels, distances = view.project(points)
    inside = view.inside(pixels)
    x, y = np.where(inside[:, None], pixels, 0).astype(int).T
    best = np.full(len(points), np.nan)
    for dy, dx in np.ndindex(3, 3):
        surface = depth[(y + dy - 1).clip(0, len(depth) - 1), (x + dx - 1).clip(0, depth.shape[1] - 1)]
        error = distances / surface - 1
        best = np.where(~(np.abs(error) >= np.abs(best)), error, best)
    return np.where(inside, best, np.nan)


if __name__ == "__main__":
    main()
