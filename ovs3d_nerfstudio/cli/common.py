"""What the subcommands share: the prompts of the moment, from the command line to a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from ovs3d_nerfstudio.prompts.prompts import given_prompts
from ovs3d_nerfstudio.prompts.shown import choose_shown

if TYPE_CHECKING:
    from ovs3d_nerfstudio.run import Run


@dataclass(kw_only=True)
class ShownOptions:
    """What of the classes a command shows or writes."""

    only: str = ""
    """Prompts, separated by semicolons, that alone are there; all else, and what belongs to no prompt, is left out."""
    without: str = ""
    """Prompts, separated by semicolons, that are left out; what stood behind them is seen."""

    def flags(self, prompts: Sequence[str]) -> Bool[np.ndarray, " flags"]:
        """Whether each prompt stays, and last, where label −1 finds it, what belongs to none. Raises PromptError."""
        return np.array(choose_shown(self.only, self.without, prompts).flags(prompts))


def ask(run: Run, prompts: str, prompts_file: Path | None) -> list[str]:
    """Has the run answer for the prompts of the moment, or for its own where none are given; returns them.

    Raises:
        RunError: the run has no prompts and none were given.
        PromptError: both are given, or the chosen one is unusable.
        EncoderError: the run's encoder cannot be had here, or is another.
    """
    return run.ask(given_prompts(prompts, prompts_file))
