"""How far rays go: the points found in the photos, each along the rays in which it was seen.

A field starts as fog, and what it is taught by colours alone may settle far from its place: behind a striped table stripes
look as well, and what is near a camera is seen by few. A few hundred steps in which some rays are told where they end decide
that before the photos do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from ovs3d_nerfstudio.data.seeds import FEWEST, Seeds, found_points, unfit


@dataclass(frozen=True)
class Sightings:
    """Pixels of the training photos in which points were found."""

    pixels: Int[Tensor, "N 3"]
    """View, row and column, on the CPU."""
    distances: Float[Tensor, " N"]
    """From the camera to the point, in the training frame."""
    colors: Float[Tensor, "N 3"]
    """Of the points, in [0, 1]; where photos are, on the CPU."""

    def __len__(self) -> int:
        return len(self.distances)

    def draw(self, count: int) -> Sightings:
        """Some at random."""
        # On the CPU: the same whatever the device, which is not waited for.
        drawn = torch.randint(len(self), (count,))
        distances = self.distances[drawn.to(self.distances.device, non_blocking=True)]
        return Sightings(self.pixels[drawn], distances, self.colors[drawn])


def find_sightings(
    image_filenames: Sequence[Path],
    mask_filenames: Sequence[Path] | None,
    cameras: Cameras,
    cache_dir: Path,
    console: Console,
    device: torch.device | str,
) -> Sightings | None:
    """The sightings of the training photos, found now or by whoever asked before; None where there are too few to rely on, or
    the cameras are none that points are found with. Says which.

    Args:
        cameras: in the size in which the photos are trained on.

    Raises PictureError for a photo, CacheError for the cache.
    """
    if unfit(cameras):
        console.print("The photos are no pinhole's or fisheye's, so geometry begins without points found in them.")
        return None
    seeds = found_points(image_filenames, mask_filenames, cameras, cache_dir, console)
    points = len(np.unique(seeds.point))
    if points < FEWEST:
        console.print(f"Only {points} points were found in the photos, so geometry begins without them.")
        return None
    sightings = sightings_of(seeds, cameras, device)
    console.print(
        escape(
            f"{points:,} points found in the photos say where {len(sightings):,} rays end, for geometry to begin there."
        )
    )
    return sightings


def sightings_of(seeds: Seeds, cameras: Cameras, device: torch.device | str) -> Sightings:
    """Those of the points in the photos that they were found in."""
    view, point = torch.from_numpy(seeds.view).long(), torch.from_numpy(seeds.point).long()
    sizes = torch.cat([cameras.width, cameras.height], -1).cpu()[view]
    columns, rows = (torch.from_numpy(seeds.place) * sizes).long().minimum(sizes - 1).clamp(min=0).unbind(-1)
    way = torch.from_numpy(seeds.positions)[point] - cameras.camera_to_worlds[:, :3, 3].cpu()[view]
    colors = torch.from_numpy(seeds.colors)[point].float() / 255
    return Sightings(torch.stack([view, rows, columns], -1), way.norm(dim=-1).to(device), colors)
