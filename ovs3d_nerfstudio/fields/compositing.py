"""Compositing of semantics: only the samples of a ray that carry its weight are ever looked up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SOMETHING = 0.5
"""Accumulation of a ray from which on there is something: below it, most of what is seen is the background."""
LEAST_LENGTH = 1e-6
"""Shorter features have no direction: the gradient of a normalisation grows as one over the length, and ends here."""


def top_samples(
    positions: Float[Tensor, "*R n 3"], weights: Float[Tensor, "*R n 1"], count: int
) -> tuple[Float[Tensor, "*R k 3"], Float[Tensor, "*R k 1"]]:
    """The `count` heaviest samples of each ray, their weights rescaled to sum to one (k = min(count, n)).

    Features are normalised after compositing, so the scale of the weights does not matter; what is dropped is at most
    the weight outside the k samples. A ray without any weight gets equal weights.
    """
    k = min(count, weights.shape[-2])
    heavy, index = weights.topk(k, dim=-2)
    total = heavy.sum(-2, keepdim=True)
    heavy = torch.where(total > 1e-6, heavy / total.clamp(min=1e-6), torch.full_like(heavy, 1 / k))
    return positions.gather(-2, index.expand(*index.shape[:-1], 3)), heavy


def composite(values: Float[Tensor, "*R k C"], weights: Float[Tensor, "*R k 1"]) -> Float[Tensor, "*R C"]:
    """Σ_i w_i v_i along each ray (3D-OVS eq. 1)."""
    return (weights * values).sum(-2)


@dataclass
class Semantics:
    """What a ray knows beside its colour."""

    coefficients: Float[Tensor, "*R K"]
    """f(r) = Σ w_i f(x_i), not normalised (3D-OVS eq. 1)."""
    salient: Float[Tensor, "*R K"]
    """Σ w_i m(x_i) f(x_i): the same, weighed by how much a point counts in the embedding of a patch that shows it."""
    scales: Float[Tensor, "*R S"]
    """s(r) = softmax(Σ w_i s(x_i)), which scale to trust (3D-OVS eq. 2)."""

    def __getitem__(self, rays: slice | Tensor) -> Semantics:
        """The semantics of some of the rays."""
        return Semantics(self.coefficients[rays], self.salient[rays], self.scales[rays])
