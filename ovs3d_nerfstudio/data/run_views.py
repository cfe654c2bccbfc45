"""What a run keeps of its data: the frame that it was trained in, and its cameras.

nerfstudio's parsers turn, centre and scale the poses by all of them, so one photo that is taken out of the data moves every camera
of a run that is opened later. A checkpoint therefore holds this beside the weights, and whatever opens it, commands of
nerfstudio's too, has its cameras brought back to where the run has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from ovs3d_nerfstudio.data.frames import Frame

SAME = 1e-3
"""Two poses are one camera when they are nearer than this: its place as a share of the box around the cameras, its axes as they
are."""


@dataclass(frozen=True)
class RunViews:
    """The frame of a run and its training views."""

    frame: Frame
    names: list[str]
    """Of the photos, within the data."""
    poses: Float[np.ndarray, "N 3 4"]
    """Of the cameras, in the model's frame."""

    @staticmethod
    def of_plain(saved: dict[str, Any]) -> RunViews:
        """What `plain` returned. Raises KeyError, TypeError or ValueError for anything else."""
        frame = Frame(np.array(saved["frame"]["transform"], float).reshape(3, 4), float(saved["frame"]["scale"]))
        names, poses = [*map(str, saved["names"])], np.array(saved["poses"], float).reshape(-1, 3, 4)
        if len(names) != len(poses) or not len(poses):
            raise ValueError(f"it has {len(names)} views with {len(poses)} poses")
        return RunViews(frame, names, poses)

    def plain(self) -> dict[str, Any]:
        """Numbers and text, as checkpoints may hold them."""
        return {"frame": self.frame.plain(), "names": self.names, "poses": self.poses.tolist()}

    def differences(self, names: Sequence[str], poses: Float[np.ndarray, "M 3 4"]) -> list[str]:
        """How the views of the data differ from those of the run, whose frame `poses` are in; nothing where they do not.

        Cameras are told apart by their poses, for photos have other paths when they are opened in another size.
        """
        ours, theirs = self._points(self.poses), self._points(poses)
        gone = cKDTree(theirs).query(ours)[0] > SAME
        new = self.places(poses) < 0
        went = [name for name, there in zip(self.names, gone, strict=True) if there]
        came = [name for name, there in zip(names, new, strict=True) if there]
        moved = [name for name in went if name in came]
        groups = (
            ([name for name in went if name not in moved], f"of its {len(self.names)} training photos went"),
            ([name for name in came if name not in moved], "came"),
            (moved, "have other poses"),
        )
        return [f"{len(group)} {what} (such as {group[0]})" for group, what in groups if group]

    def places(self, poses: Float[np.ndarray, "M 3 4"]) -> Int[np.ndarray, " M"]:
        """Which of the run's views each of `poses` is, in its frame; −1 for one that came."""
        way, place = cKDTree(self._points(self.poses)).query(self._points(poses))
        return np.where(way > SAME, -1, place)

    def _points(self, poses: Float[np.ndarray, "M 3 4"]) -> Float[np.ndarray, "M 12"]:
        """Places and axes as points, of which two are near when the poses are."""
        diagonal = max(float(np.linalg.norm(np.ptp(self.poses[..., 3], axis=0))), 1e-9)
        return np.concatenate([poses[..., 3] / diagonal, poses[..., :3].reshape(-1, 9)], -1)
