"""The datamanager of Gaussians: whole photos as nerfstudio has them, and windows of the training views for the semantics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from torch import Tensor

from ovs3d_nerfstudio.data.checked import CheckedData
from ovs3d_nerfstudio.data.dataset import OVS3DDataset
from ovs3d_nerfstudio.data.frames import Frame
from ovs3d_nerfstudio.data.seeds import seed_points
from ovs3d_nerfstudio.data.sparse_points import names_points
from ovs3d_nerfstudio.data.teaching import Teaching, TeachingConfig
from ovs3d_nerfstudio.engine.option_checks import SIZE, Range
from ovs3d_nerfstudio.features.teachers import Windows
from ovs3d_nerfstudio.gaussians.lenses import has_lens, lens_of


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

    def __init__(self, config: OVS3DImagesConfig, *args: Any, test_mode: str = "val", **kwargs: Any):
        parser = config.dataparser
        if isinstance(parser, NerfstudioDataParserConfig):
            # Where there are none, nerfstudio says that it begins at random, or asks on the terminal.
            wanted = test_mode == "val" and config.find_seeds
            parser.load_3D_points = wanted and names_points(Path(config.data or parser.data))
        super().__init__(config, *args, test_mode=test_mode, **kwargs)

    def create_train_dataset(self) -> OVS3DDataset:
        dataset = super().create_train_dataset()
        metadata = self.train_dataparser_outputs.metadata
        if self.test_mode == "val" and self.config.find_seeds:
            parsed = self.train_dataparser_outputs
            self.train_dataset = dataset
            _place_points(self.config.dataparser, parsed.metadata)
            seeds = seed_points(parsed, dataset.image_filenames, parsed.cameras, self.cache_folder(), CONSOLE)
            CONSOLE.print(escape(seeds.origin))
            points, colors = torch.from_numpy(seeds.positions), torch.from_numpy(seeds.colors)
        else:
            # What is opened, or what training begins with, brings its Gaussians along: any few stand in their place until then.
            points, colors = torch.eye(4, 3), torch.zeros(4, 3, dtype=torch.uint8)
        metadata["points3D_xyz"], metadata["points3D_rgb"] = points, colors
        return dataset

    def cameras_in_use(self) -> Iterator[Cameras]:
        """Those of the datasets, and nerfstudio's copy of them beside the photos in memory."""
        yield from super().cameras_in_use()
        if hasattr(self, "train_cameras"):
            yield self.train_cameras

    def _load_images(self, split: Literal["train", "eval"], cache_images_device: Literal["cpu", "gpu"]) -> list[dict]:
        """As nerfstudio's, which would undistort photos; here the model renders them as their lens took them."""
        dataset = self.train_dataset if split == "train" else self.eval_dataset
        cameras = dataset.cameras
        distortion, cameras.distortion_params = cameras.distortion_params, None
        photos = super()._load_images(split, cache_images_device)
        cameras.distortion_params = distortion
        if split == "train":
            self.train_cameras = cameras.to(self.device) if cache_images_device == "gpu" else cameras
        for view, kept in enumerate(photos):
            covered = self._covered(cameras, view)
            if covered is not None:
                covered = covered[..., None].to(kept["image"].device)
                kept["mask"] = kept["mask"] & covered if "mask" in kept else covered
        return photos

    def masks(self) -> Iterable[Bool[Tensor, "h w"]] | None:
        """As for any data; what a lens sees beyond what is rendered teaches nothing either."""
        cameras, given = self.train_dataset.cameras, super().masks()
        covered = [self._covered(cameras, view) for view in range(len(cameras))]
        if all(part is None for part in covered):
            return given
        everywhere = (
            torch.ones(*size.tolist(), dtype=torch.bool) for size in torch.cat([cameras.height, cameras.width], -1)
        )
        pairs = zip(everywhere if given is None else given, covered, strict=True)
        return (mask if part is None else mask & part for mask, part in pairs)

    def _covered(self, cameras: Cameras, view: int) -> Bool[Tensor, "h w"] | None:
        """Where one view's lens is followed; None where that is everywhere."""
        lens = lens_of(cameras[view : view + 1].to("cpu")) if cameras.distortion_params is not None else None
        return None if lens is None or bool(lens.covered.all()) else lens.covered

    def _checked(self, dataset: OVS3DDataset) -> OVS3DDataset:
        dataset = super()._checked(dataset)
        cameras = dataset.cameras
        if not has_lens(cameras):
            cameras.distortion_params = None  # zeros would be looked at, on the device, at every step
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


def _place_points(parser: Any, metadata: dict[str, Any]) -> None:
    """Has the sparse points lie among the cameras: nerfstudio scales them by a transforms.json's `applied_scale`, those not."""
    if isinstance(parser, NerfstudioDataParserConfig) and metadata.get("points3D_xyz") is not None:
        metadata["points3D_xyz"] = metadata["points3D_xyz"] / Frame.applied_to(parser.data).scale
