"""Losses and weights that are no numbers any more end the run, with the name of what went wrong first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ovs3d_nerfstudio.errors import UserError

REMEDY = (
    "Train with lower learning rates (--optimizers.GROUP.optimizer.lr) or --mixed-precision False, from the last checkpoint "
    "(--load-dir); if it comes again at once, look for broken values in the data (poses, pictures)."
)


class AnomalyError(UserError):
    """Training met a number that is none."""


PATIENCE = 10
"""Steps in a row whose losses a gradient scaler may skip: it halves its scale at each, and ten of them are a factor of 1024."""


class LossGuard:
    """Looks at every loss of every step.

    A CPU knows its losses at once. A GPU would have to be waited for in the middle of the step. Where a gradient scaler
    keeps weights from being touched by what is not finite (mixed precision, the default), the losses are looked at when the
    next step begins instead: the scaler has waited for them by then, so this costs nothing. Half precision overflows now and
    then, and the scaler skips that step; only what it skips `PATIENCE` times in a row is no accident.
    """

    def __init__(self, late: bool):
        """`late` where a gradient scaler is at work on a device that has to be waited for."""
        self.late = late
        self._pending: tuple[int, list[str], Tensor] | None = None
        self._skipped = 0

    def check(self, step: int, losses: dict[str, Tensor]) -> None:
        """Raises AnomalyError with the name of a loss of this step, or of the one before, that is infinite or NaN; where a
        scaler skips such steps, only when it has skipped `PATIENCE` of them in a row."""
        values = torch.stack([loss.detach().float().reshape(()) for loss in losses.values()])
        checked: tuple[int, list[str], Tensor] | None = (step, list(losses), values)
        if self.late:
            checked, self._pending = self._pending, checked
        if checked is None:
            return
        step, names, values = checked
        broken = [
            f"{name} is {value}" for name, value in zip(names, values.tolist(), strict=True) if value - value != 0
        ]
        self._skipped = self._skipped + 1 if broken else 0
        if broken and not (self.late and self._skipped < PATIENCE):
            raise AnomalyError(f"Training stopped at step {step}: {', '.join(broken)}. {REMEDY}")


def check_weights(model: nn.Module, step: int) -> None:
    """Raises AnomalyError with the names of parameters that hold an infinity or a NaN."""
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise AnomalyError(
            f"No checkpoint was written at step {step}, as numbers in {', '.join(broken[:3])} are not finite. {REMEDY}"
        )
