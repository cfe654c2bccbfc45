"""Whole splits: each annotated view rendered and compared, as numbers and as pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from rich.progress import track
from torch import Tensor

from ovs3d_nerfstudio.data.annotations import AnnotationError
from ovs3d_nerfstudio.evaluation.evaluation import Evaluator
from ovs3d_nerfstudio.evaluation.metrics import match_classes, relabel
from ovs3d_nerfstudio.pipeline import OVS3DPipeline
from ovs3d_nerfstudio.prompts.palette import colorize, legend, titled


@dataclass
class SegmentedView:
    """One view beside its truth, as arrays."""

    name: str
    photo: UInt8[np.ndarray, "H W 3"]
    prediction: Int[np.ndarray, "H W"]
    """Classes in the order of the run's prompts, −1 where the run has nothing."""
    truth: Int[np.ndarray, "H W"]
    """The same classes, −1 where none is known."""


@dataclass
class RenderedView:
    """One annotated view as the run sees it, beside what is known of it."""

    index: int
    """Place of the view in its split."""
    name: str
    """Path of the photo below the folder of all photos, without suffix."""
    photo: UInt8[np.ndarray, "H W 3"]
    labels: Int[Tensor, "H W"]
    """Indices of the run's prompts, −1 where the run has nothing."""
    truth: Int[np.ndarray, "H W"]
    """Indices of the scene's classes, −1 where none is known."""
    psnr: float
    """Of the rendered colours, in dB."""


def rendered_views(
    pipeline: OVS3DPipeline, split: Literal["test", "train"], skip: Collection[str] = ()
) -> tuple[Evaluator, Iterator[RenderedView]]:
    """The evaluator of a split, and its annotated views but those named in `skip`, each rendered when it is asked for.

    Raises AnnotationError when the data has no masks.
    """
    datamanager, model = pipeline.datamanager, pipeline.model
    data = Path(datamanager.config.data or ".")
    dataset = datamanager.eval_dataset if split == "test" else datamanager.train_dataset
    everything = [*datamanager.train_dataset.image_filenames, *datamanager.eval_dataset.image_filenames]
    evaluator = Evaluator.of_scene(data, dataset.image_filenames, everything)
    if evaluator is None:
        raise AnnotationError(
            f"{data} has no segmentations/classes.txt, so there is no truth to compare with; write masks of some views there."
        )
    wanted = set(evaluator.annotations.views) - set(skip)
    annotated = [i for i, view in enumerate(evaluator.views) if view in wanted]

    def render() -> Iterator[RenderedView]:
        pipeline.eval()
        for i in track(annotated, f"Segmenting {split} views"):
            outputs = model.get_outputs_for_camera(dataset.cameras[i : i + 1].to(pipeline.device))
            labels = model.labels_in(outputs).cpu()
            photo = model.photo_of(dataset.get_image_float32(i))
            psnr = -10 * float((outputs["rgb"].cpu() - photo).square().mean().log10())
            truth = evaluator.truth(i, *labels.shape)
            assert truth is not None, "only annotated views are walked through"
            yield RenderedView(i, evaluator.views[i], (photo * 255).byte().numpy(), labels, truth, psnr)

    return evaluator, render()


def evaluate_split(pipeline: OVS3DPipeline, split: Literal["test", "train"]) -> tuple[dict, list[SegmentedView]]:
    """Renders every annotated view of a split and compares it: `test` is the held-out protocol, `train` the paper's.

    Returns the summary (see `metrics.summarise`) with the mean PSNR in dB, and the views.
    """
    prompts = pipeline.model.segmenter.prompts
    evaluator, rendered = rendered_views(pipeline, split)
    order = match_classes(evaluator.annotations.classes, prompts)
    views, psnrs = [], []
    for view in rendered:
        evaluator.record(view.index, view.labels, prompts)
        views.append(SegmentedView(view.name, view.photo, view.labels.numpy(), relabel(view.truth, order)))
        psnrs.append(view.psnr)
    summary = evaluator.summary()
    summary["psnr"] = float(np.mean(psnrs))
    return summary, views


def stills(
    runs: Mapping[str, Sequence[SegmentedView]],
    prompts: Sequence[str],
    colors: Float[np.ndarray, "C 3"],
    rows: int = 4,
) -> UInt8[np.ndarray, "h w 3"]:
    """Photo | truth | segmentation by each run of up to `rows` views one below the other, with the legend at the right.

    `runs` are the same views as runs of these prompts have segmented them, by what stands above their column.
    """
    views = next(iter(runs.values()))
    chosen = np.linspace(0, len(views) - 1, min(rows, len(views))).astype(int)
    height, width = views[0].photo.shape[:2]
    gap = 4
    lines = [np.concatenate([titled(name, width + gap) for name in ("photo", "truth", *runs)], 1)]
    for i in chosen:
        maps = [views[i].truth, *(run[i].prediction for run in runs.values())]
        pictures = [views[i].photo, *(_painted(labels, colors) for labels in maps)]
        resized = [np.array(Image.fromarray(p).resize((width, height), Image.Resampling.NEAREST)) for p in pictures]
        lines.append(np.concatenate([np.pad(p, ((0, gap), (0, gap), (0, 0)), constant_values=255) for p in resized], 1))
    sheet = np.concatenate(lines)
    key = legend(prompts, colors)
    page = np.full((max(len(sheet), len(key)), sheet.shape[1] + key.shape[1], 3), 255, np.uint8)
    page[: len(sheet), : sheet.shape[1]] = sheet
    page[: len(key), sheet.shape[1] :] = key
    return page


def _painted(labels: Int[np.ndarray, "H W"], colors: Float[np.ndarray, "C 3"]) -> UInt8[np.ndarray, "H W 3"]:
    return (colorize(labels, colors) * 255).round().astype(np.uint8)
