"""Points that carry labels, and the connected objects of each class among them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

EDGE = 0.002
"""Share of an object's points on either side of each axis that its box leaves out: crumbs that hang on to it. Of Gaussians it
is a share of their opacity, and where they end is where their centres do: on a kitchen table each side of seven boxes is within
4.6 % of the true diagonal; with half a standard deviation of each Gaussian added, nine sides are off by more than 5 %."""
FAINT = 0.1
"""Gaussians of less opacity say nothing of where an object ends; those inside of it belong to it all the same."""
SPARSE = 0.05
"""Points where a class has less than this share of its typical density are no part of an object: floaters, which every
field has, lead from one thing to the next."""


@dataclass
class LabelledPoints:
    """A cloud; `class_id` is the label + 1, as in label images, and 0 is none."""

    positions: Float[np.ndarray, "N 3"]
    colors: Float[np.ndarray, "N 3"]
    """Of the photos, in [0, 1]."""
    class_id: Int[np.ndarray, " N"]
    probability: Float[np.ndarray, " N"]
    """Of the class, in [0, 1]."""
    distance: Float[np.ndarray, " N"]
    """From the camera that saw it, in the model's units; 0 for what no single camera saw."""
    opacity: Float[np.ndarray, " N"]
    """Of Gaussians, in [0, 1]; 1 for points."""

    def __getitem__(self, chosen: np.ndarray) -> LabelledPoints:
        """The chosen points."""
        return LabelledPoints(*(getattr(self, column.name)[chosen] for column in fields(self)))


@dataclass(frozen=True)
class SceneObject:
    """A connected object of one class."""

    prompt: str
    class_id: int
    """The prompt's place in the list, from 1."""
    count: int
    """Points or Gaussians of it."""
    centroid: Float[np.ndarray, " 3"]
    box_min: Float[np.ndarray, " 3"]
    box_max: Float[np.ndarray, " 3"]
    """Corners of the box along the axes of the frame, in its units."""
    probability: float
    """Mean over its points of the probability of its class."""
    members: Int[np.ndarray, " n"] = field(repr=False)
    """Which of the points, or of the run's Gaussians, are part of it."""


@dataclass(frozen=True)
class Found:
    """The objects of a scene, and what is none."""

    objects: list[SceneObject]
    """Class by class, the largest of each first."""
    crumbs: int
    """Pieces that are too small to be objects."""
    left_out: int
    """Points in crumbs, or alone."""
    alike: list[tuple[str, str, float]] = field(default_factory=list)
    """Pairs of prompts that are nearly the same to the encoder, and the correlation of their similarities."""


def connected(positions: Float[np.ndarray, "N 3"], gap: float) -> Int[np.ndarray, " N"]:
    """A component for each point, 0 the largest: points share one when steps of at most about `gap` lead between them.

    Points are gathered in cubes of side `gap`; cubes that touch, corners included, are connected.
    """
    cubes, cube_of, _ = _cubes(positions, gap)
    pairs = cKDTree(cubes).query_pairs(1.0, p=np.inf, output_type="ndarray")
    graph = coo_matrix((np.ones(len(pairs)), pairs.T), shape=(len(cubes),) * 2)
    component = connected_components(graph, directed=False)[1][cube_of]
    order = np.argsort(-np.bincount(component), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[component]


def crowded(positions: Float[np.ndarray, "N 3"], gap: float) -> Bool[np.ndarray, " N"]:
    """Whether each point's cube of side `gap` holds at least `SPARSE` of what the cube of the median point holds."""
    _, cube_of, counts = _cubes(positions, gap)
    neighbours = counts[cube_of]
    return neighbours >= SPARSE * np.median(neighbours)


def _cubes(positions: np.ndarray, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cubes of side `gap` that hold points, which of them holds each point, and how many each holds."""
    cubes, cube_of, counts = np.unique(
        np.floor(positions / gap).astype(np.int64), axis=0, return_inverse=True, return_counts=True
    )
    return cubes, cube_of.ravel(), counts


def find_objects(cloud: LabelledPoints, gap: float, least: float, prompts: list[str]) -> Found:
    """The connected objects of each class.

    Args:
        gap: see `connected`, in units of the cloud.
        least: smallest share of a class's points that makes an object.
        prompts: of the classes.
    """
    objects, crumbs, left_out = [], 0, 0
    for class_id in np.unique(cloud.class_id[cloud.class_id > 0]).tolist():
        chosen = np.flatnonzero(cloud.class_id == class_id)
        solid = chosen[cloud.opacity[chosen] >= FAINT]
        if not len(solid):
            left_out += len(chosen)
            continue
        dense = solid[crowded(cloud.positions[solid], gap)]
        component = connected(cloud.positions[dense], gap)
        sizes = np.bincount(component)
        count = int((sizes >= max(least * len(dense), 2)).sum())
        crumbs += len(sizes) - count
        loose = np.setdiff1d(chosen, dense[component < count], assume_unique=True)
        for part in range(count):
            core = dense[component == part]
            positions, opacity = cloud.positions[core], cloud.opacity[core]
            low, high = _quantiles(positions, opacity, EDGE)
            near = cloud.positions[loose]
            inside = ((near >= low - gap) & (near <= high + gap)).all(-1)
            members, loose = np.sort(np.concatenate([core, loose[inside]])), loose[~inside]
            objects.append(
                SceneObject(
                    prompts[class_id - 1],
                    class_id,
                    len(members),
                    np.average(positions, 0, opacity),
                    low,
                    high,
                    float(cloud.probability[members].mean()),
                    members,
                )
            )
        left_out += len(loose)
    return Found(objects, crumbs, left_out)


def _quantiles(
    positions: Float[np.ndarray, "n 3"], weights: Float[np.ndarray, " n"], edge: float
) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Where along each axis the share `edge` of the weight lies below, and above."""
    corners = []
    for values in positions.T:
        order = np.argsort(values)
        below = np.cumsum(weights[order]) - weights[order] / 2
        corners.append(np.interp(np.array([edge, 1 - edge]) * weights.sum(), below, values[order]))
    low, high = np.array(corners).T
    return low, high
