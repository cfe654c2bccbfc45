"""Points of a scene whose cameras are known: features that match along epipolar lines, chained to tracks and triangulated.

All geometry is one of rays, so a lens matters only where a pixel becomes a ray (`views`). Errors are angles, given in pixels
of the picture in which they are made.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ovs3d_nerfstudio.data.views import View

FEATURES, CONTRAST = 4000, 0.01
"""SIFT: features a photo at most, the strongest; and its contrast threshold, a quarter of OpenCV's: known cameras throw
out the wrong matches that faint features bring."""
RANKS = (0, 1, 2, 4, 7, 11)
"""Which other views a view is matched with, counted from the nearest: near ones match best, far ones tell depth best."""
WIDEST = 50.0
"""Degrees between the directions of two views from which on SIFT finds little."""
EPIPOLAR = 1.5
"""Pixels that a match may lie off its epipolar line, in both pictures."""
RATIO = 0.85
"""How much nearer, in SIFT space, the best match must be than any other along the same line."""
ALIKE = 0.5
"""Least cosine of a match's descriptors."""
LIMITS = (12.0, 3.0, 1.5)
"""Pixels that a point may lie off each of its features: what lies farther off goes, in as many rounds."""
LEAST_ANGLE = 1.5
"""Degrees between two of a point's rays: under less, a quarter of a pixel moves it by more than a percent."""


@dataclass(frozen=True)
class Features:
    """What SIFT finds in a view."""

    rays: Float[ndarray, "N 3"]
    """Unit vectors in the world."""
    descriptors: Float[ndarray, "N 128"]
    """Unit vectors."""
    colors: UInt8[ndarray, "N 3"]
    angle: float
    """Of a pixel of the picture they were found in, in radians."""


@dataclass(frozen=True)
class Track:
    """Observations of points: observation k is feature `feature[k]` of view `view[k]`, of point `point[k]`."""

    point: Int[ndarray, " K"]
    view: Int[ndarray, " K"]
    feature: Int[ndarray, " K"]

    def only(self, kept: ndarray) -> Track:
        return Track(self.point[kept], self.view[kept], self.feature[kept])


@dataclass(frozen=True)
class Points:
    """Points of the world with their colours, and the views that see them."""

    positions: Float[ndarray, "N 3"]
    colors: UInt8[ndarray, "N 3"]
    point: Int[ndarray, " K"]
    view: Int[ndarray, " K"]
    """Point `point[k]` was found in view `view[k]`."""

    def of(self, view: int) -> Int[ndarray, " n"]:
        """Which points were found in a view."""
        return self.point[self.view == view]

    def views_of(self) -> Int[ndarray, " N"]:
        """In how many views each point was found."""
        seen = np.unique(np.stack([self.point, self.view]), axis=1)  # a track may pass through a view twice
        return np.bincount(seen[0], minlength=len(self.positions))

    def only(self, kept: Int[ndarray, " n"]) -> Points:
        """Some of them, in that order."""
        number = np.full(len(self.positions), -1)
        number[kept] = np.arange(len(kept))
        seen = number[self.point] >= 0
        return Points(self.positions[kept], self.colors[kept], number[self.point[seen]], self.view[seen])


def joined(one: Points, other: Points) -> Points:
    """The points of both, one behind the other."""
    return Points(
        np.concatenate([one.positions, other.positions]),
        np.concatenate([one.colors, other.colors]),
        np.concatenate([one.point, len(one.positions) + other.point]),
        np.concatenate([one.view, other.view]),
    )


NO_POINTS = Points(np.zeros((0, 3)), np.zeros((0, 3), np.uint8), np.zeros(0, int), np.zeros(0, int))


def triangulate(
    views: list[View],
    features: list[Features],
    chosen: list[tuple[int, int]],
    pool: ThreadPoolExecutor,
    advance: Callable[[], None],
) -> Points:
    """Points that at least two views agree about.

    Args:
        features: of each view, see `find_features`.
        chosen: which views to match, see `pairs`.
        advance: called once for each pair.
    """

    def matched(pair: tuple[int, int]) -> Int[ndarray, "M 2"]:
        i, j = pair
        matches = match(views[i].centre, views[j].centre, features[i], features[j])
        advance()
        return matches

    matches = list(pool.map(matched, chosen))
    return solve(np.stack([view.centre for view in views]), features, chain(features, chosen, matches))


def pairs(views: list[View]) -> list[tuple[int, int]]:
    """Which views to match: each with some of its neighbours, near in place and direction."""
    centres, forwards = np.stack([view.centre for view in views]), np.stack([view.forward for view in views])
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    turned = np.degrees(np.arccos((forwards @ forwards.T).clip(-1, 1)))
    # Two views half the capture apart are as unlike as two that look 45° apart.
    unlike = apart / max(apart.max(), 1e-12) * 90 + turned
    # A view and itself, or another of the same place, have no epipolar lines.
    unlike[(turned > WIDEST) | (apart <= 1e-4 * apart.max())] = np.inf
    found = set()
    for i, row in enumerate(unlike):
        nearest = np.argsort(row, kind="stable")
        found |= {(min(i, j), max(i, j)) for j in nearest[[r for r in RANKS if r < len(row)]] if np.isfinite(row[j])}
    return sorted((int(i), int(j)) for i, j in found)


def find_features(view: View) -> Features:
    """SIFT's features where the view counts."""
    sift = cv2.SIFT.create(FEATURES, contrastThreshold=CONTRAST, enable_precise_upscale=True)
    grey = cv2.cvtColor(view.pixels, cv2.COLOR_RGB2GRAY)
    keypoints, found = sift.detectAndCompute(grey, view.seen.astype(np.uint8) * 255)
    # OpenCV's pixel centres lie at whole numbers.
    pixels = np.array([keypoint.pt for keypoint in keypoints], float).reshape(-1, 2) + 0.5
    pixels = pixels.clip(0, view.size - 1e-3)
    descriptors = np.zeros((0, 128), np.float32) if found is None else found
    # Arandjelović and Zisserman, 2012: the root of a descriptor that sums to one compares better.
    descriptors = np.sqrt(descriptors / descriptors.sum(-1, keepdims=True).clip(1e-6))
    return Features(view.rays(pixels), descriptors, view.colours(pixels), 1 / float(view.focal.mean()))


def match(
    centre_a: Float[ndarray, "3"], centre_b: Float[ndarray, "3"], a: Features, b: Features
) -> Int[ndarray, "M 2"]:
    """Pairs of features that are each other's best along their epipolar lines, and clearly so."""
    if not len(a.rays) or not len(b.rays):
        return np.zeros((0, 2), int)
    baseline = (centre_b - centre_a) / np.linalg.norm(centre_b - centre_a)
    # A ray's epipolar plane holds it and the baseline; the sine of the angle between the other ray and that plane is how far
    # off the other feature lies.
    across_a, across_b = (np.cross(baseline, rays).astype(np.float32) for rays in (a.rays, b.rays))
    sines_a, sines_b = (np.linalg.norm(across, axis=-1).clip(1e-6) for across in (across_a, across_b))
    off = np.abs(across_a @ b.rays.T.astype(np.float32))
    near = off < EPIPOLAR * b.angle * sines_a[:, None]
    near &= off < EPIPOLAR * a.angle * sines_b[None]
    alike = a.descriptors @ b.descriptors.T
    alike[~near] = -1
    mine, forth, back = np.arange(len(alike)), alike.argmax(1), alike.argmax(0)
    best = alike[mine, forth]
    kept = (back[forth] == mine) & (best > ALIKE)
    alike[mine, forth] = -1
    # Squared distances of unit vectors are 2 − 2 cos.
    kept &= (1 - best) < RATIO**2 * (1 - np.maximum(alike.max(1), alike.max(0)[forth]))
    return np.stack([mine, forth], -1)[kept]


def chain(features: list[Features], chosen: list[tuple[int, int]], matches: list[ndarray]) -> Track:
    """Tracks: features that matches connect, directly or through others."""
    first = np.cumsum([0, *(len(found.rays) for found in features)])
    ends = np.concatenate(
        [np.zeros((0, 2), int), *(m + first[[i, j]] for (i, j), m in zip(chosen, matches, strict=True))]
    )
    total = int(first[-1])
    links = coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), (total, total))
    point = connected_components(links, directed=False)[1]
    view = np.repeat(np.arange(len(features)), np.diff(first))
    return _numbered(Track(point, view, np.arange(total) - first[view]))


def _numbered(track: Track) -> Track:
    """Without points of fewer than two observations; the others are counted from 0."""
    _, point, count = np.unique(track.point, return_inverse=True, return_counts=True)
    track = track.only(count[point] > 1)
    return Track(np.unique(track.point, return_inverse=True)[1], track.view, track.feature)


def solve(centres: Float[ndarray, "V 3"], features: list[Features], track: Track) -> Points:
    """Triangulates tracks; observations that disagree go, and so do points that are then badly seen."""
    first = np.cumsum([0, *(len(found.rays) for found in features)])
    rays = np.concatenate([found.rays for found in features])
    angles = np.array([found.angle for found in features])
    for limit in LIMITS:
        if not len(track.point):
            return NO_POINTS
        seen_along, origins = rays[first[track.view] + track.feature], centres[track.view]
        positions = nearest_to_rays(origins, seen_along, track.point)
        towards = positions[track.point] - origins
        towards /= np.linalg.norm(towards, axis=-1, keepdims=True).clip(1e-12)
        sines = np.linalg.norm(np.cross(towards, seen_along), axis=-1)
        before = (towards * seen_along).sum(-1) > 0
        track = _numbered(track.only(before & (sines < limit * angles[track.view])))
    if not len(track.point):
        return NO_POINTS
    seen_along = rays[first[track.view] + track.feature]
    positions = nearest_to_rays(centres[track.view], seen_along, track.point)
    count = len(positions)
    mean = _summed(seen_along, track.point, count)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True).clip(1e-12)
    # Two rays are at most twice as far apart as the widest is from their mean.
    widest = np.zeros(count)
    np.maximum.at(widest, track.point, np.linalg.norm(np.cross(mean[track.point], seen_along), axis=-1))
    kept = widest > np.sin(np.radians(LEAST_ANGLE) / 2)
    colours = np.concatenate([found.colors for found in features])[first[track.view] + track.feature].astype(float)
    colours = _summed(colours, track.point, count) / np.bincount(track.point)[:, None]
    numbers, chosen = np.cumsum(kept) - 1, kept[track.point]
    return Points(
        positions[kept], colours[kept].round().astype(np.uint8), numbers[track.point[chosen]], track.view[chosen]
    )


def nearest_to_rays(
    origins: Float[ndarray, "K 3"], rays: Float[ndarray, "K 3"], point: Int[ndarray, " K"]
) -> Float[ndarray, "N 3"]:
    """For each point the place with the least sum of squared angles to its rays, near enough: squared distances, divided by
    those to the cameras in a second pass."""
    count = int(point.max()) + 1
    across = np.eye(3) - rays[:, :, None] * rays[:, None]
    weight = np.ones(len(point))
    for _ in range(2):
        left = _summed((across * weight[:, None, None]).reshape(-1, 9), point, count).reshape(-1, 3, 3)
        right = _summed((across @ origins[..., None])[..., 0] * weight[:, None], point, count)
        # Rays that are parallel have no point; the little that is added keeps the matrix from being singular.
        left += 1e-12 * np.trace(left, axis1=1, axis2=2)[:, None, None] * np.eye(3)
        positions = np.linalg.solve(left, right[..., None])[..., 0]
        weight = 1 / ((positions[point] - origins) ** 2).sum(-1).clip(1e-12)
    return positions


def _summed(values: Float[ndarray, "K D"], point: Int[ndarray, " K"], count: int) -> Float[ndarray, "N D"]:
    """The sum of the values of each point."""
    return np.stack([np.bincount(point, column, count) for column in values.T], -1)
