"""Real processes for the tests to kill: forked from one that has imported everything, so that they work at once.

A test hands a function of this file to `start`; it runs in a process of its own, whose output goes to a file.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "children",
        "nerfstudio.scripts.train",
        "torch.utils.tensorboard",
        "torchmetrics.image.lpip",
        "open_clip",
        "transformers.models.vit.modeling_vit",
    ]
)

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@dataclass
class Child:
    process: BaseProcess
    log: Path

    def kill_after(self, seconds: float) -> bool:
        """Whether it was still at work then; kill -9."""
        self.process.join(seconds)
        if self.process.exitcode is not None:
            return False
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def end(self) -> int:
        """The exit status, when it ends by itself."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def text(self) -> str:
        """What it printed, on one line."""
        return " ".join(self.log.read_text().split())


def start(log: Path, work: Callable, *args, **kwargs) -> Child:
    log.touch()
    process = CONTEXT.Process(target=_run, args=(log, work, args, kwargs))
    process.start()
    return Child(process, log)


def _run(log: Path, work: Callable, args: tuple, kwargs: dict) -> None:
    os.environ["COLUMNS"] = "200"
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell has what it starts in the background ignore Ctrl-C
    work(*args, **kwargs)


def write_weights(folder: Path) -> dict[str, str]:
    """Small CLIP and DINO checkpoints of random weights; their specs."""
    import open_clip
    import torch
    from transformers import ViTConfig, ViTModel

    open_clip.factory._MODEL_CONFIGS["tiny-ovs3d"] = TINY_CLIP
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-ovs3d", pretrained=None).state_dict(), folder / "clip.pt")
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**size, patch_size=8, image_size=64)).save_pretrained(folder / "dino")
    del open_clip.factory._MODEL_CONFIGS["tiny-ovs3d"]
    return specs(folder)


def specs(folder: Path) -> dict[str, str]:
    return {
        "pipeline__image_text_encoder": f"open_clip:tiny-ovs3d@{folder / 'clip.pt'}",
        "pipeline__token_encoder": f"dino:{folder / 'dino'}",
    }


def die_at(operation: int, folder: Path) -> None:
    """kill -9 just before the given file operation (opening, renaming, removing, making a folder) below `folder`."""
    seen = 0

    def count(event: str, args: tuple) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(str(folder)):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def extract(pictures: list[Path], weights: Path, cache: Path, begun: Path, die: int = 0) -> None:
    """Features of `pictures` with the small encoders; writes the name of each picture to `begun` when it is embedded."""
    import open_clip
    from rich.console import Console

    from ovs3d_nerfstudio.encoders.dino import DinoEncoder
    from ovs3d_nerfstudio.encoders.open_clip import OpenClipEncoder
    from ovs3d_nerfstudio.errors import user_errors
    from ovs3d_nerfstudio.features.extraction import extract

    class Clip(OpenClipEncoder):
        def embed_boxes(self, picture, boxes, path):
            with begun.open("a") as file:
                file.write(f"{path.name}\n")
            return super().embed_boxes(picture, boxes, path)

    open_clip.factory._MODEL_CONFIGS["tiny-ovs3d"] = TINY_CLIP
    clip, dino = (spec.partition(":")[2] for spec in specs(weights).values())
    encoders = Clip(clip, "cpu"), DinoEncoder(dino, "cpu")
    if die:
        die_at(die, cache)
    with user_errors():
        extract(pictures, *encoders, (2.0,), cache, Console(file=sys.__stdout__, width=200))


def configured(scene: Path, out: Path, steps: int, method: str = "ovs3d-lite", **settings):
    """The config of a method with small grids and, by `settings`, the small encoders; a dot in a name is `__`."""
    import open_clip
    from nerfstudio.configs.method_configs import all_methods

    open_clip.factory._MODEL_CONFIGS["tiny-ovs3d"] = TINY_CLIP
    config = copy.deepcopy(all_methods[method])
    config.data = config.pipeline.datamanager.data = scene
    config.output_dir, config.experiment_name, config.timestamp = out, "run", "t"
    config.max_num_iterations, config.vis = steps, "tensorboard"
    datamanager, model = config.pipeline.datamanager, config.pipeline.model
    datamanager.scales, datamanager.window_size = (2.0, 3.0), 4
    model.semantic_log2_hashmap_size, model.semantic_levels = 11, 4
    model.semantics_start, model.fda_start = 2, 4
    if "splat" not in method:
        datamanager.train_num_rays_per_batch = 64
        model.log2_hashmap_size, model.num_levels = 11, 4
    for name, value in settings.items():
        *place, last = name.split("__")
        target = config
        for part in place:
            target = getattr(target, part)
        setattr(target, last, value)
    return config


def train(
    scene: Path,
    out: Path,
    steps: int,
    save: int,
    load_dir: Path | None = None,
    die_in_save: tuple[int, int] = (0, 0),
    die_in_step: int = -1,
    **settings,
) -> None:
    """`ns-train` with a `configured` config; writes its steps to `steps.txt`.

    `die_in_save`: which save, and before which of its file operations; see `die_at`. `die_in_step`: kill -9 once it has begun.
    """
    from nerfstudio.scripts.train import main

    from ovs3d_nerfstudio.engine.saving import SavingTrainer
    from ovs3d_nerfstudio.pipeline import OVS3DPipeline

    config = configured(scene, out, steps, **settings)
    config.steps_per_save, config.load_dir = save, load_dir
    for group in config.optimizers.values():  # rates of one schedule, however many steps a child makes
        if group["scheduler"] is not None:
            group["scheduler"].max_steps = 50
    train_step = OVS3DPipeline.get_train_loss_dict

    def logged(self, step):
        with (out / "steps.txt").open("a") as file:
            file.write(f"{step}\n")
        if step == die_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, step)

    OVS3DPipeline.get_train_loss_dict = logged  # type: ignore[method-assign]
    save_checkpoint, saves = SavingTrainer.save_checkpoint, itertools.count(1)

    def dying(self, step):
        if next(saves) == die_in_save[0]:
            die_at(die_in_save[1], out)
        save_checkpoint(self, step)

    SavingTrainer.save_checkpoint = dying
    main(config)


def run_folder(out: Path, method: str = "ovs3d-lite") -> Path:
    return out / "run" / method / "t"


def checkpoint_folder(out: Path, method: str = "ovs3d-lite") -> Path:
    return run_folder(out, method) / "nerfstudio_models"
