"""A box that exports are limited to: of nerfstudio's options, or of an object that an export found."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float
from viser.transforms import SO3

from ovs3d_nerfstudio.errors import CommandError

if TYPE_CHECKING:
    from ovs3d_nerfstudio.data.frames import Frame

MARGIN = 0.05
"""An object's box leaves out a few of its points: it is taken larger by this share of its diagonal on each side."""


@dataclass
class Box:
    """A box that may be turned."""

    centre: Float[np.ndarray, "3"]
    to_unit: Float[np.ndarray, "3 3"]
    """Takes what lies in the box, seen from its centre, to −0.5 … 0.5 on each axis."""
    in_data: bool = False
    """Whether it is meant in the data's frame, not in the model's."""

    @staticmethod
    def turned(centre: tuple[float, ...], rotation: tuple[float, ...], size: tuple[float, ...]) -> Box:
        """As nerfstudio's OrientedBox: roll, pitch and yaw in radians, and the lengths of the sides."""
        turn = SO3.from_rpy_radians(*map(float, rotation)).as_matrix()
        return Box(np.array(centre, float), turn.T / np.array(size, float)[:, None])

    @staticmethod
    def between(low: Float[np.ndarray, "3"], high: Float[np.ndarray, "3"], in_data: bool = False) -> Box:
        """A box along the axes."""
        return Box((low + high) / 2, np.diag(1 / (high - low)), in_data)

    def in_model(self, frame: Frame) -> Box:
        """The same box in the model's frame."""
        if not self.in_data:
            return self
        turn = np.linalg.inv(frame.transform[:, :3]) / frame.scale
        return Box(frame.to_model(self.centre[None])[0], self.to_unit @ turn)

    def within(self, positions: Float[np.ndarray, "N 3"]) -> Bool[np.ndarray, " N"]:
        return (np.abs((positions - self.centre) @ self.to_unit.T) <= 0.5).all(-1)

    def bounds(self) -> Float[np.ndarray, "2 3"]:
        """The least and the greatest coordinates of the box."""
        reach = np.abs(np.linalg.inv(self.to_unit)).sum(1) / 2
        return np.stack([self.centre - reach, self.centre + reach])


@dataclass
class BoxOptions:
    """The options of a box, a base of exports that can be limited to one."""

    obb_center: tuple[float, float, float] | None = None
    """Centre of a box that limits what is exported, in the model's frame: options as the viewer's crop and ns-export have them."""
    obb_rotation: tuple[float, float, float] | None = None
    """Its roll, pitch and yaw in radians; default: none."""
    obb_scale: tuple[float, float, float] | None = None
    """The lengths of its sides."""
    object: int | None = None
    """Limit what is exported to the box of this object of an objects.json: its id there, or its place where none has ids, from 1."""
    objects_file: Path | None = None
    """The objects.json of `object`; default: the one in the output folder."""

    def box(self, folder: Path) -> Box | None:
        """The box; None where no option asks for one. Raises CommandError when there cannot be one.

        Args:
            folder: where objects.json lies, if no option says so.
        """
        given = {"center": self.obb_center, "rotation": self.obb_rotation, "scale": self.obb_scale}
        named = [name for name, value in given.items() if value is not None]
        for name in named:
            if not all(map(math.isfinite, given[name] or ())):
                raise CommandError(f"--obb-{name} {_shown(given[name])} is no box; give three numbers.")
        if self.object is not None:
            if named:
                raise CommandError(f"--object and --obb-{named[0]} both name a box; give one of them.")
            return _of_object(self.object, self.objects_file or folder / "objects.json")
        if not named:
            return None
        if self.obb_center is None or self.obb_scale is None:
            raise CommandError(
                f"--obb-{named[0]} alone is no box; give --obb-center and --obb-scale, three numbers each."
            )
        if min(self.obb_scale) <= 0:
            raise CommandError(f"--obb-scale {_shown(self.obb_scale)} is no box; give three lengths above 0.")
        return Box.turned(self.obb_center, self.obb_rotation or (0.0, 0.0, 0.0), self.obb_scale)

    def named_box(self) -> str:
        """The box as a sentence names it."""
        if self.object is not None:
            return f"the box of object {self.object}"
        return f"the box at {_shown(self.obb_center)} of {_shown(self.obb_scale)}"


def _of_object(number: int, path: Path) -> Box:
    """The box of an object, with its `MARGIN`."""
    if not path.is_file():
        raise CommandError(f"{path} does not exist; name one of `ovs3d export pointcloud` with --objects-file.")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        boxes = {
            entry.get("id", place): np.array([entry["box"]["min"], entry["box"]["max"]], float).reshape(2, 3)
            for place, entry in enumerate(listed["objects"], start=1)
        }
        in_data = listed["frame"] == "data"
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CommandError(f"{path} is no list of objects; name one of `ovs3d export pointcloud`.") from None
    if number not in boxes:
        known = ", ".join(map(str, boxes)) or "there is none"
        raise CommandError(f"{path} has no object {number}; choose one of its ids: {known}.")
    low, high = boxes[number]
    margin = MARGIN * float(np.linalg.norm(high - low))
    if not (np.isfinite(boxes[number]).all() and (high >= low).all() and margin > 0):
        raise CommandError(f"Object {number} of {path} has an empty box; export the objects again.")
    return Box.between(low - margin, high + margin, in_data)


def _shown(numbers: tuple[float, ...] | None) -> str:
    return " ".join(f"{number:g}" for number in numbers or ())
