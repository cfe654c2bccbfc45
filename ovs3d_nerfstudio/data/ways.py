"""Ways between coordinates as affine maps, and those in which something that was made of the same photos may lie."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from ovs3d_nerfstudio.data.frames import Frame, frame_of

Way = Float[np.ndarray, "3 4"]
"""x ↦ way · (x, 1)."""
STAY: Way = np.eye(3, 4)


def way_of(frame: Frame) -> Way:
    """From the data to the model."""
    return frame.scale * frame.transform


def composed(second: Way, first: Way) -> Way:
    """The way `first`, then `second`."""
    return second @ np.vstack([first, [0, 0, 0, 1]])


def back(way: Way) -> Way:
    """The way back."""
    return np.linalg.inv(np.vstack([way, [0, 0, 0, 1]]))[:3]


def possible_ways(datamanager: Any) -> dict[str, Way]:
    """The coordinates that something made of the same photos may have, by what they are called, and the way from each to those
    that an open run's model has."""
    ways = {"the data's coordinates": way_of(frame_of(datamanager))}
    before = way_of(Frame.of_outputs(datamanager.train_dataparser_outputs))
    if not np.allclose(before, ways["the data's coordinates"]):
        ways["the coordinates before the data's applied_transform"] = before
    return ways | {"the coordinates that nerfstudio trains in": STAY}
