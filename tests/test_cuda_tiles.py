"""What gsplat's kernels are given and what is made of their answers, with gsplat's plain torch functions in the kernels' place."""

from __future__ import annotations

import inspect

import gsplat
import pytest
import torch
from gsplat.cuda import _torch_impl
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci
from test_rasterization import HEIGHT, WIDTH, scene

from ovs3d_nerfstudio.gaussians import cuda_tiles
from ovs3d_nerfstudio.gaussians.plan import plan_views

KERNELS = {name: inspect.signature(getattr(gsplat, name)) for name in ("fully_fused_projection", "isect_tiles")}


def projection(*args, **kwargs):
    """gsplat's `fully_fused_projection(packed=True)`: a row for each Gaussian that a camera may see."""
    given = KERNELS["fully_fused_projection"].bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    assert a["packed"] and not a["sparse_grad"]
    if a["covars"] is None:
        covars = _quat_scale_to_covar_preci(a["quats"], a["scales"], True, False)[0]
    else:
        xx, xy, xz, yy, yz, zz = a["covars"].unbind(-1)
        covars = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1).view(-1, 3, 3)
    limits = [a[name] for name in ("width", "height", "eps2d", "near_plane", "far_plane")]
    # The kernel leaves out what is behind a camera before it divides by its depth, and its row is none.
    radii, *rest = _fully_fused_projection(
        a["means"], covars, a["viewmats"], a["Ks"], *limits, a["calc_compensations"], a["camera_model"]
    )
    cameras, gaussians = (radii > a["radius_clip"]).nonzero().unbind(-1)
    found = [None if part is None else part[cameras, gaussians] for part in rest]
    return cameras, gaussians, radii[cameras, gaussians], *found


def tiles(*args, **kwargs):
    """gsplat's `isect_tiles`, whose plain torch function packs nothing: what it is given is all that counts here."""
    given = KERNELS["isect_tiles"].bind(*args, **kwargs).arguments
    assert given["packed"] and len(given["camera_ids"]) == len(given["gaussian_ids"]) == len(given["means2d"])
    return None, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)


@pytest.mark.parametrize("options", [{}, {"rasterize_mode": "antialiased"}, {"covars": True}], ids=str)
@pytest.mark.parametrize("windows", [None, [(16, 16, 21, 15), (0, 16, 21, 15)]], ids=["whole", "windows"])
def test_a_plan_of_gsplat_s_kernels_is_ours(windows: list | None, options: dict, monkeypatch: pytest.MonkeyPatch):
    tensors = scene(60, cameras=2)
    tensors.pop("colors")
    if options.get("covars"):
        shapes = _quat_scale_to_covar_preci(tensors.pop("quats"), tensors.pop("scales"), True, False)[0]
        options = {"quats": None, "scales": None, "covars": shapes}
    ours = plan_views(**tensors, **options, width=WIDTH, height=HEIGHT, windows=windows)
    monkeypatch.setattr(cuda_tiles, "kernels_on", lambda device: True)
    monkeypatch.setattr(gsplat, "fully_fused_projection", projection)
    monkeypatch.setattr(gsplat, "isect_tiles", tiles)
    monkeypatch.setattr(gsplat, "isect_offset_encode", _torch_impl._isect_offset_encode)
    plan = plan_views(**tensors, **options, width=WIDTH, height=HEIGHT, windows=windows)
    rows = [pair for pair in zip(plan.camera_ids.tolist(), plan.gaussian_ids.tolist(), strict=True)]
    order = [rows.index(pair) for pair in zip(ours.camera_ids.tolist(), ours.gaussian_ids.tolist(), strict=True)]
    assert len(order) == len(rows) > 0
    for name in ("radii", "means2d", "depths", "conics", "opacities"):
        torch.testing.assert_close(getattr(plan, name)[order], getattr(ours, name), msg=name)
    assert torch.equal(plan.gaussians, plan.gaussian_ids) and torch.equal(plan.cameras, plan.camera_ids)
    assert (plan.bins.width, plan.bins.height) == (ours.bins.width, ours.bins.height)
