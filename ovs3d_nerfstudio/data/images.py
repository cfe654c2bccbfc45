"""The datamanager of Gaussians: whole photos as nerfstudio has them, and windows of the training views for the semantics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from torch import Tensor

from ovs3d_nerfstudio.data.checked import CheckedData
from ovs3d_nerfstudio.data.dataset import OVS3DDataset
from ovs3d_nerfstudio.data.scene_checks import SceneError
from ovs3d_nerfstudio.data.seeds import seed_points
from ovs3d_nerfstudio.data.teaching import Teaching, TeachingConfig
from ovs3d_nerfstudio.engine.option_checks import SIZE, Range
from ovs3d_nerfstudio.features.teachers import Windows


@dataclass
class OVS3DImagesConfig(TeachingConfig, FullImageDatamanagerConfig):
    """Photos as nerfstudio keeps them, and the windows of the semantic losses."""

    _target: type = field(default_factory=lambda: OVS3DImages)
    find_seeds: bool = True
    """Whether Gaussians begin at points of the data or of its photos; set by the pipeline."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        **TeachingConfig.RANGES,
        "num_windows": SIZE,
        "camera_res_scale_factor": Range(0, 1, closed=False),
    }


class OVS3DImages(CheckedData, Teaching, FullImageDatamanager[OVS3DDataset]):
    """A FullImageDatamanager that can also draw windows of its views and say what the features teach about them.

    Geometry learns from whole photos, semantics from windows alone, so a step of theirs pays for the windows' pixels.
    """

    config: OVS3DImagesConfig

    def __init__(self, config: OVS3DImagesConfig, *args: Any, **kwargs: Any):
        parser = config.dataparser
        if isinstance(parser, NerfstudioDataParserConfig):
            # Where there are none, nerfstudio says that it begins at random, or asks on the terminal.
            parser.load_3D_points = _names_points(Path(config.data or parser.data))
        super().__init__(config, *args, **kwargs)

    def create_train_dataset(self) -> OVS3DDataset:
        dataset = super().create_train_dataset()
        distortion = dataset.cameras.distortion_params
        if distortion is not None and distortion.any():
            raise SceneError(
                f"The photos of {self.config.data} have lens distortion, which Gaussians cannot be rendered with; undistort "
                "them first (colmap image_undistorter), or train a NeRF on them: ovs3d or ovs3d-lite."
            )
        metadata = self.train_dataparser_outputs.metadata
        if self.test_mode == "val" and self.config.find_seeds:
            parsed = self.train_dataparser_outputs
            self.train_dataset = dataset
            seeds = seed_points(parsed, dataset.image_filenames, parsed.cameras, self.cache_folder(), CONSOLE)
            CONSOLE.print(escape(seeds.origin))
            points, colors = torch.from_numpy(seeds.positions), torch.from_numpy(seeds.colors)
        else:
            # What is opened, or what training begins with, brings its Gaussians along: any few stand in their place until then.
            points, colors = torch.eye(4, 3), torch.zeros(4, 3, dtype=torch.uint8)
        metadata["points3D_xyz"], metadata["points3D_rgb"] = points, colors
        return dataset

    def next_step(
        self, step: int, semantics: bool, windows: bool, colors: bool
    ) -> tuple[Cameras, Windows | None, dict]:
        """What a step trains on: a camera and the batch of its photo; or, with `semantics`, windows and
        the camera of each, on the CPU.

        The batch then has `teachers` and `ranges` of the windows' pixels (see `teachers_of`) and the windows themselves, colours
        included where `colors` asks for them. Pixels that a mask ignores are no part of the former.
        """
        if not semantics:
            camera, batch = self.next_train(step)
            return camera, None, batch
        drawn = self.draw_windows(colors)
        assert drawn is not None and drawn.pixels is not None, "at least one window is drawn, on the CPU"
        pixels = drawn.pixels if drawn.seen is None else drawn.pixels[drawn.seen.flatten().cpu()]
        teachers, ranges = self.teachers_of(pixels)
        cameras = self.train_dataset.cameras[drawn.pixels[:: drawn.side**2, 0]]
        return cameras, drawn, {"teachers": teachers, "ranges": ranges, "windows": drawn}

    def next_train(self, step: int) -> tuple[Cameras, dict]:
        """The camera of a photo and its batch; each photo once in as many steps, in an order that the step alone decides, so
        that a run which is resumed goes on as if nothing was."""
        photos = len(self.train_dataset)
        turn, place = divmod(step, photos)
        order = torch.randperm(photos, generator=torch.Generator().manual_seed(turn))
        # nerfstudio's takes the first, and wants another to be there.
        self.train_unseen_cameras = [int(order[place])] * 2
        return super().next_train(step)

    def photos_in_memory(self) -> Mapping[int, Tensor]:
        """All of them."""
        return {view: kept["image"] for view, kept in enumerate(self.cached_train)}


def _names_points(data: Path) -> bool:
    """Whether a transforms.json names sparse points; what is wrong with it is said when it is parsed."""
    try:
        meta = json.loads((data if data.suffix == ".json" else data / "transforms.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and bool(meta.get("ply_file_path"))
