"""On a GPU Gaussians look as on a CPU: our loops against gsplat's kernels, which are there only."""

from __future__ import annotations

import pytest
import torch
from gsplat.cuda._torch_impl import _quat_scale_to_covar_preci
from test_rasterization import HEIGHT, NAMES, WIDTH, cut, gradients, rasterize, scene

from ovs3d_nerfstudio.gaussians.plan import plan_views
from ovs3d_nerfstudio.gaussians.rasterization import rasterization

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="gsplat composites on CUDA only"),
]


@pytest.mark.parametrize("channels", [3, 41])
@pytest.mark.parametrize("options", [{}, {"rasterize_mode": "antialiased"}, {"render_mode": "RGB+ED"}], ids=str)
def test_pictures_and_gradients_are_gsplat_s(channels: int, options: dict):
    tensors = {name: tensor.float() for name, tensor in scene(300, channels, cameras=2).items()}
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    ours, theirs = (rasterize(each, absgrad=True, packed=False, **options) for each in (tensors, there))
    torch.testing.assert_close(ours[0], theirs[0].cpu(), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1].cpu(), rtol=0, atol=1e-4)
    assert torch.equal(ours[2]["radii"] > 0, theirs[2]["radii"].cpu() > 0)
    # gsplat leaves the gradient of cameras out unless they need one, and sums with atomics.
    names = NAMES[:5]
    mine, gsplats = (
        gradients(rasterization, tensors, names, **options),
        gradients(rasterization, there, names, **options),
    )
    for name in names:
        error = (mine[name] - gsplats[name].cpu()).abs().max() / mine[name].abs().max()
        assert error < 1e-3, (name, error)


def test_a_plan_on_cuda_is_gsplat_s_picture_and_its_window_a_part_of_it():
    tensors = {name: tensor.float().cuda() for name, tensor in scene(300, 70, cameras=2).items()}
    colors = tensors.pop("colors")
    picture, alphas, _ = rasterization(**tensors, colors=colors, width=WIDTH, height=HEIGHT)
    whole, whole_alphas = plan_views(**tensors, width=WIDTH, height=HEIGHT).composite(colors)
    torch.testing.assert_close(whole, picture, rtol=0, atol=1e-3)
    torch.testing.assert_close(whole_alphas, alphas, rtol=0, atol=1e-3)
    windows = [(16, 16, 21, 15), (0, 16, 21, 15)]
    part, _ = plan_views(**tensors, width=WIDTH, height=HEIGHT, windows=windows).composite(colors)
    off = (part - cut(whole, windows)).abs()
    # A pixel whose last Gaussian is at the least alpha that counts may have it in one picture and not in the other.
    assert off.amax() <= 1 / 255 and (off.amax(-1) <= 1e-3).float().mean() >= 0.99


@pytest.mark.parametrize("options", [{}, {"rasterize_mode": "antialiased"}, {"covars": True}], ids=str)
def test_a_plan_on_cuda_is_that_of_the_cpu(options: dict):
    """Projection is gsplat's kernel there, for all cameras at once."""
    tensors = {name: tensor.float() for name, tensor in scene(300, 41, cameras=2).items()}
    if options.get("covars"):
        shapes = _quat_scale_to_covar_preci(tensors.pop("quats"), tensors.pop("scales"), True, False)[0]
        tensors, options = tensors | {"quats": None, "scales": None}, {"covars": shapes}
    windows, found = [(16, 16, 21, 15), (0, 16, 21, 15)], []
    for device in ("cpu", "cuda"):
        there = {name: tensor if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
        leaves = {name: there[name].requires_grad_() for name in NAMES[:5] if there.get(name) is not None}
        more = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        colors = there.pop("colors")
        plan = plan_views(**there, **more, width=WIDTH, height=HEIGHT, windows=windows)
        picture, alphas = plan.composite(colors)
        weights = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1)).to(device)
        wanted = torch.autograd.grad((picture * weights).sum(), list(leaves.values()))
        found.append([part.detach().cpu() for part in (picture, alphas, *wanted)])
    for name, mine, theirs in zip(("picture", "alphas", *leaves), *found, strict=True):
        error = (mine - theirs).abs().max() / mine.abs().max()
        assert error < 1e-3, (name, error)
