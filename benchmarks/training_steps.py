"""Training steps outside of nerfstudio's trainer, to be timed and profiled; what `cost.py` measures with."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import wraps
from unittest import mock

import torch
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.field_components.encodings import HashEncoding
from torch import Tensor, nn

from ovs3d_nerfstudio.fields.hash_grid import FastHashEncoding, use_fast_hash_grids
from ovs3d_nerfstudio.losses import color, paper, patches


def seconds(call: Callable[[], object], device: str) -> float:
    """How long a call takes, until the device has done what it was asked."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


class Run:
    """A pipeline with its optimizers and callbacks, stepped as nerfstudio's trainer does it."""

    def __init__(self, pipeline_config, optimizers: dict, device: str, mixed_precision: bool = True, **rank: int):
        """`mixed_precision` is of CUDA alone; `rank`: world_size and local_rank, where several processes train."""
        self.device = device.split(":")[0]
        self.mixed_precision = mixed_precision and self.device == "cuda"
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.mixed_precision)
        with mock.patch("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity"):  # it would download AlexNet
            self.pipeline = pipeline_config.setup(device=device, test_mode="val", grad_scaler=self.scaler, **rank)
        self.pipeline.train()
        if hasattr(self.pipeline, "prepare_features"):
            self.pipeline.prepare_features()
        self.optimizers = Optimizers(deepcopy(optimizers), self.pipeline.get_param_groups())
        attributes = TrainingCallbackAttributes(self.optimizers, self.scaler, self.pipeline, None)
        self.callbacks = self.pipeline.get_training_callbacks(attributes)
        config = self.model.config
        self.block = getattr(config, "proposal_update_every", 0) + 1
        """Steps from one training of the proposal networks to the next, where there are some."""
        self.first_step = max(getattr(config, "proposal_warmup", 0), getattr(config, "fda_start", 0))
        self.steps_done = 0

    @property
    def model(self):
        return self.pipeline.model

    def step(self) -> None:
        """One training step, of the time when every loss takes part and proposal networks are trained at intervals."""
        step = self.first_step + self.steps_done
        self.steps_done += 1
        self._call_back(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        self.optimizers.zero_grad_all()
        with torch.autocast(self.device, enabled=self.mixed_precision):
            loss = sum(self.pipeline.get_train_loss_dict(step)[1].values())
        self.scaler.scale(loss).backward()
        self.optimizers.optimizer_scaler_step_all(self.scaler)
        scale = self.scaler.get_scale()
        self.scaler.update()
        if scale <= self.scaler.get_scale():  # else the scaler skipped the step
            for scheduler in self.optimizers.schedulers.values():
                scheduler.step()
        self._call_back(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)

    def _call_back(self, step: int, location) -> None:
        for callback in self.callbacks:
            callback.run_callback_at_location(step, location)

    def steps(self, semantics: bool = True, fast_grids: bool = True) -> None:
        """One block of steps; without `fast_grids`, on nerfstudio's own torch code, which has the same tables."""
        config = self.model.config
        starts = getattr(config, "semantics_start", 0)
        with (
            mock.patch.object(config, "semantics_start", starts if semantics else 10**9, create=True),
            ExitStack() as stack,
        ):
            if not fast_grids:
                use_plain_hash_grids(self.model)
                stack.callback(use_fast_hash_grids, self.model)
            for _ in range(self.block):
                self.step()


def use_plain_hash_grids(module: nn.Module) -> None:
    """The reverse of `use_fast_hash_grids`."""
    for part in module.modules():
        if type(part) is FastHashEncoding:
            part.__class__ = HashEncoding


class Shares:
    """Wall time of named calls, each without the named calls inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def wrap(self, call: Callable, label: str) -> Callable:
        @wraps(call)
        def timed(*args, **kwargs):
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                self.seconds[label] += taken - self._inner.pop()
                self._inner[-1] += taken

        return timed


def profile(run: Run, blocks: int) -> str:
    """Who takes what share of a full step: parts of the code by wall time, then torch's operations by their own time."""
    model, datamanager, shares = run.model, run.pipeline.datamanager, Shares()
    parts = [
        (datamanager, "next_train", "data: rays and pixels"),
        (datamanager, "teachers_of", "data: cells of the rays"),
        (datamanager, "next_windows", "data: windows and their rays"),
        (model.proposal_sampler, "forward", "proposal sampling"),
        (model.field, "forward", "field: colour"),
        (model.field, "get_density", "field: density"),
        (model.semantic_field, "forward", "semantic field"),
        (model, "_heaviest_of_windows", "windows: weights"),
        (model, "composited", "compositing semantics"),
        (model, "get_outputs", "compositing the rest"),
        (model, "get_metrics_dict", "nerfacto's losses and metrics"),
        (model, "get_loss_dict", "nerfacto's losses and metrics"),
        (model, "semantic_losses", "semantic losses: feature, the rest"),
        (paper, "rda_loss", "semantic losses: RDA"),
        (paper, "fda_loss", "semantic losses: FDA"),
        (color, "color_loss", "semantic losses: colour"),
        (patches, "patch_distances", "semantic losses: patches, unmixing"),
        (FastHashEncoding, "forward", "hash grids, forward"),
        (Tensor, "backward", "backward"),
        (run.optimizers, "optimizer_scaler_step_all", "Adam"),
    ]
    run.steps()
    with ExitStack() as stack:
        for owner, name, label in parts:
            stack.enter_context(mock.patch.object(owner, name, shares.wrap(getattr(owner, name), label)))
        start = time.perf_counter()
        for _ in range(blocks):
            run.steps()
        total = time.perf_counter() - start
    shares.seconds["all else"] = total - sum(shares.seconds.values())
    lines = [f"A step takes {1e3 * total / blocks / run.block:.0f} ms, of which:"]
    for label, seconds in sorted(shares.seconds.items(), key=lambda item: -item[1]):
        lines.append(f"{seconds / total:6.1%}  {1e3 * seconds / blocks / run.block:7.2f} ms  {label}")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run.steps()
    operations = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in operations)
    lines += ["", "Operations, forward and backward, by the time they spend themselves:"]
    for event in operations[:12]:
        lines.append(f"{event.self_cpu_time_total / whole:6.1%}  {event.count / run.block:7.1f} a step  {event.key}")
    return "\n".join(lines)
