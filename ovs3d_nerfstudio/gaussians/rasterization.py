"""gsplat's `rasterization`, on any device: gsplat's own on CUDA, compiled loops on the CPU elsewhere.

gsplat composites on CUDA only. See `plan` for what happens elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ovs3d_nerfstudio.gaussians import cuda_tiles
from ovs3d_nerfstudio.gaussians.binning import TILE
from ovs3d_nerfstudio.gaussians.plan import CameraModel, plan_views

__all__ = ["RenderMode", "rasterization"]

RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]


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
        Ks: Intrinsics in pixels. For a window of a larger picture see `plan_views`.
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
    if cuda_tiles.kernels_on(means.device):
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
        visible = colors[plan.cameras, plan.gaussians] if per_camera else colors.index_select(0, plan.gaussians)
        if sh_degree is not None:
            centres = torch.inverse(viewmats)[:, :3, 3]
            visible = harmonics(sh_degree, means.index_select(0, plan.gaussians) - centres[plan.cameras], visible)
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


def harmonics(
    degree: int, directions: Float[Tensor, "m 3"], coefficients: Float[Tensor, "m k 3"]
) -> Float[Tensor, "m 3"]:
    """The colours of Gaussians that are seen along `directions` (of any length), from their spherical harmonics."""
    from gsplat.cuda._torch_impl import _spherical_harmonics

    return (_spherical_harmonics(degree, directions, coefficients) + 0.5).clamp_min(0.0)
