"""Pictures of a splat itself, which stand for photos where there are none: a scene as any other, for training and all commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.progress import track

from ovs3d_nerfstudio.files import write_json, written_beside
from ovs3d_nerfstudio.gaussians.shown import picture_of
from ovs3d_nerfstudio.gaussians.splats import Splat
from ovs3d_nerfstudio.gaussians.viewpoints import described, intrinsics, viewpoints

WIDTH, HEIGHT = 480, 360
"""Pixels of a picture."""
BACKGROUND = 0.5
"""Grey behind what the splat does not fill."""


def write_own_views(splat: Splat, up: tuple[float, float, float], count: int, folder: Path) -> None:
    """Chooses at most `count` cameras and leaves their pictures in `folder`, as a scene for nerfstudio-data whose poses are in
    the splat's coordinates. Raises SplatError when no camera sees anything."""
    with CONSOLE.status("Looking for cameras that see what there is"):
        chosen = viewpoints(splat, torch.tensor(up), count)
    CONSOLE.print(described(chosen))
    matrix, background = intrinsics(WIDTH, HEIGHT), torch.full((3,), BACKGROUND)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    frames = []
    for number, view in enumerate(track(chosen, "Taking pictures of the splat", console=CONSOLE)):
        name = f"images/{number:03d}.png"
        picture = picture_of(splat, view.pose, matrix, WIDTH, HEIGHT, background)
        with written_beside(folder / name) as beside:
            Image.fromarray((picture * 255).round().byte().numpy()).save(beside, "png")
        pose = np.vstack([view.pose.double().numpy(), [0, 0, 0, 1]])
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
    names = [frame["file_path"] for frame in frames]
    (fx, _, cx), (_, fy, cy) = matrix[:2].tolist()
    camera = {"camera_model": "OPENCV", "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": WIDTH, "h": HEIGHT}
    # All are trained on, so the first stands for those that nerfstudio looks at beside the training.
    splits = {"train_filenames": names, "val_filenames": names[:1], "test_filenames": names[:1]}
    write_json(folder / "transforms.json", camera | splits | {"frames": frames})
