"""In which precision is computed: single where something is set up, half in an image tower where that is fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_precision() -> Iterator[None]:
    """Autocast off, on every device that nerfstudio's trainer may have it on for.

    The trainer calls a pipeline inside `torch.autocast`: on CUDA, decompositions and quantiles refuse the half precision
    that comes of it, features would not be those that `ovs3d extract` makes, and a ray's direction would have three digits.
    CPU autocast casts much of that up again and so hides it.
    """
    with torch.autocast("cpu", enabled=False):
        if not torch.cuda.is_available():  # autocast warns of a device that is not there
            yield
            return
        with torch.autocast("cuda", enabled=False):
            yield


def tower_precision(device: torch.device) -> torch.dtype:
    """What the image tower of a vision transformer computes in on a device.

    CPUs that multiply matrices of bfloat16 by themselves (AMX) embed four times as many crops a second by it (CLIP ViT-B/16, one thread:
    9.7 for 2.4), and embeddings keep a cosine of 0.99995 with those of single precision. All others are slower by it, the more
    the older they are, so they keep to single precision, as do CPUs of which torch cannot tell (before `get_capabilities`).
    """
    if device.type == "cuda":
        return torch.float16
    told = getattr(torch.cpu, "get_capabilities", None)
    quick = device.type == "cpu" and told is not None and told().get("amx_bf16", False)
    return torch.bfloat16 if quick else torch.float32
