"""The training photo that was taken nearest to a view, to be put beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.data.scene_box import OrientedBox
from torch import Tensor

from ovs3d_nerfstudio.fields.compositing import SOMETHING
from ovs3d_nerfstudio.pipeline import OVS3DPipeline

NEAREST = "nearest_photo"
"""The output that it is."""
APART, TURNED = 0.7, 0.3
"""nerfstudio's weights of how far a photo's camera is from the view's, and of how much it is turned."""


class NearestPhotos:
    """The training photos of a run. nerfstudio's own search asks a model for rays that Gaussians do not know, and that look away
    from the photo."""

    def __init__(self, pipeline: OVS3DPipeline, seen: bool):
        """`seen`: whether a photo counts only where nothing stands between it and the view, if there is such a one."""
        self.model, self.seen = pipeline.model, seen
        self.photos = pipeline.datamanager.train_dataset
        self.poses = self.photos.cameras.camera_to_worlds.detach().cpu()

    def picture(
        self, pose: Float[Tensor, "3 4"], size: tuple[int, int], box: OrientedBox | None = None
    ) -> Float[Tensor, "H W 3"]:
        """The photo nearest to a pose, as large as `size` (height and width) holds; beside it black."""
        photo: Any = self.photos.get_data(self.place(pose.cpu(), box))["image"]
        photo = self.model.photo_of(photo.to(self.model.device)).permute(2, 0, 1)[None]
        scale = min(size[0] / photo.shape[2], size[1] / photo.shape[3])
        height, width = (max(1, round(side * scale)) for side in photo.shape[2:])
        small = F.interpolate(photo, size=(height, width), mode="bilinear", antialias=True)
        return F.pad(small, (0, size[1] - width, 0, size[0] - height))[0].permute(1, 2, 0)

    def place(self, pose: Float[Tensor, "3 4"], box: OrientedBox | None = None) -> int:
        """Which of the photos it is."""
        ways = self.poses[..., 3] - pose[:, 3]
        turned = (3 - (self.poses[..., :3] * pose[:, :3]).sum((-2, -1))) / 4  # 1 − (q·q')² of their quaternions
        order = (APART * ways.norm(dim=-1) + TURNED * turned).argsort().tolist()
        if not self.seen:
            return order[0]
        return next((place for place in order if self._free(pose[:, 3], ways[place], box)), order[0])

    @torch.no_grad()
    def _free(self, origin: Float[Tensor, "3"], way: Float[Tensor, "3"], box: OrientedBox | None) -> bool:
        """Whether nothing stands in the way from a place."""
        far = float(way.norm())
        if far == 0:
            return True
        device = self.model.device
        found = self.model.features_along(origin[None].to(device), (way / far)[None].to(device), box)
        return bool(found["accumulation"][0] < SOMETHING or found["depth"][0] >= far)
