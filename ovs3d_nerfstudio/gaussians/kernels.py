"""The loops of compositing: plain Python here, compiled by `Kernels`. Importing this module imports numba.

A Gaussian is worked out in a band of rows of a tile, as one long loop over its pixels without branches, which the
compiler turns into SIMD code; everything is in the precision of the tensors. Few channels lie one after the other in
such bands ("planar"); with many, only the pixels that a Gaussian really covers are visited, and the loop goes over
the channels of a pixel ("wide").

Each (tile, Gaussian) writes its gradient to a place of its own, and these are summed in a fixed order: results do not
depend on the number of threads.

All in one file, because numba's cache on disk only notices changes of the file that a kernel is in.
"""

from __future__ import annotations

import math

import numpy as np

from ovs3d_nerfstudio.compiled import compiled
from ovs3d_nerfstudio.gaussians.binning import TILE
from ovs3d_nerfstudio.gaussians.lanes import LANES, add_product, add_scaled, load, store, total

__all__ = ["GEOMETRY", "Kernels"]

GEOMETRY = 8
"""Columns of an entry's gradients before its colours: mean (2), conic (3), opacity, absolute mean (2)."""

# A tile's list is left when no pixel is alive; that is looked for once in so many Gaussians.
_CHECK_EVERY = 8
_PIXELS = TILE * TILE
# Scratch of a tile is one array of so many numbers for each pixel, part by part: the compiler sees that parts at
# constant distances do not overlap. Bands begin and end at multiples of 4 rows: no remainder that is not SIMD code.
_X, _Y, _T, _LAST, _WEIGHT, _BEHIND, _RATIO, _ALPHA, _DOT = (part * _PIXELS for part in range(9))
_SCRATCH = 9 * _PIXELS
_ROWS_AT_ONCE = 4


def _exp(x):
    """exp(x); `Kernels` gives float32 the function below, which becomes SIMD code, and float64 the exact one."""
    return math.exp(x)


def _exp_float32(x):
    """exp(x) to 5e-7 for x in [-87, 0]: 2^n by setting the exponent bits, times a polynomial for 2^f."""
    scaled = (x if x > np.float32(-87.0) else np.float32(-87.0)) * np.float32(1.4426950408889634)
    whole = np.floor(scaled + np.float32(0.5))
    f = scaled - whole
    p = np.float32(1.535336188319500e-4)
    p = p * f + np.float32(1.339887440266574e-3)
    p = p * f + np.float32(9.618437357674640e-3)
    p = p * f + np.float32(5.550332471162809e-2)
    p = p * f + np.float32(2.402264791363012e-1)
    p = p * f + np.float32(6.931472028550421e-1)
    p = p * f + np.float32(1.0)
    bits = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return p * np.int32(bits).view(np.float32)


def _aligned(count, like):
    """Empty scratch of the dtype of an array that begins with a line of the cache: no SIMD access crosses two."""
    padding = 64 // like.itemsize
    scratch = np.empty(count + padding, like.dtype)
    skipped = (64 - scratch.ctypes.data % 64) // like.itemsize % padding
    return scratch[skipped : skipped + count]


def _band(record, top):
    """First and last + 1 pixel, in a tile, of the rows that a Gaussian's ellipse reaches."""
    low = max(math.ceil(record[1] - record[6] - 0.5) - top, 0) // _ROWS_AT_ONCE * _ROWS_AT_ONCE
    high = min(math.floor(record[1] + record[6] - 0.5) + 1 - top, TILE)
    high = -(-high // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
    return low * TILE, max(high, low) * TILE


def _begin_tile(s, rows, across):
    """Positions of the pixels, transmittance 1 (-1: ended) inside of the picture, no last position yet."""
    number = s.dtype.type
    for t in range(_PIXELS):
        row, x = t // TILE, t % TILE
        s[_X + t] = number(x)
        s[_Y + t] = number(row)
        s[_T + t] = number(1) if (row < rows) & (x < across) else number(-1)
        s[_LAST + t] = number(-1)
        s[_BEHIND + t] = number(0)


def _weigh(s, pixels, dx0, dy0, a, b, c, opacity, position):
    """Weights alpha T of one Gaussian in a band; moves T and the last position on.

    T is negative from where a pixel has ended, its size the transmittance that is left.
    """
    number = s.dtype.type
    one, limit, floor, end, zero = number(1), number(0.999), number(1 / 255), number(1e-4), number(0)
    half_a, half_c = number(0.5) * a, number(0.5) * c
    for t in range(pixels):
        dx, dy = dx0 - s[_X + t], dy0 - s[_Y + t]
        sigma = half_a * dx * dx + half_c * dy * dy + b * dx * dy
        alpha = opacity * _exp(-sigma)
        alpha = alpha if alpha < limit else limit
        alpha = alpha if (alpha >= floor) & (sigma >= zero) else zero
        before = s[_T + t]
        after = before * (one - alpha)
        alive = after > end
        s[_WEIGHT + t] = alpha * before if alive else zero
        s[_T + t] = after if alive else -abs(before)
        s[_LAST + t] = position if alive & (alpha > zero) else s[_LAST + t]


def _any_alive(s):
    alive = 0
    for t in range(_PIXELS):
        alive += s[_T + t] > 0
    return alive > 0


def _cover(record, first, pixels, dx0, dy0, edges, quads):
    """Lists the groups of 4 pixels of a band that the ellipse meets; returns their number. edges: scratch [2 * TILE]."""
    number = record.dtype.type
    zero, most, quarter = number(0), number(TILE // 4 - 1), number(0.25)
    over_a = number(1) / record[2]
    slope = record[3] * over_a
    shrink, reach = (record[4] - record[3] * slope) * over_a, record[7] * over_a
    top = dy0 - number(first // TILE)
    for row in range(TILE):
        dy = top - number(row)
        middle, inside = dx0 + slope * dy, reach - shrink * dy * dy
        half = np.sqrt(inside if inside > zero else zero)
        left, right = np.floor((middle - half) * quarter), np.floor((middle + half) * quarter)
        left = left if left > zero else zero
        edges[row] = left if left < most else most
        right = right if right < most else most
        edges[TILE + row] = right if right > -quarter else -number(1)
    count = 0
    for row in range(pixels // TILE):
        # All four places are written whether they are needed or not: a loop of unknown length costs more.
        start = row * TILE + 4 * int(edges[row])
        for group in range(4):
            quads[count + group] = start + 4 * group
        count += max(int(edges[TILE + row]) - int(edges[row]) + 1, 0)
    return count


def _add_colors(count, quads, band, color, sums, first):
    """sums[pixel] += weight * color for the listed pixels; sums [pixels * channels], channels a multiple of LANES."""
    channels = color.shape[0]
    for k in range(count):
        t = quads[k]
        w0, w1, w2, w3 = band[_WEIGHT + t], band[_WEIGHT + t + 1], band[_WEIGHT + t + 2], band[_WEIGHT + t + 3]
        for at in range(0, channels, LANES):
            value, p0 = load(color, at), (first + t) * channels + at
            p1, p2, p3 = p0 + channels, p0 + 2 * channels, p0 + 3 * channels
            store(sums, p0, add_scaled(load(sums, p0), w0, value))
            store(sums, p1, add_scaled(load(sums, p1), w1, value))
            store(sums, p2, add_scaled(load(sums, p2), w2, value))
            store(sums, p3, add_scaled(load(sums, p3), w3, value))


def _add_gradients(count, quads, band, grads, first, target):
    """target = Σ weight * grads[pixel] over the listed pixels."""
    channels = target.shape[0]
    for at in range(0, channels, LANES):
        even = load(grads, len(grads) - LANES)  # zeros
        odd = even
        for k in range(count):
            t = quads[k]
            place = (first + t) * channels + at
            even = add_scaled(even, band[_WEIGHT + t], load(grads, place))
            odd = add_scaled(odd, band[_WEIGHT + t + 1], load(grads, place + channels))
            even = add_scaled(even, band[_WEIGHT + t + 2], load(grads, place + 2 * channels))
            odd = add_scaled(odd, band[_WEIGHT + t + 3], load(grads, place + 3 * channels))
        store(target, at, add_scaled(even, band.dtype.type(1), odd))


def _dots(count, quads, band, color, grads, first):
    """Products of a colour with grads[pixel] for the listed pixels."""
    channels = color.shape[0]
    zeros = load(grads, len(grads) - LANES)
    for k in range(count):
        t = quads[k]
        place = (first + t) * channels
        d0, d1, d2, d3 = zeros, zeros, zeros, zeros
        for at in range(0, channels, LANES):
            value = load(color, at)
            d0 = add_product(d0, value, load(grads, place + at))
            d1 = add_product(d1, value, load(grads, place + at + channels))
            d2 = add_product(d2, value, load(grads, place + at + 2 * channels))
            d3 = add_product(d3, value, load(grads, place + at + 3 * channels))
        band[_DOT + t], band[_DOT + t + 1] = total(d0), total(d1)
        band[_DOT + t + 2], band[_DOT + t + 3] = total(d2), total(d3)


def _forward_kernel(
    records, items, tile_start, columns, tile_rows, colors, backgrounds, wide, out, left, last, start, stop
):
    """Fills out [C, H, W, X], left [C, H, W] (transmittance) and last [C, H, W] (position) in tiles start:stop.

    Colours [M, X] of the records; in wide mode X is padded, and out has the channels that are wanted.
    """
    height, width, channels = out.shape[1], out.shape[2], out.shape[3]
    number = colors.dtype.type
    half = number(0.5)
    s, edges, quads = _aligned(_SCRATCH, colors), _aligned(2 * TILE, colors), np.empty(_PIXELS // 4 + 4, np.int64)
    sums = _aligned(0 if wide else channels * _PIXELS, colors).reshape(channels, -1)
    wide_sums = _aligned(_PIXELS * colors.shape[1] if wide else 0, colors)
    for tile in range(start, stop):
        camera, place = divmod(tile, columns * tile_rows)
        top, edge = place // columns * TILE, place % columns * TILE
        rows, across = min(TILE, height - top), min(TILE, width - edge)
        _begin_tile(s, rows, across)
        sums[:] = 0
        wide_sums[:] = 0
        for entry in range(tile_start[tile], tile_start[tile + 1]):
            position = entry - tile_start[tile]
            if position % _CHECK_EVERY == 0 and not _any_alive(s):
                break
            m = items[entry]
            record, color = records[m], colors[m]
            first, end = _band(record, top)
            dx0, dy0 = record[0] - number(edge) - half, record[1] - number(top) - half
            band, pixels = s[first:], end - first
            _weigh(band, pixels, dx0, dy0, record[2], record[3], record[4], record[5], number(position))
            if wide:
                count = _cover(record, first, pixels, dx0, dy0, edges, quads)
                _add_colors(count, quads, band, color, wide_sums, first)
                continue
            for channel in range(channels):
                value, sum_of = color[channel], sums[channel, first:]
                for t in range(pixels):
                    sum_of[t] += value * band[_WEIGHT + t]
        for row in range(rows):
            for x in range(across):
                transmittance = abs(s[_T + row * TILE + x])
                left[camera, top + row, edge + x] = transmittance
                last[camera, top + row, edge + x] = s[_LAST + row * TILE + x]
                pixel = out[camera, top + row, edge + x]
                for channel in range(channels):
                    value = (
                        wide_sums[(row * TILE + x) * colors.shape[1] + channel]
                        if wide
                        else sums[channel, row * TILE + x]
                    )
                    pixel[channel] = value + transmittance * backgrounds[camera, channel]


def _load_gradients(grad_out, camera, top, edge, rows, across, padded, grads, wide_grads):
    """The incoming gradient of a tile, zero outside of the picture: grads [channel, pixel] or wide [pixel * channel]."""
    channels = grad_out.shape[3]
    wide = len(wide_grads) > 0
    grads[:] = 0
    wide_grads[:] = 0
    for row in range(rows):
        for x in range(across):
            pixel = grad_out[camera, top + row, edge + x]
            for channel in range(channels):
                if wide:
                    wide_grads[(row * TILE + x) * padded + channel] = pixel[channel]
                else:
                    grads[channel, row * TILE + x] = pixel[channel]


def _color_gradient_kernel(records, items, slots, tile_start, columns, tile_rows, grad_out, wide, partial, start, stop):
    """Fills partial [I, X] with each entry's gradient of its colours: front to back, nothing else is needed."""
    height, width, channels = grad_out.shape[1], grad_out.shape[2], grad_out.shape[3]
    number = grad_out.dtype.type
    half = number(0.5)
    s, edges, quads = _aligned(_SCRATCH, grad_out), _aligned(2 * TILE, grad_out), np.empty(_PIXELS // 4 + 4, np.int64)
    padded = -(-channels // LANES) * LANES
    grads = _aligned(0 if wide else channels * _PIXELS, grad_out).reshape(channels, -1)
    wide_grads = _aligned(_PIXELS * padded + LANES if wide else 0, grad_out)
    for tile in range(start, stop):
        camera, place = divmod(tile, columns * tile_rows)
        top, edge = place // columns * TILE, place % columns * TILE
        rows, across = min(TILE, height - top), min(TILE, width - edge)
        _load_gradients(grad_out, camera, top, edge, rows, across, padded, grads, wide_grads)
        _begin_tile(s, rows, across)
        alive = True
        for entry in range(tile_start[tile], tile_start[tile + 1]):
            position = entry - tile_start[tile]
            if alive and position % _CHECK_EVERY == 0:
                alive = _any_alive(s)
            target = partial[slots[entry]]
            if not alive:
                target[:] = 0
                continue
            record = records[items[entry]]
            first, end = _band(record, top)
            dx0, dy0 = record[0] - number(edge) - half, record[1] - number(top) - half
            band, pixels = s[first:], end - first
            _weigh(band, pixels, dx0, dy0, record[2], record[3], record[4], record[5], number(position))
            if wide:
                count = _cover(record, first, pixels, dx0, dy0, edges, quads)
                _add_gradients(count, quads, band, wide_grads, first, target)
                continue
            for channel in range(channels):
                incoming, summed = grads[channel, first:], number(0)
                for t in range(pixels):
                    summed += incoming[t] * band[_WEIGHT + t]
                target[channel] = summed


def _gradient_kernel(
    records,
    items,
    slots,
    tile_start,
    columns,
    tile_rows,
    colors,
    backgrounds,
    left,
    last,
    grad_out,
    grad_alpha,
    wide,
    partial,
    start,
    stop,
):
    """Fills partial [I, GEOMETRY + X]: each entry's gradients of its geometry and its colours.

    Back to front, as gsplat: T is divided by 1 - alpha step by step. What lies behind a Gaussian only enters as its
    product with the incoming gradient, one number a pixel however many channels there are.
    """
    height, width, channels = grad_out.shape[1], grad_out.shape[2], grad_out.shape[3]
    number = grad_out.dtype.type
    half, one, zero = number(0.5), number(1), number(0)
    limit, floor = number(0.999), number(1 / 255)
    s, edges, quads = _aligned(_SCRATCH, grad_out), _aligned(2 * TILE, grad_out), np.empty(_PIXELS // 4 + 4, np.int64)
    padded = -(-channels // LANES) * LANES
    grads = _aligned(0 if wide else channels * _PIXELS, grad_out).reshape(channels, -1)
    wide_grads = _aligned(_PIXELS * padded + LANES if wide else 0, grad_out)
    for tile in range(start, stop):
        camera, place = divmod(tile, columns * tile_rows)
        top, edge = place // columns * TILE, place % columns * TILE
        rows, across = min(TILE, height - top), min(TILE, width - edge)
        _load_gradients(grad_out, camera, top, edge, rows, across, padded, grads, wide_grads)
        _begin_tile(s, rows, across)
        furthest = number(-1)
        for row in range(rows):
            for x in range(across):
                transmittance = left[camera, top + row, edge + x]
                pixel = grad_out[camera, top + row, edge + x]
                behind = -grad_alpha[camera, top + row, edge + x]
                for channel in range(channels):
                    behind += backgrounds[camera, channel] * pixel[channel]
                s[_T + row * TILE + x] = transmittance
                s[_BEHIND + row * TILE + x] = transmittance * behind
                s[_LAST + row * TILE + x] = last[camera, top + row, edge + x]
                furthest = max(furthest, last[camera, top + row, edge + x])
        for entry in range(tile_start[tile + 1] - 1, tile_start[tile] - 1, -1):
            position = number(entry - tile_start[tile])
            target = partial[slots[entry]]
            if position > furthest:
                target[:] = 0
                continue
            m = items[entry]
            record, color = records[m], colors[m]
            a, b, c, opacity = record[2], record[3], record[4], record[5]
            half_a, half_c = half * a, half * c
            first, end = _band(record, top)
            dx0, dy0 = record[0] - number(edge) - half, record[1] - number(top) - half
            band, pixels = s[first:], end - first
            for t in range(pixels):
                dx, dy = dx0 - band[_X + t], dy0 - band[_Y + t]
                sigma = half_a * dx * dx + half_c * dy * dy + b * dx * dy
                full = opacity * _exp(-sigma)
                alpha = full if full < limit else limit
                used = (alpha >= floor) & (sigma >= zero) & (band[_LAST + t] >= position)
                alpha = alpha if used else zero
                ratio = one / (one - alpha)
                transmittance = band[_T + t] * ratio
                band[_T + t] = transmittance
                band[_WEIGHT + t] = alpha * transmittance
                band[_RATIO + t] = ratio
                band[_ALPHA + t] = alpha if full <= limit else zero
                band[_DOT + t] = zero
            if wide:
                count = _cover(record, first, pixels, dx0, dy0, edges, quads)
                _add_gradients(count, quads, band, wide_grads, first, target[GEOMETRY:])
                _dots(count, quads, band, color, wide_grads, first)
            else:
                for channel in range(channels):
                    value, incoming, summed = color[channel], grads[channel, first:], zero
                    for t in range(pixels):
                        band[_DOT + t] += value * incoming[t]
                        summed += band[_WEIGHT + t] * incoming[t]
                    target[GEOMETRY + channel] = summed
            v_sum, vx, vy, vxx, vxy, vyy, abs_x, abs_y = zero, zero, zero, zero, zero, zero, zero, zero
            for t in range(pixels):
                dx, dy = dx0 - band[_X + t], dy0 - band[_Y + t]
                dot, behind = band[_DOT + t], band[_BEHIND + t]
                v = band[_ALPHA + t] * (band[_RATIO + t] * behind - band[_T + t] * dot)
                band[_BEHIND + t] = behind + band[_WEIGHT + t] * dot
                v_sum += v
                vx += v * dx
                vy += v * dy
                vxx += v * dx * dx
                vxy += v * dx * dy
                vyy += v * dy * dy
                abs_x += abs(v * (a * dx + b * dy))
                abs_y += abs(v * (b * dx + c * dy))
            target[0], target[1] = a * vx + b * vy, b * vx + c * vy
            target[2], target[3], target[4] = half * vxx, vxy, half * vyy
            target[5] = -v_sum / opacity
            target[6], target[7] = abs_x, abs_y


def _sum_kernel(partial, slot_start, totals, start, stop):
    """Sums each Gaussian's partial gradients [I, G] into totals [M, G], in the order of its tiles."""
    for m in range(start, stop):
        row = totals[m]
        row[:] = 0
        for slot in range(slot_start[m], slot_start[m + 1]):
            for k in range(row.shape[0]):
                row[k] += partial[slot, k]


class Kernels:
    lanes = LANES
    columns_before_colors = GEOMETRY

    def __init__(self) -> None:
        from numba import types
        from numba.extending import overload, register_jitable

        register_jitable(_exp_float32)

        @overload(_exp)
        def _(x):
            if x == types.float32:
                return lambda x: _exp_float32(x)
            return lambda x: math.exp(x)

        wide = (_cover, _add_colors, _add_gradients, _dots)
        for helper in (_aligned, _band, _begin_tile, _weigh, _any_alive, _load_gradients, *wide):
            register_jitable(helper)
        self.forward = compiled(_forward_kernel)
        self.gradient = compiled(_gradient_kernel)
        self.color_gradient = compiled(_color_gradient_kernel)
        self.sum = compiled(_sum_kernel)
