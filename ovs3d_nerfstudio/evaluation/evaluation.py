"""Compares segmentations with a scene's annotated masks, view by view (METHOD §5; the README says which protocol is which)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from ovs3d_nerfstudio.data.annotations import Annotations
from ovs3d_nerfstudio.evaluation.metrics import ViewMetrics, match_classes, relabel, summarise, view_metrics
from ovs3d_nerfstudio.pictures import view_names
from ovs3d_nerfstudio.prompts.prompts import find_classes_file


class Evaluator:
    """Collects the metrics of the views of one split."""

    def __init__(self, annotations: Annotations, views: Sequence[str]):
        """`views` are the names of the split's views (see `view_names`), in the order of their image indices."""
        self.annotations = annotations
        self.views = list(views)
        self.records: dict[str, ViewMetrics] = {}

    @staticmethod
    def of_scene(data: Path, split: Sequence[Path], scene: Sequence[Path]) -> Evaluator | None:
        """The evaluator of the photos `split` out of all photos `scene`; None when the data has no annotations."""
        if find_classes_file(data) is None:
            return None
        names = view_names(scene)
        return Evaluator(Annotations(data, scene), [names[path] for path in split])

    def check(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Reads every mask once, `sizes` being height and width of each view. Raises AnnotationError now rather than at the
        first evaluation, thousands of steps into a training."""
        for index, (height, width) in enumerate(sizes):
            self.truth(index, height, width)

    def truth(self, image_idx: int, height: int, width: int) -> Int[np.ndarray, "H W"] | None:
        """Class of each pixel, -1 where there is none; None when the view is not annotated."""
        view = self.views[image_idx]
        return self.annotations.labels(view, height, width) if view in self.annotations.views else None

    def record(self, image_idx: int, labels: Int[Tensor, "H W"], prompts: Sequence[str]) -> None:
        """Compare the labels of a view, which are indices of `prompts`; a view without masks is passed over."""
        truth = self.truth(image_idx, *labels.shape)
        if truth is not None:
            index = match_classes(prompts, self.annotations.classes)
            self.records[self.views[image_idx]] = view_metrics(
                relabel(labels, index), truth, len(self.annotations.classes)
            )

    def summary(self) -> dict[str, Any]:
        """Means over the recorded views, as `metrics.summarise` gives them."""
        return summarise(self.records, self.annotations.classes)

    def flat_summary(self) -> dict[str, float]:
        """The summary as one level of numbers, for nerfstudio's `ns-eval`: a class is `iou_<class>`."""
        if not self.records:
            return {}
        summary = self.summary()
        flat = {name: summary[name] for name in ("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou")}
        flat |= {f"iou_{name}": iou for name, iou in summary["classes"].items()}
        return {name: value for name, value in flat.items() if value is not None}
