"""The colour loss: boundaries go where the photo has edges."""

from __future__ import annotations

import math

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
    side = math.isqrt(log_p.shape[1])
    p, c = (values.view(len(log_p), side, side, -1) for values in (log_p, colors))
    counts = None if seen is None else seen.view(len(seen), side, side)
    total, pairs = log_p.new_zeros(()), 0
    for down, right in NEIGHBOURS:
        a = slice(None), slice(0, side - down), slice(max(0, -right), side - max(0, right))
        b = slice(None), slice(down, side), slice(max(0, right), side - max(0, -right))
        alike = torch.exp((c[a] - c[b]).square().sum(-1) / (-2 * bandwidth**2))
        if counts is not None:
            alike = alike * (counts[a] & counts[b])
        total = total + (alike * js_divergence(p[a], p[b])).sum()
        pairs += alike.numel()
    return total / max(1, pairs)
