"""The hash encoding in plain torch: the same three functions as the CPU's and Triton's kernels, where neither can run.

nerfstudio's own code holds every corner of every level at once, and autograd keeps them: 3 KiB a point. Here a level of a
chunk of points is worked out at a time, and again in the backward pass, so that nothing grows with points times levels
but the output. `hash_grid` says what the arguments mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

POINTS_AT_ONCE = 1 << 19
"""Points whose corners are held at a time: 80 MB in float32, and still few kernels for a step of a million points."""
PRIMES = (1, 2654435761, 805459861)


class _Cells:
    """One level's cells of some points: table rows of the eight corners, and where in its cell each point lies."""

    def __init__(self, positions: Tensor, scale: Tensor, rows: int):
        scaled = positions * scale
        floor = scaled.floor()
        self.offset = scaled - floor
        self.rows = rows
        # The upper corner is ceil, not floor + 1: on a grid plane both are one cell, and the gradient across it is zero.
        self.low = [floor[:, axis].long() * prime for axis, prime in enumerate(PRIMES)]
        self.high = [(floor[:, axis].long() + (self.offset[:, axis] > 0)) * prime for axis, prime in enumerate(PRIMES)]

    def corners(self) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
        """Each corner as (x, y, z), 1 for upper, and its table rows. A number of rows is a power of two, so a mask is the
        remainder, for negative cells too."""
        for x in (0, 1):
            for y in (0, 1):
                for z in (0, 1):
                    terms = [(self.low, self.high)[bit][axis] for axis, bit in enumerate((x, y, z))]
                    yield (x, y, z), (terms[0] ^ terms[1] ^ terms[2]) & (self.rows - 1)

    def share(self, axis: int, upper: int) -> Tensor:
        """Linear weight of the lower or the upper cell along an axis."""
        return self.offset[:, axis] if upper else 1 - self.offset[:, axis]

    def weight(self, corner: tuple[int, int, int]) -> Tensor:
        """Trilinear weight of a corner."""
        return self.share(0, corner[0]) * self.share(1, corner[1]) * self.share(2, corner[2])


def _pieces(positions: Tensor, table: Tensor, scalings: Tensor) -> Iterator[tuple[int, slice, _Cells]]:
    """Level by level, chunk by chunk."""
    rows = table.shape[0] // len(scalings)
    for level in range(len(scalings)):
        for start in range(0, len(positions), POINTS_AT_ONCE):
            chunk = slice(start, start + POINTS_AT_ONCE)
            yield level, chunk, _Cells(positions[chunk], scalings[level], rows)


def _by_level(tensor: Tensor, scalings: Tensor, features: int) -> Tensor:
    return tensor.view(-1, len(scalings), features)


def forward(positions: Tensor, table: Tensor, scalings: Tensor) -> Tensor:
    """Features [N, L*F] of the positions."""
    features = table.shape[1]
    out = positions.new_empty(len(positions), len(scalings) * features)
    levels, grids = _by_level(out, scalings, features), table.view(len(scalings), -1, features)
    for level, chunk, cells in _pieces(positions, table, scalings):
        total = positions.new_zeros(len(cells.offset), features)
        for corner, rows in cells.corners():
            total += grids[level].index_select(0, rows).mul_(cells.weight(corner)[:, None])
        levels[chunk, level] = total
    return out


def table_gradient(positions: Tensor, table: Tensor, scalings: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient [L*T, F] of <grad_out, output>; on a CPU its sums always run in one order."""
    features = table.shape[1]
    grad = torch.zeros_like(table)
    incoming, grids = _by_level(grad_out, scalings, features), grad.view(len(scalings), -1, features)
    for level, chunk, cells in _pieces(positions, table, scalings):
        given = incoming[chunk, level]
        for corner, rows in cells.corners():
            grids[level].scatter_add_(0, rows[:, None].expand(-1, features), given * cells.weight(corner)[:, None])
    return grad


def position_gradient(positions: Tensor, table: Tensor, scalings: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient [N, 3] of <grad_out, output>."""
    features = table.shape[1]
    grad = torch.zeros_like(positions)
    incoming, grids = _by_level(grad_out, scalings, features), table.view(len(scalings), -1, features)
    for level, chunk, cells in _pieces(positions, table, scalings):
        given = incoming[chunk, level] * scalings[level]
        target = grad[chunk]
        for corner, rows in cells.corners():
            value = (grids[level].index_select(0, rows).mul_(given)).sum(-1)
            for axis in range(3):
                one, other = (a for a in range(3) if a != axis)
                slope = value * cells.share(one, corner[one]) * cells.share(other, corner[other])
                target[:, axis].add_(slope, alpha=1 if corner[axis] else -1)
    return grad
