"""Real processes for the tests to kill: forked from one that has imported everything, so that they work at once.

A test hands a function of this file to `start`; it runs in a process of its own, whose output goes to a file.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["children", "nerfstudio.scripts.train", "ovs3d_nerfstudio.encoders.offline"])


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
    process = CONTEXT.Process(target=_run, args=(log, work, args, kwargs))
    process.start()
    return Child(process, log)


def _run(log: Path, work: Callable, args: tuple, kwargs: dict) -> None:
    os.environ["COLUMNS"] = "200"
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    work(*args, **kwargs)


def train(scene: Path, out: Path, steps: int, save: int, load_dir: Path | None = None, **settings) -> None:
    """`ns-train ovs3d-lite` with small grids; a dot in a setting's name is `__`."""
    from copy import deepcopy

    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.scripts.train import main

    config = deepcopy(all_methods["ovs3d-lite"])
    config.data, config.output_dir, config.experiment_name, config.timestamp = scene, out, "run", "t"
    config.max_num_iterations, config.steps_per_save, config.load_dir, config.vis = steps, save, load_dir, "tensorboard"
    config.pipeline.datamanager.train_num_rays_per_batch = 64
    config.pipeline.datamanager.window_size = 4
    model = config.pipeline.model
    model.log2_hashmap_size = model.semantic_log2_hashmap_size = 11
    model.num_levels = model.semantic_levels = 4
    model.semantics_start, model.fda_start = 2, 4
    for name, value in settings.items():
        *place, last = name.split("__")
        target = config
        for part in place:
            target = getattr(target, part)
        setattr(target, last, value)
    main(config)


def run_folder(out: Path) -> Path:
    return out / "run" / "ovs3d-lite" / "t"
