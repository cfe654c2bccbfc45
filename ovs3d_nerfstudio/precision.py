"""Single precision for what is set up or extracted, whatever the caller computes in."""

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
