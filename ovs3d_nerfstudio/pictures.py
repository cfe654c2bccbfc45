"""Picture files: which there are, how large they are, and their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


class PictureError(ValueError):
    """A picture cannot be used; the message is a sentence for the user."""


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, sorted by name; none where there is no folder."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header alone. Raises PictureError when the file is no picture."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_picture(path: Path) -> UInt8[Tensor, "H W 3"]:
    """RGB pixels; an alpha channel is laid over white, as nerfstudio's parsers do by default.

    Raises PictureError when the file is no picture.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info:
                image = Image.alpha_composite(Image.new("RGBA", file.size, "white"), file.convert("RGBA"))
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> PictureError:
    return PictureError(f"{path} cannot be read as a picture ({error}); replace it or take it out of the data.")
