"""PLY files of splats: those of any trainer read, with every column they have, and our own Gaussians as such a table.

The columns are those of Kerbl et al.'s trainer, which all others write too: x y z, f_dc_0…2, f_rest_… channel by channel,
opacity (a logit), scale_0…2 (logarithms), rot_0…3 (w first). Whatever else there is stays and is not looked at.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from plyfile import PlyData, PlyParseError

from ovs3d_nerfstudio.errors import UserError, reason
from ovs3d_nerfstudio.gaussians.splats import SH_OF_COLOUR, Splat

COMPRESSED = (".splat", ".ksplat", ".spz", ".sog", ".sogs", ".zip", ".lcc")
"""Kinds of files that hold splats and are no PLY."""
SHAPE = {
    "means": ("x", "y", "z"),
    "opacities": ("opacity",),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "quats": ("rot_0", "rot_1", "rot_2", "rot_3"),
}
BASE, COLOURS = ("f_dc_0", "f_dc_1", "f_dc_2"), ("red", "green", "blue")
MOST_DEGREE = 4
"""Of spherical harmonics that can be rendered."""
UNPACK = "open it in SuperSplat (superspl.at/editor) and export it as an uncompressed PLY"


class SplatError(UserError):
    """A file is no splat that can be used."""


def read_splat(path: Path) -> tuple[np.ndarray, Splat]:
    """The Gaussians of a PLY: its table of vertices with all columns as they are in the file, and what they mean.

    Colours may be plain ones (red, green, blue in bytes) in place of harmonics.

    Raises SplatError when the file is missing, of a compressed kind, torn, or holds something else than a splat.
    """
    table = _vertices(path)
    names = table.dtype.names or ()
    if "packed_position" in names:
        raise SplatError(f"{path} is a compressed PLY (PlayCanvas, SuperSplat), which cannot be read here; {UNPACK}.")
    if "opacity" not in names:
        raise SplatError(
            f"{path} holds {len(table):,} points without opacity: a point cloud or a mesh, no splat; name the PLY that a trainer "
            "of Gaussian splats wrote."
        )
    colours = BASE if BASE[0] in names else COLOURS
    missing = [name for columns in (*SHAPE.values(), colours) for name in columns if name not in names]
    if missing:
        raise SplatError(f"{path} lacks the columns {', '.join(missing)}, which Gaussians need; export it again.")
    if len(table) < 2:
        raise SplatError(
            f"{path} holds {'one Gaussian' if len(table) else 'no Gaussians'}; a scene has thousands: export it again."
        )
    count = sum(name.startswith("f_rest_") for name in names)
    degree = math.isqrt(count // 3 + 1) - 1
    rest = [f"f_rest_{i}" for i in range(count)]
    if 3 * ((degree + 1) ** 2 - 1) != count or degree > MOST_DEGREE or not set(rest) <= set(names):
        raise SplatError(
            f"{path} has {count} columns f_rest_…, which are no spherical harmonics of three channels (there are 9, 24, 45 or 72); "
            "export it again."
        )
    columns = {name: _numbers(table, wanted, path) for name, wanted in SHAPE.items()}
    base = _numbers(table, colours, path)
    if colours is COLOURS:
        base = (base / 255 - 0.5) / SH_OF_COLOUR
    by_channel = _numbers(table, rest, path) if rest else base[:, :0]
    harmonics = by_channel.view(len(table), 3, -1).transpose(1, 2).contiguous()
    return table, Splat(**columns, base=base, rest=harmonics)


def splat_table(splat: Splat) -> np.ndarray:
    """Gaussians as a table with the columns of Kerbl et al.'s trainer, in their order, normals of zero included."""
    rest = splat.rest.transpose(1, 2).flatten(1)
    parts = {
        SHAPE["means"]: splat.means,
        ("nx", "ny", "nz"): torch.zeros_like(splat.means),
        BASE: splat.base,
        tuple(f"f_rest_{i}" for i in range(rest.shape[1])): rest,
        SHAPE["opacities"]: splat.opacities,
        SHAPE["scales"]: splat.scales,
        SHAPE["quats"]: splat.quats,
    }
    table = np.empty(len(splat.means), [(name, "<f4") for names in parts for name in names])
    for names, part in parts.items():
        for name, column in zip(names, part.detach().cpu().float().unbind(-1), strict=True):
            table[name] = column.numpy()
    return table


def _vertices(path: Path) -> np.ndarray:
    """The table of the vertices of a PLY, binary or text. Raises SplatError."""
    if not path.is_file():
        raise SplatError(f"The splat {path} does not exist; name a PLY with Gaussians.")
    if path.suffix.lower() in COMPRESSED:
        raise SplatError(f"{path} is of a compressed kind ({path.suffix}), which cannot be read here; {UNPACK}.")
    try:
        return np.array(PlyData.read(str(path))["vertex"].data)  # a copy: the file itself may be written again
    except KeyError:
        raise SplatError(f"{path} is a PLY without vertices, so without Gaussians; export it again.") from None
    except (PlyParseError, ValueError, OverflowError, MemoryError) as error:
        why = reason(error)
        torn = isinstance(error, MemoryError) or "early end-of" in why or "cannot reshape" in why
        what = "is cut off, or announces more than it holds" if torn else "cannot be read as a PLY"
        raise SplatError(f"{path} {what} ({why}); copy or export it again.") from None


def _numbers(table: np.ndarray, names: tuple[str, ...] | list[str], path: Path) -> Float[torch.Tensor, "n k"]:
    """Columns in single precision. Raises SplatError, which names `path`, for lists and for what is not finite."""
    columns = np.empty((len(table), len(names)), np.float32)
    for i, name in enumerate(names):
        if table.dtype[name].kind not in "fiu":
            raise SplatError(f"The column {name} of {path} holds lists, not numbers; export it again.")
        columns[:, i] = table[name]
        wrong = np.count_nonzero(~np.isfinite(columns[:, i]))
        if wrong:
            raise SplatError(
                f"{wrong:,} of the {len(table):,} Gaussians of {path} have a {name} that is no finite number; export it again, or "
                "take them out in an editor such as SuperSplat."
            )
    return torch.from_numpy(columns)
