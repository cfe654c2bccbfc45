"""The two scenes that methods train on: the demo's, tiny, and the same with a part of every photo to ignore."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ovs3d_nerfstudio.demo.scene import make_scene
from pretended.method import MASKED, PLAIN


def write_scenes(folder: Path) -> None:
    """Makes both in `folder`; nothing that training adds to one is in the other."""
    plain = make_scene(folder / PLAIN, width=64, train_views=5, test_views=2)
    masked = Path(shutil.copytree(plain, folder / MASKED))
    (masked / "masks").mkdir()
    scene = json.loads((masked / "transforms.json").read_text())
    for frame in scene["frames"]:
        path = f"masks/{Path(frame['file_path']).stem}.png"
        with Image.open(masked / frame["file_path"]) as photo:
            seen = np.full((photo.height, photo.width), 255, np.uint8)
        seen[:, : seen.shape[1] // 4] = 0
        Image.fromarray(seen).save(masked / path)
        frame["mask_path"] = path
    (masked / "transforms.json").write_text(json.dumps(scene))
