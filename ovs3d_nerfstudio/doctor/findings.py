"""What the doctor finds: each thing with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ovs3d_nerfstudio.errors import UserError

Level = Literal["good", "note", "warning", "error"]
"""note: to be known; warning: the result will suffer; error: it will not work."""


@dataclass(frozen=True)
class Finding:
    """One thing, in sentences."""

    level: Level
    about: str
    """What was looked at, in a word or two."""
    what: str
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


def good_or(fine: bool, level: Level, about: str, what: str, remedy: str) -> Finding:
    """A finding that asks for its remedy only where all is not `fine`."""
    return Finding("good", about, what) if fine else Finding(level, about, what, remedy)


def refused(about: str, error: UserError, level: Level = "error") -> Finding:
    """What a user can mend, as a finding."""
    what, _, remedy = str(error).partition("; ")
    return Finding(level, about, f"{what.rstrip('.')}.", f"{remedy[:1].upper()}{remedy[1:]}")
