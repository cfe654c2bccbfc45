"""A scene's embeddings span few of the encoder's D dimensions: learn K coefficients in a fixed orthonormal basis instead.

Rendering is linear in the samples, so compositing K coefficients and multiplying once a ray is the same as compositing D
numbers, up to what the basis leaves out. The first directions span the prompts, so that the similarity with a training
prompt loses nothing but the length of what is left out; the others are the principal directions of the cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ovs3d_nerfstudio.features.extraction import CachedViews


@dataclass
class Basis:
    """An orthonormal basis and how well it holds the scene."""

    vectors: Float[Tensor, "D K"]
    energy: float
    """Share of the cells' squared length inside the basis."""

    def project(self, embeddings: Float[Tensor, "*n D"]) -> Float[Tensor, "*n K"]:
        return embeddings.float() @ self.vectors


def scale_cells(views: CachedViews, view: int) -> list[Float[Tensor, "cells D"]]:
    """The pyramid of a view read as METHOD §2 says: the mean over covering patches, normalised. One tensor a scale."""
    return [
        F.normalize(grid.cells(patches.float()), dim=-1)
        for grid, patches in zip(views.grids(view), views.patches(view), strict=True)
    ]


def fit_basis(
    views: CachedViews, text: Float[Tensor, "C D"], max_dim: int, energy: float
) -> tuple[Basis, Float[Tensor, "D D"]]:
    """The smallest basis that holds the prompts and `energy` of the cells, at most `max_dim` wide; 0 means all of D.

    One pass over the views accumulates the cells' D×D second moment, so memory does not depend on the number of views.
    Returns the basis and the second moment.
    """
    dim = views.patches(0)[0].shape[-1]
    moment = torch.zeros(dim, dim)
    for view in range(len(views.keys)):
        for cells in scale_cells(views, view):
            moment += cells.T @ cells
    moment /= moment.trace()
    if max_dim <= 0 or max_dim >= dim:
        return Basis(torch.eye(dim), 1.0), moment
    vectors = torch.zeros(dim, 0)
    if 0 < len(text) <= max_dim:
        directions, singular, _ = torch.linalg.svd(text.float().T, full_matrices=False)
        vectors = directions[:, singular > 1e-4 * singular[0]]
    outside = torch.eye(dim) - vectors @ vectors.T
    values, principal = torch.linalg.eigh(outside @ moment @ outside)
    values, principal = values.flip(0), principal.flip(1)
    inside = float((vectors.T @ moment @ vectors).trace())
    kept = inside + values.clamp(min=0).cumsum(0)
    extra = int((kept < energy).sum()) + 1
    extra = min(extra, max_dim - vectors.shape[1])
    vectors = torch.linalg.qr(torch.cat([vectors, principal[:, :extra]], 1)).Q
    return Basis(vectors, float((vectors.T @ moment @ vectors).trace())), moment
