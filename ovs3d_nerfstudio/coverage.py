"""Where rays should start: what only one camera can see cannot be reconstructed, and invites floaters before the lens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

OTHERS = 2
"""Other cameras that must see a point before it counts as covered."""


def covered_depth(cameras: Cameras, most_cameras: int = 48, grid: int = 5) -> float | None:
    """Distance from the cameras, in scene units, at which their views begin to overlap; None when they never do.

    Along a grid of rays of every camera, the first of a range of depths at which `OTHERS` other cameras see the point;
    of these, the 10th percentile. Front-facing captures, whose cameras stand side by side, have it far from the lens;
    in a full turn it is small. Frusta are taken as pinhole: lens distortion moves their borders by little.
    """
    chosen = torch.linspace(0, len(cameras) - 1, min(most_cameras, len(cameras))).long()
    cameras = cameras[chosen].to("cpu")
    depths = torch.logspace(-2, 1.3, 60)
    share = (torch.arange(grid) + 0.5) / grid
    first = []
    for index in range(len(cameras)):
        size = torch.stack([cameras.height[index, 0], cameras.width[index, 0]])
        coords = torch.stack(torch.meshgrid(share, share, indexing="ij"), -1).reshape(-1, 2) * size
        rays = cameras.generate_rays(camera_indices=index, coords=coords)
        points = rays.origins[:, None] + rays.directions[:, None] * depths[:, None]
        covered = sees(cameras, points).sum(0) - 1 >= OTHERS
        ever = covered.any(-1)
        first.append(depths[covered.float().argmax(-1)][ever])
    starts = torch.cat(first)
    return float(torch.quantile(starts, 0.1)) if len(starts) else None


def sees(cameras: Cameras, points: Float[Tensor, "*n 3"]) -> Bool[Tensor, " N *n"]:
    """Whether each of N cameras has each point in its picture."""
    rotation, centre = cameras.camera_to_worlds[:, :, :3], cameras.camera_to_worlds[:, :, 3]
    flat = points.reshape(-1, 3)
    local = (flat[None] - centre[:, None]) @ rotation
    depth = -local[..., 2]
    x = cameras.fx * local[..., 0] / depth.clamp(min=1e-9) + cameras.cx
    y = -cameras.fy * local[..., 1] / depth.clamp(min=1e-9) + cameras.cy
    inside = (depth > 0) & (x >= 0) & (x < cameras.width) & (y >= 0) & (y < cameras.height)
    return inside.view(len(cameras), *points.shape[:-1])
