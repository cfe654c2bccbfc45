"""Data that has been looked at: what cannot be used ends a command with a sentence before anything is trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.base_datamanager import DataManager
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import UnidentifiedImageError
from rich.markup import escape
from torch import Tensor, nn

from ovs3d_nerfstudio.data.capture import capture_of
from ovs3d_nerfstudio.data.dataset import LenientDataset, OVS3DDataset
from ovs3d_nerfstudio.data.frames import Frame
from ovs3d_nerfstudio.data.run_views import RunViews
from ovs3d_nerfstudio.data.scene_checks import (
    SceneError,
    check_cameras,
    check_files,
    check_pictures,
    readable_scene,
)
from ovs3d_nerfstudio.errors import user_errors
from ovs3d_nerfstudio.features.extraction import check_size
from ovs3d_nerfstudio.pictures import PictureError, open_picture, view_names

UNMOVED = 1e-5
"""A frame is the run's when no camera lies farther than this from where the run has it, as a share of the farthest coordinate."""


class CheckedData(DataManager, nn.Module):
    """Stands before a datamanager of nerfstudio's in the order of bases, and has its data read and checked with sentences.

    A module, as nerfstudio's datamanagers are no more on its main branch: what a checkpoint keeps of the data is its state.
    """

    config: Any
    """Of the datamanager, and a TeachingConfig."""
    dataparser: Any
    train_dataset: OVS3DDataset
    eval_dataset: OVS3DDataset
    train_dataparser_outputs: Any
    frame: Frame
    """From the data's coordinates to those of the cameras."""

    def __init__(self, config: Any, *args: Any, test_mode: str = "val", **kwargs: Any):
        """Data that cannot be used ends the command with a sentence, here because ns-render builds no pipeline for it."""
        parser = config.dataparser
        place = Path(config.data or parser.data)
        with user_errors():
            if (
                test_mode != "val" and not place.exists()
            ):  # a run is opened, and nerfstudio's commands ask for no other place
                raise SceneError(
                    f"The run's data, {place}, is not there; put it back, or a link to where it is. Every `ovs3d` command on a run "
                    "takes --data."
                )
        with user_errors(), readable_scene(parser, place):
            try:
                super().__init__(config, *args, test_mode=test_mode, **kwargs)  # type: ignore[call-arg]
            except (FileNotFoundError, UnidentifiedImageError):
                if test_mode == "val" or getattr(parser, "downscale_factor", 1) is not None:
                    raise
                # nerfstudio's parser looks at the first photo to choose a size, which matters only to whoever reads photos.
                parser.downscale_factor = 1  # type: ignore[attr-defined]
                super().__init__(config, *args, test_mode=test_mode, **kwargs)  # type: ignore[call-arg]
        with user_errors():
            if test_mode == "val":
                self._check_names()
        if config.run_views is not None:
            self._fit(config.run_views)
        if isinstance(self.train_dataset, LenientDataset) and (missing := self.train_dataset.missing()):
            CONSOLE.print(
                f"{len(missing)} of {len(self.train_dataset)} training photos are not there; they are shown grey."
            )

    def _check_names(self) -> None:
        """Raises SceneError or PictureError when two views are one file, or would be called the same."""
        parts = [self.train_dataparser_outputs, self.eval_dataset._dataparser_outputs]
        paths = [path for part in parts for path in part.image_filenames]
        poses = torch.cat([part.cameras.camera_to_worlds for part in parts])
        check_files(paths, poses)
        view_names(paths)

    @property
    def dataset_type(self) -> type[OVS3DDataset]:
        return OVS3DDataset if self.test_mode == "val" else LenientDataset

    def require_eval_photos(self) -> None:
        """Raises PictureError when a photo to compare with is not there or cannot be read."""
        dataset = self.eval_dataset
        if not isinstance(dataset, LenientDataset):
            return
        if missing := dataset.missing():
            raise PictureError(f"The photo {missing[0]} is not there to compare with; put it back, or name other data.")
        for path in dataset.image_filenames:
            open_picture(path)

    def create_train_dataset(self) -> OVS3DDataset:
        """The training photos, whose cameras and headers have been looked at."""
        self.frame = Frame.of_parser(self.config.dataparser, self.train_dataparser_outputs)
        cameras = self.train_dataparser_outputs.cameras
        capture = check_cameras(cameras, str(self.config.data), for_training=self.test_mode == "val")
        dataset = self._checked(super().create_train_dataset())
        if self.test_mode == "val":
            for path, header in dataset.headers.items():
                check_size(path, header.height, header.width, self.config.scales)
        # nerfstudio's way from the data to a model. A run that goes on starts from no other capture than it did.
        known: RunViews | None = self.config.run_views
        if known is not None:
            capture = capture_of(torch.from_numpy(known.poses), capture.panoramas)
        dataset.metadata["capture"] = capture
        return dataset

    def create_eval_dataset(self) -> OVS3DDataset:
        """The held-out photos, likewise."""
        if self.test_mode == "val":
            # What a run is opened with, so that it is not trained in vain.
            self.dataparser.get_dataparser_outputs(split="test")
        return self._checked(super().create_eval_dataset())

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: see `run_views`."""
        return RunViews(self.frame, self._names(), _numpy(self.train_dataset.cameras)).plain()

    def set_extra_state(self, saved: dict[str, Any]) -> None:
        """Brings the cameras to where the run of a checkpoint has them, and says how the data differ from its own.

        Raises KeyError, TypeError or ValueError when `saved` is nothing that a checkpoint has kept.
        """
        known = RunViews.of_plain(saved)
        moved = self._fit(known)
        # ns-render makes another datamanager of the same config, which no checkpoint is loaded into.
        self.config.run_views = known
        differences = known.differences(self._names(), _numpy(self.train_dataset.cameras))
        if moved and not differences:
            differences = ["they are turned or scaled otherwise"]
        if differences:
            done = "All cameras are put where the run has them." if moved else "The run's frame stays."
            said = f"The data are not as at the training: {', '.join(differences)}. {done}"
            CONSOLE.print(f"[bold yellow]Warning:[/bold yellow] {escape(said)}", soft_wrap=True)

    def of_each_view(self, kept: Float[Tensor, "N k"]) -> Float[Tensor, "M k"]:
        """What a run kept for each of its training views, for those of the data: zeros for a view that came."""
        known = self.config.run_views
        places = known.places(_numpy(self.train_dataset.cameras))
        rows = kept[torch.from_numpy(places).clamp_min(0)]
        rows[torch.from_numpy(places < 0)] = 0
        return rows

    def cameras_in_use(self) -> Iterator[Cameras]:
        """All cameras that were made of the data."""
        for dataset in (self.train_dataset, self.eval_dataset):
            yield from (dataset.cameras, dataset._dataparser_outputs.cameras)

    def _fit(self, known: RunViews) -> bool:
        """Brings the cameras into a run's frame; returns whether they were elsewhere."""
        before, frame = self.frame, known.frame
        poses = _numpy(self.train_dataset.cameras)
        way = np.abs(frame.poses_to_model(before.poses_to_data(poses)) - poses)[..., 3].max()
        if way <= UNMOVED * max(1.0, np.abs(poses[..., 3]).max()):
            return False
        for cameras in {id(cameras): cameras for cameras in self.cameras_in_use()}.values():
            fitted = torch.from_numpy(frame.poses_to_model(before.poses_to_data(_numpy(cameras))))
            cameras.camera_to_worlds = fitted.to(cameras.camera_to_worlds.dtype).to(cameras.camera_to_worlds.device)
        # What nerfstudio takes for the way to the model, from wherever it began.
        datasets = (self.train_dataset, self.eval_dataset)
        outputs = [self.train_dataparser_outputs, *(dataset._dataparser_outputs for dataset in datasets)]
        for parsed in {id(parsed): parsed for parsed in outputs}.values():
            fitted_frame = frame.in_place_of(before, Frame.of_outputs(parsed))
            parsed.dataparser_transform = torch.from_numpy(fitted_frame.transform).float()
            parsed.dataparser_scale = fitted_frame.scale
        self.frame = frame
        return True

    def _names(self) -> list[str]:
        root = Path(self.config.data)
        paths = self.train_dataset.image_filenames
        return [(path.relative_to(root) if path.is_relative_to(root) else path).as_posix() for path in paths]

    def _checked(self, dataset: OVS3DDataset) -> OVS3DDataset:
        if self.test_mode == "inference":  # needs no pictures
            return dataset
        parsed = dataset._dataparser_outputs
        check_pictures(dataset.image_filenames, dataset.headers, parsed.cameras, parsed.mask_filenames)
        return dataset


def _numpy(cameras: Cameras) -> Float[np.ndarray, "N 3 4"]:
    return cameras.camera_to_worlds.detach().cpu().double().numpy()
