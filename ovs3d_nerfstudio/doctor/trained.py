"""What is the matter with a run: its geometry, and prompts that win nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float

from ovs3d_nerfstudio.data.capture import capture_of
from ovs3d_nerfstudio.doctor.findings import Finding, good_or, refused
from ovs3d_nerfstudio.pictures import PictureError, evenly
from ovs3d_nerfstudio.prompts.segmentation import alike
from ovs3d_nerfstudio.run import Run

SIDE = 96
"""Longer side in pixels of the pictures that are rendered to look at a run."""
VIEWS = 3
"""Pictures of the training, and held-out ones, each."""
POOR, FAIR = 18.0, 22.0
"""PSNR in dB of held-out views below which nothing else can be right, and below which labels suffer."""
APART = 6.0
"""PSNR in dB that training views may be better than held-out ones."""
CLOSE = 0.15
"""What ends nearer than this share of the distance of a close camera to what is looked at stands before the lens."""
FOG = 0.03
"""Share of the rays that may end there."""
NOWHERE = 0.001
"""Share of the pixels below which a prompt wins nowhere."""


def run_findings(run: Run) -> list[Finding]:
    """Looks at a few small pictures of a run."""
    pipeline, model = run.pipeline, run.pipeline.model
    datamanager = pipeline.datamanager
    found = [Finding("good", "run", f"{run.config.method_name}, step {run.step}, {run.checkpoint.name}.")]
    looks = {}
    with torch.no_grad():
        for name, dataset in (("test", datamanager.eval_dataset), ("train", datamanager.train_dataset)):
            looks[name] = [look(pipeline, dataset, i) for i in evenly(len(dataset), VIEWS)]
    found += pictures([a.psnr for a in looks["test"]], [a.psnr for a in looks["train"]])
    everything = looks["train"] + looks["test"]
    found += [refused("photos", seen.broken, "warning") for seen in everything if seen.broken][:1]
    distance = capture_of(datamanager.train_dataset.cameras.camera_to_worlds).distance
    close = float(np.mean(np.concatenate([(seen.depth < CLOSE * distance).ravel() for seen in everything])))
    found.append(
        good_or(close <= FOG, "warning", "floaters", f"{close:.1%} of the rays end right before the lens.",
                "More photos, or a start with less fog there: see the last table of docs/own-photos.md. Labels of what lies behind suffer.")
    )  # fmt: skip
    segmenter = model.segmenter
    if not segmenter.prompts:
        return [
            *found,
            Finding(
                "note", "prompts", "The run has no prompts.", "Ask it with --prompts, in the viewer, or from Python."
            ),
        ]
    labels = np.concatenate([seen.labels.ravel() for seen in everything])
    found += classes(segmenter.prompts, labels, len(everything))
    for i, j, correlation in alike(segmenter.sample @ segmenter.project(segmenter.text)):
        found.append(
            Finding("warning", "prompts", f"'{segmenter.prompts[i]}' and '{segmenter.prompts[j]}' are nearly the same to the encoder "
                    f"(correlation {correlation:.2f}).", "Keep one: they share their object between them.")
        )  # fmt: skip
    return found


class Look:
    """A small picture of a run, and how it agrees with its photo, or why that cannot be read."""

    def __init__(self, psnr: float, depth: Float[np.ndarray, "h w"], labels: np.ndarray, broken: PictureError | None):
        self.psnr, self.depth, self.labels, self.broken = psnr, depth, labels, broken


def look(pipeline: Any, dataset: Any, index: int) -> Look:
    """View `index` of a dataset, rendered small; PSNR is NaN where the photo is gone or broken."""
    camera = dataset.cameras[index : index + 1].to(pipeline.device)
    camera.rescale_output_resolution(min(1.0, SIDE / max(int(camera.width), int(camera.height))))
    outputs = pipeline.model.get_outputs_for_camera(camera)
    rgb = outputs["rgb"].cpu().numpy()
    psnr, broken = float("nan"), None
    try:
        if dataset.image_filenames[index].is_file():
            photo = pipeline.model.photo_of(dataset.get_image_float32(index)).numpy()
            small = cv2.resize(photo, rgb.shape[1::-1], interpolation=cv2.INTER_AREA)
            psnr = -10 * float(np.log10(max(1e-10, np.square(rgb - small).mean())))
    except PictureError as error:
        broken = error
    labels = pipeline.model.labels_in(outputs).cpu().numpy() if "segmentation" in outputs else np.zeros(0, int)
    return Look(psnr, outputs["depth"][..., 0].cpu().numpy(), labels, broken)


def pictures(test: Sequence[float], train: Sequence[float]) -> list[Finding]:
    """What PSNR says, of small pictures."""
    seen = np.nanmean(train) if np.isfinite(train).any() else float("nan")
    if not len(test) or not np.isfinite(test).any():
        return [good_or(bool(seen >= FAIR), "warning", "geometry", f"PSNR {seen:.1f} dB on training views, at {SIDE} pixels; none is held out.", "Geometry comes first: train longer, with more and sharper photos.")]  # fmt: skip
    held = float(np.nanmean(test))
    what = f"PSNR {held:.1f} dB on held-out views, {seen:.1f} dB on training views, at {SIDE} pixels."
    if held < POOR:
        return [
            Finding(
                "warning",
                "geometry",
                what,
                "The cameras are wrong or too few: check them with ovs3d doctor --data, before all else.",
            )
        ]
    if seen - held > APART:
        return [
            Finding(
                "warning", "geometry", what, "Training views were learned by heart: take more photos, or ovs3d-splat."
            )
        ]
    return [
        good_or(
            held >= FAIR,
            "warning",
            "geometry",
            what,
            "Geometry comes first: train longer, with more and sharper photos.",
        )
    ]


def classes(prompts: Sequence[str], labels: np.ndarray, views: int) -> list[Finding]:
    """Prompts that win nowhere in the labels of so many `views`, and one that takes nearly everything."""
    shares = np.bincount(labels[labels >= 0], minlength=len(prompts)) / max(1, (labels >= 0).sum())
    nowhere = [prompt for prompt, share in zip(prompts, shares, strict=True) if share < NOWHERE]
    found = []
    if nowhere:
        found.append(
            Finding("warning", "classes", f"{'; '.join(nowhere)}: found nowhere in {views} views.",
                    "Say what is seen (colour, material), or drop them; compare with --pipeline.model.class-scores relevancy.")
        )  # fmt: skip
    if len(prompts) > 1 and shares.max() > 0.9:
        found.append(
            Finding("warning", "classes", f"'{prompts[int(shares.argmax())]}' takes {shares.max():.0%} of what is seen.",
                    "Give what else is there a name, or compare with --pipeline.model.class-scores relevancy.")
        )  # fmt: skip
    return found or [Finding("good", "classes", f"Each of the {len(prompts)} prompts is found.")]
