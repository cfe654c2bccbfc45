"""How a training ends before its last step: by Ctrl-C in one line, and before its first step without a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from nerfstudio.utils import profiler

from ovs3d_nerfstudio.engine.checkpoints import checkpoints
from ovs3d_nerfstudio.errors import INTERRUPTED, say_stopped

CLOCK = 2.0
"""Seconds by which a file system's clock may be behind."""


@contextmanager
def ending(folder: Path, top: Path, begun: Callable[[], bool], saved: Path, first: bool) -> Iterator[None]:
    """Of the block that trains: a run that has not `begun` leaves nothing of `folder`, and Ctrl-C says how to go on.

    Args:
        folder: the run's; it and its parents below `top` go when it holds nothing older than this process.
        saved: the folder of its checkpoints.
        first: whether this process speaks for the others.
    """
    try:
        yield
    except BaseException as error:
        if first and not begun():
            remove_new(folder, top)
        if not isinstance(error, KeyboardInterrupt):
            raise
        profiler.PROFILER.clear()  # nerfstudio would print its table
        if first:
            say_stopped(stopped(saved))
        raise SystemExit(INTERRUPTED) from None


def stopped(saved: Path) -> str:
    """What Ctrl-C leaves, as a sentence."""
    if checkpoints(saved):
        return f"Stopped. To go on from the last checkpoint: --load-dir {saved}"
    return "Stopped before the first checkpoint; extracted features are kept."


def remove_new(folder: Path, top: Path) -> None:
    """Removes a run's folder that this process has made, and its parents below `top` that are empty then."""
    started = psutil.Process().create_time() - CLOCK
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    if not folder.is_dir() or any(path.lstat().st_mtime < started for path in files):
        return
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents:
        if parent == top or not parent.is_relative_to(top) or any(parent.iterdir()):
            return
        parent.rmdir()
