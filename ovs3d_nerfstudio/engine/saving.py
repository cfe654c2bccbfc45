"""A trainer that can be killed at any instant: the last checkpoint is whole, and going on from it ends as if nothing was.

nerfstudio's own writes checkpoints to their final name and then deletes the others, so a kill in between loses the run; and
a resumed run draws other rays and trains as many steps again.
"""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.engine.trainer import Trainer
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from ovs3d_nerfstudio.engine.checkpoints import (
    CheckpointError,
    checkpoint_path,
    checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from ovs3d_nerfstudio.errors import user_errors

COUNTS_FROM_THE_FIRST = "max_num_iterations - self._start_step" in inspect.getsource(Trainer.train)
"""Whether nerfstudio's loop itself counts the steps of a resumed run from the first one, as its main branch does. Its release
1.1.5 counts those of this process, and both call themselves 1.1.5."""


class SavingTrainer(Trainer):
    """nerfstudio's trainer, with whole checkpoints and a resuming that repeats nothing."""

    _saved: tuple[Path, dict[str, Any]] | None = None
    """The checkpoint to go on from, between its reading and its loading."""

    def train(self) -> None:
        """Trains up to `max_num_iterations` steps in all, counted from the first one of a run that is resumed."""
        left = self.config.max_num_iterations - self._start_step
        if left > 0:
            if not COUNTS_FROM_THE_FIRST:
                self.config.max_num_iterations = left
            super().train()
            return
        self.step, self.training_state = self._start_step - 1, "completed"
        self.save_checkpoint(self.step)  # this run's folder may be another than the checkpoint's
        CONSOLE.print(
            f"There is nothing left to train: the checkpoint is of step {self.step}, and --max-num-iterations "
            f"{self.config.max_num_iterations} counts from the first step. Raise it to train on."
        )

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Saves everything that the next step depends on; deletes earlier checkpoints, as configured, when that is on disk.

        When it cannot be saved, training goes on and the next save tries again; after the last step that is an error.
        """
        path = checkpoint_path(self.checkpoint_dir, step)
        with user_errors():
            try:
                write_checkpoint(path, self._state(step))
            except CheckpointError as error:
                if self.training_state == "completed":
                    raise
                CONSOLE.print(f"[bold yellow]Warning:[/bold yellow] {escape(str(error))} Training goes on.")
                return
        if self.config.save_only_latest_checkpoint:
            for other in checkpoints(self.checkpoint_dir):
                if other != path:
                    other.unlink()

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "pipeline": self.pipeline.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
            # Beyond nerfstudio's: with these a resumed run draws the rays and samples that it would have drawn.
            "random": random_state(),
            "sampler": self.pipeline.model.step_state(),
        }

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """As nerfstudio's; a run that goes on has its checkpoint read first, for its data begin where that was trained."""
        with user_errors():
            self._saved = self._checkpoint_to_load()
        if self._saved is not None:
            datamanager: Any = self.config.pipeline.datamanager
            datamanager.known(self._saved[1])
        super().setup(test_mode)

    def _checkpoint_to_load(self) -> tuple[Path, dict[str, Any]] | None:
        config = self.config
        if config.load_dir is not None:
            return _latest(config.load_dir, config.load_step)
        if config.load_checkpoint is not None:
            return config.load_checkpoint, read_checkpoint(config.load_checkpoint)
        return None

    def _load_checkpoint(self) -> None:
        if self._saved is None:
            earlier = checkpoints(self.checkpoint_dir)
            if earlier:
                CONSOLE.print(
                    f"[bold yellow]Warning:[/bold yellow] Training starts anew, and its first save replaces {earlier[0]}; "
                    f"to go on from there, give --load-dir {self.checkpoint_dir}."
                )
            return
        (path, state), self._saved = self._saved, None
        with user_errors():
            self._resume(state)
        CONSOLE.print(f"Going on after step {state['step']} from {path}.")

    def _resume(self, state: dict[str, Any]) -> None:
        self.pipeline.load_pipeline(state["pipeline"], state["step"])
        try:
            self.optimizers.load_optimizers(state["optimizers"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint's optimizers do not fit ({error}); resume with the method and settings of its run."
            ) from error
        for optimizer in self.optimizers.optimizers.values():
            for parameter, kept in optimizer.state.items():
                # Of views that are others now: their parameters go on without a past.
                if any(value.shape not in (parameter.shape, ()) for value in kept.values() if torch.is_tensor(value)):
                    kept.clear()
        if "schedulers" in state and self.config.load_scheduler:
            self.optimizers.load_schedulers(state["schedulers"])
        if state.get("scalers"):  # empty from a run without mixed precision, as on a CPU
            self.grad_scaler.load_state_dict(state["scalers"])
        self._start_step = state["step"] + 1
        if "sampler" in state:
            self.pipeline.model.load_step_state(state["sampler"])
        # Ranks of one run must not all draw what rank 0 drew.
        if "random" in state and self.world_size == 1:
            set_random_state(state["random"])


def _latest(folder: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of `step`, or the latest one that can be read."""
    if step is not None:
        path = checkpoint_path(folder, step)
        return path, read_checkpoint(path)
    for path in checkpoints(folder):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            CONSOLE.print(f"[bold yellow]Warning:[/bold yellow] {escape(str(error))} An earlier one is tried.")
    raise CheckpointError(
        f"There is no checkpoint that can be read in --load-dir {folder}; name the folder nerfstudio_models of a run."
    )


def random_state() -> dict[str, Any]:
    """The states of the generators that nerfstudio and we draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets what `random_state` returned; CUDA's where it is of as many devices as there are here."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
