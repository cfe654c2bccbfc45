"""Dataset: photos of any kind as nerfstudio wants them. Its own reader takes CMYK for RGBA, a palette's numbers for greys and
the lower half of 16 bits for the whole."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.markup import escape

from ovs3d_nerfstudio.pictures import Header, PictureError, open_picture, picture_header, read_mask


class OVS3DDataset(InputDataset):
    """An InputDataset whose pictures have 8 bits and three channels, or four if one of them may be transparent."""

    @cached_property
    def headers(self) -> dict[Path, Header]:
        """What the files of the pictures say of themselves. Raises PictureError when one is not there or is no picture."""
        return {path: picture_header(path) for path in self.image_filenames}

    def get_numpy_image(self, image_idx: int) -> UInt8[np.ndarray, "H W channels"]:
        """The pixels of a picture. Raises PictureError when they cannot be read."""
        alpha = any(header.alpha for header in self.headers.values())
        picture = open_picture(self.image_filenames[image_idx], alpha)
        if self.scale_factor != 1.0:
            size = [int(side * self.scale_factor) for side in picture.size]
            picture = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        return np.array(picture)

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict:
        """As nerfstudio's, whose main branch reads masks in a way that today's Pillow refuses."""
        read = self.get_image_float32 if image_type == "float32" else self.get_image_uint8
        data: dict = {"image_idx": image_idx, "image": read(image_idx)}
        masks = self._dataparser_outputs.mask_filenames
        if masks is not None:
            data["mask"] = read_mask(masks[image_idx], self.scale_factor)
            if self.mask_color:
                painted = torch.ones_like(data["image"]) * torch.tensor(self.mask_color)
                data["image"] = torch.where(data["mask"], data["image"], painted)
        return data | self.get_metadata(data)


class LenientDataset(OVS3DDataset):
    """A dataset for looking at a run: a photo that is not there, or cannot be read, is grey."""

    @cached_property
    def headers(self) -> dict[Path, Header]:
        """As for any dataset, of the photos that have one."""
        found = {}
        for path in self.image_filenames:
            with suppress(PictureError):
                found[path] = picture_header(path)
        return found

    def missing(self) -> list[Path]:
        """The photos that are not there."""
        return [path for path in self.image_filenames if not path.is_file()]

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict:
        path = self.image_filenames[image_idx]
        if path.is_file():
            try:
                return super().get_data(image_idx, image_type)
            except PictureError as error:
                CONSOLE.print(f"[bold yellow]Warning:[/bold yellow] {escape(str(error))} It is shown grey.")
        size = int(self.cameras.height[image_idx]), int(self.cameras.width[image_idx])
        grey = torch.full((*size, 3), 127, dtype=torch.uint8)
        data = {"image_idx": image_idx, "image": grey if image_type == "uint8" else grey / 255}
        if self._dataparser_outputs.mask_filenames is not None:
            data["mask"] = torch.ones(*size, 1, dtype=torch.bool)
        return data
