"""Which unlike pairs FDA drives apart: a background of many looks is one class, and a shadow is no thing of its own."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

DARKEST = 1e-4
"""Product of two brightnesses from which on colours can be told; black has none."""


@torch.no_grad()
def told_apart(
    log_p: Float[Tensor, "W T C"], colors: Float[Tensor, "W T 3"], pairs: Int[Tensor, "2 W P"], bandwidth: float
) -> Float[Tensor, "W P"]:
    """How much the pairs (a, b) differ in what is told of their pixels already, 0 … 1: (1 − p_a·p_b) · (1 − exp(−d² / 2σ²)).

    1 − p_a·p_b is how probably the two are of different classes, so a class of many looks need not be torn for a small
    thing to be pushed off its surroundings. d² = |c_a × c_b|² / (|c_a| |c_b|) is the squared distance of their colours when brightness is
    left out, by which a surface and the shadow on it are alike though their tokens are not.

    Args:
        colors: of the photo, in [0, 1].
        bandwidth: σ, the distance of colours from which on pixels differ.
    """
    a, b = pairs
    window = torch.arange(len(log_p), device=log_p.device)[:, None]
    p, brightness = log_p.exp(), colors.norm(dim=-1)
    differ = 1 - (p[window, a] * p[window, b]).sum(-1)
    crossed = torch.linalg.cross(colors[window, a], colors[window, b], dim=-1).square().sum(-1)
    distance = crossed / (brightness[window, a] * brightness[window, b]).clamp(min=DARKEST)
    return differ * (1 - torch.exp(-distance / (2 * bandwidth**2)))
