"""How time, memory and disk grow with views, picture size, prompts, scales and D, and what a second process gains.

    python benchmarks/growth.py [--json FILE] [--write] [--quick] [--work FOLDER]

One thing grows at a time; the others stay as in BASE. Pictures are generated, and a synthetic encoder stands for the real
ones, whose cost is theirs: what is measured is the pipeline. Times are of the processor, on one thread, so that what else
the machine does counts little. `--write` puts the tables into docs/performance.md and draws
docs/images/growth.png. The largest scene takes 8 GB below --work and some minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.multiprocessing as mp
from cost import processor, resident
from pages import ROOT, fill
from PIL import Image
from rich.console import Console
from training_steps import Run

from ovs3d_nerfstudio import pipeline as pipeline_module
from ovs3d_nerfstudio.configs import ovs3d_lite
from ovs3d_nerfstudio.data import rays as datamanager
from ovs3d_nerfstudio.demo.scene import make_scene
from ovs3d_nerfstudio.encoders.base import image_text_encoder, token_encoder
from ovs3d_nerfstudio.engine import ranks
from ovs3d_nerfstudio.features.extraction import extract

BASE = {"views": 10, "height": 1080, "prompts": 10, "scales": 3, "D": 512}
AXES = {
    "views": [10, 100, 1000],
    "height": [270, 1080, 2160],
    "prompts": [1, 10, 200],
    "scales": [1, 3, 5],
    "D": [384, 768, 1152],
}
QUICK = {"views": [3, 6], "height": [135, 270], "prompts": [1, 5], "scales": [1, 2], "D": [384, 512]}
MEASURED = {
    "extraction_ms": "extraction, ms a view",
    "basis_ms": "fitting the basis, ms a view",
    "teaching_ms": "projecting, ms a view",
    "step_ms": "a step, ms",
    "cache_mb": "cache, MB a view on disk",
    "extraction_mb": "peak of extraction, MB",
    "basis_mb": "peak of fitting, MB",
    "teaching_kept_mb": "memory of features, MB",
    "own_mb": "memory in training, MB",
    "mapped_mb": "mapped from disk, MB",
}
"""What is measured of each point. Peaks, and what features keep, are beyond what was there before; memory is the whole
process's own (anonymous), as it trains. What is mapped from disk the system takes back when it needs the room."""
SCALES = (5.0, 7.0, 10.0, 14.0, 20.0)
PICTURES = 8
"""Pictures that nerfstudio holds at a time: all of a thousand at 1080p would take 25 GB, with or without features."""


# One point ------------------------------------------------------------------------------------------------------------
def make_views(folder: Path, count: int, height: int) -> Path:
    """A scene of `count` training views and one to test, 16:9, that cost little to make: blurred noise from a circle."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    width, frames, names = height * 16 // 9, [], []
    for view in range(count + 1):
        name = f"images/{view:05d}.jpg"
        if not (folder / name).exists():
            noise = np.random.default_rng(view).integers(0, 255, (9, 16, 3), np.uint8)
            Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).save(folder / name)
        turn = 2 * math.pi * view / (count + 1)
        c, s = math.cos(turn), math.sin(turn)
        pose = [[-s, 0, c, 2 * c], [c, 0, s, 2 * s], [0, 1, 0, 0.3], [0, 0, 0, 1]]
        frames.append({"file_path": name, "transform_matrix": pose})
        names.append(name)
    camera = {"fl_x": width, "fl_y": width, "cx": width / 2, "cy": height / 2, "w": width, "h": height}
    splits = {"train_filenames": names[:-1], "val_filenames": names[-1:], "test_filenames": names[-1:]}
    (folder / "transforms.json").write_text(
        json.dumps({"camera_model": "OPENCV", **camera, "frames": frames, **splits})
    )
    return folder


def memory(kind: str) -> float:
    """MB of this process: RssAnon is its own, RssFile mapped from files, VmHWM the most it had of both."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident(kind)


def watched(call: Callable, part: str, row: dict[str, float], views: int) -> Callable:
    """Notes what a call takes: processor time a view, the most memory meanwhile, and what it keeps."""

    def measured(*args: Any) -> Any:
        own, all_of_it = memory("RssAnon"), memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        start = time.process_time()
        result = call(*args)
        row[f"{part}_ms"] = 1e3 * (time.process_time() - start) / max(1, views)
        row[f"{part}_mb"] = max(0.0, memory("VmHWM") - all_of_it)
        row[f"{part}_kept_mb"] = max(0.0, memory("RssAnon") - own)
        return result

    return measured


def measure(point: dict[str, int], work: Path, steps: int) -> dict[str, float]:
    """Everything of MEASURED. Views that an earlier point of the same folder made are cached; rates count the new ones."""
    torch.set_num_threads(1)
    name = "-".join(str(point[axis]) for axis in ("height", "scales", "D"))
    scene = make_views(work / f"scene-{point['height']}", point["views"], point["height"])
    trainer = deepcopy(ovs3d_lite.config)
    pipeline = trainer.pipeline
    pipeline.prompts = "; ".join(f"prompt {n}" for n in range(point["prompts"]))
    pipeline.image_text_encoder, pipeline.token_encoder = f"synthetic:{point['D']}", "synthetic"
    data = pipeline.datamanager
    data.data, data.feature_cache_dir, data.scales = scene, work / f"cache-{name}", SCALES[: point["scales"]]
    data.train_num_images_to_sample_from, data.eval_num_images_to_sample_from = min(PICTURES, point["views"]), 1
    lacking = point["views"] - len(list(data.feature_cache_dir.glob("tokens-*/*.safetensors")))
    row: dict[str, float] = {}
    parts = {"extraction": (datamanager, "extract"), "basis": (pipeline_module, "fit_basis")}
    parts |= {"teaching": (datamanager, "Teachers")}
    with ExitStack() as stack:
        for part, (owner, called) in parts.items():
            counted = lacking if part == "extraction" else point["views"]
            stack.enter_context(mock.patch.object(owner, called, watched(getattr(owner, called), part, row, counted)))
        run = Run(pipeline, trainer.optimizers, "cpu")
    if not lacking:
        del row["extraction_ms"], row["extraction_mb"]
    teachers = run.pipeline.datamanager.teachers
    views, mapped = teachers.views, (teachers.cells, teachers._patches, teachers._boxes, *teachers._tokens)
    row["mapped_mb"] = sum(rows.nbytes for rows in mapped) / 2**20
    row["cache_mb"] = (views.pyramid.size(views.keys) + views.tokens.size(views.keys)) / 2**20 / point["views"]
    run.steps()
    taken = []
    for _ in range(steps):
        start = time.process_time()
        run.steps()
        taken.append(1e3 * (time.process_time() - start) / run.block)
    row["step_ms"], row["own_mb"] = min(taken), memory("RssAnon")
    return row


# Processes ------------------------------------------------------------------------------------------------------------
class Stopwatch:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self.start = self.now()

    def taken(self, parts: int) -> tuple[float, float]:
        """Milliseconds a part: wall, processor time of this process."""
        return tuple(1e3 * (now - start) / parts for now, start in zip(self.now(), self.start, strict=True))

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def as_rank(rank: int, count: int, work: Path, rays: int, steps: int) -> None:
    """Extracts a small scene with a real network and trains, as one of `count` ranks; rank 0 writes how long it took."""
    torch.set_num_threads(1)  # a core for each
    folder = work / f"processes-{count}"
    if count > 1:
        ranks.join(ranks.meeting_in(folder), rank, count, "gloo")
    trainer = deepcopy(ovs3d_lite.config)
    pipeline, scene = trainer.pipeline, work / "demo"
    pipeline.datamanager.data, pipeline.datamanager.feature_cache_dir = scene, folder / "cache"
    pipeline.datamanager.train_num_rays_per_batch = rays // count
    pipeline.datamanager.num_windows, pipeline.datamanager.window_size = 2 // count, 16
    encoder, tokens = image_text_encoder("offline:crops"), token_encoder("offline")
    pictures = sorted((scene / "images").glob("train*"))
    first, quiet = pictures[rank : rank + 1], Console(quiet=True)
    ranks.wait_for_all()
    extract(first * count, encoder, tokens, (2.0,), folder / "warm", quiet)  # weights are loaded
    start = Stopwatch()
    extract(pictures, encoder, tokens, (3.0,), folder / "cache", quiet)
    extraction = start.taken(len(pictures))
    pipeline.image_text_encoder, pipeline.datamanager.scales = "offline", (2.0, 3.0)
    run = Run(pipeline, trainer.optimizers, "cpu", world_size=count, local_rank=rank)
    run.steps()
    taken = []
    for _ in range(steps):
        ranks.wait_for_all()
        start = Stopwatch()
        run.steps()
        ranks.wait_for_all()
        taken.append(start.taken(run.block))
    if rank == 0:
        row = {"processes": count, "rays": rays, "views": len(pictures)}
        row |= dict(zip(("extraction_ms", "extraction_cpu_ms"), extraction, strict=True))
        row |= dict(zip(("step_ms", "step_cpu_ms"), map(min, zip(*taken, strict=True)), strict=True))
        (folder / "row.json").write_text(json.dumps(row))


def processes(work: Path, rays: int, steps: int) -> list[dict]:
    make_scene(work / "demo", width=160, train_views=4, test_views=1)
    rows = []
    for count in (1, 2):
        folder = work / f"processes-{count}"
        folder.mkdir()
        mp.spawn(as_rank, args=(count, work, rays, steps), nprocs=count)
        rows.append(json.loads((folder / "row.json").read_text()))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


# Results --------------------------------------------------------------------------------------------------------------
def tables(results: dict) -> str:
    shown = {key: what for key, what in MEASURED.items() if any(key in row for row in results["rows"])}
    lines = [f"| | {' | '.join(shown.values())} |", "|---" * (len(shown) + 1) + "|"]
    for row in results["rows"]:
        cells = ["–" if key not in row else f"{row[key]:.{0 if row[key] >= 10 else 1}f}" for key in shown]
        lines.append(f"| {row['axis']} {row[row['axis']]} | {' | '.join(cells)} |")
    keys = ("extraction_ms", "extraction_cpu_ms", "step_ms", "step_cpu_ms")
    lines += [
        "",
        "| processes | extraction, ms a view: wall | processor, of one process | a step, ms: wall | processor |",
    ]
    lines.append("|---" * 5 + "|")
    lines += [
        f"| {row['processes']} | {' | '.join(f'{row[key]:.0f}' for key in keys)} |" for row in results["processes"]
    ]
    base = ", ".join(f"{name} {value}" for name, value in results["base"].items())
    return "\n".join([*lines, "", f"All else: {base}. Measured on {results['machine']}."])


def plot(rows: list[dict], path: Path) -> None:
    """A column for each thing that grows, a row for each thing measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    shown = ["extraction_ms", "step_ms", "cache_mb", "own_mb", "mapped_mb"]
    figure, panels = pyplot.subplots(
        len(shown),
        len(axes),
        figsize=(2.2 * len(axes), 1.6 * len(shown)),
        sharex="col",
        sharey="row",
        layout="constrained",
    )
    for column, axis in enumerate(axes):
        for line, key in enumerate(shown):
            points = [(row[axis], row.get(key, math.nan)) for row in rows if row["axis"] == axis]
            panel = panels[line, column]
            panel.plot(*zip(*points, strict=True), "o-", color="#4477aa")
            panel.set_xscale("log")
            panel.set_xticks([at for at, _ in points], [f"{at}" for at, _ in points], fontsize=7)
            panel.minorticks_off()
            panel.set_ylim(0, 1.1 * max(row.get(key, 0) for row in rows))
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(MEASURED[key].replace(", ", "\n"), fontsize=8)
        panels[-1, column].set_xlabel({"height": "height in pixels"}.get(axis, axis))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--write", action="store_true", help="put tables and plot into docs/")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that it runs")
    parser.add_argument(
        "--work", type=Path, help="where scenes and caches lie meanwhile; default: the temporary folder"
    )
    options = parser.parse_args()
    base = BASE | ({"views": 3, "height": 270} if options.quick else {})
    steps = 1 if options.quick else 3
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        measure(
            base | {"views": 2, "height": 135}, work, 1
        )  # what is loaded once is loaded before anything is measured
        for axis, values in (QUICK if options.quick else AXES).items():
            for value in values:
                point = base | {axis: value}
                rows.append({"axis": axis, **point, **measure(point, work, steps)})
                print(rows[-1], file=sys.stderr, flush=True)
            for cache in work.glob("cache-*"):  # room for the next
                shutil.rmtree(cache)
        parallel = processes(work, 128 if options.quick else 1024, steps)
    results = {"rows": rows, "processes": parallel, "base": base, "machine": processor()}
    text = tables(results)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.write:
        fill(ROOT / "docs" / "performance.md", "growth", text)
        plot(rows, ROOT / "docs" / "images" / "growth.png")


if __name__ == "__main__":
    main()
