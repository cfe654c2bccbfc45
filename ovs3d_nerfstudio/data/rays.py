"""The datamanager of the NeRF: rays as nerfstudio draws them, and what the features teach about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from ovs3d_nerfstudio.data.checked import CheckedData
from ovs3d_nerfstudio.data.dataset import OVS3DDataset
from ovs3d_nerfstudio.data.sightings import Sightings, find_sightings
from ovs3d_nerfstudio.data.teaching import Teaching, TeachingConfig
from ovs3d_nerfstudio.engine.option_checks import COUNT, SIZE, Range
from ovs3d_nerfstudio.features.teachers import Windows


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
class OVS3DDataManagerConfig(TeachingConfig, VanillaDataManagerConfig):
    """Rays as nerfstudio draws them, and the teachers and windows of the semantic losses."""

    _target: type = field(default_factory=lambda: OVS3DDataManager)
    pixel_sampler: PixelSamplerConfig = field(default_factory=lambda: PixelSamplerConfig(_target=MaskedPixelSampler))
    """How rays are drawn from the photos; never where a mask ignores them."""

    depth_rays: int = 1024
    """How many of a step's rays, at most half of them, go to points that were found in the photos, for the depth loss; 0 finds
    none."""
    depth_steps: int = 2000
    """First steps, over which the depth and the opacity loss fade away: geometry begins where things are, and goes on by the
    photos alone."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        **TeachingConfig.RANGES,
        "depth_rays": COUNT,
        "depth_steps": COUNT,
        "train_num_rays_per_batch": SIZE,
        "eval_num_rays_per_batch": SIZE,
        "camera_res_scale_factor": Range(0, 1, closed=False),
    }


class OVS3DDataManager(CheckedData, Teaching, VanillaDataManager[OVS3DDataset]):
    """A VanillaDataManager that can also say what the cached features teach about its rays.

    Pixels that a view's mask (`mask_path`) ignores are no rays.
    """

    config: OVS3DDataManagerConfig
    _kept: dict | None = None
    _photos: Mapping[int, Tensor] | None = None

    def next_step(
        self, step: int, semantics: bool, windows: bool, colors: bool
    ) -> tuple[RayBundle, RayBundle | None, dict]:
        """What a step trains on: rays, the rays of windows where there are some, and a batch to learn from.

        The batch has the entries of `_drawn`; with `semantics` also `teachers` and `ranges` of the rays (see `teachers_of`),
        and with `windows` their `windows`, colours included where `colors` asks for them.
        """
        rays, batch = self._drawn(step)
        batch["image"] = batch["image"].to(self.device, non_blocking=True)
        if not semantics:
            return rays, None, batch
        batch["teachers"], batch["ranges"] = self.teachers_of(batch["indices"])
        drawn = self.next_windows(colors) if windows else None
        if drawn is None:
            return rays, None, batch
        window_rays, batch["windows"] = drawn
        return rays, window_rays, batch

    def _drawn(self, step: int) -> tuple[RayBundle, dict]:
        """As `next_train`, which exports ask too. In the first steps the batch has, as `start_share`, what is left of the losses of
        the start by then; and the last rays are of `sightings`, with their `distances`."""
        self.train_count += 1
        assert self.train_pixel_sampler is not None, "set up with the training data"
        batch = self.train_pixel_sampler.sample(next(self.iter_train_image_dataloader))
        config, drawn = self.config, len(batch["indices"])
        if step >= config.depth_steps:
            return self.train_ray_generator(batch["indices"]), batch
        batch["start_share"] = 1 - step / config.depth_steps
        count = min(config.depth_rays, drawn // 2)
        if count and self.sightings is not None:
            seen, image = self.sightings.draw(count), batch["image"]
            # Points are seen where a photo with transparency is opaque.
            colors = F.pad(seen.colors, (0, image.shape[-1] - 3), value=1.0)
            batch["image"], batch["indices"] = ending(image, colors), ending(batch["indices"], seen.pixels)
            batch["distances"] = seen.distances
        return self.train_ray_generator(batch["indices"]), batch

    def next_windows(self, colors: bool = False) -> tuple[RayBundle, Windows] | None:
        """Windows (see `draw_windows`) with their rays, or None when no window is asked for."""
        windows = self.draw_windows(colors)
        return None if windows is None else (self.train_ray_generator(windows.indices), windows)

    def cameras_in_use(self) -> Iterator[Cameras]:
        """Those of the datasets, and what nerfstudio made of them when it was set up."""
        yield from super().cameras_in_use()
        made = ("train_ray_generator", "eval_ray_generator", "fixed_indices_eval_dataloader", "eval_dataloader")
        yield from (getattr(self, name).cameras for name in made if hasattr(self, name))

    @cached_property
    def sightings(self) -> Sightings | None:
        """Those of the training photos, found when first asked for; None where the photos show too little."""
        dataset, masks = self.train_dataset, self.train_dataparser_outputs.mask_filenames
        photos, cameras = dataset.image_filenames, dataset.cameras
        return find_sightings(photos, masks, cameras, self.cache_folder(), CONSOLE, self.device)

    def photos_in_memory(self) -> Mapping[int, Float[Tensor, "H W c"]]:
        """Those that nerfstudio draws rays from; looked up anew only when it has changed them, as a GPU would have to be waited
        for."""
        kept = self.train_image_dataloader.cached_collated_batch
        if self._photos is None or kept is not self._kept:
            self._kept = kept
            views = [] if kept is None else kept["image_idx"].tolist()
            self._photos = {view: kept["image"][place] for place, view in enumerate(views)}  # type: ignore[index]
        return self._photos


def ending(rows: Tensor, last: Tensor) -> Tensor:
    """As many rows, of which the last are others."""
    return torch.cat([rows[: -len(last)], last.to(rows.device, non_blocking=True)])
