"""The colour loss: boundaries go where the photo has edges."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ovs3d_nerfstudio.losses.paper import js_divergence

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))
"""Steps (rows, columns) from a ray of a window to those it is compared with by `color_loss`."""


def color_loss(
    log_p: Float[Tensor, "W TT C"],
    colors: Float[Tensor, "W TT 3"],
    bandwidth: float,
    seen: Bool[Tensor, "W TT"] | None = None,
) -> Float[Tensor, ""]:
    """Neighbouring rays of like colour should agree on the class: mean of exp(−|c_a − c_b|² / 2σ²) · JS(p_a, p_b).

    The pairwise term of a conditional random field (Krähenbühl & Koltun, 2011) as a loss (Obukhov et al., 2019), over pairs
    at `NEIGHBOURS` of each window: boundaries go where the photo has edges, which tokens and patches are too coarse to tell.

    Args:
        colors: of the photo, in [0, 1].
        bandwidth: σ, the distance of colours from which on rays may differ.
        seen: whether each ray counts; by default all do.
    """
    windows, side = len(log_p), math.isqrt(log_p.shape[1])
    inside = _inside(side)
    counts = inside.to(log_p.device, non_blocking=True)[:, None]  # neighbour, window, row, column

    def rolled(values: Tensor) -> tuple[Tensor, Tensor]:
        own = values.view(windows, side, side, *values.shape[2:])
        return own, torch.stack([own.roll((-y, -x), (1, 2)) for y, x in NEIGHBOURS])

    own, other = rolled(colors)
    alike = torch.exp((own - other).square().sum(-1) / (-2 * bandwidth**2))
    if seen is not None:
        own, other = rolled(seen)
        counts = counts & own & other
    own, other = rolled(log_p)
    pairs = int(inside.sum()) * windows
    return (counts * alike * js_divergence(own, other)).sum() / max(1, pairs)


@lru_cache(maxsize=8)
def _inside(side: int) -> Bool[Tensor, "N T T"]:
    """Which rays of a window have each of the neighbours: those on its other side, where it was rolled over its edge, are none."""
    place = torch.arange(side)
    row, column = torch.meshgrid(place, place, indexing="ij")
    return torch.stack([(row < side - y) & (column + x >= 0) & (column + x < side) for y, x in NEIGHBOURS])
