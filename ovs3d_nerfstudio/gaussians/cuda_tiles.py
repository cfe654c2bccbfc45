"""The CUDA side of `plan`: gsplat's own kernels project, sort and composite, here called one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import gsplat
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovs3d_nerfstudio.gaussians.binning import TILE

__all__ = ["CudaBins", "bin_on_cuda", "composite_on_cuda", "kernels_on", "project_on_cuda"]

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


def project_on_cuda(
    means: Float[Tensor, "n 3"],
    quats: Float[Tensor, "n 4"] | None,
    scales: Float[Tensor, "n 3"] | None,
    covars: Float[Tensor, "n 3 3"] | None,
    opacities: Float[Tensor, " n"],
    viewmats: Float[Tensor, "c 4 4"],
    Ks: Float[Tensor, "c 3 3"],
    width: int,
    height: int,
    antialiased: bool,
    camera_model: Literal["pinhole", "ortho", "fisheye"],
    **limits: float,
) -> tuple[Tensor, ...]:
    """Projects Gaussians into all cameras at once; arguments as of `rasterization`, of which `limits` are eps2d, near_plane, far_plane
    and radius_clip. Of each pair of a camera and a Gaussian that it may see: both ids, radius, mean, depth, conic and opacity."""
    if covars is not None:
        i, j = torch.triu_indices(3, 3)
        covars, quats, scales = covars[:, i, j], None, None
    *columns, factors = gsplat.fully_fused_projection(
        means,
        covars,
        quats,
        scales,
        viewmats,
        Ks,
        width,
        height,
        packed=True,
        calc_compensations=antialiased,
        camera_model=camera_model,
        **limits,
    )
    opacity = opacities.index_select(0, columns[1])
    return *columns, opacity * factors if antialiased else opacity


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
