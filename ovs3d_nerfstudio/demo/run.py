"""The demo: makes the embedded scene, trains `ovs3d-lite` and `ovs3d-splat-lite` on it with the offline encoder, and leaves
pictures to look at.

Every step is a command that a user would type; this file only types them and lays the results side by side.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovs3d_nerfstudio.demo.scene import make_scene
from ovs3d_nerfstudio.engine.threads import let_sleep
from ovs3d_nerfstudio.files import written_beside

NERF, SPLAT = "ovs3d-lite", "ovs3d-splat-lite"


@dataclass
class Judged:
    """A run of the demo, and how well it does in both protocols."""

    config: Path
    metrics: dict[str, Any]
    """By split, see `evaluate_split`."""
    views: list
    """The held-out ones, a `SegmentedView` each."""
    prompts: list[str]
    colors: np.ndarray


def run_demo(folder: Path, steps: int | None = None, video: bool = True, splat: bool = True) -> Path:
    """Leaves `video.mp4`, `stills.png`, `legend.png`, `metrics.json` and the runs in `folder`; returns the NeRF's config.

    Args:
        steps: training steps; default: those of each method.
        video: whether to render the video, the slowest picture.
        splat: whether to train Gaussians too.
    """
    started = time.time()
    let_sleep()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"The demo scene: {make_scene(folder / 'scene')}")
    runs = [judged(trained(NERF, folder, steps))]
    leave_pictures(folder, *runs)
    config = runs[0].config
    if video:
        frames = ["--rendered-output-names", "rgb", "segmentation", "segmentation_overlay", "--interpolation-steps", 6]
        frames += ["--downscale-factor", 2]  # a quarter of the pixels: a frame takes a second or two on two cores
        nerfstudio("ns-render", "interpolate", "--load-config", config, "--output-path", folder / "video.mp4", *frames)
    if splat:
        runs.append(judged(trained(SPLAT, folder, steps)))
        leave_pictures(folder, *runs)
    for run in runs:
        score = run.metrics["test"]
        print(f"{run.config.parent.name}: held-out mIoU {score['miou']:.3f}, PSNR {score['psnr']:.1f} dB.")
    print(f"All of it took {(time.time() - started) / 60:.1f} minutes.")
    print(
        f"Look at {folder / 'stills.png'}, {folder / 'legend.png'}"
        + (f" and {folder / 'video.mp4'}." if video else ".")
    )
    print(f"Metrics: {folder / 'metrics.json'}. Walk through it: ns-viewer --load-config {runs[-1].config}")
    return config


def trained(method: str, folder: Path, steps: int | None) -> Path:
    """The config of a training on the scene in `folder`; the second one finds its features cached."""
    words = [method, "--data", folder / "scene", "--output-dir", folder, "--experiment-name", "run"]
    words += ["--timestamp", ".", "--vis", "tensorboard"]
    if steps is not None:
        words += ["--max-num-iterations", steps]
    nerfstudio("ns-train", *words)
    return folder / "run" / method / "config.yml"


def judged(config: Path) -> Judged:
    """Evaluates a run in both protocols."""
    # Imported here: nerfstudio takes seconds to import, and making the scene needs none of it.
    from nerfstudio.utils.eval_utils import eval_setup

    from ovs3d_nerfstudio.evaluation.splits import evaluate_split
    from ovs3d_nerfstudio.pipeline import OVS3DPipeline

    _, pipeline, _, _ = eval_setup(config)
    assert isinstance(pipeline, OVS3DPipeline)
    test, views = evaluate_split(pipeline, "test")
    train, _ = evaluate_split(pipeline, "train")
    segmenter = pipeline.model.segmenter
    return Judged(
        config, {"test": test, "train": train}, views, list(segmenter.prompts), segmenter.colors.cpu().numpy()
    )


def leave_pictures(folder: Path, nerf: Judged, splat: Judged | None = None) -> None:
    """Writes `stills.png`, `legend.png` and `metrics.json`: by split for the NeRF, and the same as `splat`."""
    from ovs3d_nerfstudio.evaluation.splits import stills
    from ovs3d_nerfstudio.prompts.palette import save_legend

    metrics = nerf.metrics | ({"splat": splat.metrics} if splat else {})
    with written_beside(folder / "metrics.json") as beside:
        beside.write_text(json.dumps(metrics, indent=2) + "\n")
    runs = {"NeRF": nerf.views} | ({"Gaussians": splat.views} if splat else {})
    page = stills(runs, nerf.prompts, nerf.colors)
    Image.fromarray(page).save(folder / "stills.png")
    save_legend(folder / "legend.png", nerf.prompts, nerf.colors)


def nerfstudio(command: str, *arguments: object) -> None:
    """Runs one of nerfstudio's commands of this environment. Raises SystemExit with its exit status when it fails."""
    words = [str(Path(sys.executable).with_name(command)), *map(str, arguments)]
    print("$", command, *words[1:], flush=True)
    status = subprocess.run(words, check=False).returncode
    if status:
        raise SystemExit(status)
