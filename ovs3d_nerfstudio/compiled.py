"""Loops compiled by numba, and spread over as many threads as torch uses."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

__all__ = ["compiled", "run", "spans", "untraced"]

# No "nnan"/"ninf": what is NaN must come out as NaN, as it does in reference implementations.
FASTMATH = frozenset({"contract", "nsz", "reassoc"})


def compiled(kernel: Callable, fastmath: Set[str] = FASTMATH) -> Callable:
    """The kernel, compiled at its first call, without Python's lock; kept on disk where a folder is writable.

    Numba is imported here and not with this module, because that takes half a second. Its parallel loops are not
    used: its "workqueue" layer aborts the process when two threads launch a loop at once (nerfstudio's viewer and
    trainer do), its OpenMP layer when a forked child launches one. Kernels that release the lock, run from an
    ordinary thread pool (see `run`), have neither problem.
    """
    import numba

    # Python's divisions can raise, and a loop that can be left by an exception does not become SIMD code.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
    try:
        return numba.njit(**options, cache=True)(kernel)
    except RuntimeError:  # no folder for the cache is writable: compile in every process
        return numba.njit(**options)(kernel)


@contextmanager
def untraced() -> Iterator[None]:
    """Nobody interrupts what runs in here; also a decorator.

    nerfstudio's viewer ends a render that is out of date by an exception from `sys.settrace`, at whatever line is next:
    that must not be one of an import or of a compiler's, which would leave half of it behind.
    """
    trace = sys.gettrace()
    if trace is None:
        yield
        return
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


@functools.lru_cache(maxsize=4)
def _thread_pool(pid: int, threads: int) -> ThreadPoolExecutor:
    """Worker threads of this process: a forked child has another pid and must not use its parent's pool."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ovs3d-compiled")


def run(kernel: Callable, calls: Sequence[tuple], threads: int) -> None:
    """Calls a kernel with each tuple of arguments, on so many threads; returns when all calls have."""
    if threads == 1 or len(calls) == 1:
        for arguments in calls:
            kernel(*arguments)
    else:
        list(_thread_pool(os.getpid(), threads).map(lambda arguments: kernel(*arguments), calls))


def spans(items: int, parts: int) -> list[tuple[int, int]]:
    """Cuts range(items) into consecutive ranges [start, stop) whose lengths differ by at most one."""
    return [(items * part // parts, items * (part + 1) // parts) for part in range(parts)]
