"""Datamanager: nerfstudio's own, plus what the semantic losses need of the cached features for one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from nerfstudio.data.utils.data_utils import get_image_mask_tensor_from_path
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from ovs3d_nerfstudio.capture import capture_of
from ovs3d_nerfstudio.dataset import LenientDataset, OVS3DDataset
from ovs3d_nerfstudio.encoders.base import ImageTextEncoder, TokenEncoder
from ovs3d_nerfstudio.errors import user_errors
from ovs3d_nerfstudio.features.basis import Basis
from ovs3d_nerfstudio.features.extraction import CachedViews, ClipFeatures, check_size, default_cache_dir, extract
from ovs3d_nerfstudio.features.teachers import Teachers, Windows
from ovs3d_nerfstudio.pictures import PictureError
from ovs3d_nerfstudio.scene_checks import check_cameras, check_pictures, readable_scene


class MaskedPixelSampler(PixelSampler):
    """nerfstudio's, but that it can sample within the mask of one picture too: so it samples pictures of different sizes."""

    def rejection_sample_mask(
        self, mask: Tensor, num_samples: int, num_images: int, *size: Any, **options: Any
    ) -> Tensor:
        # nerfstudio 1.1.5 squeezes a lone picture's axis away, and then wants to index it.
        several = mask.expand(max(2, len(mask)), -1, -1, -1)
        indices = super().rejection_sample_mask(several, num_samples, num_images, *size, **options)
        indices[:, 0] %= num_images
        return indices


@dataclass
class OVS3DDataManagerConfig(VanillaDataManagerConfig):
    """Rays as nerfstudio draws them, and the teachers and windows of the semantic losses."""

    _target: type = field(default_factory=lambda: OVS3DDataManager)
    pixel_sampler: PixelSamplerConfig = field(default_factory=lambda: PixelSamplerConfig(_target=MaskedPixelSampler))
    """How rays are drawn from the photos; never where a mask ignores them."""
    scales: tuple[float, ...] = (5.0, 7.0, 10.0)
    """Patches along the shorter side of a picture, one number a scale of the CLIP pyramid (3D-OVS: 5, 7, 10)."""
    clip_features: ClipFeatures = "patches"
    """What a patch's embedding is: `patches`, that of its crop (3D-OVS); `dense`, the mean inside it of features that one
    pass over the picture gives, which takes a hundredth of the time (encoders open_clip with a ViT, and offline)."""
    feature_cache_dir: Path | None = None
    """Folder of the feature cache; default: .ovs3d-cache in the data folder."""
    num_windows: int = 8
    """Windows drawn a step for FDA (3D-OVS: 8)."""
    window_size: int = 32
    """Side of a window in tokens (3D-OVS: 32)."""
    rays_a_token: int = 1
    """Rays along the side of a token of a window: more see a patch's average with less noise (3D-OVS: 1)."""


class OVS3DDataManager(VanillaDataManager[OVS3DDataset]):
    """A VanillaDataManager that can also say what the cached features teach about its rays.

    Pixels that a view's mask (`mask_path`) ignores are no rays, and teach nothing in the semantic losses.

    Nothing is extracted before `extract_features` is called: a viewer or a render never needs features, nor photos.
    """

    config: OVS3DDataManagerConfig
    teachers: Teachers | None = None
    _kept: dict | None = None
    _places: Mapping[int, int] = MappingProxyType({})

    def __init__(self, config: OVS3DDataManagerConfig, *args: Any, test_mode: str = "val", **kwargs: Any):
        """Data that cannot be used ends the command with a sentence, here because ns-render builds no pipeline for it."""
        parser = config.dataparser
        with user_errors(), readable_scene(parser, Path(config.data or parser.data)):
            try:
                super().__init__(config, *args, test_mode=test_mode, **kwargs)  # type: ignore[arg-type]
            except FileNotFoundError:
                if test_mode == "val" or getattr(parser, "downscale_factor", 1) is not None:
                    raise
                # nerfstudio's parser looks at the first photo to choose a size, which matters only to whoever reads photos.
                parser.downscale_factor = 1  # type: ignore[attr-defined]
                super().__init__(config, *args, test_mode=test_mode, **kwargs)  # type: ignore[arg-type]
        if isinstance(self.train_dataset, LenientDataset) and (missing := self.train_dataset.missing()):
            CONSOLE.print(
                f"{len(missing)} of {len(self.train_dataset)} training photos are not there; they are shown grey."
            )

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
        check_cameras(self.train_dataparser_outputs.cameras, str(self.config.data))
        dataset = self._checked(super().create_train_dataset())
        if self.test_mode == "val":
            for path, header in dataset.headers.items():
                check_size(path, header.height, header.width, self.config.scales)
        # nerfstudio's way from the data to a model.
        dataset.metadata["capture"] = capture_of(dataset.cameras.camera_to_worlds)
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

    def extract_features(self, image_text_encoder: ImageTextEncoder, token_encoder: TokenEncoder) -> CachedViews:
        """The features of the training views, from the cache or made now."""
        data = self.config.data or self.train_dataset.image_filenames[0].parent
        return extract(
            self.train_dataset.image_filenames,
            image_text_encoder,
            token_encoder,
            self.config.scales,
            self.config.feature_cache_dir or default_cache_dir(Path(data)),
            CONSOLE,
            self.config.clip_features,
        )

    def teach(self, views: CachedViews, basis: Basis) -> Teachers:
        """Hold the features of `views` as coefficients of `basis` for the steps to come."""
        files = self.train_dataparser_outputs.mask_filenames
        masks = (get_image_mask_tensor_from_path(file)[..., 0] for file in files) if files else None
        self.teachers = Teachers(views, basis, self.device, masks)
        cameras = self.train_dataset.cameras
        self._sizes = torch.cat([cameras.height, cameras.width], -1).cpu()
        return self.teachers

    def next_teachers(self, batch: dict) -> tuple[Float[Tensor, "R S K"], Float[Tensor, "R S 2 C"]]:
        """What the pyramid says of the rays of `batch`, one cell a scale, and the ranges of their views' similarities."""
        assert self.teachers is not None, "teach() comes first"
        indices = batch["indices"].cpu()
        y, x = ((indices[:, 1:] + 0.5) / self._sizes[indices[:, 0]]).unbind(-1)
        return self.teachers.at(indices[:, 0], y, x), self.teachers.ranges[
            indices[:, 0].to(self.device, non_blocking=True)
        ]

    def next_windows(self, colors: bool = False) -> tuple[RayBundle, Windows] | None:
        """Windows for FDA and the patch loss with their rays, or None when no window is asked for. With `colors`, the photos'
        colours at their rays too; then they lie in photos that nerfstudio keeps in memory, if it does keep some."""
        assert self.teachers is not None, "teach() comes first"
        config = self.config
        if config.num_windows == 0:
            return None
        kept = self.train_image_dataloader.cached_collated_batch if colors else None
        places = self._places_of(kept)
        windows = self.teachers.windows(
            config.num_windows, config.window_size, self._sizes, None, config.rays_a_token, sorted(places) or None
        )
        if colors:
            colored = []
            assert windows.pixels is not None, "they are drawn on the CPU"
            for rays in windows.pixels.split(windows.side**2):
                view = int(rays[0, 0])
                photo = kept["image"][places[view]] if kept else self.train_dataset.get_image_float32(view)
                colored.append(photo[rays[:, 1], rays[:, 2], :3])
            windows.colors = torch.stack(colored).to(self.device, non_blocking=True)
        return self.train_ray_generator(windows.indices), windows

    def _places_of(self, kept: dict | None) -> Mapping[int, int]:
        """Which of the photos in memory is which view's; looked up anew only when nerfstudio has changed them, as a GPU would
        have to be waited for."""
        if kept is not self._kept:
            self._kept = kept
            self._places = {} if kept is None else {v: place for place, v in enumerate(kept["image_idx"].tolist())}
        return self._places
