"""Losses of 3D-OVS (Liu et al., NeurIPS 2023, §3.2–3.3) as functions of tensors, nothing of nerfstudio."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ovs3d_nerfstudio.fields.compositing import LEAST_LENGTH

Divergence = Literal["js", "kl"]


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
    apart: Float[Tensor, "W P"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Feature-distribution alignment (3D-OVS eq. 6–8) over token pairs of windows: its positive and negative part.

    With g = cos(d_a, d_b) − `shift` and j the divergence of p_a and p_b, the parts are Σ g⁺ j / #(g⁺ ≠ 0) and
    Σ g⁻ j / #(g⁻ ≠ 0): alike tokens should agree (positive), unlike ones differ (negative, which is ≤ 0). Dividing each
    by its own count is the re-balancing; without it both are divided by the number of pairs. Pairs with a token that is not
    `seen` count for nothing; by default all are.

    `apart` says how much an unlike pair weighs besides (see `losses.apart`, which is ours, not the paper's).
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
    if apart is not None:
        negative = negative * apart
    count_p = (positive > 0).sum().clamp(min=1) if rebalance else g.numel()
    count_n = (negative < 0).sum().clamp(min=1) if rebalance else g.numel()
    return (positive * j).sum() / count_p, (negative * j).sum() / count_n
