"""A splat: Gaussians as every trainer and viewer keeps them, whatever model renders them, and what turning a scene does to
their shapes and colours."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SH_OF_COLOUR = 0.28209479177387814
"""The harmonic of degree 0: a colour is 0.5 + this × its coefficient."""


@dataclass(frozen=True)
class Splat:
    """Gaussians in one frame."""

    means: Float[Tensor, "n 3"]
    scales: Float[Tensor, "n 3"]
    """Logarithms of the standard deviations along the axes."""
    quats: Float[Tensor, "n 4"]
    """Rotations (w, x, y, z), of any length."""
    opacities: Float[Tensor, "n 1"]
    """Logits."""
    base: Float[Tensor, "n 3"]
    """Coefficients of the harmonic of degree 0."""
    rest: Float[Tensor, "n k 3"]
    """Those of the degrees from 1 on."""

    @property
    def degree(self) -> int:
        """Of the spherical harmonics."""
        return math.isqrt(self.rest.shape[1] + 1) - 1

    def to(self, device: torch.device | str) -> Splat:
        """The same on a device."""
        return Splat(*(part.to(device) for part in vars(self).values()))

    def moved(self, way: Float[np.ndarray, "3 4"]) -> Splat:
        """The same scene after the similarity x ↦ way · (x, 1); a mirror image where that mirrors.

        The identity leaves every bit.
        """
        if np.array_equal(way, np.eye(3, 4)):
            return self
        size = abs(np.linalg.det(way[:, :3])) ** (1 / 3)
        turn = torch.from_numpy(way[:, :3] / size)
        # A Gaussian is the same seen through its centre, so a mirror may be taken for the turn that is left of it.
        proper = turn * torch.linalg.det(turn).sign()
        like = self.means
        linear, shift = (torch.from_numpy(part).to(like) for part in (way[:, :3].copy(), way[:, 3].copy()))
        rest = self.rest
        if self.degree:
            turned = harmonics_turned(turn, self.degree)[1:, 1:].to(like)
            rest = torch.einsum("jk,nkc->njc", turned, rest)
        return replace(
            self,
            means=like @ linear.T + shift,
            scales=self.scales + math.log(size),
            quats=quat_product(quat_of(proper).to(like), F.normalize(self.quats, dim=-1)),
            rest=rest,
        )


def harmonics_turned(turn: Float[Tensor, "3 3"], degree: int) -> Float[Tensor, "k k"]:
    """What coefficients of spherical harmonics are multiplied by when all directions are: found from the harmonics themselves,
    in double precision, as the turned colours have to be those of the directions turned back."""
    from gsplat.cuda._torch_impl import _eval_sh_bases_fast

    count = (degree + 1) ** 2
    directions = F.normalize(torch.randn(8 * count, 3, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    there = _eval_sh_bases_fast(count, directions)
    before = _eval_sh_bases_fast(count, directions @ turn.double())
    found = torch.linalg.lstsq(there, before).solution
    # No degree mixes with another: what is left of that is rounding.
    degrees = torch.arange(count).double().sqrt().long()
    return torch.where(degrees[:, None] == degrees, found, 0.0)


def quat_of(rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "4"]:
    """The unit quaternion (w, x, y, z) of a rotation."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(rotation.numpy()).as_quat()
    return torch.tensor([w, x, y, z], dtype=torch.float64)


def quat_product(first: Float[Tensor, "4"], second: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """The rotation `second`, then `first`."""
    w, x, y, z = first.unbind(-1)
    rows = [[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]]
    return second @ torch.stack([torch.stack(row) for row in rows]).T
