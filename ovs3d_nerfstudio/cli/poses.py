"""Poses to render at, from a file: a camera path of the viewer, or a transforms.json with the lens of each frame."""

from __future__ import annotations

from typing import Any

import torch
from nerfstudio.cameras.camera_paths import get_path_from_json
from nerfstudio.cameras.camera_utils import get_distortion_params
from nerfstudio.cameras.cameras import Cameras

from ovs3d_nerfstudio.data.camera_models import kind_of
from ovs3d_nerfstudio.data.frames import Frame

FRAME_RATE = 24
"""Frames a second of a video whose poses are those of a transforms.json."""


def is_transforms(content: dict[str, Any]) -> bool:
    """Whether a JSON file is a transforms.json, whose poses are in the data's coordinates."""
    return "frames" in content


def poses_of(content: dict[str, Any]) -> tuple[Cameras, float]:
    """The cameras of a JSON file in the coordinates that they stand in, and how many seconds a video of them takes.

    Raises LookupError, TypeError, ValueError, RuntimeError, AttributeError or ArithmeticError for what holds none.
    """
    if not is_transforms(content):
        cameras, seconds = get_path_from_json(content), float(content["seconds"])
    else:
        cameras = _of_transforms(content)
        seconds = len(cameras) / FRAME_RATE
    cameras.camera_to_worlds = cameras.camera_to_worlds.float()
    if not (seconds > 0 and (cameras.width > 0).all() and cameras.camera_to_worlds.isfinite().all()):
        raise ValueError("it has no pictures, no time, or poses that are no finite numbers")
    return cameras, seconds


def in_model(cameras: Cameras, frame: Frame) -> Cameras:
    """Cameras of the data where a model has them."""
    poses = frame.poses_to_model(cameras.camera_to_worlds.double().numpy())
    cameras.camera_to_worlds = torch.from_numpy(poses).float()
    return cameras


def _of_transforms(content: dict[str, Any]) -> Cameras:
    """The frames, in the order of the file; as nerfstudio reads it, what is given for all of them goes before what each has, but
    for their camera models."""
    frames = content["frames"]

    def each(key: str) -> torch.Tensor:
        return torch.tensor([[float(content[key] if key in content else frame[key])] for frame in frames])

    lens = ("k1", "k2", "k3", "k4", "p1", "p2")
    shared = any(key in content for key in lens)
    distortion = [
        get_distortion_params(**{key: float((content if shared else frame).get(key, 0.0)) for key in lens})
        for frame in frames
    ]
    return Cameras(
        camera_to_worlds=torch.tensor([frame["transform_matrix"] for frame in frames]).float()[:, :3, :4],
        fx=each("fl_x"),
        fy=each("fl_y"),
        cx=each("cx"),
        cy=each("cy"),
        width=each("w").int(),
        height=each("h").int(),
        distortion_params=torch.stack(distortion),
        camera_type=torch.tensor([[kind_of(content, frame).value] for frame in frames]),
    )
