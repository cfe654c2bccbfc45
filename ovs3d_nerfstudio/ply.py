"""PLY files with a label on every vertex, in the binary form that any reader takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from plyfile import PlyData, PlyElement

from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.files import written_beside

COLORS = ("red", "green", "blue")


def vertex_table(
    positions: Float[np.ndarray, "N 3"],
    colors: Float[np.ndarray, "N 3"],
    class_id: Int[np.ndarray, " N"],
    probability: Float[np.ndarray, " N"],
) -> np.ndarray:
    """A structured array: x, y, z, colour (from [0, 1] to bytes), class_id, probability."""
    kinds = [*((name, "f4") for name in "xyz"), *((name, "u1") for name in COLORS)]
    table = np.empty(len(positions), [*kinds, ("class_id", "u2"), ("probability", "f4")])
    for axis, name in enumerate("xyz"):
        table[name] = positions[:, axis]
    for channel, name in enumerate(COLORS):
        table[name] = (colors[:, channel].clip(0, 1) * 255).round()
    table["class_id"], table["probability"] = class_id, probability
    return table


def with_labels(table: np.ndarray, class_id: Int[np.ndarray, " N"], probability: Float[np.ndarray, " N"]) -> np.ndarray:
    """The same table with the columns class_id and probability behind; older ones of these names are replaced."""
    kept = [name for name in table.dtype.names or () if name not in ("class_id", "probability")]
    kinds = [(name, table.dtype[name].str) for name in kept]
    wider = np.empty(len(table), [*kinds, ("class_id", "<u2"), ("probability", "<f4")])
    for name in kept:
        wider[name] = table[name]
    wider["class_id"], wider["probability"] = class_id, probability
    return wider


def write_ply(path: Path, vertices: np.ndarray, faces: Int[np.ndarray, "F 3"] | None = None) -> None:
    """Writes vertices, and triangles if there are any, beside and renames; makes the folder."""
    elements = [PlyElement.describe(vertices, "vertex")]
    if faces is not None:
        table = np.empty(len(faces), [("vertex_indices", "i4", (3,))])
        table["vertex_indices"] = faces
        elements.append(PlyElement.describe(table, "face"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        PlyData(elements, byte_order="<").write(str(beside))


def read_vertices(path: Path, remedy: str = "export it again") -> np.ndarray:
    """The vertices of a PLY as a structured array. Raises CommandError when the file is missing or no such PLY; of the latter
    `remedy` says what to do."""
    if not path.is_file():
        raise CommandError(f"{path} does not exist; name a PLY that ns-export wrote.")
    try:
        return PlyData.read(str(path))["vertex"].data
    except Exception as error:  # the reader lets out whatever a broken file provokes
        raise CommandError(f"{path} cannot be read as a PLY with vertices ({error}); {remedy}.") from None


def has_numbers(table: np.ndarray, names: Iterable[str]) -> bool:
    """Whether a table has columns of these names, and each of them numbers rather than lists."""
    return all(name in (table.dtype.names or ()) and table.dtype[name].kind in "iuf" for name in names)


def positions_of(table: np.ndarray, path: Path, remedy: str = "export it again") -> Float[np.ndarray, "N 3"]:
    """x, y, z of a table. Raises CommandError, with `remedy`, when `path`, whence it was read, has none."""
    if not has_numbers(table, "xyz"):
        raise CommandError(f"The vertices of {path} have no x, y and z; {remedy}.")
    return np.stack([table[name] for name in "xyz"], -1).astype(np.float64)
