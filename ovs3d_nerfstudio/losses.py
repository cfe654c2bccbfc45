"""Losses of 3D-OVS (Liu et al., NeurIPS 2023, §3.2–3.3) as functions of tensors, nothing of nerfstudio."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ovs3d_nerfstudio.features.teachers import Windows
from ovs3d_nerfstudio.renderers import LEAST_LENGTH

Divergence = Literal["js", "kl"]

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))
"""Steps (rows, columns) from a ray of a window to those it is compared with by `color_loss`."""


def cosine_loss(features: Float[Tensor, "R K"], targets: Float[Tensor, "R K"]) -> Float[Tensor, ""]:
    """Mean of 1 − cos(feature, target): the feature loss (3D-OVS eq. 3). Zero vectors count as cos = 0."""
    return (1 - F.cosine_similarity(features, targets, dim=-1, eps=LEAST_LENGTH)).mean()


def js_divergence(log_p: Float[Tensor, "*n C"], log_q: Float[Tensor, "*n C"]) -> Float[Tensor, "*n"]:
    """Jensen–Shannon divergence in nats of two distributions given as logarithms; 0 … ln 2."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2


def kl_divergence(log_p: Float[Tensor, "*n C"], log_q: Float[Tensor, "*n C"]) -> Float[Tensor, "*n"]:
    """Kullback–Leibler divergence KL(p ‖ q) in nats, unbounded; what the authors' code computes in place of JS."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rda_loss(logits: Float[Tensor, "R C"], relevancy: Float[Tensor, "R C"]) -> Float[Tensor, ""]:
    """Relevancy-distribution alignment (3D-OVS eq. 5): mean JS(softmax(logits), softmax(relevancy)) over rays."""
    return js_divergence(logits.log_softmax(-1), relevancy.log_softmax(-1)).mean()


def sample_pairs(windows: int, tokens: int, pairs: int, device: torch.device | str) -> Int[Tensor, "2 W P"]:
    """Token pairs (a, b) of each window: all of them when there are at most `pairs`, else `pairs` drawn at random.

    A random subset keeps FDA's memory at windows × pairs × classes instead of windows × tokens² × classes, and its mean
    unbiased.
    """
    if tokens * tokens <= pairs:
        grid = torch.arange(tokens, device=device)
        return torch.stack(torch.meshgrid(grid, grid, indexing="ij")).reshape(2, 1, -1).expand(2, windows, -1)
    return torch.randint(tokens, (2, windows, pairs), device=device)


def fda_loss(
    log_p: Float[Tensor, "W T C"],
    tokens: Float[Tensor, "W T E"],
    pairs: Int[Tensor, "2 W P"],
    shift: float,
    divergence: Divergence = "js",
    rebalance: bool = True,
    seen: Bool[Tensor, "W T"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Feature-distribution alignment (3D-OVS eq. 6–8) over token pairs of windows: its positive and negative part.

    With g = cos(d_a, d_b) − `shift` and j the divergence of p_a and p_b, the parts are Σ g⁺ j / #(g⁺ ≠ 0) and
    Σ g⁻ j / #(g⁻ ≠ 0): alike tokens should agree (positive), unlike ones differ (negative, which is ≤ 0). Dividing each
    by its own count is the re-balancing; without it both are divided by the number of pairs. Pairs with a token that is not
    `seen` count for nothing; by default all are.
    """
    a, b = pairs
    window = torch.arange(len(log_p), device=log_p.device)[:, None]
    # All cosines of a window at once: a product of matrices is cheaper than gathering two wide tokens for every pair.
    unit = F.normalize(tokens, dim=-1)
    g = (unit @ unit.mT)[window, a, b] - shift
    if seen is not None:
        g = g * (seen[window, a] & seen[window, b])
    j = {"js": js_divergence, "kl": kl_divergence}[divergence](log_p[window, a], log_p[window, b])
    positive, negative = g.clamp(min=0), g.clamp(max=0)
    count_p = (positive > 0).sum().clamp(min=1) if rebalance else g.numel()
    count_n = (negative < 0).sum().clamp(min=1) if rebalance else g.numel()
    return (positive * j).sum() / count_p, (negative * j).sum() / count_n


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


def patch_distances(
    rays: Float[Tensor, "n K"], windows: Windows, aperture: Float[Tensor, ""] | float = 0.0
) -> Float[Tensor, " P"]:
    """1 − cos(mean of the rays inside a patch, the patch's own embedding) of all patches of the windows.

    The pyramid blurs: a cell is a mean over patches, and a patch is a mean over what it shows. Here the
    rendered rays, blurred in the same way, should give the embeddings back, so the field itself may stay sharp. The rays
    are not normalised: a thing may weigh more in an embedding than its area says.

    Args:
        rays: what each ray of the windows gives to an embedding, window by window.
        aperture: `a` of the weight exp(−a u²) that a ray has at u ∈ [−1, 1] from a patch's centre, along either axis.
    """
    pictures = rays.view(-1, windows.side, windows.side, rays.shape[-1])
    distances = []
    for group, picture in zip(windows.patches, pictures, strict=True):
        rows, cols = _through(group.rows, aperture), _through(group.cols, aperture)
        mean = torch.einsum("pi,pj,ijk->pk", rows, cols, picture)
        distances.append(1 - F.cosine_similarity(mean, group.coefficients, dim=-1, eps=LEAST_LENGTH))
    return torch.cat(distances)


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


def _through(coverage: Float[Tensor, "P T"], aperture: Float[Tensor, ""] | float) -> Float[Tensor, "P T"]:
    """Shares of an interval seen through the aperture; `coverage` is uniform inside the interval and sums to one."""
    place = torch.arange(coverage.shape[1], device=coverage.device) + 0.5
    centre = (coverage * place).sum(1, keepdim=True)
    half = 0.5 / coverage.amax(1, keepdim=True)
    exponent = -aperture * ((place - centre) / half).square()
    # Less the greatest, which cancels: a narrow aperture would else leave no weight at all to divide by.
    weighed = coverage * torch.exp(exponent - exponent.amax(1, keepdim=True))
    return weighed / weighed.sum(1, keepdim=True)
