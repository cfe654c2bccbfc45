"""The schedule of learning rates: nerfstudio's exponential decay over the steps of the run, cooled at their end."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nerfstudio.engine.schedulers import ExponentialDecayScheduler, ExponentialDecaySchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ovs3d_nerfstudio.engine.option_checks import SHARE, SIZE, Range, check_config


@dataclass
class CoolingSchedulerConfig(ExponentialDecaySchedulerConfig):
    """Exponential decay that is cooled at its end."""

    _target: type = field(default_factory=lambda: CoolingScheduler)
    max_steps: int | None = None  # type: ignore[assignment]
    """The step at which the decay ends. Default: the last of the run, however many are asked for, which the trainer knows; without
    one rates stay as they are."""
    cooling: float = 0.3
    """Share of the steps, the last of them, in which the rate falls linearly to nothing besides. A step sees one window or a few: at a
    tenth of the first rate the run would end on what the last of them showed."""

    RANGES: ClassVar[Mapping[str, Range]] = {"max_steps": SIZE, "cooling": SHARE}


class CoolingScheduler(ExponentialDecayScheduler):
    """nerfstudio's decay, times what falls from 1 to 0 over the last steps."""

    config: CoolingSchedulerConfig

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> Any:
        first, last, cooling = self.config.warmup_steps, self.config.max_steps, self.config.cooling
        if last is None:
            return LambdaLR(optimizer, lambda _step: 1.0)
        scheduler: Any = super().get_scheduler(optimizer, lr_init)
        if not cooling:
            return scheduler
        decay = scheduler.lr_lambdas[0]

        def cooled(step: int) -> float:
            return float(decay(step) * min(1.0, max(0.0, (last - step) / (cooling * (last - first)))))

        scheduler.lr_lambdas = [cooled] * len(scheduler.lr_lambdas)
        return scheduler


def check_schedules(optimizers: Mapping[str, Any]) -> None:
    """Raises OptionError for what cannot be."""
    for name, group in optimizers.items():
        if isinstance(group["scheduler"], CoolingSchedulerConfig):
            check_config(f"--optimizers.{name}.scheduler.", group["scheduler"])


def over_steps(optimizers: dict[str, Any], steps: int) -> dict[str, Any]:
    """The same optimizers for a run of so many steps."""
    optimizers = deepcopy(optimizers)
    for schedule in (group["scheduler"] for group in optimizers.values()):
        if isinstance(schedule, CoolingSchedulerConfig):
            # A run may end before its semantics begin.
            schedule.max_steps = max(schedule.max_steps or steps, schedule.warmup_steps + 1)
    return optimizers
