"""Data that has been looked at: what cannot be used ends a command with a sentence before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nerfstudio.data.datamanagers.base_datamanager import DataManager
from nerfstudio.utils.rich_utils import CONSOLE

from ovs3d_nerfstudio.data.dataset import LenientDataset, OVS3DDataset
from ovs3d_nerfstudio.data.scene_checks import check_cameras, check_files, check_pictures, readable_scene
from ovs3d_nerfstudio.errors import user_errors
from ovs3d_nerfstudio.features.extraction import check_size
from ovs3d_nerfstudio.pictures import PictureError, view_names


class CheckedData(DataManager):
    """Stands before a datamanager of nerfstudio's in the order of bases, and has its data read and checked with sentences."""

    config: Any
    """Of the datamanager, and a TeachingConfig."""
    train_dataset: OVS3DDataset
    eval_dataset: OVS3DDataset
    train_dataparser_outputs: Any

    def __init__(self, config: Any, *args: Any, test_mode: str = "val", **kwargs: Any):
        """Data that cannot be used ends the command with a sentence, here because ns-render builds no pipeline for it."""
        parser = config.dataparser
        with user_errors(), readable_scene(parser, Path(config.data or parser.data)):
            try:
                super().__init__(config, *args, test_mode=test_mode, **kwargs)  # type: ignore[call-arg]
            except FileNotFoundError:
                if test_mode == "val" or getattr(parser, "downscale_factor", 1) is not None:
                    raise
                # nerfstudio's parser looks at the first photo to choose a size, which matters only to whoever reads photos.
                parser.downscale_factor = 1  # type: ignore[attr-defined]
                super().__init__(config, *args, test_mode=test_mode, **kwargs)  # type: ignore[call-arg]
        with user_errors():
            if test_mode == "val":
                self._check_names()
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
        """Raises PictureError when a photo to compare with is not there."""
        dataset = self.eval_dataset
        if isinstance(dataset, LenientDataset) and (missing := dataset.missing()):
            raise PictureError(f"The photo {missing[0]} is not there to compare with; put it back, or name other data.")

    def create_train_dataset(self) -> OVS3DDataset:
        """The training photos, whose cameras and headers have been looked at."""
        cameras = self.train_dataparser_outputs.cameras
        capture = check_cameras(cameras, str(self.config.data), for_training=self.test_mode == "val")
        dataset = self._checked(super().create_train_dataset())
        if self.test_mode == "val":
            for path, header in dataset.headers.items():
                check_size(path, header.height, header.width, self.config.scales)
        # nerfstudio's way from the data to a model.
        dataset.metadata["capture"] = capture
        return dataset

    def create_eval_dataset(self) -> OVS3DDataset:
        """The held-out photos, likewise."""
        return self._checked(super().create_eval_dataset())

    def _checked(self, dataset: OVS3DDataset) -> OVS3DDataset:
        if self.test_mode == "inference":  # needs no pictures
            return dataset
        parsed = dataset._dataparser_outputs
        check_pictures(dataset.image_filenames, dataset.headers, parsed.cameras, parsed.mask_filenames)
        return dataset
