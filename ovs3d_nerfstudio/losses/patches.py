"""Losses of what a patch shows: blurred as the encoder blurs, what is rendered should give the patches' embeddings back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ovs3d_nerfstudio.features.teachers import Windows
from ovs3d_nerfstudio.fields.compositing import LEAST_LENGTH


def patch_distances(
    rays: Sequence[Float[Tensor, "n K"]], windows: Windows, aperture: Float[Tensor, ""] | float = 0.0
) -> list[Float[Tensor, " P"]]:
    """1 − cos(mean of the rays inside a patch, the patch's own embedding) of all patches of the windows, for each of several
    answers of what the rays are.

    The pyramid blurs: a cell is a mean over patches, and a patch is a mean over what it shows. Here the
    rendered rays, blurred in the same way, should give the embeddings back, so the field itself may stay sharp. The rays
    are not normalised: a thing may weigh more in an embedding than its area says.

    Args:
        rays: what each ray of the windows gives to an embedding, window by window.
        aperture: `a` of the weight exp(−a u²) that a ray has at u ∈ [−1, 1] from a patch's centre, along either axis.
    """
    patches, side = windows.patches, windows.side
    rows, cols = _through(torch.stack([patches.rows, patches.cols]), aperture)
    picture = torch.cat(list(rays), -1).view(len(rows), side, side, -1)  # W i j X
    # Along a window's rows first, then down its columns: W p X.
    along = torch.matmul(cols, picture.transpose(1, 2).flatten(2)).unflatten(-1, (side, -1))
    means = torch.matmul(rows[:, :, None], along)[:, :, 0].flatten(0, 1).index_select(0, patches.there)
    known = patches.coefficients.flatten(0, 1).index_select(0, patches.there)
    return [
        1 - F.cosine_similarity(mean, known, dim=-1, eps=LEAST_LENGTH)
        for mean in means.split([part.shape[-1] for part in rays], -1)
    ]


def patch_loss(distances: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    """Mean of `patch_distances` of features; 0 when no window holds a patch."""
    return distances.sum() / max(1, len(distances))


def unmixing_loss(classes: Float[Tensor, " P"], features: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    """Mean of the `patch_distances` of classes, each weighed by how much of a patch the classes explain.

    A patch may show what no prompt names, or the encoder not know what it shows. Features, which are free, explain it all
    the same, and the weight is the fourth power of their distance over the classes': 1 where classes explain a patch as
    well. Without it the classes would be scattered so as to imitate what they cannot explain.
    """
    weights = ((features + 1e-3) / (classes + 1e-3)).clamp(max=1).pow(4).detach()
    return (weights * classes).sum() / max(1, len(classes))


def _through(coverage: Float[Tensor, "*P T"], aperture: Float[Tensor, ""] | float) -> Float[Tensor, "*P T"]:
    """Shares of an interval seen through the aperture; `coverage` is uniform inside the interval and sums to one."""
    place = torch.arange(coverage.shape[-1], device=coverage.device) + 0.5
    centre = (coverage * place).sum(-1, keepdim=True)
    half = 0.5 / coverage.amax(-1, keepdim=True)
    exponent = -aperture * ((place - centre) / half).square()
    # Less the greatest, which cancels: a narrow aperture would else leave no weight at all to divide by.
    weighed = coverage * torch.exp(exponent - exponent.amax(-1, keepdim=True))
    return weighed / weighed.sum(-1, keepdim=True)
