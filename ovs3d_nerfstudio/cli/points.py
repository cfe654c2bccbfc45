"""Labels of points in space, and the connected objects of a labelled cloud."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

from ovs3d_nerfstudio.models.semantics import SemanticModel

CHUNK = 1 << 16
"""Points labelled at once."""
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
    """From the camera that saw it, in the model's units."""

    def __getitem__(self, chosen: np.ndarray) -> LabelledPoints:
        """The chosen points."""
        return LabelledPoints(*(getattr(self, column.name)[chosen] for column in fields(self)))


def classify(
    model: SemanticModel, coefficients: Float[Tensor, "*n K"]
) -> tuple[Int[Tensor, "*n"], Float[Tensor, "*n"]]:
    """The winning class and its probability, at the temperature that FDA had in training."""
    p = (model.class_scores(coefficients) / model.fda_temperature()).softmax(-1)
    probability, label = p.max(-1)
    return label, probability


@torch.no_grad()
def label_positions(
    model: SemanticModel, positions: Float[np.ndarray, "N 3"]
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Class and probability of points in the model's frame, from the semantic field at these very points."""
    labels, probabilities = [], []
    for part in torch.from_numpy(positions.astype(np.float32)).split(CHUNK):
        label, probability = classify(model, model.semantic_field(part.to(model.device))[0])
        labels.append(label.cpu())
        probabilities.append(probability.cpu())
    return torch.cat(labels).numpy(), torch.cat(probabilities).numpy()


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


def objects(cloud: LabelledPoints, gap: float, least: float, name_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """The connected objects of each class, largest first, as JSON can hold them.

    Args:
        gap: see `connected`, in units of the cloud.
        least: smallest share of a class's points that makes an object.
        name_of: the prompt of a class id.
    """
    found = []
    for class_id in np.unique(cloud.class_id[cloud.class_id > 0]).tolist():
        chosen = cloud[cloud.class_id == class_id]
        chosen = chosen[crowded(chosen.positions, gap)]
        component = connected(chosen.positions, gap)
        for part in range(component.max() + 1):
            points = chosen[component == part]
            if len(points.positions) < max(least * len(chosen.positions), 2):
                break
            low, high = np.quantile(points.positions, [EDGE, 1 - EDGE], axis=0)
            found.append(
                {
                    "prompt": name_of(class_id),
                    "class_id": class_id,
                    "points": len(points.positions),
                    "centroid": points.positions.mean(0).tolist(),
                    "box": {"min": low.tolist(), "max": high.tolist()},
                    "probability": float(points.probability.mean()),
                }
            )
    return found
