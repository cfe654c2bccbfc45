"""Gaussians projected into views and sorted into tiles: what does not depend on their colours, computed once.

Projection, sorting and compositing are gsplat's own kernels on CUDA. Elsewhere gsplat's plain torch functions project, and
`binning` and `compositing` do the rest on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ovs3d_nerfstudio.compiled import untraced
from ovs3d_nerfstudio.gaussians import cuda_tiles
from ovs3d_nerfstudio.gaussians.binning import TILE, Bins, bin_gaussians, may_be_seen
from ovs3d_nerfstudio.gaussians.compositing import composite
from ovs3d_nerfstudio.gaussians.cuda_tiles import CudaBins, bin_on_cuda, composite_on_cuda, project_on_cuda

__all__ = ["CameraModel", "Plan", "Window", "plan_views"]

CameraModel = Literal["pinhole", "ortho", "fisheye"]
Window = tuple[int, int, int, int]
"""Left, top, width and height of a part of a picture, in pixels."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything about views of Gaussians that does not depend on their colours, to composite any values with.

    Make it once for Gaussians and cameras that stand still and composite what changes. Gradients reach the geometry
    if the plan was made with gradients on; made of detached tensors or under `torch.no_grad()`, only the values get
    gradients, at half the cost.

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
        visible = _rows(values, self.gaussians) if values.dim() == 2 else values[self.cameras, self.gaussians]
        return self.composite_visible(visible, backgrounds, absgrad)

    @untraced()  # the first call compiles
    def composite_visible(
        self, values: Float[Tensor, "m x"], backgrounds: Float[Tensor, "c x"] | None = None, absgrad: bool = False
    ) -> tuple[Float[Tensor, "c h w x"], Float[Tensor, "c h w 1"]]:
        """The same, of values of the visible Gaussians alone, in the order of `gaussians`."""
        geometry = (self.means2d, self.conics, self.opacities)
        if isinstance(self.bins, Bins):
            return composite(*geometry, values, backgrounds, self.bins, absgrad)
        return composite_on_cuda(*geometry, values, backgrounds, self.bins, absgrad)

    def gather(self, pictures: Float[Tensor, "c h w x"]) -> Float[Tensor, "m x"]:
        """Sums over pixels, each times the weight that the Gaussian has there, for the visible Gaussians.

        It is the transpose of `composite_visible`: what it gives for a picture of ones is how much each Gaussian
        is seen, and divided by that, what it gives for features is their average over what shows the Gaussian.
        """
        values = pictures.new_zeros(len(self.gaussians), pictures.shape[-1], requires_grad=True)
        frozen = replace(self, **{name: getattr(self, name).detach() for name in ("means2d", "conics", "opacities")})
        with torch.enable_grad():
            composited, _ = frozen.composite_visible(values)
        return torch.autograd.grad(composited, values, pictures)[0]

    def visible(self, rows: Float[Tensor, "*rows x"]) -> Float[Tensor, "m x"]:
        """What belongs to the visible Gaussians, of something that has the plan's rows."""
        if self.gaussian_ids is None:
            return rows[self.cameras, self.gaussians]
        return rows if isinstance(self.bins, CudaBins) else _rows(rows, torch.from_numpy(self.bins.flat))


@untraced()
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
    windows: Sequence[Window] | None = None,
) -> Plan:
    """Projects Gaussians into cameras and sorts them into tiles; arguments as of `rasterization`, and:

    Args:
        windows: The part of each camera's picture to composite, all of one size; `width` and `height` are those of the
            whole. The work is in proportion to the Gaussians that meet them. A window's pixels are the picture's, up to
            where gsplat cuts Gaussians off at whole tiles; exactly if its left and top are multiples of 16.

    Raises:
        ValueError: tile_size is not 16; windows of several sizes; or rows that are not packed, on CUDA.
    """
    if tile_size != TILE:
        raise ValueError(f"tile_size must be {TILE}, not {tile_size}.")
    if cuda_tiles.kernels_on(means.device) and not packed:
        raise ValueError("packed must be True on CUDA for a plan; call rasterization for rows of all Gaussians.")
    windows = windows or [(0, 0, width, height)] * len(viewmats)
    size = windows[0][2:] if windows else (width, height)
    if any(window[2:] != size for window in windows):
        raise ValueError(f"windows must have one size, not {sorted({window[2:] for window in windows})}.")
    options = _Options(width, height, near_plane, far_plane, radius_clip, eps2d, rasterize_mode, camera_model)
    cameras = range(len(viewmats))
    if covars is None and (quats is None or scales is None):
        raise ValueError("Gaussians need quats and scales, or covars.")
    gaussians = _Gaussians(means, quats, scales, covars, opacities)
    if cuda_tiles.kernels_on(means.device):
        return _plan_on_cuda(gaussians, viewmats, Ks, windows, options)
    views = [_view(gaussians, viewmats[i : i + 1], Ks[i : i + 1], windows[i], options) for i in cameras]
    camera_ids, gaussian_ids = None, None
    if packed:
        views = [_View(*(_rows(column, view.radii.nonzero()[:, 0]) for column in view)) for view in views]
        gaussian_ids = torch.cat([view.ids for view in views])
        camera_ids = torch.cat([torch.full_like(view.ids, i) for i, view in zip(cameras, views, strict=True)])
        _, radii, means2d, depths, conics, opacity = (torch.cat(columns) for columns in zip(*views, strict=True))
    else:
        spread = [_View(*(_spread(column, view.ids, len(means)) for column in view)) for view in views]
        _, radii, means2d, depths, conics, opacity = (torch.stack(columns) for columns in zip(*spread, strict=True))
    geometry = (means2d.view(-1, 2), conics.view(-1, 3), opacity.view(-1), radii.view(-1), depths.view(-1))
    bins = bin_gaussians(*geometry, camera_ids, len(views), *size)
    flat = torch.from_numpy(bins.flat).to(means.device)
    seen = gaussian_ids[flat] if gaussian_ids is not None else flat % max(len(means), 1)
    seen_by = camera_ids[flat] if camera_ids is not None else flat // max(len(means), 1)
    return Plan(radii, means2d, depths, conics, opacity, camera_ids, gaussian_ids, bins, seen, seen_by)


class _Gaussians(NamedTuple):
    """What is projected: shapes are `quats` and `scales`, or `covars` instead."""

    means: Float[Tensor, "n 3"]
    quats: Float[Tensor, "n 4"] | None
    scales: Float[Tensor, "n 3"] | None
    covars: Float[Tensor, "n 3 3"] | None
    opacities: Float[Tensor, " n"]


class _Options(NamedTuple):
    width: int
    height: int
    near_plane: float
    far_plane: float
    radius_clip: float
    eps2d: float
    rasterize_mode: str
    camera_model: CameraModel


class _View(NamedTuple):
    """The Gaussians that one camera may see: `ids` says which."""

    ids: Int[Tensor, " m"]
    radii: Int[Tensor, " m"]
    means2d: Float[Tensor, "m 2"]
    depths: Float[Tensor, " m"]
    conics: Float[Tensor, "m 3"]
    opacities: Float[Tensor, " m"]


def _view(
    gaussians: _Gaussians,
    viewmat: Float[Tensor, "1 4 4"],
    K: Float[Tensor, "1 3 3"],
    window: Window,
    options: _Options,
) -> _View:
    """Projects those Gaussians that may be seen: one in the plane of the camera would make gradients infinite."""
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    means, quats, scales, covars, opacities = gaussians
    width, height, near, far, clip, eps2d, mode, model = options
    view = viewmat[0].detach()
    if model == "pinhole":
        if covars is not None:
            sizes = covars.detach().diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
        else:
            assert scales is not None, "looked at by `plan_views`"
            sizes = scales.detach().abs().amax(-1)
        ids = may_be_seen(means, sizes, view, K[0], width, height, window, near, far, eps2d)
    else:
        distance = means.detach() @ view[2, :3] + view[2, 3]
        ids = ((distance > near) & (distance < far)).nonzero()[:, 0]
    if covars is not None:
        shapes = _rows(covars, ids)
    else:
        assert quats is not None and scales is not None, "looked at by `plan_views`"
        shapes = _quat_scale_to_covar_preci(_rows(quats, ids), _rows(scales, ids), True, False)[0]
    limits = (width, height, eps2d, near, far, mode == "antialiased", model)
    projected = _fully_fused_projection(_rows(means, ids), shapes, viewmat, K, *limits)
    radii, means2d, depths, conics = (part[0] for part in projected[:4])
    factors = projected[4]
    means2d = means2d - means2d.new_tensor(window[:2])
    radii = torch.where(_meets(means2d, radii, *window[2:]) & (radii > clip), radii, 0)
    opacity = _rows(opacities, ids) if factors is None else _rows(opacities, ids) * factors[0]
    return _View(ids, radii, means2d, depths, conics, opacity)


def _plan_on_cuda(
    gaussians: _Gaussians,
    viewmats: Float[Tensor, "c 4 4"],
    Ks: Float[Tensor, "c 3 3"],
    windows: Sequence[Window],
    options: _Options,
) -> Plan:
    """All cameras at once: what a GPU's host does for each costs more than the GPU's own work."""
    width, height, near, far, clip, eps2d, mode, model = options
    columns = project_on_cuda(
        *gaussians,
        viewmats,
        Ks,
        width,
        height,
        mode == "antialiased",
        model,
        eps2d=eps2d,
        near_plane=near,
        far_plane=far,
        radius_clip=clip,
    )
    camera_ids, gaussian_ids, radii, means2d, depths, conics, opacity = columns
    across, down = windows[0][2:] if windows else (width, height)
    if any(window != (0, 0, width, height) for window in windows):
        corners = torch.tensor([window[:2] for window in windows], dtype=means2d.dtype)
        means2d = means2d - corners.to(means2d.device, non_blocking=True)[camera_ids]
        kept = _meets(means2d, radii, across, down).nonzero()[:, 0]
        columns = (camera_ids, gaussian_ids, radii, means2d, depths, conics, opacity)
        camera_ids, gaussian_ids, radii, means2d, depths, conics, opacity = (_rows(part, kept) for part in columns)
    bins = bin_on_cuda(means2d, radii, depths, camera_ids, gaussian_ids, len(viewmats), across, down)
    return Plan(radii, means2d, depths, conics, opacity, camera_ids, gaussian_ids, bins, gaussian_ids, camera_ids)


def _meets(means2d: Float[Tensor, "m 2"], radii: Int[Tensor, " m"], across: int, down: int) -> Bool[Tensor, " m"]:
    """Which Gaussians reach into a window of this size."""
    x, y = means2d.detach().unbind(-1)
    return (x + radii > 0) & (x - radii < across) & (y + radii > 0) & (y - radii < down)


def _rows(tensor: Tensor, ids: Int[Tensor, " m"]) -> Tensor:
    """tensor[ids], whose backward pass is several times slower on a CPU."""
    return tensor.index_select(0, ids.to(tensor.device))


def _spread(part: Tensor, ids: Tensor, count: int) -> Tensor:
    """Puts rows to their places among so many rows of zeros."""
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, ids, part)
