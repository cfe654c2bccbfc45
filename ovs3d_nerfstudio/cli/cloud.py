"""A labelled point cloud: where the rays of the training views end, and what is seen there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import Progress
from torch import Tensor

from ovs3d_nerfstudio.cli.points import classify
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.models.nerf import OVS3DModel
from ovs3d_nerfstudio.models.semantics import SemanticModel
from ovs3d_nerfstudio.objects.points import LabelledPoints
from ovs3d_nerfstudio.pipeline import OVS3DPipeline

MOST_TRIES = 20
"""Batches without any point after which a run is said to show nothing."""
NEIGHBOURS = 20
"""Neighbours whose mean distance makes a point an outlier, as in ns-export."""


@torch.no_grad()
def sample_cloud(pipeline: OVS3DPipeline, num_points: int, rays_per_batch: int, std_ratio: float) -> LabelledPoints:
    """Points in the model's frame where random training pixels end; pixels that end nowhere are left out.

    Each has the label that its pixel has in `segmentation`. `std_ratio` takes out outliers, see open3d's
    `remove_statistical_outlier`; 0 keeps all. Raises CommandError when the pixels end nowhere.
    """
    pipeline.eval()
    batches = _along_rays if isinstance(pipeline.model, OVS3DModel) else _in_views
    parts: list[LabelledPoints] = []
    count = tries = 0
    with _labels_in_outputs(pipeline.model), Progress(console=CONSOLE) as progress:
        task = progress.add_task("Sampling points", total=num_points)
        for part in batches(pipeline, num_points, rays_per_batch):
            found = len(part.positions)
            tries = 0 if found else tries + 1
            if tries == MOST_TRIES:
                raise CommandError("The pixels of this run end nowhere; train it longer before you export it.")
            parts.append(part)
            count += found
            progress.update(task, completed=min(count, num_points))
            if count >= num_points:
                break
    gathered = zip(*(vars(part).values() for part in parts), strict=True)
    cloud = LabelledPoints(*map(np.concatenate, gathered))[np.arange(min(count, num_points))]
    cloud.positions = cloud.positions.astype(np.float64)
    return cloud[_inliers(cloud.positions, std_ratio)] if std_ratio > 0 else cloud


def _along_rays(pipeline: OVS3DPipeline, num_points: int, rays_per_batch: int) -> Iterator[LabelledPoints]:
    """Batches of random rays, without end."""
    datamanager = pipeline.datamanager
    assert datamanager.train_pixel_sampler is not None, "an open run has training views"
    datamanager.train_pixel_sampler.num_rays_per_batch = rays_per_batch
    while True:
        rays, _ = datamanager.next_train(0)
        outputs = pipeline.model(rays)
        yield _ends(rays.origins + rays.directions * outputs["depth"], outputs["depth"], outputs)


def _in_views(pipeline: OVS3DPipeline, num_points: int, rays_per_batch: int) -> Iterator[LabelledPoints]:
    """As many random pixels of each training view as it takes, again and again: a splat has whole pictures only."""
    cameras = pipeline.datamanager.train_dataset.cameras
    share = math.ceil(1.1 * num_points / len(cameras))
    while True:
        for view in range(len(cameras)):
            camera = cameras[view : view + 1].to(pipeline.device)
            outputs = pipeline.model.get_outputs_for_camera(camera)
            height, width = outputs["depth"].shape[:2]
            chosen = torch.randint(height * width, (share,), device=pipeline.device)
            pixels = {name: output.flatten(0, 1)[chosen] for name, output in outputs.items()}
            row, col = chosen // width + 0.5, chosen % width + 0.5
            # Along the axes of nerfstudio's cameras; depth is along the last one.
            across = torch.stack([(col - camera.cx[0]) / camera.fx[0], (camera.cy[0] - row) / camera.fy[0]], -1)
            along = torch.cat([across, -torch.ones_like(across[:, :1])], -1) @ camera.camera_to_worlds[0, :, :3].T
            steps = along * pixels["depth"]
            yield _ends(camera.camera_to_worlds[0, :, 3] + steps, steps.norm(dim=-1, keepdim=True), pixels)


def _ends(positions: Float[Tensor, "n 3"], distance: Float[Tensor, "n 1"], outputs: dict) -> LabelledPoints:
    """The points of those pixels that end somewhere."""
    ends = outputs["accumulation"][:, 0] > 0.5
    columns = (positions, outputs["rgb"], outputs["label"] + 1, outputs["probability"], distance[:, 0])
    return LabelledPoints(*(column[ends].cpu().numpy() for column in columns))


@contextmanager
def _labels_in_outputs(model: SemanticModel) -> Iterator[None]:
    """Adds `label` and `probability` of each pixel to the model's outputs, which are for the eye otherwise."""
    shown = model.shown

    def with_labels(semantics, *picture):
        label, probability = classify(model, semantics.coefficients)
        return shown(semantics, *picture) | {"label": label, "probability": probability}

    with mock.patch.object(model, "shown", with_labels):
        yield


def _inliers(positions: np.ndarray, std_ratio: float) -> np.ndarray:
    # Imported here: it takes seconds.
    import open3d

    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(positions))
    return np.asarray(cloud.remove_statistical_outlier(NEIGHBOURS, std_ratio)[1])
