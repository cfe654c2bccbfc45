"""The processes of one run on several devices: which of them this one is, and what they wait for. Only torch.distributed.

Alone, a process is rank 0 of 1, and waits for nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

STEP_TIMEOUT = timedelta(hours=3)
"""How long a rank waits in a step for one that evaluates, or whose viewer is paused. One that died is noticed at once, see
`watch`."""
WORK_TIMEOUT = timedelta(days=7)
"""How long it waits for others to extract: as long as that takes on the slowest machine."""

_workers: Any = None
_watchers: Any = None
_goodbye = threading.Event()


def meeting_in(folder: Path) -> str:
    """Where the ranks of one machine meet: a file, as no port is free for sure."""
    return "file:///" + (folder / "meeting").as_posix().lstrip("/")


def join(url: str, rank: int, count: int, backend: str) -> None:
    """Become rank `rank` of `count`; all of them meet at `url` (tcp://… or file://…)."""
    global _workers, _watchers
    dist.init_process_group(backend, init_method=url, world_size=count, rank=rank, timeout=STEP_TIMEOUT)
    # Waiting goes by gloo on every device: it sees the connection of a dead rank close, where NCCL would need the timeout.
    _workers = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT)
    _watchers = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT)


def watch(died: Callable[[int], None]) -> None:
    """Has `died` called with the number of a rank that died, from a thread of its own, whatever this rank waits for meanwhile.

    Rank 0 looks at all others, and they at rank 0, so that the death of one ends all. Call it on every rank, once.
    """
    _goodbye.clear()
    for other in _partners():
        threading.Thread(target=_listen, args=(other, died), name=f"ovs3d watches rank {other}", daemon=True).start()


def _partners() -> Iterable[int]:
    return range(1, count()) if rank() == 0 else (0,)


def _listen(other: int, died: Callable[[int], None]) -> None:
    try:
        dist.recv(torch.zeros(1), src=other, group=_watchers)  # its last word
    except RuntimeError:
        if not _goodbye.is_set():
            died(other)


def leave() -> None:
    """The end of the work of every rank: those that `watch` learn that nobody died."""
    wait_for_all()
    _goodbye.set()
    for other in _partners():
        dist.send(torch.zeros(1), dst=other, group=_watchers)
    wait_for_all()
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait_for_all() -> None:
    """Returns when every rank has come here. Raises RuntimeError when one of them died."""
    if count() > 1:
        dist.barrier(_workers)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank: made once, and the same to the last bit."""
    if count() == 1:
        return make()
    made = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made, src=0, group=_workers)
    return made[0]  # type: ignore[return-value]


def copy_first(tensors: Iterable[Tensor]) -> None:
    """Gives the tensors of every rank the values of rank 0's; they lie where ranks exchange gradients."""
    for tensor in tensors:
        values = tensor.contiguous()
        dist.broadcast(values, 0)
        tensor.copy_(values)
