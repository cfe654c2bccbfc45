"""How well a run agrees with the scene's masks: what `ovs3d eval` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from ovs3d_nerfstudio import __version__
from ovs3d_nerfstudio.cli.common import ask
from ovs3d_nerfstudio.cli.labels import ids, write_labels
from ovs3d_nerfstudio.cli.report import write_report
from ovs3d_nerfstudio.engine.option_checks import check_file
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.evaluation.metrics import ViewMetrics, match_classes, relabel, summarise, view_metrics
from ovs3d_nerfstudio.evaluation.splits import RenderedView, rendered_views
from ovs3d_nerfstudio.files import write_json
from ovs3d_nerfstudio.pictures import write_picture
from ovs3d_nerfstudio.pipeline import OVS3DPipeline
from ovs3d_nerfstudio.prompts.palette import colorize, colors_for
from ovs3d_nerfstudio.prompts.prompts import clean_prompt, prompt_key
from ovs3d_nerfstudio.run import load_run

WRONG = np.array([220, 30, 30], np.uint8)
"""Colour of a wrong pixel in the picture of errors."""
GAP = 4
"""White pixels between the pictures of a view."""


def evaluate(
    load_config: Path,
    output_path: Path,
    split: Literal["test", "train", "all"],
    prompts: str,
    prompts_file: Path | None,
    prompt_classes: str,
    pictures: bool,
    data: Path | None,
) -> None:
    """Does what `ovs3d eval` was asked for, by its options. Raises CommandError and the errors of prompts, annotations and
    encoders."""
    check_file("--output-path", output_path)
    folder = output_path.with_suffix("")
    if folder == output_path:
        raise CommandError(f"--output-path {output_path} has no suffix; name a file such as metrics.json.")
    mapping = parse_mapping(prompt_classes)
    run = load_run(load_config, data=data)
    asked = ask(run, prompts, prompts_file)
    comparison = compare(run.pipeline, split, mapping)
    for view in comparison.views:
        write_labels(folder / "labels" / f"{view.name}.png", view.prediction, len(comparison.classes))
    figures = {
        "version": __version__,
        "scene": str(run.pipeline.datamanager.config.data),
        "run": str(load_config),
        "method": run.config.method_name,
        "checkpoint": str(run.checkpoint),
        "step": run.step,
        "split": split,
        "prompts": dict(zip(asked, comparison.class_of_prompt, strict=True)),
        "label_ids": ids(comparison.classes, comparison.colors),
        **comparison.figures(),
    }
    write_json(output_path, figures)
    CONSOLE.print(
        f"mIoU {figures['miou']:.3f}, mean accuracy {figures['mean_accuracy']:.3f}, pixel accuracy "
        f"{figures['pixel_accuracy']:.3f}, boundary IoU {figures['boundary_iou']:.3f} over "
        f"{len(comparison.views)} views of '{split}'."
    )
    for sentence in comparison.remarks():
        CONSOLE.print(f"[yellow]{escape(sentence)}")
    if pictures:
        sheets = {view.name: panel(view, comparison.colors) for view in comparison.views}
        for name, sheet in sheets.items():
            write_picture(folder / "pictures" / f"{name}.png", sheet)
        write_report(folder / "report.html", figures, comparison.colors, sheets, comparison.remarks())
        CONSOLE.print(f"Report: {escape(str(folder / 'report.html'))}")
    CONSOLE.print(f"Figures: {escape(str(output_path))}")


@dataclass
class ComparedView:
    """One view in the scene's classes."""

    name: str
    split: str
    photo: UInt8[np.ndarray, "H W 3"]
    prediction: Int[np.ndarray, "H W"]
    """Classes; −1 where a prompt won that is no class."""
    truth: Int[np.ndarray, "H W"]
    """Classes; −1 where none is known."""
    psnr: float
    """In dB."""


@dataclass
class Comparison:
    """A run and the truth, view by view."""

    classes: list[str]
    colors: Float[np.ndarray, "C 3"]
    class_of_prompt: list[str | None]
    """The class of each prompt, None for a prompt that is no class."""
    views: list[ComparedView]
    records: dict[str, ViewMetrics]

    def figures(self) -> dict[str, Any]:
        """The summary of `metrics.summarise`, with PSNR (dB) and split of each view, and the confusion matrix in pixels."""
        summary = summarise(self.records, self.classes)
        for view in self.views:
            summary["views"][view.name] |= {"psnr": view.psnr, "split": view.split}
        summary["psnr"] = float(np.mean([view.psnr for view in self.views]))
        total = sum((record["confusion"] for record in self.records.values()), np.zeros((len(self.classes),) * 2, int))
        pixels = sum(np.bincount(view.truth[view.truth >= 0], minlength=len(self.classes)) for view in self.views)
        summary["confusion"] = {
            "classes": self.classes,
            "truth_by_prediction": total.tolist(),
            "truth_pixels": np.asarray(pixels).tolist(),
        }
        return summary

    def remarks(self) -> list[str]:
        """What a reader of the figures should know: classes without a prompt, prompts without a class."""
        remarks = []
        unnamed = [name for name in self.classes if name not in self.class_of_prompt]
        if unnamed:
            remarks.append(f"No prompt stands for {', '.join(unnamed)}: what is of that class is counted as wrong.")
        if None in self.class_of_prompt:
            count = self.class_of_prompt.count(None)
            remarks.append(f"{count} of the prompts are no class of the scene: wherever one wins is counted as wrong.")
        return remarks


def parse_mapping(text: str) -> dict[str, str]:
    """The class of each prompt (by `prompt_key`) in "PROMPT = CLASS; …".

    Raises CommandError for a part that is not of that form.
    """
    mapping = {}
    for part in filter(str.strip, text.split(";")):
        # The last sign divides: a prompt may hold one, a class of a mask hardly does.
        prompt, sign, name = part.rpartition("=")
        if not sign or not clean_prompt(prompt) or not clean_prompt(name):
            raise CommandError(f"'{part.strip()}' in --prompt-classes is not of the form PROMPT = CLASS; write it so.")
        mapping[prompt_key(prompt)] = clean_prompt(name)
    return mapping


def compare(pipeline: OVS3DPipeline, split: Literal["test", "train", "all"], mapping: dict[str, str]) -> Comparison:
    """Renders the annotated views of a split and compares them with their masks.

    Raises CommandError when the split has no annotated view, or `mapping` names what is no prompt or no class.
    """
    prompts = pipeline.model.segmenter.prompts
    views: list[ComparedView] = []
    records: dict[str, ViewMetrics] = {}
    splits: tuple[Literal["test", "train"], ...] = ("test", "train") if split == "all" else (split,)
    for part in splits:
        evaluator, rendered = rendered_views(pipeline, part, skip=set(records))
        classes = evaluator.annotations.classes
        index = class_index(prompts, classes, mapping)
        for view in rendered:
            compared = _in_classes(view, part, index)
            records[view.name] = view_metrics(compared.prediction, compared.truth, len(classes))
            views.append(compared)
    if not views:
        raise CommandError(f"No view of the split '{split}' has masks; choose another with --split.")
    names = [classes[i] if i >= 0 else None for i in index]
    return Comparison(classes, class_colors(pipeline, index, classes), names, views, records)


def class_index(prompts: Sequence[str], classes: Sequence[str], mapping: dict[str, str]) -> Int[np.ndarray, " P"]:
    """The class of each prompt, by `mapping` or else by its own name; −1 for none.

    Raises CommandError when `mapping` names what is no prompt or no class.
    """
    unknown = set(mapping) - set(map(prompt_key, prompts))
    if unknown:
        raise CommandError(
            f"--prompt-classes maps {', '.join(sorted(unknown))}, which is not among the prompts; they are: {'; '.join(prompts)}."
        )
    index = match_classes([mapping.get(prompt_key(prompt), prompt) for prompt in prompts], classes)
    for prompt, label in zip(prompts, index, strict=True):
        if label < 0 and prompt_key(prompt) in mapping:
            raise CommandError(
                f"--prompt-classes maps {prompt} to {mapping[prompt_key(prompt)]}, which is no class; the classes are: "
                f"{'; '.join(classes)}."
            )
    return index


def class_colors(
    pipeline: OVS3DPipeline, index: Int[np.ndarray, " P"], classes: Sequence[str]
) -> Float[np.ndarray, "C 3"]:
    """A class has the colour of the first prompt that stands for it, or one of its own where there is none."""
    segmenter = pipeline.model.segmenter
    firsts = [int(np.flatnonzero(index == label)[0]) if label in index else None for label in range(len(classes))]
    names = [name if first is None else segmenter.prompts[first] for name, first in zip(classes, firsts, strict=True)]
    return colors_for(names, segmenter.trained_prompts)


def panel(view: ComparedView, colors: Float[np.ndarray, "C 3"]) -> UInt8[np.ndarray, "H w 3"]:
    """photo | truth | prediction | errors, side by side; errors are red over the grey photo, what is not known is black."""
    grey = np.repeat(view.photo.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    wrong, unknown = view.prediction != view.truth, view.truth < 0
    errors = np.where((wrong & ~unknown)[..., None], WRONG, np.where(unknown[..., None], 0, grey)).astype(np.uint8)
    painted = [(colorize(labels, colors) * 255).round().astype(np.uint8) for labels in (view.truth, view.prediction)]
    pictures = [view.photo, *painted, errors]
    white = np.full((len(view.photo), GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, white)][:-1], axis=1)


def _in_classes(view: RenderedView, split: str, index: Int[np.ndarray, " P"]) -> ComparedView:
    return ComparedView(view.name, split, view.photo, relabel(view.labels, index), view.truth, view.psnr)
