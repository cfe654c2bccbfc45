"""Label images: one id a class in an 8- or 16-bit PNG, and the JSON that says what an id means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from ovs3d_nerfstudio.cli.common import write_json
from ovs3d_nerfstudio.features.cache import written_beside


def write_labels(path: Path, labels: Int[np.ndarray, "H W"], num_classes: int) -> None:
    """Writes the id of each pixel, its label + 1; 0 is none. 8 bits, or 16 where `num_classes` is above 255."""
    kind = np.uint8 if num_classes <= 255 else np.uint16
    write_picture(path, (np.asarray(labels) + 1).astype(kind))


def read_labels(path: Path) -> Int[np.ndarray, "H W"]:
    """The labels that `write_labels` wrote: −1 is none."""
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.int64) - 1


def write_picture(path: Path, pixels: UInt8[np.ndarray, "H W 3"] | np.ndarray) -> None:
    """Writes a PNG beside and renames; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        Image.fromarray(pixels).save(beside, format="PNG")


def write_ids(path: Path, names: Sequence[str], colors: Float[np.ndarray, "C 3"]) -> None:
    """Writes what each id of the label images means: `{"1": {"prompt": …, "color": [r, g, b]}, …}`, colours 0–255."""
    write_json(path, ids(names, colors))


def ids(names: Sequence[str], colors: Float[np.ndarray, "C 3"]) -> dict[str, dict]:
    """Prompt (or class) and colour of each id, as JSON can hold them."""
    bytes_ = (np.asarray(colors) * 255).round().astype(int).tolist()
    return {str(i + 1): {"prompt": name, "color": bytes_[i]} for i, name in enumerate(names)}
