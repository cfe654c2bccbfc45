"""CPU kernels of the hash encoding, compiled by numba; `hash_grid` says what they mean and wraps them for autograd."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ovs3d_nerfstudio.compiled import compiled, run, spans

# Points whose corners are worked out together. That part is plain arithmetic and becomes SIMD code once it is
# split from the table look-ups; a tile of this many points keeps its scratch space in the first-level cache.
_TILE = 128
# Below this many (point, level) pairs one thread finishes before a second one has woken up.
_MIN_PARALLEL_WORK = 8192

# ----------------------------------------------------------------------------------------------------------
# CPU kernels. Plain Python here, compiled by `NumbaBackend` on first use, so that importing this module does
# not import numba. `features` is a tuple of length F: its length is part of its type, which makes F a
# compile-time constant and lets the compiler unroll the innermost loop.
# ----------------------------------------------------------------------------------------------------------


def _tile_corners(positions, start, count, scale, mask, rows, offsets):
    """Table rows [8, tile] and offsets in the cell [3, tile]; bits 0, 1, 2 of a corner: x, y, z."""
    prime_y = np.uint32(2654435761)
    prime_z = np.uint32(805459861)
    for k in range(count):
        x = positions[start + k, 0] * scale
        y = positions[start + k, 1] * scale
        z = positions[start + k, 2] * scale
        floor_x = np.floor(x)
        floor_y = np.floor(y)
        floor_z = np.floor(z)
        offset_x = x - floor_x
        offset_y = y - floor_y
        offset_z = z - floor_z
        # The reference multiplies in int64 and takes the result modulo a power of two, which only depends on
        # the low 32 bits: unsigned 32-bit arithmetic that wraps gives the same rows, negative cells included.
        x0 = np.uint32(np.int32(floor_x))
        y0 = np.uint32(np.int32(floor_y))
        z0 = np.uint32(np.int32(floor_z))
        # The upper corner is ceil, not floor + 1: on a grid plane both corners are the same cell and the
        # position gradient across the plane is zero.
        x1 = np.uint32(x0 + np.uint32(offset_x > 0))
        y1 = np.uint32(np.uint32(y0 + np.uint32(offset_y > 0)) * prime_y)
        z1 = np.uint32(np.uint32(z0 + np.uint32(offset_z > 0)) * prime_z)
        y0 = np.uint32(y0 * prime_y)
        z0 = np.uint32(z0 * prime_z)
        rows[0, k] = (x0 ^ y0 ^ z0) & mask
        rows[1, k] = (x1 ^ y0 ^ z0) & mask
        rows[2, k] = (x0 ^ y1 ^ z0) & mask
        rows[3, k] = (x1 ^ y1 ^ z0) & mask
        rows[4, k] = (x0 ^ y0 ^ z1) & mask
        rows[5, k] = (x1 ^ y0 ^ z1) & mask
        rows[6, k] = (x0 ^ y1 ^ z1) & mask
        rows[7, k] = (x1 ^ y1 ^ z1) & mask
        offsets[0, k] = offset_x
        offsets[1, k] = offset_y
        offsets[2, k] = offset_z


def _forward_kernel(positions, table, scalings, mask, out, start, stop, features):
    """out[start:stop, L, F] from table [L, T, F], level by level: one level's table may fit the cache."""
    rows = np.empty((8, _TILE), np.uint32)
    offsets = np.empty((3, _TILE), positions.dtype)
    one = positions.dtype.type(1)
    for level in range(scalings.shape[0]):
        grid = table[level]
        for first in range(start, stop, _TILE):
            count = min(_TILE, stop - first)
            _tile_corners(positions, first, count, scalings[level], mask, rows, offsets)
            for k in range(count):
                x1, y1, z1 = offsets[0, k], offsets[1, k], offsets[2, k]
                x0, y0, z0 = one - x1, one - y1, one - z1
                w00, w10, w01, w11 = y0 * z0, y1 * z0, y0 * z1, y1 * z1
                for f in range(len(features)):
                    low = w00 * grid[rows[0, k], f] + w10 * grid[rows[2, k], f]
                    low += w01 * grid[rows[4, k], f] + w11 * grid[rows[6, k], f]
                    high = w00 * grid[rows[1, k], f] + w10 * grid[rows[3, k], f]
                    high += w01 * grid[rows[5, k], f] + w11 * grid[rows[7, k], f]
                    out[first + k, level, f] = low * x0 + high * x1


def _table_gradient_kernel(positions, grad_out, scale, level, mask, grid, start, stop, features):
    """Fills grid [T, F] with one level's gradient over points start:stop of grad_out [N, L, F]."""
    # Clearing the rows here, not with torch.zeros, leaves them in this core's cache for the additions.
    grid[:] = 0
    rows = np.empty((8, _TILE), np.uint32)
    offsets = np.empty((3, _TILE), positions.dtype)
    one = positions.dtype.type(1)
    for first in range(start, stop, _TILE):
        count = min(_TILE, stop - first)
        _tile_corners(positions, first, count, scale, mask, rows, offsets)
        for k in range(count):
            x1, y1, z1 = offsets[0, k], offsets[1, k], offsets[2, k]
            x0, y0, z0 = one - x1, one - y1, one - z1
            w00, w10, w01, w11 = y0 * z0, y1 * z0, y0 * z1, y1 * z1
            for f in range(len(features)):
                low = grad_out[first + k, level, f] * x0
                high = grad_out[first + k, level, f] * x1
                grid[rows[0, k], f] += low * w00
                grid[rows[1, k], f] += high * w00
                grid[rows[2, k], f] += low * w10
                grid[rows[3, k], f] += high * w10
                grid[rows[4, k], f] += low * w01
                grid[rows[5, k], f] += high * w01
                grid[rows[6, k], f] += low * w11
                grid[rows[7, k], f] += high * w11


def _position_gradient_kernel(positions, table, scalings, mask, grad_out, grad, start, stop, features):
    """Fills grad[start:stop, 3] from table [L, T, F] and grad_out [N, L, F]."""
    rows = np.empty((8, _TILE), np.uint32)
    offsets = np.empty((3, _TILE), positions.dtype)
    v = np.empty(8, positions.dtype)  # a cell's corners, each summed over features with the incoming gradient
    one = positions.dtype.type(1)
    grad[start:stop] = 0
    for level in range(scalings.shape[0]):
        grid = table[level]
        scale = scalings[level]
        for first in range(start, stop, _TILE):
            count = min(_TILE, stop - first)
            _tile_corners(positions, first, count, scale, mask, rows, offsets)
            for k in range(count):
                x1, y1, z1 = offsets[0, k], offsets[1, k], offsets[2, k]
                x0, y0, z0 = one - x1, one - y1, one - z1
                v[:] = 0
                for f in range(len(features)):
                    incoming = grad_out[first + k, level, f] * scale
                    for corner in range(8):
                        v[corner] += incoming * grid[rows[corner, k], f]
                # The values on the cell's four edges along x, at this x.
                e00, e10 = x0 * v[0] + x1 * v[1], x0 * v[2] + x1 * v[3]
                e01, e11 = x0 * v[4] + x1 * v[5], x0 * v[6] + x1 * v[7]
                low = y0 * (v[1] - v[0]) + y1 * (v[3] - v[2])
                high = y0 * (v[5] - v[4]) + y1 * (v[7] - v[6])
                grad[first + k, 0] += z0 * low + z1 * high
                grad[first + k, 1] += z0 * (e10 - e00) + z1 * (e11 - e01)
                grad[first + k, 2] += y0 * (e01 - e00) + y1 * (e11 - e10)


def huge_page_copy(tensor: Tensor) -> Tensor:
    """Copy of a CPU tensor in memory from numpy's allocator.

    On Linux numpy asks for huge pages for large arrays and torch does not; random look-ups in a table of tens
    of megabytes spend up to a third of their time on address translation otherwise.
    """
    return torch.from_numpy(tensor.detach().numpy().copy())


class NumbaBackend:
    """The kernels above, compiled, and spread over as many threads as torch uses (see `compiled`)."""

    def __init__(self) -> None:
        from numba.extending import register_jitable

        # Without fast maths: a product fused into the subtraction would round the offsets differently from
        # the reference, and not always into [0, 1].
        register_jitable(fastmath=False)(_tile_corners)

        self._forward = compiled(_forward_kernel)
        self._table_gradient = compiled(_table_gradient_kernel)
        self._position_gradient = compiled(_position_gradient_kernel)

    @staticmethod
    def _plan(positions: Tensor, table: Tensor, scalings: Tensor) -> tuple[np.ndarray, np.uint32, tuple, int]:
        """The table as [L, T, F], the mask that is "modulo T", a tuple of length F, the number of threads."""
        levels, features = scalings.shape[0], table.shape[1]
        grid = table.numpy().reshape(levels, -1, features)
        threads = torch.get_num_threads() if len(positions) * levels >= _MIN_PARALLEL_WORK else 1
        return grid, np.uint32(grid.shape[1] - 1), (0,) * features, threads

    def forward(self, positions: Tensor, table: Tensor, scalings: Tensor) -> Tensor:
        grid, mask, features, threads = self._plan(positions, table, scalings)
        out = positions.new_empty(len(positions), len(grid), len(features))
        head = (positions.numpy(), grid, scalings.numpy(), mask, out.numpy())
        calls = [(*head, *span, features) for span in spans(len(positions), threads)]
        run(self._forward, calls, threads)
        return out.flatten(1)

    def table_gradient(self, positions: Tensor, table: Tensor, scalings: Tensor, grad_out: Tensor) -> Tensor:
        grid, mask, features, threads = self._plan(positions, table, scalings)
        levels = len(grid)
        where, scales = positions.numpy(), scalings.numpy()
        incoming = grad_out.numpy().reshape(-1, levels, len(features))
        grad = np.empty_like(grid)  # numpy's allocator: see huge_page_copy
        # A level's rows belong to one thread, so nothing needs to be atomic. The levels left over after each
        # thread has had the same number are cut into spans of points; all spans but the first add up into a
        # level-sized buffer of their own. (5 levels on 2 threads: 2 each, and half of the fifth each.)
        left_over = levels % threads
        calls, partial_sums = [], []
        for level in range(levels):
            parts = 1 if level < levels - left_over else threads // left_over
            for part, span in enumerate(spans(len(positions), parts)):
                target = grad[level] if part == 0 else np.empty_like(grad[level])
                calls.append((where, incoming, scales[level], level, mask, target, *span, features))
                if part > 0:
                    partial_sums.append((level, target))
        run(self._table_gradient, calls, threads)
        for level, partial_sum in partial_sums:
            grad[level] += partial_sum
        return torch.from_numpy(grad).view_as(table)

    def position_gradient(self, positions: Tensor, table: Tensor, scalings: Tensor, grad_out: Tensor) -> Tensor:
        grid, mask, features, threads = self._plan(positions, table, scalings)
        grad = torch.empty_like(positions)
        incoming = grad_out.numpy().reshape(-1, len(grid), len(features))
        head = (positions.numpy(), grid, scalings.numpy(), mask, incoming, grad.numpy())
        calls = [(*head, *span, features) for span in spans(len(positions), threads)]
        run(self._position_gradient, calls, threads)
        return grad
