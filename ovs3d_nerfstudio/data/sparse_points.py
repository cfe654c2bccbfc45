"""The sparse points that a transforms.json names: read whole, or refused. nerfstudio goes on without those that it cannot read,
and with whatever lay in memory for what is missing of a file that was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.ply import COLORS, has_numbers, positions_of, read_vertices


def names_points(data: Path) -> bool:
    """Whether a transforms.json names sparse points; what is wrong with it is said when it is parsed."""
    try:
        meta = json.loads((data if data.suffix == ".json" else data / "transforms.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and bool(meta.get("ply_file_path"))


def read_points(path: Path) -> tuple[Float[np.ndarray, "N 3"], UInt8[np.ndarray, "C 3"]]:
    """Positions and colours, of which there are none where the file has none. Raises CommandError when it cannot be used."""
    otherwise = "or take ply_file_path out of transforms.json and points are found in the photos"
    if not path.is_file():
        raise CommandError(f"The ply_file_path of transforms.json, {path}, is not there; put it back, {otherwise}.")
    remedy = f"write that ply_file_path of transforms.json again, {otherwise}"
    table = read_vertices(path, remedy)
    positions = positions_of(table, path, remedy)
    coloured = has_numbers(table, COLORS)
    colors = np.stack([table[name] for name in COLORS], -1) if coloured else np.zeros((0, 3))
    return positions, colors.clip(0, 255).astype(np.uint8)
