"""What the cached features teach about the pixels of the training views, however those are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.data.datamanagers.base_datamanager import DataManager
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from ovs3d_nerfstudio.data.dataset import OVS3DDataset
from ovs3d_nerfstudio.data.run_views import RunViews
from ovs3d_nerfstudio.encoders.base import ImageTextEncoder, TokenEncoder
from ovs3d_nerfstudio.engine.option_checks import COUNT, SIZE, Range
from ovs3d_nerfstudio.features.basis import Basis
from ovs3d_nerfstudio.features.extraction import CachedViews, ClipFeatures, default_cache_dir, extract
from ovs3d_nerfstudio.features.teachers import Teachers, Windows
from ovs3d_nerfstudio.pictures import read_mask


@dataclass
class TeachingConfig:
    """How features are extracted, and the windows of the semantic losses."""

    scales: tuple[float, ...] = (5.0, 7.0, 10.0)
    """Patches along the shorter side of a picture, one number a scale of the CLIP pyramid (3D-OVS: 5, 7, 10)."""
    clip_features: ClipFeatures = "patches"
    """What a patch's embedding is: `patches`, that of its crop (3D-OVS); `dense`, the mean inside it of features that one
    pass over the picture gives, which takes a hundredth of the time (encoders open_clip with a ViT, and offline)."""
    finer: float = 0.0
    """How many times finer than the finest scale patches are cut where the pyramid disagrees, half as many as all of its own;
    0 cuts none (3D-OVS). They teach in windows."""
    feature_cache_dir: Path | None = None
    """Folder of the feature cache; default: .ovs3d-cache in the data folder."""
    num_windows: int = 8
    """Windows drawn a step for FDA (3D-OVS: 8)."""
    window_size: int = 32
    """Side of a window in tokens (3D-OVS: 32)."""
    rays_a_token: int = 1
    """Rays along the side of a token of a window: more see a patch's average with less noise (3D-OVS: 1)."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "num_windows": COUNT,
        "window_size": SIZE,
        "rays_a_token": SIZE,
        "finer": COUNT,
    }
    """What each number may be."""

    run_views: ClassVar[RunViews | None] = None
    """What the checkpoint of an opened run keeps of its data; no option, and no part of a config.yml."""

    def known(self, state: dict[str, Any]) -> None:
        """Takes up what a checkpoint keeps of its run's data, before the data are read; what is wrong with it is said when it is
        loaded."""
        with suppress(KeyError, TypeError, ValueError):
            self.run_views = RunViews.of_plain(state["pipeline"]["datamanager._extra_state"])  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "run_views"}


class Teaching(DataManager):
    """Stands before a datamanager of nerfstudio's in the order of bases, and says what the features teach about its pixels.

    Pixels that a view's mask (`mask_path`) ignores teach nothing. Nothing is extracted before `extract_features` is called: a
    viewer or a render never needs features, nor photos.
    """

    config: Any
    """Of the datamanager, and a TeachingConfig."""
    train_dataset: OVS3DDataset
    train_dataparser_outputs: Any
    device: Any
    teachers: Teachers | None = None

    def extract_features(self, image_text_encoder: ImageTextEncoder, token_encoder: TokenEncoder) -> CachedViews:
        """The features of the training views, from the cache or made now."""
        return extract(
            self.train_dataset.image_filenames,
            image_text_encoder,
            token_encoder,
            self.config.scales,
            self.cache_folder(),
            CONSOLE,
            self.config.clip_features,
            self.config.finer,
        )

    def cache_folder(self) -> Path:
        """Where what is found in the photos is kept. Raises CacheError when the data's own folder for it leads elsewhere."""
        data = self.config.data or self.train_dataset.image_filenames[0].parent
        return self.config.feature_cache_dir or default_cache_dir(Path(data))

    def teach(self, views: CachedViews, basis: Basis) -> Teachers:
        """Hold the features of `views` as coefficients of `basis` for the steps to come."""
        self.teachers = Teachers(views, basis, self.device, self.masks())
        cameras = self.train_dataset.cameras
        self._sizes = torch.cat([cameras.height, cameras.width], -1).cpu()
        return self.teachers

    def masks(self) -> Iterable[Bool[Tensor, "h w"]] | None:
        """Where each training view teaches, true for pixels that count; None where all do."""
        files = self.train_dataparser_outputs.mask_filenames
        return (read_mask(file)[..., 0] for file in files) if files else None

    def teachers_of(self, indices: Int[Tensor, "R 3"]) -> tuple[Float[Tensor, "R S K"], Float[Tensor, "R S 2 C"]]:
        """What the pyramid says of pixels (view, row, column), one cell a scale, and the ranges of their views' similarities."""
        assert self.teachers is not None, "teach() comes first"
        indices = indices.cpu()
        y, x = ((indices[:, 1:] + 0.5) / self._sizes[indices[:, 0]]).unbind(-1)
        views = indices[:, 0].to(self.device, non_blocking=True)
        return self.teachers.at(indices[:, 0], y, x), self.teachers.ranges[views]

    def photos_in_memory(self) -> Mapping[int, Tensor]:
        """The photos that need not be read for a step, H×W×c by their views; in [0, 1], or in bytes."""
        return {}

    def draw_windows(self, colors: bool = False) -> Windows | None:
        """Windows for FDA and the patch loss, or None when no window is asked for. With `colors`, the photos' colours at their
        rays too; then they lie in photos that are in memory, if some are."""
        assert self.teachers is not None, "teach() comes first"
        config = self.config
        if config.num_windows == 0:
            return None
        photos = self.photos_in_memory() if colors else {}
        windows = self.teachers.windows(
            config.num_windows, config.window_size, self._sizes, None, config.rays_a_token, sorted(photos) or None
        )
        if colors:
            colored = []
            assert windows.pixels is not None, "they are drawn on the CPU"
            of_windows = (indices.split(windows.side**2) for indices in (windows.pixels, windows.indices))
            for on_cpu, on_device in zip(*of_windows, strict=True):
                view = int(on_cpu[0, 0])
                photo = photos[view] if photos else self.train_dataset.get_image_float32(view)
                rays = on_cpu if photo.device.type == "cpu" else on_device
                seen = photo[rays[:, 1], rays[:, 2], :3]
                colored.append(seen.float() / 255 if seen.dtype == torch.uint8 else seen)
            windows.colors = torch.stack(colored).to(self.device, non_blocking=True)
        return windows
