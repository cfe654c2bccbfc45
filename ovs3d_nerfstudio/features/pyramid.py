"""Geometry of the CLIP pyramid: where a scale's patches lie, and how they make cells (3D-OVS §3.1; METHOD of the README).

A scale divides the picture into `rows × cols` equal cells; a patch is a block of 4 × 4 cells, one patch starting at
every cell that leaves room for it. A patch's stride is therefore a quarter of its side, a pixel is covered by up to 16
patches, and the mean over the patches that cover a pixel is the same for all pixels of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CELLS_A_PATCH = 4
"""Cells along a patch's side: the stride is a quarter of a patch (3D-OVS, supplement)."""


@dataclass(frozen=True)
class ScaleGrid:
    """One scale on one picture: `rows × cols` cells, `patch_rows × patch_cols` patches."""

    height: int
    width: int
    rows: int
    cols: int

    @staticmethod
    def of(height: int, width: int, patches_a_side: float) -> ScaleGrid:
        """The grid whose patches have a side of min(height, width) / `patches_a_side` pixels, as nearly as cells tile.

        Raises ValueError when the picture is too small to be cut so finely.
        """
        stride = min(height, width) / patches_a_side / CELLS_A_PATCH
        if stride < 1:
            raise ValueError(
                f"A picture of {width}×{height} pixels is too small for patches of 1/{patches_a_side:g} of its shorter "
                f"side; it needs {CELLS_A_PATCH * patches_a_side:.0f} pixels, or fewer patches a side (scales)."
            )
        return ScaleGrid(height, width, round(height / stride), round(width / stride))

    @property
    def patch_rows(self) -> int:
        return self.rows - CELLS_A_PATCH + 1

    @property
    def patch_cols(self) -> int:
        return self.cols - CELLS_A_PATCH + 1

    @property
    def num_cells(self) -> int:
        return self.rows * self.cols

    @property
    def num_patches(self) -> int:
        return self.patch_rows * self.patch_cols

    def boxes(self) -> Float[Tensor, "P 4"]:
        """Left, top, right, bottom of every patch in pixels, row by row."""
        top, left = torch.meshgrid(torch.arange(self.patch_rows), torch.arange(self.patch_cols), indexing="ij")
        corners = torch.stack([left, top, left + CELLS_A_PATCH, top + CELLS_A_PATCH], -1).reshape(-1, 4)
        cell = torch.tensor([self.width / self.cols, self.height / self.rows])
        return corners.float() * cell.repeat(2)

    def jittered_boxes(self, generator: torch.Generator) -> Float[Tensor, "P 4"]:
        """`boxes` with each border moved outwards by U(0, side/4) and clipped to the picture (3D-OVS §3.1)."""
        boxes = self.boxes()
        side = torch.tensor([self.width / self.cols, self.height / self.rows]).repeat(2) * CELLS_A_PATCH
        outwards = torch.tensor([-1.0, -1.0, 1.0, 1.0])
        boxes = boxes + outwards * side / 4 * torch.rand(boxes.shape, generator=generator)
        limit = torch.tensor([self.width, self.height, self.width, self.height])
        return boxes.clamp(min=0).minimum(limit)

    def cells(self, patches: Float[Tensor, "P D"]) -> Float[Tensor, "cells D"]:
        """Mean over the patches that cover each cell, row by row."""
        grid = patches.reshape(self.patch_rows, self.patch_cols, -1).permute(2, 0, 1)[:, None]
        border = CELLS_A_PATCH - 1
        covered = F.avg_pool2d(F.pad(grid, [border] * 4), CELLS_A_PATCH, stride=1)
        count = F.avg_pool2d(F.pad(torch.ones_like(grid[:1]), [border] * 4), CELLS_A_PATCH, stride=1)
        return (covered / count)[:, 0].flatten(1).T.contiguous()
