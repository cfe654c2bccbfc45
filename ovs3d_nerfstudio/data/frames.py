"""The frame of the data: the coordinates of the poses as they stand in its file, and the way from there to a model's.

nerfstudio means others where a transforms.json has an `applied_transform` or an `applied_scale`: those of the program that the
poses are from, before ns-process-data turned them (its parser counts what had been applied as part of its own transform). What
lies beside such a file, as sparse_pc.ply, is in the coordinates of the file, and so is all that we write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.minimal_dataparser import MinimalDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.files import write_json

COLMAP_APPLIED = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]]
"""What nerfstudio takes to have been applied where a transforms.json beside COLMAP's folder does not say."""


class FrameError(UserError):
    """A run does not say how its coordinates follow from the data's."""


@dataclass(frozen=True)
class Frame:
    """The similarity from the data's coordinates to those of a model: x ↦ scale · (transform · x)."""

    transform: Float[np.ndarray, "3 4"]
    scale: float = 1.0

    @staticmethod
    def of_parser(parser: DataParserConfig, parsed: DataparserOutputs) -> Frame:
        """The frame of data that `parser` has just read.

        Where a parser of nerfstudio's moves its poses and does not say how (sdfstudio-data, nerfosr-data, nuscenes-data,
        dycheck-data), this is what it says: no way at all.
        """
        if isinstance(parser, MinimalDataParserConfig):  # takes poses as they are, and says what others had applied
            return Frame(np.eye(4)[:3])
        applied = (
            Frame.applied_to(parser.data) if isinstance(parser, NerfstudioDataParserConfig) else Frame(np.eye(4)[:3])
        )
        return Frame.of_outputs(parsed)._after(applied)

    @staticmethod
    def of_outputs(parsed: DataparserOutputs) -> Frame:
        """As nerfstudio means it: from the coordinates that the poses had before anything was applied to them. Two runs on the
        same data share those whatever their dataparsers."""
        return Frame(np.array(parsed.dataparser_transform, float), float(parsed.dataparser_scale))

    @staticmethod
    def of_run(folder: Path) -> Frame:
        """The frame of the run in `folder`; of one of nerfstudio's own methods, or of ours before they wrote a frame.json, with
        the help of the data that its config names.

        Raises FrameError when a file is missing or broken.
        """
        if (folder / "frame.json").is_file():
            return Frame._read(folder / "frame.json")
        theirs, data = Frame.of_run_outputs(folder), _transforms_of(folder / "config.yml")
        try:
            return theirs if data is None else theirs._after(Frame.applied_to(data))
        except (OSError, ValueError, TypeError, AttributeError):
            raise FrameError(
                f"{data}, which the run in {folder} was trained on, cannot be read; put it back."
            ) from None

    @staticmethod
    def of_run_outputs(folder: Path) -> Frame:
        """As `of_outputs`, of the run in `folder`. Raises FrameError when its dataparser_transforms.json is missing or broken."""
        return Frame._read(folder / "dataparser_transforms.json")

    @staticmethod
    def applied_to(data: Path) -> Frame:
        """What a transforms.json, or that of a folder, says had been applied to its poses before they came there: the way from
        the coordinates of another program to its own, as nerfstudio reads it."""
        path = data if data.suffix == ".json" else data / "transforms.json"
        meta = json.loads(path.read_text(encoding="utf-8"))
        legacy = COLMAP_APPLIED if (data / "colmap" / "sparse" / "0").exists() else np.eye(4)[:3]
        return Frame(np.array(meta.get("applied_transform", legacy), float), float(meta.get("applied_scale", 1.0)))

    @staticmethod
    def _read(path: Path) -> Frame:
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            frame = Frame(np.array(saved["transform"], float).reshape(3, 4), float(saved["scale"]))
            if not (np.isfinite(frame.transform).all() and 0 < abs(frame.scale) < np.inf):
                raise ValueError("no similarity")
            return frame
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            raise FrameError(f"{path} is missing or broken; name a run of ns-train that has it.") from None

    def write(self, folder: Path) -> None:
        """Leaves it in a run's folder, for `of_run`."""
        write_json(folder / "frame.json", self.plain())

    def plain(self) -> dict[str, Any]:
        """As JSON and checkpoints can hold it."""
        return {"transform": self.transform.tolist(), "scale": self.scale}

    def _after(self, applied: Frame) -> Frame:
        """This frame of nerfstudio's, without what had been applied before: scales multiply and transforms are chained, each for
        itself."""
        transform = np.vstack([applied.transform, [0, 0, 0, 1]])
        return Frame(self.transform @ np.linalg.inv(transform), self.scale / applied.scale)

    def in_place_of(self, other: Frame, way: Frame) -> Frame:
        """A `way` to the model of `other` that leads to the model of this frame instead, from wherever it begins."""
        theirs, theirs_whole = (np.vstack([frame.transform, [0, 0, 0, 1]]) for frame in (other, way))
        return Frame(self.transform @ np.linalg.inv(theirs) @ theirs_whole, way.scale * self.scale / other.scale)

    @property
    def rotation(self) -> Float[np.ndarray, "3 3"]:
        """What turns directions: orthonormal, whatever was rounded or scaled in `transform`."""
        left, _, right = np.linalg.svd(self.transform[:, :3])
        return left @ right

    def to_model(self, positions: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
        return self.scale * (positions @ self.transform[:, :3].T + self.transform[:, 3])

    def to_data(self, positions: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
        return (positions / self.scale - self.transform[:, 3]) @ np.linalg.inv(self.transform[:, :3]).T

    def poses_to_model(self, poses: Float[np.ndarray, "*n 3 4"]) -> Float[np.ndarray, "*n 3 4"]:
        """Camera-to-world poses: their origins as `to_model` has them, their axes turned and no longer or shorter."""
        return np.concatenate([self.rotation @ poses[..., :3], self.to_model(poses[..., 3])[..., None]], -1)

    def poses_to_data(self, poses: Float[np.ndarray, "*n 3 4"]) -> Float[np.ndarray, "*n 3 4"]:
        """Likewise, the other way."""
        return np.concatenate([self.rotation.T @ poses[..., :3], self.to_data(poses[..., 3])[..., None]], -1)


def frame_of(datamanager: Any) -> Frame:
    """The frame of an open run, by its datamanager."""
    return datamanager.frame


def _transforms_of(config: Path) -> Path | None:
    """The data of a run whose config.yml says that nerfstudio-data reads it; else None.

    Nothing that the file names is built: it may be of a method that is not installed.
    """
    try:
        node = _entry(_entry(yaml.compose(config.read_text(encoding="utf-8")), "pipeline"), "datamanager")
    except (OSError, yaml.YAMLError, ValueError):
        return None
    parser, kind = _entry(node, "dataparser"), NerfstudioDataParserConfig
    if parser is None or not parser.tag.endswith(f":{kind.__module__}.{kind.__name__}"):
        return None
    for data in (_entry(node, "data"), _entry(parser, "data")):
        if isinstance(data, yaml.SequenceNode) and data.value:  # PathLib's own arguments
            return Path(*(part.value for part in data.value))
    return None


def _entry(node: yaml.Node | None, key: str) -> yaml.Node | None:
    entries = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in entries if name.value == key), None)
