"""Gaussians projected into views and sorted into tiles: what does not depend on their colours, computed once.

gsplat's plain torch functions project, on whatever device the tensors are; sorting and compositing are gsplat's own
on CUDA, and those of `binning` and `compositing` on the CPU elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovs3d_nerfstudio.gaussians.binning import TILE, Bins, bin_gaussians, may_be_seen
from ovs3d_nerfstudio.gaussians.compositing import composite
from ovs3d_nerfstudio.gaussians.cuda_tiles import CudaBins, bin_on_cuda, composite_on_cuda

__all__ = ["CameraModel", "Plan", "Window", "plan_views"]

CameraModel = Literal["pinhole", "ortho", "fisheye"]
Window = tuple[int, int, int, int]
"""Left, top, width and height of a part of a picture, in pixels."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything about views of Gaussians that does not depend on their colours, to composite any values with.

    Make it once for Gaussians and cameras that stand still and composite what changes. Gradients reach the geometry if the plan was made with gradients on; made
    of detached tensors or under `torch.no_grad()`, only the values get gradients, several times cheaper.

    Rows: C × N where `gaussian_ids` is None, else one for each pair of a camera and a Gaussian that it may see.
    """

    radii: Int[Tensor, "*rows"]
    """Radius in pixels, 0 where a Gaussian is not seen."""
    means2d: Float[Tensor, "*rows 2"]
    """Pixels of the window; the centre of its first one is (0.5, 0.5)."""
    depths: Float[Tensor, "*rows"]
    conics: Float[Tensor, "*rows 3"]
    """Upper triangle of the inverse 2D covariances, 1/pixel²."""
    opacities: Float[Tensor, "*rows"]
    """With compensations where views are antialiased."""
    camera_ids: Int[Tensor, " rows"] | None
    gaussian_ids: Int[Tensor, " rows"] | None
    bins: Bins | CudaBins
    gaussians: Int[Tensor, " m"]
    """The Gaussian of each visible one, camera by camera and front to back: only these need values."""
    cameras: Int[Tensor, " m"]
    """And its camera."""

    def composite(
        self,
        values: Float[Tensor, "*c n x"],
        backgrounds: Float[Tensor, "c x"] | None = None,
        absgrad: bool = False,
    ) -> tuple[Float[Tensor, "c h w x"], Float[Tensor, "c h w 1"]]:
        """Pictures of values of all Gaussians, [N, X] or [C, N, X], with any number of channels, and alphas."""
        visible = values[self.gaussians] if values.dim() == 2 else values[self.cameras, self.gaussians]
        return self.composite_visible(visible, backgrounds, absgrad)

    def composite_visible(
        self, values: Float[Tensor, "m x"], backgrounds: Float[Tensor, "c x"] | None = None, absgrad: bool = False
    ) -> tuple[Float[Tensor, "c h w x"], Float[Tensor, "c h w 1"]]:
        """The same, of values of the visible Gaussians alone, in the order of `gaussians`."""
        geometry = (self.means2d, self.conics, self.opacities)
        if isinstance(self.bins, Bins):
            return composite(*geometry, values, backgrounds, self.bins, absgrad)
        return composite_on_cuda(*geometry, values, backgrounds, self.bins, absgrad)

    def visible(self, rows: Float[Tensor, "*rows x"]) -> Float[Tensor, "m x"]:
        """What belongs to the visible Gaussians, of something that has the plan's rows."""
        if self.gaussian_ids is None:
            return rows[self.cameras, self.gaussians]
        return rows if isinstance(self.bins, CudaBins) else rows[torch.from_numpy(self.bins.flat).to(rows.device)]


def plan_views(
    means: Float[Tensor, "n 3"],
    quats: Float[Tensor, "n 4"] | None,
    scales: Float[Tensor, "n 3"] | None,
    opacities: Float[Tensor, " n"],
    viewmats: Float[Tensor, "c 4 4"],
    Ks: Float[Tensor, "c 3 3"],
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    packed: bool = True,
    tile_size: int = TILE,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    camera_model: CameraModel = "pinhole",
    covars: Float[Tensor, "n 3 3"] | None = None,
    window: Window | None = None,
) -> Plan:
    """Projects Gaussians into cameras and sorts them into tiles; arguments as of `rasterization`, and:

    Args:
        window: The part of the pictures to composite; `width` and `height` are those of the whole. The work is in
            proportion to the Gaussians that meet it. Its pixels are the picture's, up to where gsplat cuts
            Gaussians off at whole tiles; exactly if its left and top are multiples of 16.

    Raises:
        ValueError: tile_size is not 16; or rows that are not packed, on CUDA.
    """
    left, top, across, down = window or (0, 0, width, height)
    if tile_size != TILE:
        raise ValueError(f"tile_size must be {TILE}, not {tile_size}.")
    if means.device.type == "cuda" and not packed:
        raise ValueError("packed must be True on CUDA for a plan; call rasterization for rows of all Gaussians.")
    views = []
    for camera in range(len(viewmats)):
        view, K = viewmats[camera : camera + 1], Ks[camera : camera + 1]
        if camera_model == "pinhole" and means.device.type != "cuda":
            sizes = scales.detach().abs().amax(-1) if covars is None else _traces(covars).sqrt()
            camera_of_view = (view[0].detach(), K[0].detach(), width, height, (left, top, across, down))
            ids = may_be_seen(means.detach(), sizes, *camera_of_view, near_plane, far_plane, eps2d)
        else:
            distance = means.detach() @ view[0, 2, :3].detach() + view[0, 2, 3].detach()
            ids = ((distance > near_plane) & (distance < far_plane)).nonzero()[:, 0]
        shapes = covars[ids] if covars is not None else _covariances(quats[ids], scales[ids])
        antialiased = rasterize_mode == "antialiased"
        size = (width, height, eps2d, near_plane, far_plane, antialiased, camera_model)
        radii, means2d, depths, conics, compensations = _project(means[ids], shapes, view, K, *size)
        if window is not None:
            means2d = means2d - means2d.new_tensor([left, top])
            size_of = means2d.new_tensor([across, down])
            inside = (means2d + radii[:, None] > 0) & (means2d - radii[:, None] < size_of)
            radii = torch.where(inside.all(-1), radii, 0)
        radii = torch.where(radii > radius_clip, radii, 0)
        opacity = opacities[ids] if compensations is None else opacities[ids] * compensations
        views.append((ids, radii, means2d, depths, conics, opacity))
    ids, *parts = zip(*views, strict=True)
    camera_ids, gaussian_ids = None, None
    if packed:
        seen = [radii > 0 for radii in parts[0]]
        parts = [torch.cat([part[keep] for part, keep in zip(column, seen, strict=True)]) for column in parts]
        gaussian_ids = torch.cat([chosen[keep] for chosen, keep in zip(ids, seen, strict=True)])
        counts = torch.stack([keep.sum() for keep in seen])
        camera_ids = torch.repeat_interleave(torch.arange(len(viewmats), device=means.device), counts)
    else:
        parts = [
            torch.stack([_spread(part, chosen, len(means)) for part, chosen in zip(column, ids, strict=True)])
            for column in parts
        ]
    radii, means2d, depths, conics, opacity = parts
    if means.device.type == "cuda":
        size_and_cameras = (camera_ids, gaussian_ids, len(viewmats), across, down)
        bins: Bins | CudaBins = bin_on_cuda(means2d, radii, depths, *size_and_cameras)
        flat = torch.arange(len(radii), device=means.device)
    else:
        rows = radii.dim()
        geometry = (means2d.flatten(0, rows - 1), conics.flatten(0, rows - 1), opacity.flatten())
        bins = bin_gaussians(*geometry, radii.flatten(), depths.flatten(), camera_ids, len(viewmats), across, down)
        flat = torch.from_numpy(bins.flat).to(means.device)
    gaussians = gaussian_ids[flat] if gaussian_ids is not None else flat % max(len(means), 1)
    cameras = camera_ids[flat] if camera_ids is not None else flat // max(len(means), 1)
    return Plan(radii, means2d, depths, conics, opacity, camera_ids, gaussian_ids, bins, gaussians, cameras)


def _traces(covars: Float[Tensor, "n 3 3"]) -> Float[Tensor, " n"]:
    return covars.detach().diagonal(dim1=-2, dim2=-1).sum(-1)


def _covariances(quats: Float[Tensor, "m 4"], scales: Float[Tensor, "m 3"]) -> Float[Tensor, "m 3 3"]:
    from gsplat.cuda._torch_impl import _quat_scale_to_covar_preci

    return _quat_scale_to_covar_preci(quats, scales, True, False)[0]


def _project(means: Tensor, shapes: Tensor, view: Tensor, K: Tensor, *options: Any) -> list[Tensor | None]:
    """gsplat's projection into one camera: radii, means2d, depths, conics, compensations, each [M, ...]."""
    from gsplat.cuda._torch_impl import _fully_fused_projection

    return [out[0] if out is not None else None for out in _fully_fused_projection(means, shapes, view, K, *options)]


def _spread(part: Tensor, ids: Tensor, count: int) -> Tensor:
    """Puts rows to their places among so many rows of zeros."""
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, ids, part)
