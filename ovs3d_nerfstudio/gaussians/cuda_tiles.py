"""The CUDA side of `plan`: gsplat's own kernels sort and composite, here called one by one."""

from __future__ import annotations

from dataclasses import dataclass

import gsplat
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovs3d_nerfstudio.gaussians.binning import TILE

__all__ = ["CudaBins", "bin_on_cuda", "composite_on_cuda", "kernels_on"]

# gsplat's kernels keep the channels of a tile in shared memory; its own rasterization cuts at 32, too.
_CHANNELS_AT_ONCE = 32


def kernels_on(device: torch.device) -> bool:
    """Whether gsplat's kernels run on a device."""
    return device.type == "cuda"


@dataclass(frozen=True, eq=False)
class CudaBins:
    """Which of the packed rows meet which tile, as gsplat's kernels want it."""

    offsets: Int[Tensor, "c rows columns"]
    flatten_ids: Int[Tensor, " i"]
    width: int
    height: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along a row and rows of tiles."""
        return -(-self.width // TILE), -(-self.height // TILE)


def bin_on_cuda(
    means2d: Float[Tensor, "rows 2"],
    radii: Int[Tensor, " rows"],
    depths: Float[Tensor, " rows"],
    camera_ids: Int[Tensor, " rows"],
    gaussian_ids: Int[Tensor, " rows"],
    cameras: int,
    width: int,
    height: int,
) -> CudaBins:
    """Sorts packed Gaussians by depth and into tiles."""
    columns, rows = -(-width // TILE), -(-height // TILE)
    ids = {"packed": True, "n_cameras": cameras, "camera_ids": camera_ids, "gaussian_ids": gaussian_ids}
    _, pairs, flatten_ids = gsplat.isect_tiles(means2d, radii, depths, TILE, columns, rows, **ids)
    return CudaBins(gsplat.isect_offset_encode(pairs, cameras, columns, rows), flatten_ids, width, height)


def composite_on_cuda(
    means2d: Float[Tensor, "rows 2"],
    conics: Float[Tensor, "rows 3"],
    opacities: Float[Tensor, " rows"],
    values: Float[Tensor, "rows x"],
    backgrounds: Float[Tensor, "c x"] | None,
    bins: CudaBins,
    absgrad: bool,
) -> tuple[Float[Tensor, "c h w x"], Float[Tensor, "c h w 1"]]:
    """Pictures and alphas, some channels at a time; values in the order of the rows."""
    pictures, alphas = [], []
    for start in range(0, values.shape[-1], _CHANNELS_AT_ONCE):
        part = slice(start, start + _CHANNELS_AT_ONCE)
        picture, alpha = gsplat.rasterize_to_pixels(
            means2d,
            conics,
            values[:, part],
            opacities,
            bins.width,
            bins.height,
            TILE,
            bins.offsets,
            bins.flatten_ids,
            backgrounds=backgrounds[:, part] if backgrounds is not None else None,
            packed=True,
            absgrad=absgrad,
        )
        pictures.append(picture)
        alphas.append(alpha)
    return torch.cat(pictures, -1), alphas[0]
