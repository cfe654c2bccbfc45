"""Dense points of a scene whose cameras are known and of which some points are: block matching (OpenCV's SGBM) in pairs of
views, rectified by their known cameras, kept where other pairs agree.

The known points say which pairs look at the same things from a good angle, and how near and far to search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from ovs3d_nerfstudio.data.triangulation import Points
from ovs3d_nerfstudio.data.views import View

REFERENCES = 60
"""Views, evenly chosen, that are matched densely at most: more tell little new, and their depth takes memory."""
PARTNERS = 2
"""Other views that each is matched with."""
LEAST_SHARED = 12
"""Known points that both views of a pair must have before them."""
ANGLES = (2.0, 8.0, 25.0)
"""Degrees between the rays to a point of a pair's views, least, best and most."""
DISPARITIES = 256
"""Most disparities to search, in pixels."""
BLOCK = 5
"""Side in pixels of the blocks that are compared."""
MARGIN = 1.3
"""How much nearer and farther than the known points is searched."""
AGREEMENT, WITNESSES = 0.01, 2
"""Share of its distance within which that many pairs of other views must confirm a point."""


@dataclass(frozen=True)
class Rectified:
    """The depth of a view as one pair tells it, in a pinhole camera at the view's place."""

    view: int
    partner: int
    rotation: Float[ndarray, "3 3"]
    centre: Float[ndarray, "3"]
    focal: float
    corner: Float[ndarray, "2"]
    """Of the picture's left upper corner, in pixels from the axis."""
    depth: Float[ndarray, "H W"]
    """Along the pinhole's axis; NaN where nothing was found."""
    pixels: UInt8[ndarray, "H W 3"]

    def points(self, rows: ndarray, columns: ndarray) -> Float[ndarray, "N 3"]:
        """World points of pixels."""
        local = np.stack([columns + 0.5, rows + 0.5], -1) + self.corner
        local = np.concatenate([local / self.focal, np.ones((len(local), 1))], -1) * self.depth[rows, columns, None]
        return local @ self.rotation + self.centre

    def agrees(self, points: Float[ndarray, "N 3"]) -> Bool[ndarray, " N"]:
        """Which points lie where this depth says."""
        local = (points - self.centre) @ self.rotation.T
        with np.errstate(divide="ignore", invalid="ignore"):
            places = local[:, :2] / local[:, 2:] * self.focal - self.corner
            inside = (local[:, 2] > 0) & ((places >= 0) & (places < self.depth.shape[::-1])).all(-1)
            columns, rows = np.where(inside[:, None], places, 0).astype(int).T
            return inside & (np.abs(self.depth[rows, columns] / local[:, 2] - 1) < AGREEMENT)


def densify(
    views: list[View], known: Points, count: int, pool: ThreadPoolExecutor, advance: Callable[[], None]
) -> tuple[Float[ndarray, "N 3"], UInt8[ndarray, "N 3"]]:
    """About `count` points, or fewer, and their colours.

    Args:
        advance: called once for each pair of `stereo_pairs`.
    """

    def matched(pair: tuple[int, int]) -> Rectified | None:
        depth = rectified_depth(views, known, *pair)
        advance()
        return depth

    depths = [depth for depth in pool.map(matched, stereo_pairs(views, known)) if depth is not None]
    if not depths:
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint8)

    def drawn(k: int) -> tuple[ndarray, ndarray]:
        return confirmed(depths, k, count)

    found = list(pool.map(drawn, range(len(depths))))
    positions, colours = (np.concatenate(parts) for parts in zip(*found, strict=True))
    kept = np.random.default_rng(0).permutation(len(positions))[:count]
    return positions[kept], colours[kept]


def stereo_pairs(views: list[View], known: Points) -> list[tuple[int, int]]:
    """Pairs of a view and another that sees the same known points, from an angle that tells depth and still looks alike."""
    chosen = np.unique(np.linspace(0, len(views) - 1, min(REFERENCES, len(views))).round().astype(int))
    found = []
    least, best, most = ANGLES
    for i in chosen:
        points = known.positions[known.of(i)]
        if len(points) < LEAST_SHARED:
            continue
        scores = np.zeros(len(views))
        for j in range(len(views)):
            if j == i or views[j].forward @ views[i].forward < 0.7:
                continue
            shared = points[views[j].inside(views[j].project(points)[0])]
            if len(shared) < LEAST_SHARED:
                continue
            one, other = (centre - shared for centre in (views[i].centre, views[j].centre))
            cosines = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
            angle = np.degrees(np.arccos(np.median(cosines.clip(-1, 1))))
            baseline = views[j].centre - views[i].centre
            ahead = abs(baseline @ views[i].forward) / np.linalg.norm(baseline)
            if least < angle < most and ahead < 0.7:
                scores[j] = len(shared) / len(points) * min(angle / best, best / angle)
        found += [(int(i), int(j)) for j in np.argsort(-scores, kind="stable")[:PARTNERS] if scores[j] > 0]
    return found


def rectified_depth(views: list[View], known: Points, i: int, j: int) -> Rectified | None:
    """Depth of view i from view j; None where the two cannot be compared."""
    one, other = views[i], views[j]
    baseline = other.centre - one.centre
    length = float(np.linalg.norm(baseline))
    x = baseline / length
    y = np.cross(one.forward + other.forward, x)
    y /= np.linalg.norm(y)
    rotation = np.stack([x, y, np.cross(x, y)])
    local = (known.positions[known.of(i)] - one.centre) @ rotation.T
    near, far = np.quantile(local[:, 2], [0.01, 0.99]) * (1 / MARGIN, MARGIN)
    if near <= 0:
        return None
    focal = float(one.focal.mean())
    fewest = int(np.floor(focal * length / far))
    disparities = int(np.ceil((focal * length / near - fewest) / 16)) * 16
    if disparities > DISPARITIES:
        return None
    # The part of the pinhole's plane that view i sees, at most 53° to each side.
    seen = one.rays(one.border()) @ rotation.T
    seen = np.where(seen[:, 2:] > 0.05, seen[:, :2] / seen[:, 2:].clip(0.05), np.sign(seen[:, :2]) * 1.3)
    corner, end = np.floor(seen.clip(-1.3, 1.3) * focal).min(0), np.ceil(seen.clip(-1.3, 1.3) * focal).max(0)
    width, height = (end - corner).astype(int)
    places = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1).reshape(-1, 2) + corner
    directions = np.concatenate([places / focal, np.ones((len(places), 1))], -1) @ rotation
    greys, seen_in = [], []
    for view, shift in ((one, 0), (other, fewest)):
        # The other picture is shifted so that the farthest disparity is 0.
        moved = directions - shift / focal * x if shift else directions
        pixels, _ = view.project(view.centre + moved)
        inside = view.inside(pixels).reshape(height, width)
        maps = np.nan_to_num(pixels - 0.5, nan=-1e4).astype(np.float32).reshape(height, width, 2)
        warped = cv2.remap(view.pixels, maps[..., 0], maps[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        greys.append(warped)
        seen_in.append(inside)
    matcher = cv2.StereoSGBM_create(
        minDisparity=0,
        numDisparities=disparities,
        blockSize=BLOCK,
        P1=8 * 3 * BLOCK**2,
        P2=32 * 3 * BLOCK**2,
        disp12MaxDiff=1,
        preFilterCap=31,
        uniquenessRatio=8,
        speckleWindowSize=60,
        speckleRange=1,
        mode=cv2.STEREO_SGBM_MODE_SGBM_3WAY,
    )
    # SGBM looks at nothing within `disparities` of the left edge.
    padded = [cv2.copyMakeBorder(grey, 0, 0, disparities, 0, cv2.BORDER_REPLICATE) for grey in greys]
    disparity = matcher.compute(*padded)[:, disparities:].astype(float) / 16
    columns = np.arange(width) - disparity
    there = np.take_along_axis(seen_in[1], columns.round().astype(int).clip(0, width - 1), 1) & (columns >= 0)
    valid = (disparity > 0) & seen_in[0] & there
    depth = np.full((height, width), np.nan)
    depth[valid] = focal * length / (disparity[valid] + fewest)
    return Rectified(i, j, rotation, one.centre, focal, corner, depth.astype(np.float32), greys[0])


def confirmed(depths: list[Rectified], k: int, count: int) -> tuple[Float[ndarray, "n 3"], UInt8[ndarray, "n 3"]]:
    """Points of a pair that others confirm, drawn at random: enough that all pairs together give `count`."""
    mine = depths[k]
    rows, columns = np.nonzero(np.isfinite(mine.depth))
    drawn = np.random.default_rng(k).permutation(len(rows))[: 6 * count // len(depths)]
    rows, columns = rows[drawn], columns[drawn]
    points = mine.points(rows, columns)
    apart = [np.linalg.norm(other.centre - mine.centre) if other.view != mine.view else np.inf for other in depths]
    others = [depths[n] for n in np.argsort(apart, kind="stable")[:12] if np.isfinite(apart[n])]
    votes = sum((other.agrees(points).astype(int) for other in others), np.zeros(len(points), int))
    kept = votes >= WITNESSES
    return points[kept], mine.pixels[rows[kept], columns[kept]]
