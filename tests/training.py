"""A training in this process, step by step as nerfstudio's trainer does it, for tests that look at each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.engine.optimizers import Optimizers


@dataclass
class Trained:
    pipeline: Any
    losses: list[dict[str, float]] = field(default_factory=list)
    """Of each step."""
    snapshots: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    """The model's parameters before some of the steps."""


def train_steps(config: Any, steps: int) -> Trained:
    """Trains `steps` steps on one thread from seed 0; parameters are kept before the first step, the first of the semantics,
    and after the last."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        pipeline = config.pipeline.setup(device="cpu", test_mode="val", world_size=1, local_rank=0)
        pipeline.train()
        optimizers = Optimizers(config.optimizers, pipeline.get_param_groups())
        attributes = TrainingCallbackAttributes(
            optimizers=optimizers, grad_scaler=None, pipeline=pipeline, trainer=None
        )
        callbacks = pipeline.get_training_callbacks(attributes)
        trained = Trained(pipeline)
        for step in range(steps):
            if step in (0, config.pipeline.model.semantics_start):
                trained.snapshots[step] = _parameters(pipeline.model)
            for callback in callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
            optimizers.zero_grad_all()
            _, losses, _ = pipeline.get_train_loss_dict(step)
            sum(losses.values()).backward()
            optimizers.optimizer_step_all()
            optimizers.scheduler_step_all(step)
            for callback in callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
            trained.losses.append({name: float(value) for name, value in losses.items()})
        trained.snapshots[steps] = _parameters(pipeline.model)
        return trained
    finally:
        torch.set_num_threads(threads)


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
