"""The depth loss: a ray that is known to end at a point ends there."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

TOLERANCE = 0.01
"""Share of its distance by which a ray may end elsewhere: of the points found in photos nine tenths lie nearer."""


def depth_loss(
    weights: Float[Tensor, "R n"],
    starts: Float[Tensor, "R n"],
    ends: Float[Tensor, "R n"],
    distances: Float[Tensor, " R"],
    tolerance: float = TOLERANCE,
) -> Float[Tensor, ""]:
    """Mean share of a ray's weight that lies elsewhere than at its distance: in no sample that comes within a share of
    `tolerance` of it.

    Linear in the weights: a few rays that are told a wrong distance pull no harder than others (DS-NeRF's logarithm would).

    Args:
        weights, starts, ends: of the samples along each ray.
        distances: how far each ray goes.
    """
    distance = distances[:, None]
    there = (starts <= (1 + tolerance) * distance) & (ends >= (1 - tolerance) * distance)
    return 1 - (weights * there).sum(-1).mean()
