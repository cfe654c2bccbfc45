"""Fast multiresolution hash encoding with nerfstudio's own table layout and numbers.

nerfstudio's pip-only ("torch") hash encoding materialises every corner of every level as a tensor. The
encoding here computes the same function (Müller et al. 2022, "Instant Neural Graphics Primitives with a
Multiresolution Hash Encoding", section 3) in fused kernels: numba on the CPU, Triton on CUDA (see
`hash_grid_triton`), and torch's own operations in bounded memory where neither can run (see `hash_grid_torch`). The
parameter keeps its name, shape and row order, so checkpoints are interchangeable in both directions.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from subprocess import SubprocessError
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.field_components.encodings import HashEncoding
from torch import Tensor, nn

from ovs3d_nerfstudio.fields import hash_grid_torch
from ovs3d_nerfstudio.memory import is_out_of_memory

__all__ = ["FastHashEncoding", "use_fast_hash_grids"]

# Points whose corners are worked out together. That part is plain arithmetic and becomes SIMD code once it is
# split from the table look-ups; a tile of this many points keeps its scratch space in the first-level cache.
_TILE = 128
# Below this many (point, level) pairs one thread finishes before a second one has woken up.
_MIN_PARALLEL_WORK = 8192
# No "nnan"/"ninf": positions that are NaN must come out as NaN, as they do in the reference.
_FASTMATH = {"contract", "nsz", "reassoc"}


# ----------------------------------------------------------------------------------------------------------
# CPU kernels. Plain Python here, compiled by `_NumbaBackend` on first use, so that importing this module does
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


@functools.lru_cache(maxsize=4)
def _thread_pool(pid: int, threads: int) -> ThreadPoolExecutor:
    """Worker threads of this process: a forked child has another pid and must not use its parent's pool."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ovs3d-hash-grid")


def _run(kernel: Callable, calls: Sequence[tuple], threads: int) -> None:
    if threads == 1:
        for arguments in calls:
            kernel(*arguments)
    else:
        list(_thread_pool(os.getpid(), threads).map(lambda arguments: kernel(*arguments), calls))


def _spans(points: int, parts: int) -> list[tuple[int, int]]:
    return [(points * part // parts, points * (part + 1) // parts) for part in range(parts)]


def _huge_page_copy(tensor: Tensor) -> Tensor:
    """Copy of a CPU tensor in memory from numpy's allocator.

    On Linux numpy asks for huge pages for large arrays and torch does not; random look-ups in a table of tens
    of megabytes spend up to a third of their time on address translation otherwise.
    """
    return torch.from_numpy(tensor.detach().numpy().copy())


class _NumbaBackend:
    """The kernels above, compiled, and spread over as many threads as torch uses.

    Numba's own parallel loops are not used: its "workqueue" layer aborts the process when two threads launch
    a loop at once (nerfstudio's viewer and trainer do), its OpenMP layer when a forked child launches one.
    Kernels that release the GIL, run from an ordinary thread pool, have neither problem.
    """

    def __init__(self) -> None:
        import numba
        from numba.extending import register_jitable

        # Without fast maths: a product fused into the subtraction would round the offsets differently from
        # the reference, and not always into [0, 1].
        register_jitable(fastmath=False)(_tile_corners)

        def compiled(kernel: Callable) -> Callable:
            try:
                return numba.njit(nogil=True, fastmath=_FASTMATH, cache=True)(kernel)
            except RuntimeError:  # no directory for the cache is writable: compile in every process
                return numba.njit(nogil=True, fastmath=_FASTMATH)(kernel)

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
        calls = [(*head, *span, features) for span in _spans(len(positions), threads)]
        _run(self._forward, calls, threads)
        return out.flatten(1)

    def table_gradient(self, positions: Tensor, table: Tensor, scalings: Tensor, grad_out: Tensor) -> Tensor:
        grid, mask, features, threads = self._plan(positions, table, scalings)
        levels = len(grid)
        where, scales = positions.numpy(), scalings.numpy()
        incoming = grad_out.numpy().reshape(-1, levels, len(features))
        grad = np.empty_like(grid)  # numpy's allocator: see _huge_page_copy
        # A level's rows belong to one thread, so nothing needs to be atomic. The levels left over after each
        # thread has had the same number are cut into spans of points; all spans but the first add up into a
        # level-sized buffer of their own. (5 levels on 2 threads: 2 each, and half of the fifth each.)
        left_over = levels % threads
        calls, partial_sums = [], []
        for level in range(levels):
            parts = 1 if level < levels - left_over else threads // left_over
            for part, span in enumerate(_spans(len(positions), parts)):
                target = grad[level] if part == 0 else np.empty_like(grad[level])
                calls.append((where, incoming, scales[level], level, mask, target, *span, features))
                if part > 0:
                    partial_sums.append((level, target))
        _run(self._table_gradient, calls, threads)
        for level, partial_sum in partial_sums:
            grad[level] += partial_sum
        return torch.from_numpy(grad).view_as(table)

    def position_gradient(self, positions: Tensor, table: Tensor, scalings: Tensor, grad_out: Tensor) -> Tensor:
        grid, mask, features, threads = self._plan(positions, table, scalings)
        grad = torch.empty_like(positions)
        incoming = grad_out.numpy().reshape(-1, len(grid), len(features))
        head = (positions.numpy(), grid, scalings.numpy(), mask, incoming, grad.numpy())
        calls = [(*head, *span, features) for span in _spans(len(positions), threads)]
        _run(self._position_gradient, calls, threads)
        return grad


@contextmanager
def _untraced() -> Iterator[None]:
    """Nobody interrupts what runs in here.

    nerfstudio's viewer ends a render that is out of date by an exception from `sys.settrace`, at whatever line is next:
    that must not be one of an import or of a compiler's, which would leave half of it behind.
    """
    trace = sys.gettrace()
    if trace is None:
        yield
        return
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


@functools.cache
def _backend(device: torch.device) -> Any:
    """What computes hash encodings on a device: an object with the three functions above.

    Kept for the life of the process, so that only what a missing or broken backend raises may decide it: whatever else
    comes by (an interrupt, a shortage of memory) goes through, and the next call tries again.
    """
    try:
        if device.type == "cpu":
            return _NumbaBackend()
        if device.type == "cuda":
            from ovs3d_nerfstudio.fields import hash_grid_triton

            # Triton compiles at the first launch, for which it needs a C compiler: find out on one point.
            hash_grid_triton.forward(*(torch.zeros(size, device=device) for size in ((1, 3), (2, 1), (1,))))
            return hash_grid_triton
    except (ImportError, AttributeError, OSError, RuntimeError, SubprocessError, *_compiler_errors()) as error:
        if is_out_of_memory(error):
            raise
        warnings.warn(f"Fast hash grids cannot run on {device}, using torch code: {error}", stacklevel=3)
    return hash_grid_torch


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What numba and Triton raise where they cannot compile; of those only that have been imported."""
    homes = (
        ("numba.core.errors", "NumbaError"),
        ("triton.errors", "TritonError"),
        ("triton.compiler", "CompilationError"),
    )
    found = (getattr(sys.modules.get(module), name, None) for module, name in homes)
    return tuple(kind for kind in found if kind is not None)


class _HashGrid(torch.autograd.Function):
    """positions [N, 3], table [L*T, F], scalings [L], all contiguous and of one dtype, to [N, L*F]."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, table: Tensor, scalings: Tensor, backend: Any) -> Tensor:
        ctx.save_for_backward(positions, table, scalings)
        ctx.backend = backend
        if len(positions) == 0:
            return positions.new_empty(0, len(scalings) * table.shape[1])
        with _untraced():  # the first call compiles
            return backend.forward(positions, table, scalings)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # once_differentiable would stay silent: it only looks at grad_out
            raise RuntimeError("hash grids have no second derivatives: create_graph=True is not supported")
        positions, table, scalings = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_positions, grad_table = None, None
        if len(positions) == 0:
            return torch.zeros_like(positions), torch.zeros_like(table), None, None
        if ctx.needs_input_grad[0]:
            grad_positions = ctx.backend.position_gradient(positions, table, scalings, grad_out)
        if ctx.needs_input_grad[1]:
            grad_table = ctx.backend.table_gradient(positions, table, scalings, grad_out)
        return grad_positions, grad_table, None, None


class FastHashEncoding(HashEncoding):
    """nerfstudio's `HashEncoding(implementation="torch")`, computed by fused kernels.

    Same table (`hash_table` [num_levels * 2**log2_hashmap_size, features_per_level], one level after the
    other), same hash, same trilinear interpolation, hence the same state dict and, up to rounding, the same
    values and gradients (Müller et al. 2022, section 3, except that coarse levels are hashed too). The first
    call on a CPU compiles for a few seconds; the result is cached on disk where that is possible.

    The gradients cannot be differentiated again: a backward pass with create_graph=True raises RuntimeError.

    Args:
        num_levels: Number of grids L.
        min_res: Cells along one axis of the coarsest grid.
        max_res: Cells along one axis of the finest grid.
        log2_hashmap_size: Every level has 2**log2_hashmap_size rows.
        features_per_level: Features F of a row.
        hash_init_scale: Rows start uniform in [-hash_init_scale, hash_init_scale].
        implementation: Only "torch": tiny-cuda-nn lays its table out differently.
        interpolation: None or "Linear".

    Raises:
        ValueError: implementation is not "torch".
    """

    position_gradients: bool = True
    """Whether gradients may flow to the positions. nerfacto's field asks for them at every step, needed or not: set this
    to False where nothing (camera optimiser, normals) uses them."""

    def __init__(
        self,
        num_levels: int = 16,
        min_res: int = 16,
        max_res: int = 1024,
        log2_hashmap_size: int = 19,
        features_per_level: int = 2,
        hash_init_scale: float = 0.001,
        implementation: Literal["torch"] = "torch",
        interpolation: Literal["Linear"] | None = None,
    ) -> None:
        if implementation != "torch":
            raise ValueError(f'implementation must be "torch", not {implementation!r}')
        grid = (num_levels, min_res, max_res, log2_hashmap_size, features_per_level)
        super().__init__(*grid, hash_init_scale, implementation=implementation, interpolation=interpolation)
        self.hash_table.data = _huge_page_copy(self.hash_table)

    def forward(self, in_tensor: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch features"]:
        """Encodes positions.

        Args:
            in_tensor: Positions, normally in [0, 1]; outside of it the grid simply goes on (and is hashed).

        Returns:
            L*F features, level by level: float32, or float64 if the positions or the table are.

        Raises:
            ValueError: the last dimension is not 3.
        """
        if in_tensor.shape[-1] != 3:
            raise ValueError(f"positions must have 3 coordinates, got shape {tuple(in_tensor.shape)}")
        table = self.hash_table
        if in_tensor.device != table.device:
            return super().forward(in_tensor)
        with _untraced():
            backend = _backend(table.device)
        # Half-precision positions are scaled in float32 by the reference too (its scalings are float32).
        dtype = torch.promote_types(torch.promote_types(in_tensor.dtype, table.dtype), torch.float32)
        positions = in_tensor.reshape(-1, 3).to(dtype).contiguous()
        if not self.position_gradients:
            positions = positions.detach()
        scalings = self.scalings.to(device=table.device, dtype=dtype)
        out = _HashGrid.apply(positions, table.to(dtype).contiguous(), scalings, backend)
        return out.view(*in_tensor.shape[:-1], self.get_out_dim())


def use_fast_hash_grids(module: nn.Module) -> int:
    """Makes every torch-implemented `HashEncoding` inside a module (itself included) a `FastHashEncoding`.

    The objects stay the same and only change class, which is safe because the subclass has no state of its
    own: parameters, their names, hooks, and whatever else refers to the encodings (nerfstudio's density field
    holds its encoding twice) stay valid. Encodings of tiny-cuda-nn, and of other subclasses, are left alone.

    Args:
        module: Any module tree, for example a nerfacto model.

    Returns:
        The number of encodings changed.
    """
    changed = 0
    for part in module.modules():
        if type(part) is HashEncoding and part.tcnn_encoding is None:
            part.__class__ = FastHashEncoding
            if part.hash_table.device.type == "cpu":
                part.hash_table.data = _huge_page_copy(part.hash_table)
            changed += 1
    return changed
