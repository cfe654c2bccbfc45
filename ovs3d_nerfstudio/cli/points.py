"""Labels of points in space, and the connected objects of a labelled cloud."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovs3d_nerfstudio.models.semantics import SemanticModel
from ovs3d_nerfstudio.objects.points import LabelledPoints, find_objects

CHUNK = 1 << 16
"""Points labelled at once."""


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


def objects(cloud: LabelledPoints, gap: float, least: float, name_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """The connected objects of each class, largest first, as JSON can hold them.

    Args:
        gap: see `connected`, in units of the cloud.
        least: smallest share of a class's points that makes an object.
        name_of: the prompt of a class id.
    """
    found = find_objects(cloud, gap, least, [name_of(i + 1) for i in range(cloud.class_id.max(initial=0))]).objects
    return [
        {
            "prompt": one.prompt,
            "class_id": one.class_id,
            "points": one.count,
            "centroid": one.centroid.tolist(),
            "box": {"min": one.box_min.tolist(), "max": one.box_max.tolist()},
            "probability": one.probability,
        }
        for one in found
    ]
