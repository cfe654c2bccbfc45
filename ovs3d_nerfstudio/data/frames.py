"""The frame of the data: the coordinates of the poses as they stand in its file, and the way from there to a model's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ovs3d_nerfstudio.errors import UserError


class FrameError(UserError):
    """A run does not say how its coordinates follow from the data's."""


@dataclass
class Frame:
    """The similarity from the data's coordinates to those of a model: x ↦ scale · (transform · x)."""

    transform: Float[np.ndarray, "3 4"]
    scale: float

    @staticmethod
    def of_run(folder: Path) -> Frame:
        """The frame of the run in `folder`. Raises FrameError when its dataparser_transforms.json is missing or broken."""
        path = folder / "dataparser_transforms.json"
        try:
            saved = json.loads(path.read_text())
            frame = Frame(np.array(saved["transform"], float).reshape(3, 4), float(saved["scale"]))
            if not (np.isfinite(frame.transform).all() and 0 < abs(frame.scale) < np.inf):
                raise ValueError("no similarity")
            return frame
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            raise FrameError(f"{path} is missing or broken; name a run of ns-train that has it.") from None

    def to_model(self, positions: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        return self.scale * (positions @ self.transform[:, :3].T + self.transform[:, 3])

    def to_data(self, positions: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        return (positions / self.scale - self.transform[:, 3]) @ np.linalg.inv(self.transform[:, :3]).T


def frame_of(datamanager: Any) -> Frame:
    """The frame of an open run, by its datamanager."""
    parsed = datamanager.train_dataparser_outputs
    return Frame(parsed.dataparser_transform.double().numpy(), float(parsed.dataparser_scale))
