"""A labelled point cloud: where the rays of the training views end, and what is seen there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import Progress

from ovs3d_nerfstudio.cli.points import LabelledPoints, classify
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.models.semantics import SemanticModel
from ovs3d_nerfstudio.pipeline import OVS3DPipeline

MOST_TRIES = 20
"""Batches without any point after which a run is said to show nothing."""
NEIGHBOURS = 20
"""Neighbours whose mean distance makes a point an outlier, as in ns-export."""


@torch.no_grad()
def sample_cloud(pipeline: OVS3DPipeline, num_points: int, rays_per_batch: int, std_ratio: float) -> LabelledPoints:
    """Points in the model's frame where rays of random training pixels end; rays that end nowhere are left out.

    Each has the label that its pixel has in `segmentation`. `std_ratio` takes out outliers, see open3d's
    `remove_statistical_outlier`; 0 keeps all. Raises CommandError when the rays end nowhere.
    """
    datamanager, model = pipeline.datamanager, pipeline.model
    assert datamanager.train_pixel_sampler is not None, "an open run has training views"
    datamanager.train_pixel_sampler.num_rays_per_batch = rays_per_batch
    pipeline.eval()
    parts: list[LabelledPoints] = []
    count = tries = 0
    with _labels_in_outputs(model), Progress(console=CONSOLE) as progress:
        task = progress.add_task("Sampling points", total=num_points)
        while count < num_points:
            rays, _ = datamanager.next_train(0)
            outputs = model(rays)
            ends = outputs["accumulation"][:, 0] > 0.5
            tries = 0 if ends.any() else tries + 1
            if tries == MOST_TRIES:
                raise CommandError("The rays of this run end nowhere; train it longer before you export it.")
            position = rays.origins + rays.directions * outputs["depth"]
            label, distance = outputs["label"] + 1, outputs["depth"][:, 0]
            columns = (position, outputs["rgb"], label, outputs["probability"], distance)
            parts.append(LabelledPoints(*(column[ends].cpu().numpy() for column in columns)))
            count += int(ends.sum())
            progress.update(task, completed=min(count, num_points))
    gathered = zip(*(vars(part).values() for part in parts), strict=True)
    cloud = LabelledPoints(*map(np.concatenate, gathered))[np.arange(num_points)]
    cloud.positions = cloud.positions.astype(np.float64)
    return cloud[_inliers(cloud.positions, std_ratio)] if std_ratio > 0 else cloud


@contextmanager
def _labels_in_outputs(model: SemanticModel) -> Iterator[None]:
    """Adds `label` and `probability` of each ray to the model's outputs, which are for the eye otherwise."""
    shown = model.shown

    def with_labels(semantics, rgb):
        label, probability = classify(model, semantics.coefficients)
        return shown(semantics, rgb) | {"label": label, "probability": probability}

    with mock.patch.object(model, "shown", with_labels):
        yield


def _inliers(positions: np.ndarray, std_ratio: float) -> np.ndarray:
    # Imported here: it takes seconds.
    import open3d

    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(positions))
    return np.asarray(cloud.remove_statistical_outlier(NEIGHBOURS, std_ratio)[1])
