"""The references of the quality benchmark, which show what a field adds: the 2D pyramid alone, its plain average over 3D
points or over Gaussians, and what the same field learns from true labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from spans import plan_of
from torch import Tensor

from ovs3d_nerfstudio.encoders.base import image_text_encoder, token_encoder
from ovs3d_nerfstudio.evaluation.evaluation import Evaluator
from ovs3d_nerfstudio.evaluation.metrics import match_classes, relabel
from ovs3d_nerfstudio.evaluation.splits import SegmentedView
from ovs3d_nerfstudio.features.basis import scale_cells
from ovs3d_nerfstudio.features.extraction import extract
from ovs3d_nerfstudio.models.nerf import OVS3DModel
from ovs3d_nerfstudio.pictures import read_picture
from ovs3d_nerfstudio.pipeline import OVS3DPipeline
from ovs3d_nerfstudio.prompts.prompts import find_classes_file, read_prompts_file

Scores = dict[str, tuple[dict, list[SegmentedView]]]
"""Summary and views of each split that has annotated views."""
SPLITS = ("test", "train")
"""Held-out protocol, and the paper's: annotated views that are trained on, their labels never."""
DEPTH_SHRINK = 1 / 3
"""Training views' depth is rendered smaller for `average-3d`: cells are larger than three pixels anyway."""
DEPTH_TOLERANCE = 0.03
"""A point counts as seen by a view when it is not farther than this share behind what the view renders there."""


class QualityError(ValueError):
    """A row cannot be run as asked; the message is a sentence for the user."""


class TrueTeachers:
    """Stands in for `Teachers`: a ray is taught the text embedding of its true class, at every scale."""

    def __init__(self, pipeline: OVS3DPipeline):
        self.num_scales = pipeline.config.model.num_scales
        self.windows = pipeline.datamanager.teachers.windows  # where Gaussians look; none of their losses takes part
        paths = pipeline.datamanager.train_dataset.image_filenames
        folder = paths[0].parent.parent
        classes = find_classes_file(folder)
        if classes is None or not (folder / "label_maps").is_dir():
            raise QualityError(f"The row 'truth' needs the folder {folder / 'label_maps'}; leave the row out.")
        prompts, listed = pipeline.model.segmenter.prompts, read_prompts_file(classes)
        # A label map holds line numbers of classes.txt; anything beyond is no class, here the last row, which is zero.
        order = np.full(256, -1)
        order[: len(listed)] = [prompts.index(name) for name in listed]
        maps = [np.asarray(Image.open(folder / "label_maps" / f"{path.stem}.png")) for path in paths]
        self.labels = torch.from_numpy(order[np.stack(maps)]).to(pipeline.device)
        segmenter = pipeline.model.segmenter
        taught = segmenter.project(segmenter.text).T
        self.taught = torch.cat([taught, torch.zeros_like(taught[:1])])
        self.ranges = taught.new_zeros(len(paths), self.num_scales, 2, len(prompts))  # RDA takes no part

    def at(self, view: Int[Tensor, " R"], y: Float[Tensor, " R"], x: Float[Tensor, " R"]) -> Float[Tensor, "R S K"]:
        """Coefficients of the true class of each pixel; `y`, `x` in [0, 1) of the picture's height and width."""
        _, height, width = self.labels.shape
        label = self.labels[view, (y * height).long(), (x * width).long()]
        return self.taught[label][:, None].expand(-1, self.num_scales, -1)


def _score(
    data: Path, paths: dict[str, list[Path]], prompts: Sequence[str], predict: Callable[[str, int], np.ndarray]
) -> Scores:
    """What `evaluate_split` does, for labels that no pipeline renders: `predict` gives those of a view of a split."""
    result = {}
    for split in SPLITS:
        evaluator = Evaluator.of_scene(data, paths[split], [path for s in SPLITS for path in paths[s]])
        assert evaluator is not None, "check_scene comes first"
        order, views = match_classes(evaluator.annotations.classes, prompts), []
        for i, name in enumerate(evaluator.views):
            if name in evaluator.annotations.views:
                labels = predict(split, i)
                evaluator.record(i, torch.from_numpy(labels), prompts)
                truth = relabel(evaluator.truth(i, *labels.shape), order)
                views.append(SegmentedView(name, read_picture(paths[split][i]).numpy(), labels, truth))
        if views:
            result[split] = ({**evaluator.summary(), "psnr": None}, views)
    return result


def pyramid(config: TrainerConfig, scene: Path, prompts: list[str]) -> Scores:
    """The mean of the normalised cells at each pixel of the evaluated views themselves, compared with the prompts."""
    manager, device = config.pipeline.datamanager, config.machine.device_type
    parser = copy.deepcopy(manager.dataparser)
    parser.data = manager.data
    # While it trains, nerfstudio holds the views of `val` out, so these are the ones that the other rows are measured on.
    paths = {
        s: parser.setup().get_dataparser_outputs(split=n).image_filenames
        for s, n in zip(SPLITS, ("val", "train"), strict=True)
    }
    encoder = image_text_encoder(config.pipeline.image_text_encoder, device)
    tokens = token_encoder(config.pipeline.token_encoder, device)
    text = encoder.embed_text(prompts)

    def predict(path: Path) -> np.ndarray:
        views = extract([path], encoder, tokens, manager.scales, manager.feature_cache_dir, CONSOLE)
        height, width = views.sizes[0]
        scores = torch.zeros(height, width, len(prompts))
        for grid, cells in zip(views.grids(0), scale_cells(views, 0), strict=True):
            row = ((torch.arange(height) + 0.5) / height * grid.rows).long()
            col = ((torch.arange(width) + 0.5) / width * grid.cols).long()
            scores += (cells @ text.T).view(grid.rows, grid.cols, -1)[row][:, col]
        return scores.argmax(-1).numpy()

    return _score(scene, paths, prompts, lambda split, i: predict(paths[split][i]))


def average(pipeline: OVS3DPipeline, scales: slice = slice(None)) -> Scores:
    """Each pixel's 3D point by the field's own depth; similarities averaged over the training views that see it, and over `scales`.

    Points are projected without lens distortion.
    """
    pipeline.eval()
    manager, model = pipeline.datamanager, pipeline.model
    datasets = {"test": manager.eval_dataset, "train": manager.train_dataset}
    cameras = manager.train_dataset.cameras.to(pipeline.device)
    depths = []
    for i in range(len(cameras)):
        camera = cameras[i : i + 1]
        camera.rescale_output_resolution(DEPTH_SHRINK)
        depths.append(_depth(model, camera)[0])
    # The same cells as the pyramid's, as similarities with the prompts; the prompts lie in the basis, so nothing is lost.
    assert manager.teachers is not None, "train() prepared the features"
    cells = copy.copy(manager.teachers)
    cells.cells = cells.cells.float() @ model.segmenter.project(model.segmenter.text)

    def predict(camera: Cameras) -> np.ndarray:
        _, points = _depth(model, camera)
        total = torch.zeros(*points.shape[:2], len(model.segmenter.prompts), device=points.device)
        for i, depth in enumerate(depths):
            y, x, distance = _project(points, cameras[i])
            inside = (distance > 0) & (y >= 0) & (y < 1) & (x >= 0) & (x < 1)
            y, x = y[inside], x[inside]
            there = depth[(y * depth.shape[0]).long(), (x * depth.shape[1]).long()]
            # What no view sees unhidden is still told by the views that have it in their picture.
            weight = (distance[inside] < there * (1 + DEPTH_TOLERANCE)).float() + 1e-3
            told = cells.at(torch.full_like(y, i, dtype=torch.long), y, x)[:, scales].mean(1)
            total[inside] += weight[:, None] * told
        return total.argmax(-1).cpu().numpy()

    data, paths = Path(manager.config.data or "."), {s: dataset.image_filenames for s, dataset in datasets.items()}
    views = {split: dataset.cameras.to(pipeline.device) for split, dataset in datasets.items()}
    return _score(data, paths, model.segmenter.prompts, lambda split, i: predict(views[split][i : i + 1]))


@torch.no_grad()
def lift(pipeline: OVS3DPipeline, scales: slice = slice(None)) -> Scores:
    """The training-free average over Gaussians: each takes the mean of the similarities at the pixels of the training views
    that show it, over `scales`, weighed by how much of a pixel it is; rasterised as the run's own features are."""
    pipeline.eval()
    manager, model = pipeline.datamanager, pipeline.model
    prompts, teachers = model.segmenter.prompts, manager.teachers
    assert teachers is not None, "train() prepared the features"
    text = model.segmenter.project(model.segmenter.text)

    total = torch.zeros(model.num_points, len(prompts) + 1, device=pipeline.device)
    cameras = manager.train_dataset.cameras.to(pipeline.device)
    for i in range(len(cameras)):
        camera = cameras[i : i + 1]
        height, width = int(camera.height), int(camera.width)
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        view = torch.full((height * width,), i)
        told = (F.normalize(teachers.at(view, y.flatten(), x.flatten())[:, scales], dim=-1) @ text).mean(1)
        told = torch.cat([told, torch.ones_like(told[:, :1])], -1).view(1, height, width, -1)
        seen = plan_of(model.splat, camera)
        total.index_add_(0, seen.gaussians, seen.gather(told))
    similarities = total[:, :-1] / total[:, -1:].clamp(min=1e-6)

    def predict(camera: Cameras) -> np.ndarray:
        return plan_of(model.splat, camera).composite(similarities)[0][0].argmax(-1).cpu().numpy()

    datasets = {"test": manager.eval_dataset, "train": manager.train_dataset}
    data, paths = Path(manager.config.data or "."), {s: dataset.image_filenames for s, dataset in datasets.items()}
    views = {split: dataset.cameras.to(pipeline.device) for split, dataset in datasets.items()}
    return _score(data, paths, prompts, lambda split, i: predict(views[split][i : i + 1]))


@torch.no_grad()
def _depth(model: OVS3DModel, camera: Cameras) -> tuple[Float[Tensor, "H W"], Float[Tensor, "H W 3"]]:
    """Distance along each ray of one camera, and the point there; no semantics are rendered."""
    rays = camera.generate_rays(camera_indices=0, keep_shape=True)
    flat, chunk = rays.flatten(), model.config.eval_num_rays_per_chunk
    parts = [model(flat[i : i + chunk], semantics=False)["depth"] for i in range(0, len(flat), chunk)]
    depth = torch.cat(parts).view(*rays.shape, 1)
    return depth[..., 0], rays.origins + depth * rays.directions


def _project(
    points: Float[Tensor, "H W 3"], camera: Cameras
) -> tuple[Float[Tensor, "H W"], Float[Tensor, "H W"], Float[Tensor, "H W"]]:
    """Where a pinhole camera sees points, as shares of its height and width, and how far away; −1 when behind it."""
    pose = camera.camera_to_worlds
    local = (points - pose[:, 3]) @ pose[:, :3]
    forward = -local[..., 2].clamp(max=-1e-6)
    x = (camera.cx + camera.fx * local[..., 0] / forward) / camera.width
    y = (camera.cy - camera.fy * local[..., 1] / forward) / camera.height
    return y, x, torch.where(local[..., 2] < 0, local.norm(dim=-1), -1.0)
