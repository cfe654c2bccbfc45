"""Colours of classes: one colour for a prompt in the viewer, in renders, in legends and in point clouds.

A colour belongs to a *slot*, a number. The trained prompts take the slots 0, 1, 2… in their order;
`colors_for` gives every other prompt a slot by its text, of those that are far from all colours before it, so
that adding a prompt never recolours the ones before it.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ovs3d_nerfstudio.prompts.prompts import prompt_key

Array = TypeVar("Array", np.ndarray, Tensor)

# The first 7 are Okabe and Ito's set for colour-blind readers (https://jfly.uni-koeln.de/color/, 2008),
# without black, which here means unlabelled. Each of the others is the sRGB colour, on a grid of 18 levels a
# channel with CIELAB lightness in 22..93 and chroma above 12, that is farthest from all before it and from
# black and white. Distance is the smallest CIEDE2000 over normal sight, deuteranopia and protanopia (Machado
# et al., 2009, severity 1). No two of the first 12 are closer than 11.5, no two of the 30 closer than 7.9;
# about 2 is just noticeable.
_TABLE = bytes.fromhex("""
    E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7 960000 96005A 00E1A5 2D0FC3 785A4B C3E1FF 5A2D2D 3C87FF
    87D2C3 1E6978 FF4B78 B43C00 6900FF D20F87 69D269 B4694B A5FF96 4B2D3C D28796 5A0087 1ED2D2 B4F0D2 B4964B
""")
_TABLE_SLOTS = len(_TABLE) // 3
_NEW_SLOTS = 24
"""At least so many slots are there for a prompt that was not trained to choose its own from."""
_FAR = 40.0
"""CIELAB distance from which on two colours are told apart at a glance, small in a legend and over a photo."""
_BROAD_FONTS = "Noto Sans|CJK|WenQuanYi|Unicode MS|Fallback|Hiragino Sans|YaHei|Malgun"
"""Families whose purpose is to cover scripts that DejaVu lacks; trying every font would take too long."""
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
"""From linear sRGB (IEC 61966-2-1)."""
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def class_color(slot: int) -> tuple[float, float, float]:
    """The sRGB colour of `slot` ≥ 0, channels in [0, 1]; the colour-blind tell the first 30 apart too."""
    if slot < _TABLE_SLOTS:
        red, green, blue = _TABLE[3 * slot : 3 * slot + 3]
        return red / 255, green / 255, blue / 255
    # Steps of the golden ratio spread the hues evenly, however many there are.
    value = (0.95, 0.6, 0.78, 0.45, 0.87)[slot % 5]
    saturation = (0.9, 0.5, 0.7)[slot % 3]
    return colorsys.hsv_to_rgb(slot * _GOLDEN_RATIO % 1, saturation, value)


def palette(n: int) -> Float[np.ndarray, "n 3"]:
    """The sRGB colours of the slots 0 … n-1 in [0, 1], float32."""
    return _colors(range(n))


def colors_for(prompts: Sequence[str], trained: Sequence[str]) -> Float[np.ndarray, "C 3"]:
    """The sRGB colour of each of `prompts` in [0, 1], float32.

    A trained prompt has the slot of its place among `trained`, wherever it stands in `prompts`. Any other
    prompt has a slot behind these: the first, from one on that its text decides, whose colour is far from those
    of `trained` and of the prompts before it, or where none is far, the farthest. So a prompt appended to the
    list recolours none, and all colours differ.
    """
    slots = {prompt_key(prompt): slot for slot, prompt in enumerate(trained)}
    first = len(trained)
    last = max(_TABLE_SLOTS, first + _NEW_SLOTS)
    for key in map(prompt_key, prompts):
        if key in slots:
            continue
        taken = set(slots.values())
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        tries = [first + (number + step) % (last - first) for step in range(last - first)]
        free = [slot for slot in tries if slot not in taken]
        if not free:  # the slots behind, one by one
            slots[key] = max(taken, default=0) + 1
        elif not taken:
            slots[key] = free[0]
        else:
            colors = np.stack([_lab(slot) for slot in [*free, *sorted(taken)]])
            apart = np.linalg.norm(colors[: len(free), None] - colors[None, len(free) :], axis=-1).min(1)
            slots[key] = free[int(np.argmax(apart >= _FAR) if (apart >= _FAR).any() else apart.argmax())]
    return _colors([slots[prompt_key(prompt)] for prompt in prompts])


def colorize(labels: Array, colors: Float[np.ndarray, "C 3"] | Float[Tensor, "C 3"]) -> Array:
    """Paints labels.

    Args:
        labels: `*shape` integers below C, an array or a tensor; below 0 is unlabelled and painted black.
        colors: in [0, 1].

    Returns:
        `*shape 3` float32 in [0, 1], an array or a tensor on the labels' device, as the labels are.
    """
    # Black stands first: behind the colours it would hide a label that is one too large.
    if isinstance(labels, Tensor):
        table = torch.as_tensor(colors, dtype=torch.float32, device=labels.device)
        return torch.cat([table.new_zeros(1, 3), table])[(labels.long() + 1).clamp(min=0)]
    return np.concatenate([np.zeros((1, 3)), _numpy(colors)]).astype(np.float32)[np.maximum(labels + 1, 0)]


def legend(
    prompts: Sequence[str],
    colors: Float[np.ndarray, "C 3"] | Float[Tensor, "C 3"],
    font_size: int = 18,
    max_rows: int = 25,
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture of each prompt beside its colour, on white, filled column by column.

    A prompt wider than 24 times `font_size` (pixels) is cut with an ellipsis. Characters that no font here
    can draw are written as their escapes (`\\u684c`), so that two prompts never look the same.

    Raises:
        ValueError: there are not as many colours as prompts.
    """
    if len(prompts) != len(colors):
        raise ValueError(f"There are {len(prompts)} prompts and {len(colors)} colours; give one colour a prompt.")
    lines = [fitted_text(" ".join(prompt.split()), font_size) for prompt in prompts]
    pad, row = font_size // 2, round(font_size * 1.6)
    rows = min(max(len(lines), 1), max_rows)
    filled = [lines[start : start + rows] for start in range(0, len(lines), rows)]
    widths = [max(round(font.getlength(text)) for text, font in column) + row + 2 * pad for column in filled]

    picture = Image.new("RGB", (sum(widths) + pad, rows * row + 2 * pad), "white")
    draw = ImageDraw.Draw(picture)
    swatches = (np.clip(_numpy(colors), 0, 1) * 255).round().astype(int).tolist()
    for i, (text, font) in enumerate(lines):
        left, top = pad + sum(widths[: i // rows]), pad + i % rows * row
        box = (left, top + row // 8, left + row * 3 // 4, top + row * 7 // 8)
        draw.rectangle(box, fill=tuple(swatches[i]), outline="black")
        draw.text((left + row, top + row // 2), text, fill="black", font=font, anchor="lm")
    return np.array(picture)


def save_legend(
    path: Path,
    prompts: Sequence[str],
    colors: Float[np.ndarray, "C 3"] | Float[Tensor, "C 3"],
    font_size: int = 18,
    max_rows: int = 25,
) -> None:
    """Writes `legend` to `path`, in the format of its suffix; makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(legend(prompts, colors, font_size, max_rows)).save(path)


def titled(text: str, width: int, font_size: int = 18) -> UInt8[np.ndarray, "H width 3"]:
    """A strip as wide as a picture, with what the picture is called in its middle, black on white."""
    text, font = fitted_text(text, font_size)
    strip = Image.new("RGB", (width, round(font_size * 1.6)), "white")
    ImageDraw.Draw(strip).text((width // 2, strip.height // 2), text, fill="black", font=font, anchor="mm")
    return np.array(strip)


def _colors(slots: Sequence[int]) -> Float[np.ndarray, "n 3"]:
    return np.array([class_color(slot) for slot in slots], dtype=np.float32).reshape(-1, 3)


@functools.lru_cache(maxsize=4096)
def _lab(slot: int) -> Float[np.ndarray, "3"]:
    """Its colour in CIELAB (D65)."""
    colors = _colors([slot]).astype(np.float64)
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _TO_XYZ.sum(1)
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root[0]
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _numpy(colors: Float[np.ndarray, "C 3"] | Float[Tensor, "C 3"]) -> Float[np.ndarray, "C 3"]:
    return colors.numpy(force=True) if isinstance(colors, Tensor) else np.asarray(colors)


def fitted_text(text: str, font_size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """`text` as the legend writes it, and the font that has its characters."""
    path = _font_path(text)
    if path is None:
        path = _standard_font()
        drawable = _characters(path)
        text = "".join(c if c in drawable else c.encode("ascii", "backslashreplace").decode() for c in text)
    font, limit = ImageFont.truetype(path, font_size), 24 * font_size
    if font.getlength(text) > limit:
        while text and font.getlength(text + "…") > limit:
            text = text[:-1]
        text += "…"
    return text, font


@functools.lru_cache(maxsize=512)
def _font_path(text: str) -> str | None:
    """A font file with every character of `text`: matplotlib's own, else one installed here, else None."""
    if set(text) <= _characters(_standard_font()):
        return _standard_font()
    # Imported here: the first time, it lists the system's fonts, which takes seconds.
    from matplotlib.font_manager import fontManager

    broad = [font.fname for font in fontManager.ttflist if re.search(_BROAD_FONTS, font.name)]
    return next((path for path in sorted(broad) if set(text) <= _characters(path)), None)


@functools.cache
def _standard_font() -> str:
    """DejaVu Sans, which matplotlib ships: Latin, Greek, Cyrillic, Arabic, Hebrew and more."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.lru_cache(maxsize=64)
def _characters(font_path: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(font_path).get_charmap()))
