"""What a prompt typed into the viewer costs: from Enter to the new picture, and against rendering the view again.

    python benchmarks/query.py --load-config RUN/config.yml [--json FILE]

Times are medians. `change` is all that follows the embedding of the prompts: a new question, the product of the kept
features with its text, labels, colours. `enter` is embedding, change and the encoding of the picture for the browser. Each
turn asks for words that were not asked before. `render` is the view rendered from nothing, as after a move of the camera.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils import colormaps
from viser._scene_api import _encode_image_binary

from ovs3d_nerfstudio.errors import user_errors
from ovs3d_nerfstudio.files import write_json
from ovs3d_nerfstudio.models.semantics import SemanticModel
from ovs3d_nerfstudio.run_files import open_run
from ovs3d_nerfstudio.viewer.live import LiveModel, LivePrompts

ADJECTIVES = [
    "red",
    "green",
    "blue",
    "yellow",
    "white",
    "black",
    "wooden",
    "metal",
    "soft",
    "shiny",
    "small",
    "large",
    "round",
    "old",
    "striped",
    "plastic",
]
NOUNS = [
    "cup",
    "chair",
    "book",
    "lamp",
    "car",
    "dog",
    "flower",
    "shoe",
    "table",
    "bottle",
    "clock",
    "fork",
    "hat",
    "piano",
    "bridge",
    "carpet",
]
CHANGE_MS, SHARE, GPU_CHANGE_MS = 100.0, 1 / 20, 5.0
"""Asked on a CPU at 480×360 with 10 prompts, of a render everywhere, and on a GPU at 1440×1080."""


@dataclass
class Settings:
    sizes: tuple[tuple[int, int], ...] = ((480, 360), (1440, 1080))
    """Widths and heights of the view in pixels."""
    prompts: tuple[int, ...] = (1, 10, 100)
    """Numbers of prompts."""
    turns: int = 9
    """Changes that are timed for each number of prompts."""
    renders: int = 3
    """Renders that are timed for each size; one for views of more than a million pixels on a CPU."""


@dataclass
class Arguments(Settings):
    load_config: Path = tyro.MISSING
    """config.yml of a trained run."""
    json: Path | None = None
    """Where to write the rows."""


@dataclass
class Row:
    device: str
    width: int
    height: int
    prompts: int
    turns: int
    embed_ms: float
    change_ms: float
    enter_ms: float
    render_ms: float
    renders: int
    features_mb: float
    times_render: float = field(init=False)
    """render / change"""

    def __post_init__(self) -> None:
        self.times_render = self.render_ms / self.change_ms


def main(arguments: Arguments) -> list[Row]:
    _, pipeline, _, _ = open_run(arguments.load_config, "inference")
    return measure(pipeline.model.eval(), pipeline.datamanager.train_dataset.cameras[:1], arguments)


def measure(model: SemanticModel, view: Cameras, settings: Settings) -> list[Row]:
    """A row for each size and number of prompts; `view` is a camera, of any size."""
    live = LivePrompts(model)
    live.follow_training()
    live.ask(["first of all"])  # the text tower is loaded once, and that is not what is timed
    device, fresh, rows = str(model.device), words(), []
    for width, height in settings.sizes:
        camera = resized(view, width, height).to(device)
        renders = 1 if device == "cpu" and width * height > 1e6 else settings.renders
        rendered = []
        for _ in range(renders):
            shown = LiveModel(live, threading.Lock())
            rendered.append(timed(lambda: shown.get_outputs_for_camera(camera)["segmentation"], device)[0])  # noqa: B023
        kept = model.segmenter.basis.shape[1] * width * height * 4 / 1e6
        for prompts in settings.prompts:
            turns = [
                turn(live, shown, camera, [next(fresh) for _ in range(prompts)]) for _ in range(settings.turns + 1)
            ]
            embed, change, enter = (1e3 * median(times) for times in zip(*turns[1:], strict=True))
            row = Row(
                name(device),
                width,
                height,
                prompts,
                settings.turns,
                embed,
                change,
                enter,
                1e3 * median(rendered),
                renders,
                kept,
            )
            rows.append(row)
            print(
                f"{width}×{height}, {prompts} prompts: change {change:.1f} ms, Enter to picture {enter:.1f} ms",
                flush=True,
            )
    return rows


def resized(view: Cameras, width: int, height: int) -> Cameras:
    """A copy of the camera `view` for pictures of another size, which show the same."""
    camera = deepcopy(view)
    camera.fx, camera.fy = camera.fx * width / camera.width, camera.fy * height / camera.height
    camera.cx, camera.cy = torch.full_like(camera.cx, width / 2), torch.full_like(camera.cy, height / 2)
    camera.width, camera.height = torch.full_like(camera.width, width), torch.full_like(camera.height, height)
    return camera


def turn(live: LivePrompts, view: LiveModel, camera, prompts: list[str]) -> tuple[float, float, float]:
    """Seconds of embedding, of change and from Enter to the picture."""
    device = str(live.model.device)
    asking, embedding = timed(lambda: live.ask(prompts), device)
    looking, picture = timed(lambda: view.get_outputs_for_camera(camera)["segmentation"], device)

    def send() -> None:
        # As nerfstudio's viewer and viser do with a still view.
        shown = (colormaps.apply_colormap(picture) * 255).type(torch.uint8).cpu().numpy()
        _encode_image_binary(np.ascontiguousarray(shown), "jpeg", jpeg_quality=75)

    return embedding, asking - embedding + looking, asking + looking + timed(send, device)[0]


def timed(call: Callable, device: str) -> tuple[float, object]:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


def words():
    """Prompts that are never said twice."""
    for round_ in count():
        for adjective in ADJECTIVES:
            for noun in NOUNS:
                yield f"{adjective} {noun}" + (f" number {round_}" if round_ else "")


def name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread" + "s" * (threads > 1)


def table(rows: list[Row]) -> str:
    lines = [
        "| device | size | prompts | embed | change | Enter to picture | render | render / change |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        lines.append(
            f"| {row.device} | {row.width}×{row.height} | {row.prompts} | {row.embed_ms:.0f} ms | {row.change_ms:.1f} ms "
            f"| {row.enter_ms:.0f} ms | {row.render_ms / 1e3:.2f} s | {row.times_render:.0f} |"
        )
    return "\n".join(lines)


def verdicts(rows: list[Row]) -> list[str]:
    said = []
    for row in rows:
        if row.prompts != 10:
            continue
        what = f"{row.width}×{row.height}, 10 prompts"
        said.append(f"{what}: change is 1/{row.times_render:.0f} of a render (asked: 1/{1 / SHARE:.0f} at most)")
        asked = CHANGE_MS if row.device.startswith("cpu") else GPU_CHANGE_MS
        if (row.width, row.height) == ((480, 360) if row.device.startswith("cpu") else (1440, 1080)):
            said.append(f"{what}: change takes {row.change_ms:.1f} ms (asked: {asked:.0f} ms at most)")
    return said


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    with user_errors():
        measured = main(arguments)
    print(table(measured))
    print("\n".join(verdicts(measured)))
    if arguments.json is not None:
        write_json(arguments.json, {"rows": [asdict(row) for row in measured]})
