"""Triton kernels of the hash encoding; the same three functions as the CPU's, on CUDA tensors.

Every function takes contiguous tensors of one floating dtype on one device: positions [N, 3] with N > 0, a
table [L*T, F] with T a power of two, scalings [L]. `hash_grid` says what they mean and wraps the functions
for autograd. Importing this module imports Triton.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128
# A product fused into the subtraction would round the offsets in a cell differently from the reference, and
# not always into [0, 1]. Nothing is lost: these kernels wait for memory, not for arithmetic.
_OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _cell(position_ptr, n, inside, scale, axis: tl.constexpr, prime: tl.constexpr):
    """Hash terms of a point's lower and upper cell along one axis, and its offset between the two."""
    x = tl.load(position_ptr + n * 3 + axis, mask=inside, other=0.0) * scale
    floor = tl.floor(x)
    offset = x - floor
    # 32-bit products wrap; the mask that follows only keeps bits that a wider product has as well. The upper
    # corner is ceil, not floor + 1, so that both corners are one cell on a grid plane.
    lower = floor.to(tl.int32).to(tl.uint32, bitcast=True)
    upper = lower + (offset > 0).to(tl.uint32)
    return lower * prime, upper * prime, offset


@triton.jit
def _cells(position_ptr, n, inside, scale):
    x0, x1, ox = _cell(position_ptr, n, inside, scale, 0, 1)
    y0, y1, oy = _cell(position_ptr, n, inside, scale, 1, 2654435761)
    z0, z1, oz = _cell(position_ptr, n, inside, scale, 2, 805459861)
    return x0, x1, ox, y0, y1, oy, z0, z1, oz


@triton.jit
def _forward_kernel(position_ptr, table_ptr, scaling_ptr, out_ptr, points, rows, L, F: tl.constexpr, B: tl.constexpr):
    level = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = n < points
    x0, x1, ox, y0, y1, oy, z0, z1, oz = _cells(position_ptr, n, inside, tl.load(scaling_ptr + level))
    grid_ptr = table_ptr + level * rows * F
    for f in tl.static_range(F):
        total = tl.zeros_like(ox)
        for corner in tl.static_range(8):
            row = (x1 if corner & 1 else x0) ^ (y1 if corner & 2 else y0) ^ (z1 if corner & 4 else z0)
            weight = (ox if corner & 1 else 1 - ox) * (oy if corner & 2 else 1 - oy)
            weight *= oz if corner & 4 else 1 - oz
            source = grid_ptr + (row & (rows - 1)).to(tl.int64) * F + f
            total += weight * tl.load(source, mask=inside, other=0.0)
        tl.store(out_ptr + (n * L + level) * F + f, total, mask=inside)


@triton.jit
def _table_gradient_kernel(
    position_ptr, scaling_ptr, grad_out_ptr, grad_ptr, points, rows, L, F: tl.constexpr, B: tl.constexpr
):
    level = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = n < points
    x0, x1, ox, y0, y1, oy, z0, z1, oz = _cells(position_ptr, n, inside, tl.load(scaling_ptr + level))
    grid_ptr = grad_ptr + level * rows * F
    for f in tl.static_range(F):
        grad_out = tl.load(grad_out_ptr + (n * L + level) * F + f, mask=inside, other=0.0)
        for corner in tl.static_range(8):
            row = (x1 if corner & 1 else x0) ^ (y1 if corner & 2 else y0) ^ (z1 if corner & 4 else z0)
            weight = (ox if corner & 1 else 1 - ox) * (oy if corner & 2 else 1 - oy)
            weight *= oz if corner & 4 else 1 - oz
            # Nobody waits for these sums before the kernel ends, so they need no memory ordering.
            target = grid_ptr + (row & (rows - 1)).to(tl.int64) * F + f
            tl.atomic_add(target, weight * grad_out, mask=inside, sem="relaxed")


@triton.jit
def _position_gradient_kernel(
    position_ptr,
    table_ptr,
    scaling_ptr,
    grad_out_ptr,
    grad_ptr,
    points,
    rows,
    L,
    F: tl.constexpr,
    B: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = n < points
    dx = tl.zeros((B,), dtype=position_ptr.dtype.element_ty)
    dy = tl.zeros((B,), dtype=position_ptr.dtype.element_ty)
    dz = tl.zeros((B,), dtype=position_ptr.dtype.element_ty)
    # One program sums over all levels of its points: no atomics, and the same result every time.
    for level in range(L):
        scale = tl.load(scaling_ptr + level)
        x0, x1, ox, y0, y1, oy, z0, z1, oz = _cells(position_ptr, n, inside, scale)
        grid_ptr = table_ptr + tl.cast(level, tl.int64) * rows * F
        for corner in tl.static_range(8):
            row = (x1 if corner & 1 else x0) ^ (y1 if corner & 2 else y0) ^ (z1 if corner & 4 else z0)
            row_ptr = grid_ptr + (row & (rows - 1)).to(tl.int64) * F
            value = tl.zeros_like(ox)  # the corner's share of <grad_out, output>, before its weight
            for f in tl.static_range(F):
                grad_out = tl.load(grad_out_ptr + (n * L + level) * F + f, mask=inside, other=0.0)
                value += grad_out * tl.load(row_ptr + f, mask=inside, other=0.0)
            value *= scale
            wx = ox if corner & 1 else 1 - ox
            wy = oy if corner & 2 else 1 - oy
            wz = oz if corner & 4 else 1 - oz
            dx += wy * wz * (value if corner & 1 else -value)
            dy += wx * wz * (value if corner & 2 else -value)
            dz += wx * wy * (value if corner & 4 else -value)
    tl.store(grad_ptr + n * 3, dx, mask=inside)
    tl.store(grad_ptr + n * 3 + 1, dy, mask=inside)
    tl.store(grad_ptr + n * 3 + 2, dz, mask=inside)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's (in its interpreter: a CPU)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _sizes(positions: Tensor, table: Tensor, scalings: Tensor) -> tuple[int, int, int, int, int]:
    levels, features = scalings.shape[0], table.shape[1]
    return len(positions), table.shape[0] // levels, levels, features, _BLOCK


def forward(positions: Tensor, table: Tensor, scalings: Tensor) -> Tensor:
    """Features [N, L*F] of the positions."""
    sizes = _sizes(positions, table, scalings)
    out = positions.new_empty(len(positions), len(scalings) * table.shape[1])
    with _on(table):
        grid = (triton.cdiv(len(positions), _BLOCK), len(scalings))
        _forward_kernel[grid](positions, table, scalings, out, *sizes, **_OPTIONS)
    return out


def table_gradient(positions: Tensor, table: Tensor, scalings: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient [L*T, F] of <grad_out, output>; its sums run in any order, so the last bits may vary."""
    grad = torch.zeros_like(table)
    with _on(table):
        grid = (triton.cdiv(len(positions), _BLOCK), len(scalings))
        sizes = _sizes(positions, table, scalings)
        _table_gradient_kernel[grid](positions, scalings, grad_out, grad, *sizes, **_OPTIONS)
    return grad


def position_gradient(positions: Tensor, table: Tensor, scalings: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient [N, 3] of <grad_out, output>."""
    grad = torch.empty_like(positions)
    with _on(table):
        sizes = _sizes(positions, table, scalings)
        grid = (triton.cdiv(len(positions), _BLOCK),)
        _position_gradient_kernel[grid](positions, table, scalings, grad_out, grad, *sizes, **_OPTIONS)
    return grad
