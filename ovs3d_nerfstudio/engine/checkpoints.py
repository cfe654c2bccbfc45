"""Checkpoint files: written whole or not at all, read without running code, and refused in words when they do not fit.

A file has the entries that nerfstudio's have, so its commands read ours; it holds nothing but tensors and plain values.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovs3d_nerfstudio.errors import UserError, reason
from ovs3d_nerfstudio.files import written_beside

TINY_CUDA_NN = "pip install git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch"
"""How tiny-cuda-nn is installed: it is in no package index."""

# Runs that nerfstudio's own trainer saved hold NumPy scalars besides (the schedulers' state) and nothing else beyond what
# torch reads of itself, so these are all that is allowed. torch < 2.4 has no such list.
if hasattr(torch.serialization, "add_safe_globals"):
    torch.serialization.add_safe_globals(
        [np.dtype, np.core.multiarray.scalar, *{type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)}]  # type: ignore[attr-defined]
    )


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or used."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the latest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The name under which nerfstudio looks for the checkpoint of a step."""
    return folder / f"step-{step:09d}.ckpt"


def write_checkpoint(path: Path, state: dict) -> None:
    """Writes to the run's folder, to the disk itself, and renames: a file named as a checkpoint is a whole one.

    Raises CheckpointError when it cannot be written, and leaves nothing of it.
    """
    # Not in the folder of checkpoints: nerfstudio reads a step out of every name there, and dies of others.
    folder = path.parent.parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.ckpt.*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        with written_beside(path, folder) as beside, beside.open("wb") as file:
            torch.save(_plain(state), file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (OSError, KeyboardInterrupt)):
            cause = cause.__context__  # torch hides it behind an error of its own
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        why = (cause and cause.strerror) or reason(error)
        raise CheckpointError(f"The checkpoint {path} cannot be written ({why}); make room there.") from error


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; no code in it is run. With `mmap` weights stay on the disk until they are used.

    Raises CheckpointError when there is none, or it is torn, holds more than tensors and plain values, or is no checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}; name a step or a file that is there.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: it is damaged, or holds more than tensors and plain values ({reason(error)}); "
            "name another one, or remove it, so that the one before it is taken."
        ) from error
    if not isinstance(state, dict) or not {"step", "pipeline"} <= state.keys():
        raise CheckpointError(f"{path} is no checkpoint of a training; name a step-….ckpt that ns-train wrote.")
    return state


def check_implementation(saved: Iterable[str], wanted: Iterable[str]) -> None:
    """Compares the names of a checkpoint's parameters with those of the model that is to have them.

    Raises CheckpointError when one of the two is made of tiny-cuda-nn's modules and the other is not.
    """
    # tiny-cuda-nn keeps all of a module in one parameter of this name.
    fused, fused_here = (any(name.endswith(".params") for name in names) for names in (saved, wanted))
    if fused and not fused_here:
        raise CheckpointError(
            f"This run was trained with tiny-cuda-nn, which is not at hand here: it needs an NVIDIA GPU and `{TINY_CUDA_NN}`."
        )
    if fused_here and not fused:
        raise CheckpointError(
            "This run was trained without tiny-cuda-nn, but is opened with it; write `implementation: torch` under "
            "`model:` in its config.yml."
        )


def _sync_folder(folder: Path) -> None:
    """Has the names in a folder on disk, so that none is deleted there before another has come."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _plain(value: Any) -> Any:
    """NumPy's scalars and arrays as numbers and lists, in nested containers: what every torch reads of itself."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
