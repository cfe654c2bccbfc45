"""Compares segmentations with a scene's annotated masks, view by view (METHOD §5; the README says which protocol is which)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from rich.progress import track
from torch import Tensor

from ovs3d_nerfstudio.annotations import AnnotationError, Annotations
from ovs3d_nerfstudio.metrics import ViewMetrics, match_classes, relabel, summarise, view_metrics
from ovs3d_nerfstudio.palette import colorize, legend
from ovs3d_nerfstudio.prompts import find_classes_file

if TYPE_CHECKING:
    from ovs3d_nerfstudio.pipeline import OVS3DPipeline


class Evaluator:
    """Collects the metrics of the views of one split."""

    def __init__(self, annotations: Annotations, views: Sequence[str]):
        """`views` are the stems of the split's photos, in the order of their image indices."""
        self.annotations = annotations
        self.views = list(views)
        self.records: dict[str, ViewMetrics] = {}

    @staticmethod
    def of_scene(data: Path, split: Sequence[Path], scene: Sequence[Path]) -> Evaluator | None:
        """The evaluator of the photos `split` out of all photos `scene`; None when the data has no annotations."""
        if find_classes_file(data) is None:
            return None
        return Evaluator(Annotations(data, scene), [path.stem for path in split])

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


@dataclass
class SegmentedView:
    """One view beside its truth, as arrays."""

    name: str
    photo: UInt8[np.ndarray, "H W 3"]
    prediction: Int[np.ndarray, "H W"]
    """Classes in the order of the run's prompts."""
    truth: Int[np.ndarray, "H W"]
    """The same classes, −1 where none is known."""


@dataclass
class RenderedView:
    """One annotated view as the run sees it, beside what is known of it."""

    index: int
    """Place of the view in its split."""
    name: str
    """Stem of the photo."""
    photo: UInt8[np.ndarray, "H W 3"]
    labels: Int[Tensor, "H W"]
    """Indices of the run's prompts."""
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
            labels = model.segmenter.labels_of(outputs["segmentation"]).cpu()
            # Transparent pixels are black to nerfacto.
            photo = model.renderer_rgb.blend_background(dataset.get_image_float32(i))
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
    views: Sequence[SegmentedView], prompts: Sequence[str], colors: Float[np.ndarray, "C 3"], rows: int = 4
) -> UInt8[np.ndarray, "h w 3"]:
    """Photo | truth | segmentation of up to `rows` views one below the other, with the legend at the right."""
    chosen = [views[i] for i in np.linspace(0, len(views) - 1, min(rows, len(views))).astype(int)]
    height, width = chosen[0].photo.shape[:2]
    gap = 4
    lines = []
    for view in chosen:
        pictures = [view.photo, *(_painted(labels, colors) for labels in (view.truth, view.prediction))]
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
