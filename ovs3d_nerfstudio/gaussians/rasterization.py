"""gsplat's `rasterization`, on any device: gsplat's own on CUDA, compiled loops on the CPU elsewhere.

gsplat composites on CUDA only. Here its plain torch functions project the Gaussians and evaluate the spherical
harmonics, on whatever device the tensors are, and `binning` and `compositing` do the rest on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovs3d_nerfstudio.gaussians.binning import TILE, Bins, bin_gaussians, may_be_seen
from ovs3d_nerfstudio.gaussians.compositing import composite

__all__ = ["Plan", "plan_views", "rasterization"]

RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]
CameraModel = Literal["pinhole", "ortho", "fisheye"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything about views of Gaussians that does not depend on their colours, to composite any values with.

    Make it once for Gaussians and cameras that stand still and composite what changes; a window of a picture is a
    camera with another principal point. Gradients reach the geometry if the plan was made with gradients on; made
    of detached tensors or under `torch.no_grad()`, only the values get gradients, several times cheaper.

    Rows: C × N where `gaussian_ids` is None, else one for each pair of a camera and a Gaussian that it may see.
    """

    radii: Int[Tensor, "*rows"]
    """Radius in pixels, 0 where a Gaussian is not seen."""
    means2d: Float[Tensor, "*rows 2"]
    """Pixels; the centre of the first one is (0.5, 0.5)."""
    depths: Float[Tensor, "*rows"]
    conics: Float[Tensor, "*rows 3"]
    """Upper triangle of the inverse 2D covariances, 1/pixel²."""
    opacities: Float[Tensor, "*rows"]
    """With compensations where views are antialiased."""
    camera_ids: Int[Tensor, " rows"] | None
    gaussian_ids: Int[Tensor, " rows"] | None
    bins: Bins
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
        return composite(self.means2d, self.conics, self.opacities, values, backgrounds, self.bins, absgrad)

    def visible(self, rows: Float[Tensor, "*rows x"]) -> Float[Tensor, "m x"]:
        """What belongs to the visible Gaussians, of something that has the plan's rows."""
        return rows.flatten(0, self.radii.dim() - 1)[torch.from_numpy(self.bins.flat).to(rows.device)]


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
) -> Plan:
    """Projects Gaussians into cameras and sorts them into tiles; arguments as of `rasterization`.

    Raises:
        ValueError: tile_size is not 16.
    """
    if tile_size != TILE:
        raise ValueError(f"tile_size must be {TILE} where there is no CUDA, not {tile_size}.")
    views = []
    for camera in range(len(viewmats)):
        view, K = viewmats[camera : camera + 1], Ks[camera : camera + 1]
        if camera_model == "pinhole":
            sizes = scales.detach().abs().amax(-1) if covars is None else _traces(covars).sqrt()
            planes = (near_plane, far_plane, eps2d)
            ids = may_be_seen(means.detach(), sizes, view[0].detach(), K[0].detach(), width, height, *planes)
        else:
            ids = torch.arange(len(means), device=means.device)
        shapes = covars[ids] if covars is not None else _covariances(quats[ids], scales[ids])
        antialiased = rasterize_mode == "antialiased"
        size = (width, height, eps2d, near_plane, far_plane, antialiased, camera_model)
        radii, means2d, depths, conics, compensations = _project(means[ids], shapes, view, K, *size)
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
    rows = radii.dim()
    bins = bin_gaussians(
        means2d.flatten(0, rows - 1),
        conics.flatten(0, rows - 1),
        opacity.flatten(),
        radii.flatten(),
        depths.flatten(),
        camera_ids,
        len(viewmats),
        width,
        height,
    )
    flat = torch.from_numpy(bins.flat).to(means.device)
    gaussians = gaussian_ids[flat] if gaussian_ids is not None else flat % max(len(means), 1)
    cameras = camera_ids[flat] if camera_ids is not None else flat // max(len(means), 1)
    return Plan(radii, means2d, depths, conics, opacity, camera_ids, gaussian_ids, bins, gaussians, cameras)


def rasterization(
    means: Float[Tensor, "n 3"],
    quats: Float[Tensor, "n 4"],
    scales: Float[Tensor, "n 3"],
    opacities: Float[Tensor, " n"],
    colors: Float[Tensor, "..."],
    viewmats: Float[Tensor, "c 4 4"],
    Ks: Float[Tensor, "c 3 3"],
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int = TILE,
    backgrounds: Float[Tensor, "c x"] | None = None,
    render_mode: RenderMode = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: CameraModel = "pinhole",
    covars: Float[Tensor, "n 3 3"] | None = None,
) -> tuple[Float[Tensor, "c h w x"], Float[Tensor, "c h w 1"], dict[str, Any]]:
    """Pictures of 3D Gaussians (Kerbl et al. 2023), with gradients: gsplat 1.4's function, argument by argument.

    On CUDA it *is* gsplat's. Elsewhere `means`, `quats`, `scales`, `opacities`, `colors`, `viewmats` and
    `backgrounds` get gradients too, in the precision of `means`; a float64 scene is computed in float64. The work of
    a window is in proportion to the Gaussians that meet it.

    Args:
        means: Centres.
        quats: Rotations (w, x, y, z), of any length.
        scales: Standard deviations along the axes.
        opacities: In [0, 1].
        colors: [N, X] or [C, N, X], any number of channels; with sh_degree, coefficients [N, K, 3] or [C, N, K, 3].
        viewmats: World to camera (x right, y down, z forward).
        Ks: Intrinsics in pixels. A window of a picture has its corner subtracted from cx and cy.
        width: Pixels.
        height: Pixels.
        near_plane: Gaussians nearer than this are left out.
        far_plane: Gaussians farther than this are left out.
        radius_clip: Gaussians whose radius is at most so many pixels are left out.
        eps2d: Added to the variances in the picture, pixel².
        sh_degree: Degree of the spherical harmonics to evaluate, None for plain colours.
        packed: The rows of `meta` are the visible Gaussians alone, instead of all [C, N].
        tile_size: Only 16 where there is no CUDA.
        backgrounds: What is seen through the Gaussians, black if None.
        render_mode: Colours, accumulated depth (D), expected depth (ED: divided by alpha), or colours and one of them.
        sparse_grad: Only on CUDA.
        absgrad: The backward pass sets `meta["means2d"].absgrad` (Ye et al. 2024, "AbsGS").
        rasterize_mode: "antialiased" compensates opacities for `eps2d` (Yu et al. 2024, "Mip-Splatting").
        channel_chunk: Only matters on CUDA; here all channels are composited at once.
        distributed: Only on CUDA.
        camera_model: As gsplat's.
        covars: Covariances, instead of `quats` and `scales`.

    Returns:
        Pictures, alphas, and `meta`: camera_ids and gaussian_ids (None where not packed), radii, means2d, depths,
        conics, opacities, width, height, n_cameras, tile_size, tile_width, tile_height. Gaussians that are not seen
        have a radius of 0. Elsewhere than on CUDA there are no lists of intersections, but `plan`.

    Raises:
        ValueError: an option that only works on CUDA, or a shape that does not fit.
    """
    if means.device.type == "cuda":
        from gsplat import rasterization as on_cuda

        return on_cuda(
            means,
            quats,
            scales,
            opacities,
            colors,
            viewmats,
            Ks,
            width,
            height,
            near_plane=near_plane,
            far_plane=far_plane,
            radius_clip=radius_clip,
            eps2d=eps2d,
            sh_degree=sh_degree,
            packed=packed,
            tile_size=tile_size,
            backgrounds=backgrounds,
            render_mode=render_mode,
            sparse_grad=sparse_grad,
            absgrad=absgrad,
            rasterize_mode=rasterize_mode,
            channel_chunk=channel_chunk,
            distributed=distributed,
            camera_model=camera_model,
            covars=covars,
        )
    for option, value in (("sparse_grad", sparse_grad), ("distributed", distributed)):
        if value:
            raise ValueError(f"{option}=True needs CUDA tensors; leave it False on {means.device.type}.")
    if render_mode not in ("RGB", "D", "ED", "RGB+D", "RGB+ED"):
        raise ValueError(f'render_mode must be "RGB", "D", "ED", "RGB+D" or "RGB+ED", not {render_mode!r}.')
    _check_colors(colors, sh_degree, len(viewmats), len(means))
    views = (viewmats, Ks, width, height, near_plane, far_plane, radius_clip, eps2d)
    options = (packed, tile_size, rasterize_mode, camera_model, covars)
    plan = plan_views(means, quats, scales, opacities, *views, *options)
    values = []
    if "RGB" in render_mode:
        per_camera = colors.dim() == (3 if sh_degree is None else 4)
        visible = colors[plan.cameras, plan.gaussians] if per_camera else colors[plan.gaussians]
        if sh_degree is not None:
            centres = torch.inverse(viewmats)[:, :3, 3]
            visible = _harmonics(sh_degree, means[plan.gaussians] - centres[plan.cameras], visible)
        values.append(visible)
    elif backgrounds is not None:
        backgrounds = backgrounds[:, :0]
    if render_mode != "RGB":
        values.append(plan.visible(plan.depths[..., None]))
        if backgrounds is not None:
            backgrounds = torch.cat([backgrounds, backgrounds.new_zeros(len(backgrounds), 1)], -1)
    pictures, alphas = plan.composite_visible(torch.cat(values, -1), backgrounds, absgrad)
    if render_mode in ("ED", "RGB+ED"):
        expected = pictures[..., -1:] / alphas.clamp(min=1e-10)
        pictures = torch.cat([pictures[..., :-1], expected], -1)
    columns, rows = plan.bins.tiles
    meta = {name: getattr(plan, name) for name in ("camera_ids", "gaussian_ids", "radii", "means2d", "depths")}
    meta |= {"conics": plan.conics, "opacities": plan.opacities, "width": width, "height": height, "plan": plan}
    meta |= {"n_cameras": len(viewmats), "tile_size": tile_size, "tile_width": columns, "tile_height": rows}
    return pictures, alphas, meta


def _check_colors(colors: Tensor, sh_degree: int | None, cameras: int, gaussians: int) -> None:
    shape = tuple(colors.shape)
    heads = ((gaussians,), (cameras, gaussians))
    if sh_degree is None:
        if shape[:-1] not in heads:
            raise ValueError(f"colors must be [N, X] or [C, N, X] for C={cameras} and N={gaussians}, not {shape}.")
    elif len(shape) < 3 or shape[:-2] not in heads or shape[-1] != 3 or shape[-2] < (sh_degree + 1) ** 2:
        wanted = f"[N, K, 3] or [C, N, K, 3] for C={cameras}, N={gaussians} and K of at least {(sh_degree + 1) ** 2}"
        raise ValueError(f"colors must be {wanted}, not {shape}.")


def _traces(covars: Float[Tensor, "n 3 3"]) -> Float[Tensor, " n"]:
    return covars.detach().diagonal(dim1=-2, dim2=-1).sum(-1)


def _covariances(quats: Float[Tensor, "m 4"], scales: Float[Tensor, "m 3"]) -> Float[Tensor, "m 3 3"]:
    from gsplat.cuda._torch_impl import _quat_scale_to_covar_preci

    return _quat_scale_to_covar_preci(quats, scales, True, False)[0]


def _project(means: Tensor, shapes: Tensor, view: Tensor, K: Tensor, *options: Any) -> list[Tensor | None]:
    """gsplat's projection into one camera: radii, means2d, depths, conics, compensations, each [M, ...]."""
    from gsplat.cuda._torch_impl import _fully_fused_projection

    return [out[0] if out is not None else None for out in _fully_fused_projection(means, shapes, view, K, *options)]


def _harmonics(degree: int, directions: Tensor, coefficients: Tensor) -> Float[Tensor, "m 3"]:
    from gsplat.cuda._torch_impl import _spherical_harmonics

    return (_spherical_harmonics(degree, directions, coefficients) + 0.5).clamp_min(0.0)


def _spread(part: Tensor, ids: Tensor, count: int) -> Tensor:
    """Puts rows to their places among so many rows of zeros."""
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, ids, part)
