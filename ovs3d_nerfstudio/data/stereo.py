"""Dense points of a scene whose cameras are known and of which some points are: block matching (OpenCV's SGBM) in pairs of
views, rectified by their known cameras, kept where other pairs agree.

The known points say which pairs look at the same things from a good angle, and how near and far to search.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from ovs3d_nerfstudio.data.triangulation import NO_POINTS, Points
from ovs3d_nerfstudio.data.views import View
from ovs3d_nerfstudio.pictures import evenly

REFERENCES = 60
"""Views, evenly chosen, that are matched densely at most: more tell little new, and their depth takes memory."""
PARTNERS = 2
"""Other views that each is matched with. With one, stereo takes half the time and its points are as exact, but lie in fewer
places: Gaussians begun there are 0.5 dB behind (held out) after 300 steps."""
LEAST_SHARED = 12
"""Known points that both views of a pair must have before them."""
ANGLES = (2.0, 8.0, 25.0)
"""Degrees between the rays to a point of a pair's views, least, best and most."""
DISPARITIES = 256
"""Most disparities to search, in pixels."""
BLOCK = 5
"""Side in pixels of the blocks that are compared."""
WIDEST = 1.3
"""Tangent of the angle from the axis, of 52°, beyond which nothing is matched: a pinhole stretches what is there."""
MARGIN = 1.3
"""How much nearer and farther than the known points is searched."""
AGREEMENT, WITNESSES, ASKED = 0.01, 2, 12
"""Share of its distance within which that many pairs of other views, of the nearest that many, must confirm a point."""
THROUGH = 0.03
"""Share of its distance beyond a point at which none of them may see something: it would be seen through. Blocks at the edge of
a thing that is near are matched as if they were all of it, so half of the points that lie before the true surface go so."""
DRAWN = 6
"""How many times as many points are drawn as are wanted: as many may be confirmed by none."""


@dataclass(frozen=True)
class Rectified:
    """The depth of a view as one pair tells it, in a pinhole camera at the view's place."""

    view: int
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

    def beyond(self, points: Float[ndarray, "N 3"]) -> Float[ndarray, " N"]:
        """How far behind points this depth is, as a share of theirs; NaN where it tells nothing."""
        local = (points - self.centre) @ self.rotation.T
        with np.errstate(divide="ignore", invalid="ignore"):
            places = local[:, :2] / local[:, 2:] * self.focal - self.corner
            inside = (local[:, 2] > 0) & ((places >= 0) & (places < self.depth.shape[::-1])).all(-1)
            columns, rows = np.where(inside[:, None], places, 0).astype(int).T
            return np.where(inside, self.depth[rows, columns] / local[:, 2] - 1, np.nan)


def densify(
    views: list[View],
    known: Points,
    chosen: list[tuple[int, int]],
    count: int,
    pool: ThreadPoolExecutor,
    advance: Callable[[], None],
) -> Points:
    """About `count` points, or fewer, each of one view. Equal arguments give equal points.

    Args:
        chosen: see `stereo_pairs`.
        advance: called once for each pair.
    """

    def matched(pair: tuple[int, int]) -> Rectified | None:
        depth = rectified_depth(views, known, *pair)
        advance()
        return depth

    depths = [depth for depth in pool.map(matched, chosen) if depth is not None]
    found = list(pool.map(lambda k: confirmed(depths, k, count), range(len(depths))))
    if not found:
        return NO_POINTS
    positions, colours = (np.concatenate(parts) for parts in zip(*found, strict=True))
    view = np.repeat([depth.view for depth in depths], [len(part) for part, _ in found])
    kept = np.sort(np.random.default_rng(0).permutation(len(positions))[:count])
    return Points(positions[kept], colours[kept], np.arange(len(kept)), view[kept])


def stereo_pairs(views: list[View], known: Points) -> list[tuple[int, int]]:
    """Pairs of a view and another that sees the same known points, from an angle that tells depth and still looks alike."""
    chosen = evenly(len(views), REFERENCES)
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
    """Depth of view i from view j; None where there is too much to search."""
    one, other = views[i], views[j]
    length = float(np.linalg.norm(other.centre - one.centre))
    # The pinhole's rows lie along the baseline, so that view i is always the left one; its axis looks between those of both.
    x = (other.centre - one.centre) / length
    y = np.cross(one.forward + other.forward, x)
    y /= np.linalg.norm(y)
    rotation = np.stack([x, y, np.cross(x, y)])
    near, far = np.quantile((known.positions[known.of(i)] - one.centre) @ rotation[2], [0.01, 0.99])
    if near <= 0:
        return None
    focal = float(one.focal.mean())
    fewest = int(focal * length / far / MARGIN)
    disparities = int(np.ceil((focal * length / near * MARGIN - fewest) / 16)) * 16
    if disparities > DISPARITIES:
        return None
    seen = one.rays(one.border()) @ rotation.T
    seen = focal * (seen[:, :2] / seen[:, 2:].clip(1e-3)).clip(-WIDEST, WIDEST)
    corner = np.floor(seen.min(0))
    width, height = (np.ceil(seen.max(0)) - corner).astype(int)
    places = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1).reshape(-1, 2) + corner
    directions = np.concatenate([places / focal, np.ones((len(places), 1))], -1) @ rotation
    left, left_seen = _seen_along(one, directions, height)
    # The other picture is moved so that the fewest disparity is 0.
    right, right_seen = _seen_along(other, directions - fewest / focal * x, height)
    disparity = _disparity(left, right, disparities)
    columns = np.arange(width) - disparity
    there = np.take_along_axis(right_seen, columns.round().astype(int).clip(0, width - 1), 1) & (columns >= 0)
    valid = (disparity > 0) & left_seen & there
    depth = np.full((height, width), np.nan, np.float32)
    depth[valid] = focal * length / (disparity[valid] + fewest)
    return Rectified(i, rotation, one.centre, focal, corner, depth, left)


def _seen_along(
    view: View, directions: Float[ndarray, "N 3"], height: int
) -> tuple[UInt8[ndarray, "h w 3"], Bool[ndarray, "h w"]]:
    """What a view sees along directions that fill a picture row by row, and where that counts."""
    pixels, _ = view.project(view.centre + directions)
    inside = view.inside(pixels).reshape(height, -1)
    x, y = np.nan_to_num(pixels - 0.5, nan=-1).astype(np.float32).T.reshape(2, height, -1)
    return cv2.remap(view.pixels, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), inside


def _disparity(
    left: UInt8[ndarray, "h w 3"], right: UInt8[ndarray, "h w 3"], disparities: int
) -> Float[ndarray, "h w"]:
    """How many pixels farther left the right picture shows what the left one does; negative where nobody knows."""
    matcher = cv2.StereoSGBM.create(
        minDisparity=0,
        numDisparities=disparities,
        blockSize=BLOCK,
        # OpenCV's advice, for three channels.
        P1=8 * 3 * BLOCK**2,
        P2=32 * 3 * BLOCK**2,
        disp12MaxDiff=1,
        preFilterCap=31,
        uniquenessRatio=8,
        speckleWindowSize=60,
        speckleRange=1,
        mode=cv2.STEREO_SGBM_MODE_SGBM_3WAY,
    )
    # It looks at nothing within `disparities` of the left edge.
    padded = [cv2.copyMakeBorder(side, 0, 0, disparities, 0, cv2.BORDER_REPLICATE) for side in (left, right)]
    return matcher.compute(*padded)[:, disparities:] / 16


def confirmed(depths: list[Rectified], k: int, count: int) -> tuple[Float[ndarray, "n 3"], UInt8[ndarray, "n 3"]]:
    """Points of a pair that others confirm, drawn at random: enough that all pairs together give `count`."""
    mine = depths[k]
    rows, columns = np.nonzero(np.isfinite(mine.depth))
    drawn = np.random.default_rng(k).permutation(len(rows))[: DRAWN * count // len(depths)]
    rows, columns = rows[drawn], columns[drawn]
    points = mine.points(rows, columns)
    others = sorted(
        (other for other in depths if other.view != mine.view),
        key=lambda other: float(np.linalg.norm(other.centre - mine.centre)),
    )[:ASKED]
    beyond = np.stack([np.full(len(points), np.nan), *(other.beyond(points) for other in others)])
    kept = ((np.abs(beyond) < AGREEMENT).sum(0) >= WITNESSES) & ~(beyond > THROUGH).any(0)
    return points[kept], mine.pixels[rows[kept], columns[kept]]
