"""Points that carry labels, and the connected objects of each class among them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

EDGE = 0.002
"""Share of an object's points on either side of each axis that its box leaves out: crumbs that hang on to it."""
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
    """Points in crumbs, or where their class is sparse."""
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
        dense = chosen[crowded(cloud.positions[chosen], gap)]
        left_out += len(chosen) - len(dense)
        component = connected(cloud.positions[dense], gap)
        sizes = np.bincount(component)
        count = int((sizes >= max(least * len(dense), 2)).sum())
        crumbs += len(sizes) - count
        left_out += int(sizes[count:].sum())
        for part in range(count):
            members = dense[component == part]
            positions = cloud.positions[members]
            low, high = np.quantile(positions, [EDGE, 1 - EDGE], axis=0)
            objects.append(
                SceneObject(
                    prompts[class_id - 1],
                    class_id,
                    len(members),
                    positions.mean(0),
                    low,
                    high,
                    float(cloud.probability[members].mean()),
                    members,
                )
            )
    return Found(objects, crumbs, left_out)
