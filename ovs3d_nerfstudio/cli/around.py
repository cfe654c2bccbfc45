"""A camera's way around a scene, among all of its training photos: what `ovs3d render interpolate` shows unless told otherwise."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType

from ovs3d_nerfstudio.data.capture import LOOKING_THERE, capture_of, nearest_to_axes

LEAST_WIDTH = 0.05
"""Photos that blend into one another, as a share of the way, at least."""


def around(cameras: Cameras, frames: int) -> Cameras:
    """`frames` pinhole cameras on one smooth way among the training cameras: around what they look at, a full turn where they stand
    all around it, from one end to the other where they stand before it; in the order of the photos where they look at no
    one place.

    Each is the mean of the cameras near its place on the way, so that it sees what they saw, whatever heights they had.
    """
    poses = cameras.camera_to_worlds.detach().cpu().double()
    at, closed = places(poses.numpy())
    steps = np.arange(frames) / (frames if closed else max(1, frames - 1))
    apart = steps[:, None] - at
    if closed:
        apart -= apart.round()
    width = max(LEAST_WIDTH, 1.5 / len(at))
    # Where photos are far between, the nearest still counts in full.
    exponent = -0.5 * (apart / width) ** 2
    weights = np.exp(exponent - exponent.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    mean = np.einsum("fn,nij->fij", weights, poses.numpy())
    way = mean.copy()
    way[..., 2] = mean[..., 2] / np.linalg.norm(mean[..., 2], axis=-1, keepdims=True)
    right = np.cross(mean[..., 1], way[..., 2])
    way[..., 0] = right / np.linalg.norm(right, axis=-1, keepdims=True)
    way[..., 1] = np.cross(way[..., 2], way[..., 0])
    middle = cameras[len(cameras) // 2]
    width_px, height_px = int(middle.width), int(middle.height)
    return Cameras(
        torch.from_numpy(way).float(),
        fx=float(cameras.fx.median()),
        fy=float(cameras.fy.median()),
        cx=width_px / 2,
        cy=height_px / 2,
        width=width_px,
        height=height_px,
        camera_type=CameraType.PERSPECTIVE,
    )


def places(poses: Float[np.ndarray, "N 3 4"]) -> tuple[Float[np.ndarray, " N"], bool]:
    """The place of each camera on the way, in [0, 1], and whether the way comes back to its beginning."""
    tensors = torch.from_numpy(poses)
    origins, views = tensors[..., 3], -torch.nn.functional.normalize(tensors[..., 2], dim=-1)
    point = nearest_to_axes(origins, views)
    looking = ((point - origins) * views).sum(-1) > 0
    if looking.double().mean() < LOOKING_THERE:
        return np.arange(len(poses)) / max(1, len(poses) - 1), False
    up = torch.nn.functional.normalize(tensors[..., 1].mean(0), dim=0).numpy()
    from_point = (origins - point).numpy()
    level = from_point - (from_point @ up)[:, None] * up
    first = level.mean(0) if np.linalg.norm(level.mean(0)) > 0.1 * np.linalg.norm(level, axis=-1).mean() else level[0]
    first = first - (first @ up) * up
    first = first / np.linalg.norm(first)
    azimuth = np.arctan2(level @ np.cross(up, first), level @ first)
    if capture_of(tensors).around:
        return azimuth / (2 * np.pi) % 1, True
    # From the front, `first` points to the middle of the arc, so that no azimuth wraps.
    return (azimuth - azimuth.min()) / max(np.ptp(azimuth), 1e-9), False
