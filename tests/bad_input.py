"""What the tests of bad input share: a tiny scene to spoil, and the promise that every case must keep."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import TrainerConfig
from PIL import Image

from ovs3d_nerfstudio.pipeline import OVS3DPipeline

WIDTH, HEIGHT = 48, 36
VIEWS = 7


def make_small_scene(folder: Path) -> Path:
    """Noise seen from seven places, the last held out and annotated; in the layout of transforms.json and in LLFF's."""
    random = np.random.default_rng(0)
    frames, rows = [], []
    (folder / "images").mkdir(parents=True)
    for i in range(VIEWS):
        name = f"images/{i:02d}.png"
        noise = Image.fromarray(random.integers(0, 255, (9, 12, 3), np.uint8))
        noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / name)
        pose = np.eye(4)
        pose[:3, 3] = [i / VIEWS, (i % 3) / 5, 1]
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
        llff = np.stack([-pose[:3, 1], pose[:3, 0], pose[:3, 2], pose[:3, 3], [HEIGHT, WIDTH, 50]], -1)
        rows.append([*llff.ravel(), 1, 8])
    names = [frame["file_path"] for frame in frames]
    meta: dict[str, Any] = {"fl_x": 50, "fl_y": 50, "cx": WIDTH / 2, "cy": HEIGHT / 2, "w": WIDTH, "h": HEIGHT}
    meta |= {"camera_model": "OPENCV", "frames": frames, "train_filenames": names[:-1]}
    meta |= {"val_filenames": names[-1:], "test_filenames": names[-1:]}
    (folder / "transforms.json").write_text(json.dumps(meta))
    np.save(folder / "poses_bounds.npy", rows)
    masks = folder / "segmentations" / f"{VIEWS - 1:02d}"
    masks.mkdir(parents=True)
    (folder / "segmentations" / "classes.txt").write_text("grass\nsheep\n")
    for name, mask in zip(("grass", "sheep"), np.arange(WIDTH) // (WIDTH // 2) == np.array([[0], [1]]), strict=True):
        Image.fromarray(np.tile(mask * np.uint8(255), (HEIGHT, 1))).save(masks / f"{name}.png")
    return folder


def small_config(data: Path) -> TrainerConfig:
    """`ovs3d-lite`, so small that a step takes a moment."""
    config = copy.deepcopy(all_methods["ovs3d-lite"])
    assert isinstance(config, TrainerConfig)
    pipeline = config.pipeline
    datamanager, model = pipeline.datamanager, pipeline.model
    config.data = datamanager.data = data
    config.machine.device_type = "cpu"
    datamanager.train_num_rays_per_batch = datamanager.eval_num_rays_per_batch = 64
    datamanager.num_windows, datamanager.window_size, datamanager.scales = 1, 2, (2.0, 3.0)
    model.num_levels = model.semantic_levels = 2
    model.log2_hashmap_size = model.semantic_log2_hashmap_size = 10
    model.semantics_start, model.fda_start = 0, 1
    for network in model.proposal_net_args_list:
        network |= {"num_levels": 2, "log2_hashmap_size": 10}
    return config


def opened(config: TrainerConfig, test_mode: str = "val") -> OVS3DPipeline:
    """The pipeline as a trainer or a viewer builds it."""
    return config.pipeline.setup(device=config.machine.device_type, test_mode=test_mode)


def assign(config: Any, path: str, value: Any) -> None:
    """Sets `a.b.c` of a config."""
    *parts, name = path.split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, name, value)


def everything_in(*folders: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below some folders, but for the locks of the feature cache."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def refused(capsys, folder: Path, act: Callable[[], Any], said: str | Iterable[str]) -> str:
    """Asserts that `act` ends with status 1 and a sentence that says all of `said`, and leaves `folder` as it was."""
    before = everything_in(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        act()
    printed = " ".join("".join(capsys.readouterr()).split())
    sentence = printed.partition("Error: ")[2]
    assert end.value.code == 1, printed
    assert "Traceback" not in printed and sentence.endswith((".", "'")), printed
    for part in [said] if isinstance(said, str) else said:
        assert part in sentence, printed
    # A value, and what to do about it.
    assert ";" in sentence or "take " in sentence, printed
    assert everything_in(folder) == before, "something was written"
    return sentence
