"""Out of memory: how it is known on every device, how to go on with less at once, and what a user can lower.

Whoever works in batches calls `in_batches`; what cannot go on stands inside `told_what_to_lower`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor

from ovs3d_nerfstudio.errors import UserError

OUT_OF_MEMORY = (
    "out of memory",  # CUDA, MPS, and the CUDA runtime's own errors
    "DefaultCPUAllocator",  # "can't allocate memory" on Linux and macOS, "not enough memory" on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
"""What torch writes where memory runs out and the error has no class of its own."""

LEAST_RAYS = 256
"""A picture is rendered by no fewer rays at once: what does not fit then is not the chunk's fault."""

PHOTOS = "smaller photos (--downscale-factor of the dataparser)"
CHUNK = "a smaller --pipeline.model.eval-num-rays-per-chunk"
REMEDIES = {
    "extracting features": f"use {PHOTOS}, a smaller encoder, or fewer pixels for DINO (dino:MODEL@EDGE)",
    "loading the encoder": "close what else uses the device, or use a smaller encoder, such as 'offline'",
    "training": "lower --pipeline.datamanager.num-windows and --pipeline.datamanager.train-num-rays-per-batch, or use "
    f"{PHOTOS}",
    "rendering": f"render smaller pictures, or give {CHUNK}",
    "showing a view": f"lower 'Max res' in the viewer's panel, or give {CHUNK}",
}
"""What needed memory, and what its user can lower."""


class MemoryShortage(UserError):
    """Memory ran out, and no smaller batch helps."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device; a `MemoryShortage` has said so already."""
    if isinstance(error, MemoryShortage):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)  # a library's own words for it


def shortage(what: str, error: BaseException, where: str = "") -> MemoryShortage:
    """The sentence for an error of `is_out_of_memory`. `what` is one of `REMEDIES`; `where` says which picture it was."""
    given = " ".join((str(error).strip().splitlines() or [""])[0].split())
    said = given if len(given) <= 120 else given[:119] + "…"
    reason = f" ({said.rstrip(' .')})" if said else ""
    return MemoryShortage(f"Memory ran out while {what}{where}{reason}; {REMEDIES[what]}.")


@contextmanager
def told_what_to_lower(what: str, where: str = "") -> Iterator[None]:
    """Turns an out-of-memory error into a `MemoryShortage` that names what to lower; see `shortage`."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise shortage(what, error, where) from error


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be had on a device: of the GPU, else of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return psutil.virtual_memory().available


def let_go() -> None:
    """Gives what torch keeps for later back to the device, so that a smaller batch finds it in one piece."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def in_batches(total: int, size: int, work: Callable[[int, int], None], least: int = 1) -> int:
    """Calls `work(start, stop)` over 0 … `total`, `size` at once; where memory runs out, from there on with half as many.

    Returns the size that fitted in the end. The out-of-memory error itself comes through when `least` do not fit.
    """
    start = 0
    while start < total:
        stop = min(start + size, total)
        try:
            work(start, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or stop - start <= least:
                raise
            size = max(least, (stop - start) // 2)
        else:
            start = stop
            continue
        let_go()  # here, where the error and all that its frames held is gone
    return size


def filled_in_chunks(
    total: int, chunk: int, render: Callable[[int, int], Mapping[str, Any]], device: torch.device | str
) -> dict[str, Tensor]:
    """The tensors that `render(start, stop)` gives for rays start … stop, of all `total` rays, on `device`.

    Each is written where it will stay: nothing is held twice, as it would be by concatenation. A chunk that does not fit
    is halved, down to `LEAST_RAYS`.

    Raises:
        MemoryShortage: not even that fits, or the picture itself does not.
    """
    outputs: dict[str, Tensor] = {}

    def fill(start: int, stop: int) -> None:
        for name, part in render(start, stop).items():
            if isinstance(part, Tensor):
                if name not in outputs:
                    outputs[name] = part.new_empty(total, *part.shape[1:], device=device)
                outputs[name][start:stop] = part

    with told_what_to_lower("rendering", f" a picture of {total} pixels"):
        in_batches(total, chunk, fill, LEAST_RAYS)
    return outputs
