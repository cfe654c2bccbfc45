"""How well predicted labels agree with annotated ones: per view, and as means over views.

Labels are class indices, -1 is "none": in the truth an unlabelled pixel, which is left out of every figure
but the two `authors_` ones; in a prediction a prompt that is no annotated class, or a place where the run has nothing, which is always wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import minimum_filter
from torch import Tensor

from ovs3d_nerfstudio.prompts.prompts import prompt_key

FIGURES = {
    "miou": "mIoU",
    "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy",
    "boundary_iou": "boundary IoU",
}
"""The figures that people are shown, in their order, and what they are called."""
BOUNDARY_SHARE = 0.02
"""Width of the boundary in boundary IoU as a share of the image's diagonal (Cheng et al., CVPR 2021)."""
_SCALARS = ("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou", "authors_miou", "authors_accuracy")

Labels = Int[np.ndarray, "H W"] | Int[Tensor, "H W"]


class ViewMetrics(TypedDict):
    """Metrics of one view, in [0, 1]; nan where nothing is there to be measured."""

    miou: float
    """Mean of `iou` over the classes present in the truth of the view."""
    pixel_accuracy: float
    """Share of the labelled pixels whose label is right."""
    mean_accuracy: float
    """Mean over the classes present of the share of their pixels whose label is right."""
    boundary_iou: float
    """Mean over the classes present of `boundary_iou` of their masks."""
    authors_miou: float
    """As 3D-OVS's released code: a prediction on an unlabelled pixel is an error, and every class counts,
    with 0 if it is absent. Equal to `miou` where every pixel is labelled and every class present."""
    authors_accuracy: float
    """As 3D-OVS's released code: the share of all pixels, unlabelled ones counted as wrong."""
    iou: Float[np.ndarray, " C"]
    """Intersection over union of each class on labelled pixels, nan for a class absent from the truth."""
    confusion: Int[np.ndarray, "C C"]
    """Labelled pixels of class (row) predicted as class (column); a prediction of none is in no column."""


def match_classes(prompts: Sequence[str], classes: Sequence[str]) -> Int[np.ndarray, " P"]:
    """For each prompt, the index of its class among `classes`, ignoring case; -1 if it is none of them."""
    index = {prompt_key(name): i for i, name in enumerate(classes)}
    return np.array([index.get(prompt_key(prompt), -1) for prompt in prompts], dtype=np.int64)


def relabel(prediction: Labels, index: Int[np.ndarray, " P"]) -> Int[np.ndarray, "H W"]:
    """Turns prompt indices into class indices, by the `index` that `match_classes` gave; -1 stays -1."""
    # Shifted by one, for `index[-1]` would be the class of the last prompt.
    return np.concatenate([[-1], index])[_numpy(prediction) + 1]


def view_metrics(prediction: Labels, truth: Labels, num_classes: int) -> ViewMetrics:
    """Compares the labels of one view.

    The IoU of a class equals scikit-learn's `jaccard_score(truth, prediction, labels=range(C), average=None)`
    on the labelled pixels (METHOD §5). A class absent from the truth is in no mean, yet where it is predicted
    it is an error of the classes that are there.

    Args:
        prediction: labels in -1 … C-1.
        truth: labels in -1 … C-1.
        num_classes: C.

    Raises:
        ValueError: the shapes differ, or a label is out of range.
    """
    predicted, true = _numpy(prediction), _numpy(truth)
    if predicted.shape != true.shape or true.ndim != 2 or true.size == 0:
        raise ValueError(
            f"The prediction is {predicted.shape} and the truth {true.shape}; "
            "give two pictures of labels, alike in size."
        )
    for name, labels in (("prediction", predicted), ("truth", true)):
        if labels.min() < -1 or labels.max() >= num_classes:
            raise ValueError(
                f"The {name} has labels from {labels.min()} to {labels.max()}; with {num_classes} classes "
                f"they must be from -1 to {num_classes - 1}."
            )
    from sklearn.metrics import confusion_matrix  # here: it takes a second, and few who read of classes count pixels

    # None, on either side, is one class more: the last row and the last column.
    none = num_classes
    counts = confusion_matrix(
        np.where(true < 0, none, true).ravel(),
        np.where(predicted < 0, none, predicted).ravel(),
        labels=range(num_classes + 1),
    )
    right = counts.diagonal()[:none]
    true_pixels = counts[:none].sum(axis=1)
    present = true_pixels > 0
    iou = _ratio(right, true_pixels + counts[:none, :none].sum(axis=0) - right)
    authors_iou = _ratio(right, true_pixels + counts[:, :none].sum(axis=0) - right)
    masked = np.where(true < 0, -1, predicted)
    boundaries = [boundary_iou(masked == c, true == c) for c in np.flatnonzero(present)]
    return ViewMetrics(
        miou=_mean(iou[present]),
        pixel_accuracy=float(_ratio(right.sum(), true_pixels.sum())),
        mean_accuracy=_mean(_ratio(right, true_pixels)[present]),
        boundary_iou=_mean(boundaries),
        authors_miou=_mean(np.nan_to_num(authors_iou)),
        authors_accuracy=float(right.sum() / true.size),
        iou=np.where(present, iou, np.nan),
        confusion=counts[:none, :none],
    )


def boundary_iou(prediction: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Boundary IoU of two masks (Cheng et al., CVPR 2021, eq. 2): `|G_d∩G ∩ P_d∩P| / |(G_d∩G) ∪ (P_d∩P)|`.

    `G_d ∩ G` are the pixels of a mask within `d` of its contour, `d` being 2 % of the image's diagonal
    rounded to pixels, at least 1. As in the authors' code, distance is that of `d` erosions by 3×3, and where
    the image's border cuts the mask there is contour too. nan if both masks are empty.
    """
    prediction, truth = _boundary(prediction), _boundary(truth)
    return float(_ratio((prediction & truth).sum(), (prediction | truth).sum()))


def summarise(views: Mapping[str, ViewMetrics], classes: Sequence[str]) -> dict[str, Any]:
    """Means over views, as JSON can hold them: plain floats, None for what is nowhere to be measured.

    Returns:
        The mean over views of every scalar of `ViewMetrics`; `classes`, mapping each class to the mean IoU
        over the views in whose truth it is; and `views`, mapping each view to its scalars and its `classes`.
    """
    ious = np.array([view["iou"] for view in views.values()], dtype=np.float64).reshape(len(views), len(classes))
    figures: dict[str, dict[str, Any]] = {name: dict(view) for name, view in views.items()}

    def described(scalars: Mapping[str, Any], iou: Iterable[float]) -> dict[str, Any]:
        by_class = {name: _jsonable(value) for name, value in zip(classes, iou, strict=True)}
        return {**{name: _jsonable(scalars[name]) for name in _SCALARS}, "classes": by_class}

    means = {name: _mean([view[name] for view in figures.values()]) for name in _SCALARS}
    return {
        **described(means, [_mean(column) for column in ious.T]),
        "views": {name: described(view, view["iou"]) for name, view in figures.items()},
    }


def _boundary(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    distance = max(1, round(BOUNDARY_SHARE * math.hypot(*mask.shape)))
    # d erosions by 3×3 are one minimum over 2d+1 squared, which is separable; 0 outside makes the border a
    # contour.
    eroded = minimum_filter(mask, size=2 * distance + 1, mode="constant", cval=0)
    return mask & ~eroded


def _numpy(labels: Labels) -> Int[np.ndarray, "H W"]:
    return labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, nan where `whole` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the values that are not nan; nan if there are none (`np.nanmean` would warn)."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else math.nan


def _jsonable(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
