"""The contact sheet of `ovs3d preview`: a column for each view and scale, a row for the photo, the winner and each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from ovs3d_nerfstudio.prompts.palette import colorize, fitted_text
from ovs3d_nerfstudio.prompts.segmentation import stretched

CELL_HEIGHT = 120
"""Height in pixels of a picture of the sheet."""
FONT_SIZE = 15
GAP = 4
"""White pixels between pictures."""
MARGIN = 26 * FONT_SIZE
"""Width in pixels of the column of prompts."""


@dataclass
class PreviewedView:
    """A photo and what the encoder says of it."""

    name: str
    photo: UInt8[np.ndarray, "H W 3"]
    similarities: list[Float[np.ndarray, "rows cols C"]]
    """Cosines with each prompt, one map a scale."""


def contact_sheet(
    views: Sequence[PreviewedView],
    prompts: Sequence[str],
    colors: Float[np.ndarray, "C 3"],
    scales: Sequence[float],
    shares: Float[np.ndarray, " C"],
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws the sheet.

    Args:
        colors: of the prompts, in [0, 1].
        scales: patches along the shorter side of a picture, one a scale.
        shares: of the cells that each prompt wins, in [0, 1].
    """
    sizes = [(round(CELL_HEIGHT * view.photo.shape[1] / view.photo.shape[0]), CELL_HEIGHT) for view in views]
    head = 2 * FONT_SIZE + GAP
    rows, step = len(prompts) + 2, CELL_HEIGHT + GAP
    width = MARGIN + sum(len(scales) * (size[0] + GAP) + GAP for size in sizes)
    page = Image.new("RGB", (width, head + rows * step), "white")
    draw = ImageDraw.Draw(page)
    for row, (text, color) in enumerate(_row_titles(prompts, colors, shares)):
        middle = head + row * step + CELL_HEIGHT // 2
        if color is not None:
            draw.rectangle((GAP, middle - 9, GAP + 18, middle + 9), fill=color, outline="black")
        line, font = fitted_text(text, FONT_SIZE)
        draw.text((30, middle), line, fill="black", font=font, anchor="lm")
    left = MARGIN
    for view, size in zip(views, sizes, strict=True):
        line, font = fitted_text(view.name, FONT_SIZE)
        draw.text((left, 0), line, fill="black", font=font)
        page.paste(Image.fromarray(view.photo).resize(size), (left, head))
        for scale, maps in zip(scales, view.similarities, strict=True):
            draw.text(
                (left, FONT_SIZE + 2), f"patches of 1/{scale:g}", fill="black", font=fitted_text("1/", FONT_SIZE)[1]
            )
            painted = [
                colorize(maps.argmax(-1), colors),
                *(_heat(relevancy(maps)[..., c]) for c in range(len(prompts))),
            ]
            for row, picture in enumerate(painted, start=1):
                small = Image.fromarray((picture * 255).round().astype(np.uint8))
                page.paste(small.resize(size, Image.Resampling.NEAREST), (left, head + row * step))
            left += size[0] + GAP
        left += GAP
    return np.asarray(page)


def relevancy(similarities: Float[np.ndarray, "rows cols C"]) -> Float[np.ndarray, "rows cols C"]:
    """Similarities with the least of a view moved to 0 and the greatest to 1, prompt by prompt (3D-OVS §3.3)."""
    maps = torch.from_numpy(similarities)
    return stretched(maps, maps.amin((0, 1)), maps.amax((0, 1))).numpy()


def _row_titles(
    prompts: Sequence[str], colors: Float[np.ndarray, "C 3"], shares: Float[np.ndarray, " C"]
) -> list[tuple]:
    """Text of each row, and the colour of the swatch before it."""
    fills = [tuple((np.asarray(color) * 255).round().astype(int).tolist()) for color in colors]
    titles = [(f"{prompt} ({share:.0%})", fill) for prompt, share, fill in zip(prompts, shares, fills, strict=True)]
    return [("photo", None), ("winner (share of the cells)", None), *titles]


def _heat(values: Float[np.ndarray, "rows cols"]) -> Float[np.ndarray, "rows cols 3"]:
    return matplotlib.colormaps["turbo"](values)[..., :3]
