"""Where to look at a splat from when nobody says where its photos were taken: of many cameras around and inside it, those
that together see most of what there is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ovs3d_nerfstudio.gaussians.plan import plan_views
from ovs3d_nerfstudio.gaussians.shown import view_matrix
from ovs3d_nerfstudio.gaussians.splat_files import SplatError
from ovs3d_nerfstudio.gaussians.splats import Splat

AZIMUTHS, ELEVATIONS = 18, (0.0, 20.0, 45.0)
"""Directions from which cameras look at the middle, in degrees above the horizon."""
DISTANCES = (0.6, 1.0, 1.5, 2.4)
"""How far away, in units of the splat's radius."""
INSIDE = 0.3
"""How far from the middle cameras stand that look outwards."""
FIELD_OF_VIEW = 55.0
"""Degrees along the longer side of a picture."""
TRIED = (64, 48)
"""Width and height of the pictures that cameras are compared by."""
TRIED_GAUSSIANS = 40_000
"""At most, or comparing takes minutes."""
WANTED = 4.0
"""Views that should see a Gaussian: more of them count no further."""
CLEAR = 0.02
"""A Gaussian counts as seen by a view from this share of its picture on, less by less."""
LEAST_GAIN = 0.02
"""No further camera is taken that sees less than this share of what the first one does."""


@dataclass(frozen=True)
class Viewpoint:
    """A camera: from where, which way, and how much it adds."""

    pose: Float[Tensor, "3 4"]
    """Camera to world in nerfstudio's axes (y up, looking along −z)."""
    outwards: bool
    """Whether it stands in the middle."""


def viewpoints(splat: Splat, up: Float[Tensor, "3"], count: int) -> list[Viewpoint]:
    """At most `count` cameras, best first: each the one that adds most to what those before it see.

    What a camera adds is counted in Gaussians: each counts by how clearly it is seen, until `WANTED` views see it. A camera
    behind a wall sees the wall alone, and one in a fog the fog: both add little.

    Raises SplatError when no camera sees anything.
    """
    splat = _thinned(splat)
    candidates = _candidates(splat, up)
    seen = torch.stack([_seen(splat, candidate.pose) for candidate in candidates])
    left = torch.full_like(seen[0], WANTED)
    chosen: list[int] = []
    first = 0.0
    while len(chosen) < count:
        gains = torch.minimum(seen, left).sum(1)
        gains[chosen] = 0
        best = int(gains.argmax())
        gain = float(gains[best])
        first = first or gain
        if not gain > LEAST_GAIN * first:
            break
        chosen.append(best)
        left = (left - seen[best]).clamp(min=0)
    if not chosen:
        raise SplatError(
            f"No camera sees anything of this splat, whose most opaque Gaussian has an opacity of "
            f"{float(splat.opacities.max().sigmoid()):.2g}; export it again, or name another one."
        )
    return [candidates[i] for i in chosen]


def intrinsics(width: int, height: int) -> Float[Tensor, "3 3"]:
    """Of pictures of that size."""
    focal = max(width, height) / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def _thinned(splat: Splat) -> Splat:
    """Some of the Gaussians, wider, so that they fill as much."""
    count = len(splat.means)
    if count <= TRIED_GAUSSIANS:
        return splat
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:TRIED_GAUSSIANS]
    some = Splat(*(part[chosen] for part in vars(splat).values()))
    return replace(some, scales=some.scales + math.log(count / TRIED_GAUSSIANS) / 3)


def _candidates(splat: Splat, up: Float[Tensor, "3"]) -> list[Viewpoint]:
    weights = splat.opacities.sigmoid()[:, 0] > 0.1
    means = splat.means[weights] if weights.any() else splat.means
    centre = means.median(0).values
    radius = float((means - centre).norm(dim=-1).quantile(0.7)) if len(means) < 1 << 24 else 1.0
    up = F.normalize(up, dim=0)
    level = F.normalize(torch.linalg.cross(up, torch.eye(3)[up.abs().argmin()]), dim=0)
    side = torch.linalg.cross(up, level)
    found = []
    for azimuth in np.linspace(0, 2 * math.pi, AZIMUTHS, endpoint=False):
        around = math.cos(azimuth) * level + math.sin(azimuth) * side
        for elevation in np.radians(ELEVATIONS):
            away = math.cos(elevation) * around + math.sin(elevation) * up
            found += [Viewpoint(_looking(centre + d * radius * away, -away, up), False) for d in DISTANCES]
        found.append(Viewpoint(_looking(centre - INSIDE * radius * around, around, up), True))
    return found


def _looking(origin: Float[Tensor, "3"], forward: Float[Tensor, "3"], up: Float[Tensor, "3"]) -> Float[Tensor, "3 4"]:
    right = F.normalize(torch.linalg.cross(forward, up), dim=0)
    return torch.stack([right, torch.linalg.cross(right, forward), -forward, origin], -1)


def _seen(splat: Splat, pose: Float[Tensor, "3 4"]) -> Float[Tensor, " n"]:
    """How clearly a camera sees each Gaussian, in [0, 1]."""
    width, height = TRIED
    shape = (splat.means, splat.quats, splat.scales.exp(), splat.opacities.sigmoid()[:, 0])
    with torch.no_grad():
        plan = plan_views(
            *shape,
            view_matrix(pose[None]).to(splat.means),
            intrinsics(width, height)[None].to(splat.means),
            width,
            height,
        )
        pixels = plan.gather(splat.means.new_ones(1, height, width, 1))[:, 0]
    found = splat.means.new_zeros(len(splat.means))
    return found.index_add_(0, plan.gaussians, pixels).div(CLEAR).clamp(max=1)


def described(chosen: list[Viewpoint]) -> str:
    """How many cameras there are and where, for people."""
    inside = sum(view.outwards for view in chosen)
    positions = torch.stack([view.pose[:, 3] for view in chosen])
    ranges = zip("xyz", positions.amin(0).tolist(), positions.amax(0).tolist(), strict=True)
    box = ", ".join(f"{axis} from {low:.2g} to {high:.2g}" for axis, low, high in ranges)
    return f"{len(chosen)} cameras see most of what there is, {inside} of them from its middle: {box}."
