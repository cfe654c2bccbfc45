"""Which Gaussians meet which tile of a picture, front to back.

The tiles of a Gaussian are those of the square that gsplat gives it (three standard deviations, whole tiles) in
which its ellipse really lies: the ellipse inside which its alpha reaches 1/255, below which compositing skips it.
What is left out is therefore exactly what would not have been seen, and the pictures are gsplat's.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovs3d_nerfstudio.compiled import compiled

__all__ = ["TILE", "Bins", "bin_gaussians", "may_be_seen"]

TILE = 16
"""Edge of a tile in pixels; a compile-time constant of the compositing loops."""
RECORD = 8
"""Columns of a record: mean x and y, conic a, b and c, opacity, half the height of its ellipse, one unused."""


@dataclass(frozen=True, eq=False)
class Bins:
    """The visible Gaussians of a view or several, and the tiles they meet. All arrays are numpy's."""

    records: np.ndarray
    """[M, 8]: the visible Gaussians, camera by camera, front to back."""
    flat: np.ndarray
    """[M] int64: row of each visible Gaussian in the tensors that were binned."""
    tile_start: np.ndarray
    """[C * tiles + 1] int64: where each tile's entries begin; a camera's tiles are row-major."""
    items: np.ndarray
    """[I] int32: rows of `records`, tile by tile, front to back."""
    slots: np.ndarray
    """[I] int32: each entry's place when entries are ordered by Gaussian, for sums in a fixed order."""
    slot_start: np.ndarray
    """[M + 1] int64: where each visible Gaussian's slots begin."""
    width: int
    height: int
    cameras: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along a row and rows of tiles."""
        return -(-self.width // TILE), -(-self.height // TILE)

    def tile_spans(self, parts: int) -> list[tuple[int, int]]:
        """Cuts the tiles into at most so many ranges with about as many entries each."""
        wanted = np.linspace(0, self.tile_start[-1], parts + 1)[1:-1]
        cuts = np.unique(np.concatenate([[0], np.searchsorted(self.tile_start, wanted), [len(self.tile_start) - 1]]))
        return [(int(a), int(b)) for a, b in itertools.pairwise(cuts)]


# ----------------------------------------------------------------------------------------------------------
# Kernels: plain Python here, compiled on first use.
# ----------------------------------------------------------------------------------------------------------


def _records_kernel(means, conics, opacities, flat, records):
    """Fills the records [M, 8] of the Gaussians `flat`, in its order."""
    for m in range(flat.shape[0]):
        i = flat[m]
        a, b, c = conics[i, 0], conics[i, 1], conics[i, 2]
        records[m, 0], records[m, 1] = means[i, 0], means[i, 1]
        records[m, 2], records[m, 3], records[m, 4] = a, b, c
        records[m, 5] = opacities[i]
        # sigma = -ln(alpha / opacity) is at most `reach` where alpha reaches 1/255. The slack is far more than
        # rounding and far less than a pixel: the loops test alpha itself.
        reach = 2 * math.log(max(255 * opacities[i], 1e-30)) * 1.001 + 1e-3
        det = a * c - b * b
        records[m, 6] = math.sqrt(reach * a / det) if reach > 0 and det > 0 and a > 0 and c > 0 else -1.0
        records[m, 7] = reach


def _bands_kernel(records, radii, flat, tile_columns, tile_rows, band_start, band_columns):
    """Columns [first, last) of each Gaussian in each row of tiles; returns the number of rows, or fills them.

    `band_start` [M + 1] and `band_columns` [bands, 3] (row, first, last): the first call, with no band_columns,
    fills band_start.
    """
    fill = band_columns.shape[0] > 0
    bands = 0
    for m in range(records.shape[0]):
        band_start[m] = bands
        x, y, half_height = float(records[m, 0]), float(records[m, 1]), float(records[m, 6])
        if half_height < 0:
            continue
        radius = float(radii[flat[m]])
        # gsplat's square, in whole tiles; then what of its rows the ellipse reaches (pixel centres at .5).
        first_row = max(math.floor((y - radius) / TILE), 0, math.floor((y - half_height - 0.5) / TILE))
        last_row = min(math.ceil((y + radius) / TILE), tile_rows, math.floor((y + half_height - 0.5) / TILE) + 1)
        if last_row <= first_row:
            continue
        if not fill:
            bands += last_row - first_row
            continue
        first_column = max(math.floor((x - radius) / TILE), 0)
        last_column = min(math.ceil((x + radius) / TILE), tile_columns)
        a, b, c = float(records[m, 2]), float(records[m, 3]), float(records[m, 4])
        reach = float(records[m, 7])
        det = a * c - b * b
        tip = b * math.sqrt(reach / (c * det))  # the ellipse is widest to the right at dy = -tip, to the left at tip
        for row in range(first_row, last_row):
            low = max(row * TILE + 0.5 - y, -half_height)
            high = min(row * TILE + TILE - 0.5 - y, half_height)
            dy = min(max(-tip, low), high)
            right = x - b / a * dy + math.sqrt(max((reach - dy * dy * det / a) / a, 0.0))
            dy = min(max(tip, low), high)
            left = x - b / a * dy - math.sqrt(max((reach - dy * dy * det / a) / a, 0.0))
            band_columns[bands, 0] = row
            band_columns[bands, 1] = max(first_column, math.floor((left - 0.5) / TILE))
            band_columns[bands, 2] = min(last_column, math.floor((right - 0.5) / TILE) + 1)
            bands += 1
    band_start[records.shape[0]] = bands
    return bands


def _count_kernel(band_start, band_columns, camera_of, tile_columns, tile_rows, tile_start, slot_start):
    """Fills tile_start [C * tiles + 1] and slot_start [M + 1] from the bands; returns the number of entries."""
    tile_start[:] = 0
    entries = 0
    for m in range(band_start.shape[0] - 1):
        slot_start[m] = entries
        for band in range(band_start[m], band_start[m + 1]):
            first = (camera_of[m] * tile_rows + band_columns[band, 0]) * tile_columns
            for column in range(band_columns[band, 1], band_columns[band, 2]):
                tile_start[first + column + 1] += 1
                entries += 1
    slot_start[band_start.shape[0] - 1] = entries
    for tile in range(1, tile_start.shape[0]):
        tile_start[tile] += tile_start[tile - 1]
    return entries


def _fill_kernel(band_start, band_columns, camera_of, tile_columns, tile_rows, tile_start, items, slots):
    """Fills items [I] and slots [I]: Gaussians come front to back, and so does every tile's list."""
    cursor = tile_start.copy()
    slot = 0
    for m in range(band_start.shape[0] - 1):
        for band in range(band_start[m], band_start[m + 1]):
            first = (camera_of[m] * tile_rows + band_columns[band, 0]) * tile_columns
            for column in range(band_columns[band, 1], band_columns[band, 2]):
                place = cursor[first + column]
                cursor[first + column] = place + 1
                items[place] = m
                slots[place] = slot
                slot += 1


def _may_be_seen_kernel(means, sizes, view, camera, width, height, window, near, far, eps2d, seen):
    """Fills seen [N]: False for Gaussians that cannot meet the picture, by a bound on their radius.

    The bound: the largest eigenvalue of a projected covariance is at most |J|² s² + eps2d, with s the largest
    standard deviation and J the Jacobian of the projection, whose slopes gsplat limits.
    """
    fx, fy, cx, cy = camera[0, 0], camera[1, 1], camera[0, 2], camera[1, 2]
    limit_x = max(cx, width - cx) / fx + 0.15 * width / fx
    limit_y = max(cy, height - cy) / fy + 0.15 * height / fy
    stretch = fx * fx * (1 + limit_x * limit_x) + fy * fy * (1 + limit_y * limit_y)
    left, top, right, bottom = window[0], window[1], window[0] + window[2], window[1] + window[3]
    for n in range(means.shape[0]):
        px, py, pz = means[n, 0], means[n, 1], means[n, 2]
        z = view[2, 0] * px + view[2, 1] * py + view[2, 2] * pz + view[2, 3]
        x = view[0, 0] * px + view[0, 1] * py + view[0, 2] * pz + view[0, 3]
        y = view[1, 0] * px + view[1, 1] * py + view[1, 2] * pz + view[1, 3]
        if not (z > 0.999 * near and z < 1.001 * far):
            seen[n] = False
            continue
        u = (fx * x + camera[0, 1] * y) / z + cx
        v = fy * y / z + cy
        radius = 3.003 * math.sqrt(stretch * sizes[n] * sizes[n] / (z * z) + eps2d + 0.1) + 2.0
        seen[n] = u + radius > left and u - radius < right and v + radius > top and v - radius < bottom


class _Kernels:
    def __init__(self) -> None:
        self.records = compiled(_records_kernel)
        self.bands = compiled(_bands_kernel)
        self.count = compiled(_count_kernel)
        self.fill = compiled(_fill_kernel)
        self.may_be_seen = compiled(_may_be_seen_kernel)


@functools.cache
def _kernels() -> _Kernels:
    return _Kernels()


def may_be_seen(
    means: Float[Tensor, "n 3"],
    sizes: Float[Tensor, " n"],
    viewmat: Float[Tensor, "4 4"],
    K: Float[Tensor, "3 3"],
    width: int,
    height: int,
    window: tuple[int, int, int, int],
    near_plane: float,
    far_plane: float,
    eps2d: float,
) -> Int[Tensor, " m"]:
    """Indices of all Gaussians that meet a window of a pinhole picture, and of few others, on the device of `means`.

    Projecting a Gaussian costs a hundred times more than this test, and most Gaussians miss a small window.

    Args:
        sizes: The largest standard deviation of each Gaussian.
        window: Left, top, width and height of the window.
    """
    seen = np.empty(len(means), np.bool_)
    arrays = [_array(tensor) for tensor in (means, sizes)]
    matrices = [_array(matrix).astype(np.float64) for matrix in (viewmat, K)]
    planes = (float(near_plane), float(far_plane), float(eps2d))
    _kernels().may_be_seen(*arrays, *matrices, float(width), float(height), window, *planes, seen)
    return torch.from_numpy(np.flatnonzero(seen)).to(means.device)


def bin_gaussians(
    means2d: Float[Tensor, "f 2"],
    conics: Float[Tensor, "f 3"],
    opacities: Float[Tensor, " f"],
    radii: Int[Tensor, " f"],
    depths: Float[Tensor, " f"],
    camera_ids: Int[Tensor, " f"] | None,
    cameras: int,
    width: int,
    height: int,
) -> Bins:
    """Sorts projected Gaussians by depth and into tiles; those with a radius of 0 are left out.

    Args:
        camera_ids: The camera that each row belongs to, ascending; None where the rows are cameras × Gaussians.
        cameras: Number of cameras C.
    """
    kernels = _kernels()
    means, shapes, opacity, radius, depth = map(_array, (means2d, conics, opacities, radii, depths))
    rows = len(means) // max(cameras, 1)
    camera_of_row = _array(camera_ids) if camera_ids is not None else None
    parts, counts = [], []
    for camera in range(cameras):
        first, last = camera * rows, (camera + 1) * rows
        if camera_of_row is not None:
            first, last = np.searchsorted(camera_of_row, [camera, camera + 1])
        visible = first + np.flatnonzero(radius[first:last] > 0)
        parts.append(visible[_by_depth(depth[visible])])
        counts.append(len(visible))
    flat = np.concatenate(parts) if parts else np.empty(0, np.int64)
    camera_of = np.repeat(np.arange(cameras), counts)

    records = np.empty((len(flat), RECORD), means.dtype)
    kernels.records(means, shapes, opacity, flat, records)
    columns, tile_rows = -(-width // TILE), -(-height // TILE)
    band_start, slot_start = np.empty(len(flat) + 1, np.int64), np.empty(len(flat) + 1, np.int64)
    bands = kernels.bands(records, radius, flat, columns, tile_rows, band_start, np.empty((0, 3), np.int32))
    band_columns = np.empty((bands, 3), np.int32)
    if bands:
        kernels.bands(records, radius, flat, columns, tile_rows, band_start, band_columns)
    tile_start = np.empty(cameras * columns * tile_rows + 1, np.int64)
    grid = (camera_of, columns, tile_rows)
    entries = kernels.count(band_start, band_columns, *grid, tile_start, slot_start)
    items, slots = np.empty(entries, np.int32), np.empty(entries, np.int32)
    kernels.fill(band_start, band_columns, *grid, tile_start, items, slots)
    return Bins(records, flat, tile_start, items, slots, slot_start, width, height, cameras)


def _by_depth(depths: np.ndarray) -> np.ndarray:
    """Indices from near to far; Gaussians of one depth stay in their order."""
    if depths.dtype != np.float32 or len(depths) == 0 or depths.min() < 0:
        return np.argsort(depths, kind="stable")
    # The bits of positive floats are ordered as they are: sorting integers that end in the index is five times
    # faster than a stable sort of indices.
    keys = (depths.view(np.int32).astype(np.int64) << 32) | np.arange(len(depths))
    keys.sort()
    return keys & 0xFFFFFFFF


def _array(tensor: Tensor) -> Any:
    if tensor.is_floating_point():  # numba knows no half precision
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor.detach().cpu().contiguous().numpy()
