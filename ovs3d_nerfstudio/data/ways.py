"""Ways between coordinates as affine maps, and those in which something that was made of the same photos may lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ovs3d_nerfstudio.data.frames import Frame

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
    that an open run's model has.

    nerfstudio's parser counts what a transforms.json says had been applied to its poses as part of its own way, so that the
    poses as they stand there lie behind it.
    """
    parsed = datamanager.train_dataparser_outputs
    way = float(parsed.dataparser_scale) * parsed.dataparser_transform.double().numpy()
    ways, applied = {"the data's coordinates": way}, _applied(Path(datamanager.config.data or "."))
    if applied is not None:
        transform, scale = applied
        from_file = composed(parsed.dataparser_transform.double().numpy(), back(transform))
        ways = {
            "the data's coordinates": parsed.dataparser_scale / scale * from_file,
            "the coordinates before the data's applied_transform": way,
        }
    return ways | {"the coordinates that nerfstudio trains in": STAY}


def _applied(data: Path) -> tuple[Way, float] | None:
    """`applied_transform` and `applied_scale` of a transforms.json, None where neither changes anything."""
    try:
        meta = json.loads((data if data.suffix == ".json" else data / "transforms.json").read_text(encoding="utf-8"))
        transform = np.array(meta.get("applied_transform", STAY), float)[:3].reshape(3, 4)
        scale = float(meta.get("applied_scale", 1.0))
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    usable = np.isfinite(transform).all() and abs(np.linalg.det(transform[:, :3])) > 0 and 0 < scale < np.inf
    return (transform, scale) if usable and not (np.array_equal(transform, STAY) and scale == 1) else None
