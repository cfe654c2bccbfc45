"""Finer patches where they tell most: of a scale beyond the pyramid's finest, those at which the pyramid disagrees.

A place that shows one thing at every size is known already. Where patches of several scales, or patches beside each other,
have different embeddings, something ends or is smaller than they are: there, and only there, it is looked at more closely.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovs3d_nerfstudio.features.pyramid import ScaleGrid

SHARE = 0.5
"""Finer patches a view, as a share of all patches of its pyramid: extraction takes half as long again."""


def finer_grid(height: int, width: int, scales: Sequence[float], finer: float) -> ScaleGrid | None:
    """The grid that is `finer` times finer than the finest scale; None where the picture is too small for it."""
    try:
        return ScaleGrid.of(height, width, finer * max(scales))
    except ValueError:
        return None


def places_of_disagreement(
    grids: Sequence[ScaleGrid], patches: Sequence[Float[Tensor, "P D"]], finer: ScaleGrid
) -> Int[Tensor, " n"]:
    """Which patches of `finer` are worth it: those in whose middle the patches of the pyramid agree least, in order.

    Patches agree by the length of the mean of their unit embeddings, over those of a scale that cover the middle and over the
    scales: 1 where all are the same.

    Args:
        grids, patches: of the pyramid's scales; unit embeddings.
    """
    x, y = finer.boxes().view(-1, 2, 2).mean(1).unbind(-1)
    means = []
    for grid, embedded in zip(grids, patches, strict=True):
        rows, columns = (y / grid.height * grid.rows).long(), (x / grid.width * grid.cols).long()
        means.append(grid.cells(embedded)[rows * grid.cols + columns])
    agreement = torch.stack(means).mean(0).norm(dim=-1)
    count = round(SHARE * sum(grid.num_patches for grid in grids))
    return agreement.argsort(stable=True)[:count].sort().values
