"""Labelling benchmark: how right `ovs3d label` is on splats of scenes whose geometry and masks are known, and how long it takes.

    python benchmarks/label.py --scene SCENE --splat SPLAT.ply --encoder mixture --encoder tabletop

Prints one Markdown table. *mIoU* and *boundary IoU* are those of the run's pictures on the held-out views; *of the file*, of the
labels in splat.ply, rasterised. *Gaussians right* is the share of those
that have a true class: a Gaussian's centre is projected into all views, and of those in which its depth agrees with the
scene's `depth/` (16 bits in steps of 0.1 mm) the most frequent value of `label_maps/` is its class; Gaussians that agree in no
view have none. Seconds are those of the whole command in a process of its own, features cached: on the clock, and of processor
time, which other programs on the machine do not lengthen as much. With `--blind` the command is given
the splat alone, and its run has other views than the scene's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from seeds import read_depth

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "encoders"))

from ovs3d_nerfstudio.data.views import read_view  # noqa: E402
from ovs3d_nerfstudio.evaluation.evaluation import Evaluator  # noqa: E402
from ovs3d_nerfstudio.evaluation.splits import evaluate_split  # noqa: E402
from ovs3d_nerfstudio.gaussians.plan import plan_views  # noqa: E402
from ovs3d_nerfstudio.gaussians.shown import view_matrix  # noqa: E402
from ovs3d_nerfstudio.gaussians.splat_files import read_splat  # noqa: E402
from ovs3d_nerfstudio.prompts.prompts import read_prompts_file  # noqa: E402
from ovs3d_nerfstudio.run_files import open_run  # noqa: E402

AGREES = 0.02
"""A Gaussian is seen in a view where its depth is that of the map, give or take this share."""
TITLES = (
    "splat",
    "encoder",
    "seconds",
    "CPU seconds",
    "memory (GB)",
    "mIoU",
    "boundary IoU",
    "mIoU of the file",
    "Gaussians right",
    "of those with a class",
)
COMMAND = "import sys; from ovs3d_nerfstudio.cli import main; main(sys.argv[1:])"


def main() -> None:
    arguments = parse()
    lines = ["| " + " | ".join(TITLES) + " |", "|---|---|" + "--:|" * (len(TITLES) - 2)]
    for scene, splat in zip(arguments.scene, arguments.splat, strict=True):
        for encoder in arguments.encoder:
            lines.append(measure(scene, splat, encoder, arguments))
            print("\n".join(lines), flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", type=Path, action="append", required=True, help="scene with masks; repeatable")
    parser.add_argument("--splat", type=Path, action="append", required=True, help="its splat, one a scene")
    parser.add_argument("--encoder", action="append", required=True, help="image-text encoder; repeatable")
    parser.add_argument("--method", default="ovs3d-splat-lite")
    parser.add_argument("--steps", type=int, help="training steps (default: the command's)")
    parser.add_argument("--blind", action="store_true", help="give the splat alone, without the scene's photos")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs", "label"))
    return parser.parse_args(words)


def measure(scene: Path, splat: Path, encoder: str, arguments: argparse.Namespace) -> str:
    """One row."""
    out = arguments.output_dir / f"{splat.stem}-{encoder.replace(':', '-')}"
    words = ["--output-dir", out, "--method", arguments.method, "--image-text-encoder", encoder]
    words += ["--feature-cache-dir", arguments.output_dir / "cache"]
    words += ["--steps", arguments.steps] if arguments.steps else []
    if arguments.blind:
        words += ["--prompts-file", scene / "segmentations" / "classes.txt"]
    else:
        words += ["--data", scene]
    if not arguments.blind:
        run(["extract", *words_of_extract(words)])
    seconds, busy, memory = run(["label", splat, *words])
    prompts = [entry["prompt"] for entry in json.loads((out / "classes.json").read_text()).values()]
    cells = [
        splat.stem + (", blind" if arguments.blind else ""),
        encoder,
        f"{seconds:.0f}",
        f"{busy:.0f}",
        f"{memory:.1f}",
    ]
    if arguments.blind:
        cells += ["–", "–"]
    else:
        summary, _ = evaluate_split(open_run(out / "run")[1], "test")
        cells += [f"{summary['miou']:.3f}", f"{summary['boundary_iou']:.3f}"]
    labels, right, known = labels_of(scene, out / "splat.ply", prompts)
    cells += [f"{labels:.3f}", f"{right:.3f}", f"{known:,}"]
    return "| " + " | ".join(cells) + " |"


def words_of_extract(words: Sequence) -> list:
    """What `extract` knows of the words of `label`."""
    kept = ("--method", "--image-text-encoder", "--feature-cache-dir", "--data")
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for pair in pairs if pair[0] in kept for word in pair]


def run(words: Sequence) -> tuple[float, float, float]:
    """Seconds on the clock and of processor time, and peak memory in GB of a command of ours in a process of its own, which knows the benchmark's encoders."""
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks" / "encoders"), os.environ.get("PYTHONPATH")]))
    started, before, peak = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)], env={**os.environ, "PYTHONPATH": path}
    )
    while process.poll() is None:
        time.sleep(0.2)
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        except psutil.Error:
            break
    if process.wait():
        raise SystemExit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.time() - started, busy, peak / 1e9


def labels_of(scene: Path, labelled: Path, prompts: Sequence[str]) -> tuple[float, float, int]:
    """mIoU of the file's labels on the held-out views, the share of Gaussians that have their true class, and how many have one."""
    table, splat = read_splat(labelled)
    found = table["class_id"].astype(int) - 1
    truth = true_classes(scene, splat.means.double().numpy(), prompts)
    known = truth >= 0
    right = float((found == truth)[known].mean())
    votes = torch.nn.functional.one_hot(torch.from_numpy(found + 1), len(prompts) + 1)[:, 1:].float()
    shape = (splat.means, splat.quats, splat.scales.exp(), splat.opacities.sigmoid()[:, 0])
    parser = as_in_the_file(scene)
    parsed, everything = parser.get_dataparser_outputs("test"), parser.get_dataparser_outputs("train")
    photos, cameras = parsed.image_filenames, parsed.cameras
    evaluator = Evaluator.of_scene(scene, photos, [*photos, *everything.image_filenames])
    for i in range(len(photos)):
        view = (view_matrix(cameras.camera_to_worlds[i : i + 1]), cameras[i : i + 1].get_intrinsics_matrices())
        plan = plan_views(*shape, *view, int(cameras.width[i]), int(cameras.height[i]))
        evaluator.record(i, plan.composite(votes)[0][0].argmax(-1), prompts)
    return evaluator.summary()["miou"], right, int(known.sum())


def as_in_the_file(scene: Path) -> Any:
    """A parser that leaves poses as they stand in the scene's file."""
    options = {"orientation_method": "none", "center_method": "none", "auto_scale_poses": False}
    return NerfstudioDataParserConfig(data=scene, **options).setup()


def true_classes(scene: Path, means: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The class of each point of the frame of the scene's poses, as an index of `prompts`; −1 where no view shows it."""
    listed = read_prompts_file(scene / "segmentations" / "classes.txt")
    parser = as_in_the_file(scene)
    votes = np.zeros((len(means), len(listed)), int)
    for split in ("train", "test"):
        parsed = parser.get_dataparser_outputs(split)
        for i, photo in enumerate(parsed.image_filenames):
            view = read_view(photo, None, parsed.cameras, i)
            labels = np.asarray(Image.open(scene / "label_maps" / f"{photo.stem}.png"))
            pixels, depths = view.project(means)
            inside = view.inside(pixels) & (depths > 0)
            x, y = np.where(inside[:, None], pixels, 0).astype(int).T
            agrees = inside & (np.abs(depths / read_depth(scene, photo.stem)[y, x] - 1) < AGREES)
            agrees &= labels[y, x] < len(listed)
            np.add.at(votes, (np.flatnonzero(agrees), labels[y, x][agrees]), 1)
    order = np.array([prompts.index(name) for name in listed])
    return np.where(votes.any(1), order[votes.argmax(1)], -1)


if __name__ == "__main__":
    main()
