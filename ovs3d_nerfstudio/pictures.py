"""Picture files: which there are, what their headers say, and their pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.files import written_beside

EXACT, BLURRING = (".png", ".tif", ".tiff", ".bmp"), (".jpg", ".jpeg", ".webp")
"""Formats that keep each pixel, as masks need it, and those that need not."""
SUFFIXES = (*EXACT, *BLURRING)


class PictureError(UserError):
    """A picture cannot be used."""


@dataclass(frozen=True)
class Header:
    """What a picture file says of itself."""

    width: int
    height: int
    """In pixels."""
    mode: str
    """Pillow's name for what a pixel is: RGB, L, CMYK…"""
    alpha: bool
    """Whether parts may be transparent."""
    remark: str
    """What kind of picture it is, and behind a colon what is lost of such; empty where nothing is."""


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, sorted by name; none where there is no folder."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


def evenly(total: int, wanted: int) -> list[int]:
    """At most `wanted` of `total` places, evenly chosen, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).round().astype(int)).tolist() if total else []


def view_names(photos: Iterable[Path]) -> dict[Path, str]:
    """The name of each photo's view: its path below the folder that holds all of them, without suffix, so that `a/0.png` and
    `b/0.png` are two. Raises PictureError when two photos would have one name."""
    files = list(dict.fromkeys(photos))
    folder = os.path.commonpath([file.parent for file in files]) if files else ""
    names = {file: file.relative_to(folder).with_suffix("").as_posix() for file in files}
    taken: dict[str, Path] = {}
    for file, name in names.items():
        if taken.setdefault(name, file) is not file:
            raise PictureError(
                f"{taken[name]} and {file} would both be the view {name}; rename one of them, in the data too."
            )
    return names


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """A picture's file, of which the block reads what it needs. Raises PictureError when that cannot be read."""
    try:
        with Image.open(path) as picture:
            yield picture
    except Exception as error:  # decoders let out whatever a broken file provokes
        raise _unreadable(path, error) from error


def picture_header(path: Path) -> Header:
    """The header alone, no pixel is read. Raises PictureError when the file is no picture."""
    with opened_picture(path) as picture:
        return Header(*picture.size, picture.mode, _transparent(picture), _remark(picture))


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header alone. Raises PictureError when the file is no picture."""
    header = picture_header(path)
    return header.width, header.height


def open_picture(path: Path, alpha: bool = False, side: int | None = None) -> Image.Image:
    """A picture of any kind in 8 bits: RGB, or RGBA where it may be transparent or where `alpha` asks for it.

    Of 16 bits the upper eight are kept, of several frames the first. A JPEG with sides longer than `side` may be decoded
    smaller, which is faster. Raises PictureError when the file is no picture, or has pixels that no photo has.
    """
    with opened_picture(path) as picture:
        if side is not None:
            picture.draft(None, (side, side))
        picture.load()
        if picture.mode == "F":
            raise ValueError("its pixels are floating-point numbers, not of 8 or 16 bits")
        mode = "RGBA" if alpha or _transparent(picture) else "RGB"
        return (_eight_bits(picture) if picture.mode.startswith("I") else picture).convert(mode)


def read_picture(path: Path) -> UInt8[Tensor, "H W 3"]:
    """RGB pixels; an alpha channel is laid over white, as nerfstudio's parsers do by default.

    Raises PictureError when the file is no picture.
    """
    picture = open_picture(path)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return torch.from_numpy(np.array(picture))


def read_mask(path: Path, scale_factor: float = 1.0) -> Bool[Tensor, "H W 1"]:
    """Which pixels of a photo count: those whose number in the mask is not 0. Raises PictureError when the file is no picture."""
    with opened_picture(path) as picture:
        mask = picture
        if scale_factor != 1.0:
            width, height = (int(side * scale_factor) for side in picture.size)
            mask = picture.resize((width, height), Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(mask) != 0)[..., None]


def _transparent(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits, which Pillow would cut off at 255."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its pixels have more than 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _remark(picture: Image.Image) -> str:
    if picture.mode == "CMYK":
        return "in CMYK: colours are turned into RGB without a profile"
    # A phone keeps previews and depth in further frames of a photo (MPO): the first is the photo.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        return "of several frames: only the first is used"
    return ""


def missing_picture(path: Path) -> PictureError:
    """What to say of a picture that is not there; it may be named without its suffix, or with that of another."""
    for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES)):
        for other in (path.with_name(path.name + suffix), path.with_suffix(suffix)):
            if other.is_file():
                return PictureError(
                    f"The picture {path} does not exist, but {other.name} does; name that in the data, with its suffix."
                )
    return PictureError(f"The picture {path} does not exist; put it there or take it out of the data.")


def _unreadable(path: Path, error: Exception) -> PictureError:
    if isinstance(error, FileNotFoundError):
        return missing_picture(path)
    said = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        said = "it is empty" if path.stat().st_size == 0 else "of no known kind"
    return PictureError(f"{path} cannot be read as a picture ({said}); replace it or take it out of the data.")


def write_picture(path: Path, pixels: UInt8[np.ndarray, "H W 3"] | np.ndarray) -> None:
    """Writes a PNG beside and renames; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        Image.fromarray(pixels).save(beside, format="PNG")
