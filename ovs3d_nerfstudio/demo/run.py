"""The demo: makes the embedded scene, trains `ovs3d-lite` on it with the offline encoder, and leaves pictures to look at.

Every step is a command that a user would type; this file only types them and lays the results side by side.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ovs3d_nerfstudio.demo.scene import make_scene
from ovs3d_nerfstudio.engine.threads import let_sleep
from ovs3d_nerfstudio.files import written_beside

RUN = Path("run") / "ovs3d-lite"


def run_demo(folder: Path, steps: int | None = None, video: bool = True) -> Path:
    """Leaves `video.mp4`, `stills.png`, `legend.png`, `metrics.json` and the run in `folder`; returns the run's config.

    Args:
        steps: training steps; default: those of `ovs3d-lite`.
        video: whether to render the video, the slowest picture.
    """
    started = time.time()
    let_sleep()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"The demo scene: {make_scene(folder / 'scene')}")
    train = ["ovs3d-lite", "--data", folder / "scene", "--output-dir", folder, "--experiment-name", RUN.parts[0]]
    train += ["--timestamp", ".", "--vis", "tensorboard"]
    if steps is not None:
        train += ["--max-num-iterations", steps]
    nerfstudio("ns-train", *train)
    config = folder / RUN / "config.yml"
    leave_pictures(config, folder)
    if video:
        frames = ["--rendered-output-names", "rgb", "segmentation", "segmentation_overlay", "--interpolation-steps", 6]
        frames += ["--downscale-factor", 2]  # a quarter of the pixels: a frame takes a second or two on two cores
        nerfstudio("ns-render", "interpolate", "--load-config", config, "--output-path", folder / "video.mp4", *frames)
    score = json.loads((folder / "metrics.json").read_text())["test"]
    minutes = (time.time() - started) / 60
    print(f"Held-out mIoU {score['miou']:.3f}, pixel accuracy {score['pixel_accuracy']:.3f}, in {minutes:.1f} minutes.")
    print(
        f"Look at {folder / 'stills.png'}, {folder / 'legend.png'}"
        + (f" and {folder / 'video.mp4'}." if video else ".")
    )
    print(f"Metrics: {folder / 'metrics.json'}. Walk through it: ns-viewer --load-config {config}")
    return config


def leave_pictures(config: Path, folder: Path) -> None:
    """Evaluates the run in both protocols and writes `stills.png`, `legend.png` and `metrics.json`."""
    # Imported here: nerfstudio takes seconds to import, and making the scene needs none of it.
    from nerfstudio.utils.eval_utils import eval_setup

    from ovs3d_nerfstudio.evaluation.splits import evaluate_split, stills
    from ovs3d_nerfstudio.pipeline import OVS3DPipeline
    from ovs3d_nerfstudio.prompts.palette import save_legend

    _, pipeline, _, _ = eval_setup(config)
    assert isinstance(pipeline, OVS3DPipeline)
    metrics, rows = {}, []
    for split in ("test", "train"):
        metrics[split], views = evaluate_split(pipeline, split)
        if split == "test":
            rows = views
    segmenter = pipeline.model.segmenter
    with written_beside(folder / "metrics.json") as beside:
        beside.write_text(json.dumps(metrics, indent=2) + "\n")
    Image.fromarray(stills(rows, segmenter.prompts, segmenter.colors.cpu().numpy())).save(folder / "stills.png")
    save_legend(folder / "legend.png", segmenter.prompts, np.asarray(segmenter.colors.cpu()))


def nerfstudio(command: str, *arguments: object) -> None:
    """Runs one of nerfstudio's commands of this environment. Raises SystemExit with its exit status when it fails."""
    words = [str(Path(sys.executable).with_name(command)), *map(str, arguments)]
    print("$", command, *words[1:], flush=True)
    status = subprocess.run(words, check=False).returncode
    if status:
        raise SystemExit(status)
