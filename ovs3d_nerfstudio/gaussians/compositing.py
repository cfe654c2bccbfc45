"""Front-to-back compositing of binned Gaussians on the CPU, with gradients, for any number of channels.

The same sum as gsplat's CUDA kernels (Kerbl et al. 2023, "3D Gaussian Splatting for Real-Time Radiance Field
Rendering", section 6; constants of gsplat 1.4): at a pixel centre p, alpha = min(0.999, o exp(-sigma)) with
sigma = (p - mean)ᵀ conic (p - mean) / 2, skipped under 1/255; colour = Σ c alpha T; a pixel ends before the
Gaussian that would take its transmittance T to 1e-4 or less. The loops are in `kernels`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ovs3d_nerfstudio.compiled import run, spans
from ovs3d_nerfstudio.gaussians.binning import Bins

__all__ = ["composite"]

# Below this many (tile, Gaussian) entries one thread finishes before a second one has woken up.
_MIN_PARALLEL_ENTRIES = 512
# From this many channels on, visiting only the pixels that a Gaussian covers is faster (see `kernels`).
_WIDE = 40
# Ranges of tiles a thread gets, one after the other: tiles differ in cost.
_RANGES_A_THREAD = 8


@functools.cache
def _loops() -> Any:
    from ovs3d_nerfstudio.gaussians import kernels  # and numba, which takes half a second

    return kernels.Kernels()


def composite(
    means2d: Float[Tensor, "*rows 2"],
    conics: Float[Tensor, "*rows 3"],
    opacities: Float[Tensor, "*rows"],
    values: Float[Tensor, "m x"],
    backgrounds: Float[Tensor, "c x"] | None,
    bins: Bins,
    absgrad: bool = False,
) -> tuple[Float[Tensor, "c h w x"], Float[Tensor, "c h w 1"]]:
    """Pictures of values, and alphas, with gradients for every tensor.

    What was binned is what is composited: `means2d`, `conics` and `opacities` must be the tensors that `bins` were
    made of, and are only there for their gradients. Where none of them needs one, the backward pass costs half.

    Args:
        values: Any number of channels for each of the M visible Gaussians, in the order of `bins`.
        backgrounds: What is seen through the Gaussians; black if None.
        absgrad: The backward pass sets `means2d.absgrad`: sums of absolute gradients over pixels.
    """
    if backgrounds is None:
        backgrounds = values.new_zeros(bins.cameras, values.shape[1])
    return _Composite.apply(means2d, conics, opacities, values, backgrounds, bins, absgrad)


def _tile_calls(bins: Bins, arguments: tuple) -> tuple[list[tuple], int]:
    threads = torch.get_num_threads() if len(bins.items) >= _MIN_PARALLEL_ENTRIES else 1
    parts = threads * _RANGES_A_THREAD if threads > 1 else 1
    return [(*arguments, *span) for span in bins.tile_spans(parts)], threads


def _numpy(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor.detach().to("cpu", dtype).contiguous().numpy()


def _padded(array: np.ndarray) -> np.ndarray:
    """The array with columns of zeros up to a multiple of _loops().lanes."""
    columns = array.shape[1]
    out = np.zeros((len(array), -(-columns // _loops().lanes) * _loops().lanes), array.dtype)
    out[:, :columns] = array
    return out


class _Composite(torch.autograd.Function):
    """Tensors on any device and of any floating dtype; the work is done on the CPU in the dtype of the records."""

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        conics: Tensor,
        opacities: Tensor,
        values: Tensor,
        backgrounds: Tensor,
        bins: Bins,
        absgrad: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.from_numpy(bins.records).dtype
        channels = values.shape[1]
        wide = channels >= _WIDE
        colors, behind = _numpy(values, dtype), _numpy(backgrounds, dtype)
        if wide and channels % _loops().lanes:
            colors = _padded(colors)
        size = (bins.cameras, bins.height, bins.width)
        out = np.empty((*size, channels), bins.records.dtype)
        left, last = np.empty(size, out.dtype), np.empty(size, out.dtype)
        tiles = (bins.items, bins.tile_start, *bins.tiles)
        run(_loops().forward, *_tile_calls(bins, (bins.records, *tiles, colors, behind, wide, out, left, last)))
        ctx.save_for_backward(means2d, conics, opacities)
        ctx.bins, ctx.absgrad, ctx.wide, ctx.channels = bins, absgrad, wide, channels
        ctx.arrays = (colors, behind, left, last)
        ctx.likes = (values.device, values.dtype, backgrounds.dtype)
        alphas = torch.from_numpy(1 - left[..., None])
        return torch.from_numpy(out).to(values), alphas.to(values)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_alphas: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would stay silent: it only looks at grad_out
            raise RuntimeError("composited Gaussians have no second derivatives: create_graph=True is not supported")
        means2d, conics, opacities = ctx.saved_tensors
        device, dtype, background_dtype = ctx.likes
        geometry = any(ctx.needs_input_grad[:3])
        grads: list[Tensor | None] = [None] * 7
        if geometry or ctx.needs_input_grad[3]:
            sums = _summed_gradients(ctx, grad_out, grad_alphas, geometry)
            if geometry:
                rows = torch.from_numpy(ctx.bins.flat)
                grads[0] = _scattered(sums[:, 0:2], rows, means2d)
                grads[1] = _scattered(sums[:, 2:5], rows, conics)
                grads[2] = _scattered(sums[:, 5], rows, opacities)
                if ctx.absgrad:
                    means2d.absgrad = _scattered(sums[:, 6:8], rows, means2d)
                sums = sums[:, _loops().columns_before_colors :]
            grads[3] = sums[:, : ctx.channels].to(device, dtype)
        if ctx.needs_input_grad[4]:
            transmittance = torch.from_numpy(ctx.arrays[2]).to(grad_out)[..., None]
            grads[4] = (grad_out * transmittance).sum((1, 2)).to(background_dtype)
        return tuple(grads)


def _summed_gradients(ctx: Any, grad_out: Tensor, grad_alphas: Tensor, geometry: bool) -> Float[Tensor, "m columns"]:
    """Gradients of each visible Gaussian: of its geometry if that is wanted, and of its colours, padded if wide."""
    bins, (colors, behind, left, last) = ctx.bins, ctx.arrays
    lanes = _loops().lanes
    columns = -(-ctx.channels // lanes) * lanes if ctx.wide else ctx.channels
    columns += _loops().columns_before_colors if geometry else 0
    partial, sums = (np.empty((count, columns), left.dtype) for count in (len(bins.items), len(bins.records)))
    working = torch.from_numpy(left).dtype
    incoming = _numpy(grad_out, working)
    head = (bins.records, bins.items, bins.slots, bins.tile_start, *bins.tiles)
    if geometry:
        more = (colors, behind, left, last, incoming, _numpy(grad_alphas, working)[..., 0], ctx.wide, partial)
        calls, threads = _tile_calls(bins, (*head, *more))
        run(_loops().gradient, calls, threads)
    else:
        calls, threads = _tile_calls(bins, (*head, incoming, ctx.wide, partial))
        run(_loops().color_gradient, calls, threads)
    run(_loops().sum, [(partial, bins.slot_start, sums, *span) for span in spans(len(sums), threads)], threads)
    return torch.from_numpy(sums)


def _scattered(part: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Rows at their places among zeros, in the shape, dtype and on the device of another tensor."""
    columns = part.shape[1:]
    full = part.new_zeros(like.numel() // max(columns.numel(), 1), *columns)
    return full.index_copy_(0, rows, part).view(like.shape).to(like)
