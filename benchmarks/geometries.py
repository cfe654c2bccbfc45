"""The two geometries side by side, on one scene with masks: what is trained in what time, how good it is, how fast it answers.

    python benchmarks/geometries.py --scene SCENE --encoder mixture [--seed 0] [--json FILE] [--plot PICTURE]

Trains `ovs3d-lite` and `ovs3d-splat-lite` one after the other, then has their pictures take turns. Prints one Markdown table.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cost import alternate, processor
from nerfstudio.cameras.cameras import Cameras
from pages import ROOT
from quality_rows import Job, measure

sys.path.insert(0, str(ROOT / "benchmarks" / "encoders"))  # its entry points make `mixture` and `tabletop` known

import query

from ovs3d_nerfstudio.files import write_json
from ovs3d_nerfstudio.models.semantics import SemanticModel
from ovs3d_nerfstudio.prompts.embedding import Embedder
from ovs3d_nerfstudio.viewer.live import LiveModel, LivePrompts

METHODS = {"NeRF": "ovs3d-lite", "Gaussians": "ovs3d-splat-lite"}
SIZE = (480, 360)
PROMPTS = 10
ROWS = {
    "minutes": ("training, minutes", "{:.1f}"),
    "peak_memory_gb": ("peak memory of training, GB", "{:.1f}"),
    "psnr": ("PSNR held out, dB", "{:.1f}"),
    "miou": ("mIoU held out", "{:.3f}"),
    "boundary_iou": ("boundary IoU held out", "{:.3f}"),
    "rgb": ("RGB alone, ms", "{:.0f}"),
    "view": ("the class map, as while the camera moves, ms", "{:.0f}"),
    "picture": ("RGB, segmentation and {prompts} relevancies, ms", "{:.0f}"),
    "change": ("{prompts} other prompts on a view that stays, ms", "{:.0f}"),
}
"""Figures of a geometry, what a reader calls them, and their digits."""
TIMES = ("rgb", "view", "picture", "change")


def sides(model: SemanticModel, camera: Cameras, prompts: list[str]) -> dict[str, Callable[[], object]]:
    """What is timed of one geometry."""
    live = LivePrompts(model)
    live.follow_training()
    live.ask(prompts)

    def view() -> None:
        LiveModel(live, threading.Lock()).get_outputs_for_camera(camera)["segmentation"]

    def rgb() -> None:
        with mock.patch.object(type(model.segmenter), "ready", False):
            assert "segmentation" not in model.get_outputs_for_camera(camera)

    return {"rgb": rgb, "view": view, "picture": lambda: model.get_outputs_for_camera(camera)}


def compared(options: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """The figures of each geometry."""
    figures: dict[str, dict[str, float]] = {}
    timed: dict[str, Callable[[], object]] = {}
    for name, method in METHODS.items():
        held: dict[str, Any] = {"full": None}
        torch.manual_seed(options.seed)
        outcome = measure(Job(method, options.scene, options.encoder, options.seed, options.steps, work), "full", held)
        scores = outcome.splits["test"][0]
        wanted = ("psnr", "miou", "boundary_iou")
        figures[name] = {key: scores[key] for key in wanted} | {
            key: value for key, value in outcome.costs.items() if key in ROWS and value is not None
        }
        pipeline = held["full"]
        model = pipeline.model.eval()
        camera = query.resized(pipeline.datamanager.train_dataset.cameras[:1], *options.size).to(model.device)
        fresh = query.words()
        asked = [next(fresh) for _ in range(PROMPTS)]
        model.segmenter.ask(asked, Embedder(model.device)(model.segmenter, asked))
        timed |= {f"{name} {what}": side for what, side in sides(model, camera, asked).items()}
        settings = query.Settings((options.size,), (PROMPTS,), turns=options.repeats, renders=1)
        figures[name]["change"] = query.measure(model, pipeline.datamanager.train_dataset.cameras[:1], settings)[
            0
        ].change_ms
    for side, taken in alternate(options.repeats, **timed).items():
        name, what = side.split(" ")
        figures[name][what] = 1e3 * taken
    return figures


def table(figures: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """The Markdown table; of times, how many times the NeRF's are the Gaussians'."""
    lines = [f"| | {' | '.join(METHODS)} | |", "|---|--:|--:|--:|"]
    for row, (what, digits) in ROWS.items():
        values = [figures[name].get(row) for name in METHODS]
        cells = ["–" if value is None else digits.format(value) for value in values]
        faster = f"{values[0] / values[1]:.0f} ×" if row in TIMES else ""
        lines.append(f"| {what.format(prompts=PROMPTS)} | {' | '.join(cells)} | {faster} |")
    where = f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    size = "×".join(map(str, options.size))
    lines += [
        "",
        f"Scene `{options.scene.name}`, encoder `{options.encoder}`, pictures {size}; medians of {options.repeats} turns on {where}.",
    ]
    return "\n".join(lines)


def plot(figures: dict[str, dict[str, float]], path: Path) -> None:
    """The times of both geometries, side by side on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.8), layout="constrained")
    for i, (name, color) in enumerate(zip(METHODS, ("#cc6677", "#4477aa"), strict=True)):
        places = [place + 0.38 * (i - 0.5) for place in range(len(TIMES))]
        times = [figures[name][what] for what in TIMES]
        bars = axes.barh(places, times, height=0.36, color=color, label=name)
        axes.bar_label(bars, [f"{taken:,.0f} ms" for taken in times], padding=3)
    axes.set_yticks(range(len(TIMES)), [ROWS[what][0].format(prompts=PROMPTS).removesuffix(", ms") for what in TIMES])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(axes.get_xlim()[0] / 2, 6 * axes.get_xlim()[1])
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scene", type=Path, required=True, help="a scene with masks")
    parser.add_argument("--encoder", default="mixture", help="image-text encoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps of each (default: the methods')")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, help="width and height of the pictures")
    parser.add_argument("--work", type=Path, help="where runs and features lie (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the times into this file")
    options = parser.parse_args()
    options.size = tuple(options.size)
    with tempfile.TemporaryDirectory() as folder:
        figures = compared(options, options.work or Path(folder))
    print(table(figures, options))
    if options.json:
        write_json(options.json, figures)
    if options.plot:
        plot(figures, options.plot)


if __name__ == "__main__":
    main()
