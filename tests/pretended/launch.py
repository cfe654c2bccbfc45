"""Starts a process with the pretended GPU: compiles the small library that it preloads, and runs a module of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
SECONDS = 600
"""After which a process is taken to hang."""


def why_not() -> str:
    """Why no GPU can be pretended here; empty where it can be."""
    if not sys.platform.startswith("linux"):
        return "a library that is preloaded under another's name is Linux's"
    if shutil.which("cc") is None:
        return "there is no C compiler, cc"
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    return ""


def compiled(folder: Path) -> Path:
    """The library to preload, made in `folder`."""
    library = folder / "libcuda.so.1"
    words = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, HERE / "gpu.c"]
    subprocess.run(words, check=True)
    return library


def run(library: Path, module: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `pretended.<module>` to its end and returns it, its output in `stdout`."""
    python_path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": python_path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"pretended.{module}", *map(str, words)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=SECONDS,
        check=False,
    )
