"""What the subcommands share: the prompts of the moment, from the command line to a run."""

from __future__ import annotations

from pathlib import Path

from ovs3d_nerfstudio.prompts.prompts import given_prompts
from ovs3d_nerfstudio.run import Run


def ask(run: Run, prompts: str, prompts_file: Path | None) -> list[str]:
    """Has the run answer for the prompts of the moment, or for its own where none are given; returns them.

    Raises:
        RunError: the run has no prompts and none were given.
        PromptError: both are given, or the chosen one is unusable.
        EncoderError: the run's encoder cannot be had here, or is another.
    """
    return run.ask(given_prompts(prompts, prompts_file))
