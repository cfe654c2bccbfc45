"""Counts where a program waits for the GPU: each copy that is not asynchronous, and each number or size read from it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

OURS, THEIRS = "ovs3d_nerfstudio", "nerfstudio"


class Site(NamedTuple):
    """Where a program waits."""

    package: str
    """The package whose line it is: ours, nerfstudio, or neither."""
    kind: str
    """What it waits for."""
    lines: str
    """That line and the one that called it."""


@dataclass
class Waits:
    """Waits by their sites, while they are counted."""

    sites: Counter[Site] = field(default_factory=Counter)
    counting: bool = False

    def note(self, kind: str) -> None:
        if self.counting:
            self.sites[_site(kind)] += 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts those of this block, and those alone."""
        self.sites.clear()
        self.counting = True
        try:
            yield
        finally:
            self.counting = False


WAITS = Waits()


def _site(kind: str) -> Site:
    lines = []
    frame = sys._getframe(2)
    while frame is not None and len(lines) < 2:
        path = Path(frame.f_code.co_filename)
        package = next((part for part in reversed(path.parts[:-1]) if part in (OURS, THEIRS)), None)
        if package is not None:
            place = path.parts[len(path.parts) - 1 - path.parts[::-1].index(package) :]
            lines.append((package, f"{'/'.join(place)}:{frame.f_lineno}"))
        frame = frame.f_back
    if not lines:
        return Site("torch", kind, "a thread without a line of either package")
    return Site(lines[0][0], kind, " < ".join(line for _, line in lines))
