"""Our rasterizer against a slow and obvious one."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading

import gsplat
import pytest
import torch
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci, _spherical_harmonics
from nerfstudio.viewer_legacy.server.viewer_utils import SetTrace
from torch import Tensor

from ovs3d_nerfstudio.gaussians.plan import plan_views
from ovs3d_nerfstudio.gaussians.rasterization import rasterization

WIDTH, HEIGHT = 53, 38  # several tiles, the last ones cut off
NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats")


def scene(count: int = 40, channels: int = 3, cameras: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Gaussians of all sizes in front of, beside and behind cameras, some nearly opaque, many hidden."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    means = (uniform(count, 3) - 0.5) * torch.tensor([4.0, 3.0, 3.0])
    means[: count // 10, 2] -= 4
    viewmats = torch.eye(4, dtype=torch.float64).repeat(cameras, 1, 1)
    viewmats[:, 2, 3] = 3
    viewmats[:, 0, 3] = torch.linspace(0, 0.6, cameras)
    focal = torch.tensor([[60.0, 0, 25.5], [0, 55.0, 19.5], [0, 0, 1]], dtype=torch.float64)
    tensors = {
        "means": means,
        "quats": torch.randn(count, 4, dtype=torch.float64, generator=generator),
        "scales": torch.exp(uniform(count, 3) * 4 - 4.5),
        "opacities": uniform(count) ** 0.5,
        "colors": uniform(count, channels),
        "viewmats": viewmats,
        "Ks": focal.repeat(cameras, 1, 1),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def square_of(mean: Tensor, radius: Tensor, pixels: Tensor) -> Tensor:
    """True for pixels in the tiles that gsplat gives a Gaussian: those that the square around its circle meets."""
    tiles = torch.floor(pixels / 16)
    first, last = torch.floor((mean - radius) / 16), torch.ceil((mean + radius) / 16)
    return ((tiles >= first) & (tiles < last)).all(-1)


def composite_slowly(means2d, conics, opacities, radii, depths, values, width=WIDTH, height=HEIGHT):
    """One camera: Gaussian after Gaussian, the whole picture each time. Returns values, alphas, and the terms."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([x, y], -1).to(means2d) + 0.5
    left = torch.ones(height, width, dtype=means2d.dtype)
    ended = torch.zeros(height, width, dtype=torch.bool)
    picture = torch.zeros(height, width, values.shape[-1], dtype=means2d.dtype)
    for i in torch.argsort(depths, stable=True).tolist():
        if radii[i] <= 0:
            continue
        dx, dy = (means2d[i] - pixels).unbind(-1)
        a, b, c = conics[i]
        sigma = (a * dx * dx + c * dy * dy) / 2 + b * dx * dy
        alpha = torch.clamp(opacities[i] * torch.exp(-sigma), max=0.999)
        counts = (alpha >= 1 / 255) & (sigma >= 0) & square_of(means2d[i], radii[i], pixels) & ~ended
        ended = ended | (counts & (left * (1 - alpha) <= 1e-4))
        alpha = torch.where(counts & ~ended, alpha, 0)
        picture = picture + (alpha * left)[..., None] * values[i]
        left = left * (1 - alpha)
    return picture, 1 - left[..., None]


def rasterize_slowly(
    means,
    quats,
    scales,
    opacities,
    colors,
    viewmats,
    Ks,
    width=WIDTH,
    height=HEIGHT,
    sh_degree=None,
    backgrounds=None,
    render_mode="RGB",
    rasterize_mode="classic",
    near_plane=0.01,
    radius_clip=0.0,
    **_,
):
    covars, _ = _quat_scale_to_covar_preci(quats, scales, True, False)
    antialiased = rasterize_mode == "antialiased"
    radii, means2d, depths, conics, factors = _fully_fused_projection(
        means, covars, viewmats, Ks, width, height, near_plane=near_plane, calc_compensations=antialiased
    )
    pictures, alphas = [], []
    for camera in range(len(viewmats)):
        values = colors[camera] if colors.dim() == (3 if sh_degree is None else 4) else colors
        if sh_degree is not None:
            directions = means - torch.inverse(viewmats[camera])[:3, 3]
            values = (_spherical_harmonics(sh_degree, directions, values) + 0.5).clamp_min(0)
        depth = depths[camera, :, None]
        values = {"R": values, "D": depth, "E": depth}[render_mode[0]]
        if "+" in render_mode:
            values = torch.cat([values, depth], -1)
        opacity = opacities * factors[camera] if antialiased else opacities
        seen = torch.where(radii[camera] > radius_clip, radii[camera], 0)
        geometry = (means2d[camera], conics[camera], opacity, seen, depths[camera])
        picture, alpha = composite_slowly(*geometry, values, width, height)
        if backgrounds is not None and render_mode[0] == "R":
            colored = backgrounds.shape[-1]
            behind = picture[..., :colored] + (1 - alpha) * backgrounds[camera]
            picture = torch.cat([behind, picture[..., colored:]], -1)
        if "E" in render_mode:
            picture = torch.cat([picture[..., :-1], picture[..., -1:] / alpha.clamp(min=1e-10)], -1)
        pictures.append(picture)
        alphas.append(alpha)
    return torch.stack(pictures), torch.stack(alphas), {}


def rasterize(tensors: dict[str, Tensor], function=rasterization, **options):
    return function(**tensors, **{"width": WIDTH, "height": HEIGHT, **options})


def gradients(function, tensors: dict[str, Tensor], names=NAMES, **options) -> dict[str, Tensor]:
    """Gradients of a fixed random weighting of the picture and its alphas."""
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in tensors.items()}
    picture, alphas, _ = rasterize(leaves, function, **options)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(picture.shape, dtype=torch.float64, generator=generator)
    more = torch.randn(alphas.shape, dtype=torch.float64, generator=generator)
    loss = (picture * weights.to(picture)).sum() + (alphas * more.to(alphas)).sum()
    return dict(zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True))


def assert_same_gradients(tensors: dict[str, Tensor], names=NAMES, tolerance=1e-8, **options) -> None:
    ours = gradients(rasterization, tensors, names, **options)
    theirs = gradients(rasterize_slowly, tensors, names, **options)
    for name in names:
        scale = theirs[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance * scale, msg=f"{name}, {options}")


OPTIONS = [
    {},
    {"packed": False},
    {"rasterize_mode": "antialiased"},
    {"backgrounds": torch.tensor([[0.3, 0.5, 0.9]], dtype=torch.float64)},
    {"render_mode": "D"},
    {"render_mode": "ED"},
    {"render_mode": "RGB+D", "backgrounds": torch.tensor([[0.3, 0.5, 0.9]], dtype=torch.float64)},
    {"render_mode": "RGB+ED", "packed": False},
    {"near_plane": 2.5, "radius_clip": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_pictures_are_those_of_the_slow_sum(options: dict, dtype: torch.dtype, tolerance: float):
    tensors = scene(dtype=dtype)
    ours, alphas, _ = rasterize(tensors, **options)
    theirs, their_alphas, _ = rasterize({name: t.double() for name, t in tensors.items()}, rasterize_slowly, **options)
    assert ours.dtype == alphas.dtype == dtype
    assert ours.shape == theirs.shape and alphas.shape == (1, HEIGHT, WIDTH, 1)
    scale = max(theirs.abs().max().item(), 1.0)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(alphas.double(), their_alphas, rtol=0, atol=tolerance)
    assert 0.1 < their_alphas.mean() < 0.99  # the scene has something to see, and something to see through


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_the_slow_sum(options: dict):
    names = tuple(name for name in NAMES if name != "colors" or "RGB" in options.get("render_mode", "RGB"))
    assert_same_gradients(scene(), names, **options)


@pytest.mark.parametrize("channels", [1, 4, 16, 39, 40, 48, 65])
def test_any_number_of_channels_is_composited(channels: int):
    assert_same_gradients(scene(channels=channels))
    tensors = scene(channels=channels)
    ours, theirs = rasterize(tensors)[0], rasterize(tensors, rasterize_slowly)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    single = rasterize({name: tensor.float() for name, tensor in tensors.items()})[0]
    torch.testing.assert_close(single.double(), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [3, 41])
def test_gradients_in_single_precision_are_close(channels: int):
    tensors = {name: tensor.float() for name, tensor in scene(channels=channels).items()}
    ours = gradients(rasterization, tensors)
    theirs = gradients(rasterize_slowly, {name: tensor.double() for name, tensor in tensors.items()})
    for name in NAMES:
        error = (ours[name].double() - theirs[name]).abs().max() / theirs[name].abs().max()
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("channels", [3, 41])
def test_gradients_of_colors_alone_are_the_same_as_with_the_geometry_s(channels: int):
    tensors = scene(channels=channels)
    everything = gradients(rasterization, tensors)["colors"]
    alone = gradients(rasterization, tensors, ("colors",))["colors"]
    torch.testing.assert_close(alone, everything, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_several_cameras_are_rendered_at_once(packed: bool):
    tensors = scene(cameras=3)
    backgrounds = torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tensors["colors"] = torch.stack([tensors["colors"], tensors["colors"].flip(0), tensors["colors"] ** 2])
    assert_same_gradients(tensors, packed=packed, backgrounds=backgrounds)
    together = rasterize(tensors, packed=packed, backgrounds=backgrounds)[0]
    for i in range(3):
        alone = {**tensors, **{name: tensors[name][i : i + 1] for name in ("colors", "viewmats", "Ks")}}
        torch.testing.assert_close(together[i : i + 1], rasterize(alone, backgrounds=backgrounds[i : i + 1])[0])


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_spherical_harmonics_give_colors_that_change_with_the_view(degree: int):
    tensors = scene(cameras=2)
    generator = torch.Generator().manual_seed(3)
    tensors["colors"] = torch.randn(len(tensors["means"]), 16, 3, dtype=torch.float64, generator=generator)
    assert_same_gradients(tensors, sh_degree=degree)
    ours = rasterize(tensors, sh_degree=degree)[0]
    torch.testing.assert_close(ours, rasterize(tensors, rasterize_slowly, sh_degree=degree)[0])


def test_backgrounds_get_gradients():
    tensors = scene()
    behind = torch.rand(1, 3, dtype=torch.float64).requires_grad_()
    picture, alphas, _ = rasterize(tensors, backgrounds=behind)
    (gradient,) = torch.autograd.grad(picture.sum(), behind)
    torch.testing.assert_close(gradient, (1 - alphas).sum((1, 2)).expand(1, 3))


@pytest.mark.parametrize("packed", [True, False])
def test_absolute_gradients_are_sums_over_pixels(packed: bool):
    tensors = scene(12)
    tensors["means"].requires_grad_()
    picture, _, meta = rasterize(tensors, absgrad=True, packed=packed)
    meta["means2d"].retain_grad()
    weights = torch.randn(picture.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (picture * weights).sum().backward()
    covars, _ = _quat_scale_to_covar_preci(tensors["quats"], tensors["scales"], True, False)
    sizes = (tensors["viewmats"], tensors["Ks"], WIDTH, HEIGHT)
    radii, means2d, depths, conics, _ = _fully_fused_projection(tensors["means"].detach(), covars, *sizes)
    # A mean for each pixel: the gradient of each pixel by itself is what is summed without its sign.
    spread = means2d[0][:, None, None, :].expand(-1, HEIGHT, WIDTH, -1).clone().requires_grad_()
    geometry = (conics[0], tensors["opacities"], radii[0], depths[0])
    slow, _ = composite_slowly(spread, *geometry, tensors["colors"])
    (slow * weights[0]).sum().backward()
    rows = meta["gaussian_ids"] if packed else torch.arange(12)
    ours = meta["means2d"].absgrad.view(-1, 2)
    torch.testing.assert_close(ours, spread.grad.abs().sum((1, 2))[rows])
    torch.testing.assert_close(meta["means2d"].grad.view(-1, 2), spread.grad.sum((1, 2))[rows])


@pytest.mark.parametrize("packed", [True, False])
def test_a_window_is_a_part_of_the_whole_picture_and_costs_less(packed: bool):
    tensors = scene(60, channels=41, cameras=2)
    colors = tensors.pop("colors").requires_grad_()
    tensors["means"].requires_grad_()
    windows = [(16, 16, 21, 15), (0, 16, 21, 15)]
    plans = [plan_views(**tensors, width=WIDTH, height=HEIGHT, packed=packed, windows=each) for each in (None, windows)]
    (whole, whole_alphas), (part, part_alphas) = (plan.composite(colors) for plan in plans)
    torch.testing.assert_close(part, cut(whole, windows))
    torch.testing.assert_close(part_alphas, cut(whole_alphas, windows))
    weights = torch.randn(part.shape, dtype=part.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((part * weights).sum(), [colors, tensors["means"]])
    theirs = torch.autograd.grad((cut(whole, windows) * weights).sum(), [colors, tensors["means"]])
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)
    assert len(plans[1].gaussians) < 0.8 * len(plans[0].gaussians)
    with pytest.raises(ValueError, match=r"one size, not \[\(20, 15\), \(21, 15\)\]"):
        plan_views(**tensors, width=WIDTH, height=HEIGHT, windows=[(0, 0, 21, 15), (0, 0, 20, 15)])


def cut(pictures: torch.Tensor, windows: list) -> torch.Tensor:
    """The window of each picture."""
    parts = zip(pictures, windows, strict=True)
    return torch.stack(
        [picture[top : top + down, left : left + across] for picture, (left, top, across, down) in parts]
    )


def test_a_camera_with_another_principal_point_sees_a_part_of_the_picture():
    tensors = scene()
    tensors["Ks"][:, :2, 2] -= torch.tensor([16.0, 16.0], dtype=torch.float64)
    part, _, _ = rasterize(tensors, width=20, height=16)
    torch.testing.assert_close(part, rasterize(tensors, rasterize_slowly, width=20, height=16)[0])


def test_a_plan_composites_other_values_of_the_same_geometry():
    tensors = scene(cameras=2)
    geometry = {name: tensor for name, tensor in tensors.items() if name != "colors"}
    plan = plan_views(**geometry, width=WIDTH, height=HEIGHT)
    for channels in (3, 50):
        values = torch.rand(len(tensors["means"]), channels, dtype=torch.float64).requires_grad_()
        picture, alphas = plan.composite(values)
        expected, expected_alphas, _ = rasterize({**geometry, "colors": values})
        assert torch.equal(picture, expected) and torch.equal(alphas, expected_alphas)
        again, _ = plan.composite_visible(values[plan.gaussians])
        assert torch.equal(again, picture)
        (ours,) = torch.autograd.grad(picture.square().sum(), values)
        (theirs,) = torch.autograd.grad(expected.square().sum(), values)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("packed", [True, False])
def test_gathering_is_the_transpose_of_compositing(packed: bool):
    tensors = scene(cameras=2)
    tensors["means"].requires_grad_()
    plan = plan_views(**{n: t for n, t in tensors.items() if n != "colors"}, width=WIDTH, height=HEIGHT, packed=packed)
    generator = torch.Generator().manual_seed(4)
    values = torch.rand(len(plan.gaussians), 5, dtype=torch.float64, generator=generator)
    pictures = torch.randn(2, HEIGHT, WIDTH, 5, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        composited, alphas = plan.composite_visible(values)
        gathered, seen = plan.gather(pictures), plan.gather(torch.ones_like(alphas))
    torch.testing.assert_close((composited * pictures).sum(), (values * gathered).sum())
    torch.testing.assert_close(seen.sum(), alphas.sum())


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_to_see_is_the_background(packed: bool):
    tensors = scene(5)
    tensors["means"][:, 2] = -10
    for count in (5, 0):
        few = {name: t[:count] if name in NAMES[:5] else t for name, t in tensors.items()}
        few = {name: tensor.clone().requires_grad_() for name, tensor in few.items()}
        backgrounds = torch.full((1, 3), 0.25, dtype=torch.float64)
        picture, alphas, meta = rasterize(
            few, packed=packed, backgrounds=backgrounds, render_mode="RGB+ED", absgrad=True
        )
        assert (picture[..., :3] == 0.25).all() and (picture[..., 3] == 0).all() and (alphas == 0).all()
        (picture.sum() + alphas.sum()).backward()
        assert all(few[name].grad is None or (few[name].grad == 0).all() for name in NAMES)
        assert (meta["radii"] == 0).all()


def test_one_gaussian_is_an_ellipse_that_ends_at_1_255():
    tensors = {name: tensor[:1] for name, tensor in scene(1, dtype=torch.float32).items()}
    tensors["means"][:] = 0
    tensors["scales"][:] = torch.tensor([0.3, 0.1, 0.1])
    tensors["quats"][:] = torch.tensor([0.9, 0, 0, 0.3])
    tensors["opacities"][:] = 0.8
    picture, alphas, _ = rasterize(tensors)
    assert alphas.max() == pytest.approx(0.8, abs=0.02)
    assert alphas[alphas > 0].min() >= 1 / 255 - 1e-6
    torch.testing.assert_close(picture, alphas * tensors["colors"], rtol=0, atol=1e-6)


def test_gaussians_in_the_plane_of_the_camera_or_broken_ones_do_not_spoil_the_others():
    tensors = scene()
    clean = gradients(rasterization, tensors)
    picture = rasterize(tensors)[0]
    broken = {name: torch.cat([t, t[:4]]) if name in NAMES[:5] else t for name, t in tensors.items()}
    broken["means"][-4:] = torch.tensor([[0.1, 0, -3], [0, 0, -3 + 1e-9], [0, 0, float("nan")], [0, 0, 0]])
    broken["scales"][-1] = float("nan")
    assert torch.equal(rasterize(broken)[0], picture)
    spoiled = gradients(rasterization, broken)
    for name in NAMES:
        torch.testing.assert_close(spoiled[name][: len(clean[name])], clean[name])
        assert torch.isfinite(spoiled[name]).all()


@pytest.mark.parametrize("channels", [3, 41])
def test_repeats_are_identical_with_any_number_of_threads(channels: int):
    tensors = {name: tensor.float() for name, tensor in scene(2000, channels).items()}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            picture = rasterize(tensors)[0]
            results.append([picture, *gradients(rasterization, tensors, ("opacities", "colors")).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_threads_may_render_at_once():
    scenes = [{n: t.float() for n, t in scene(1500, channels, seed=channels).items()} for channels in (3, 48)]
    alone = [gradients(rasterization, tensors) for tensors in scenes]
    wrong: list[str] = []

    def work(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        for _ in range(10):
            got = gradients(rasterization, tensors)
            wrong.extend(name for name in ("colors", "opacities") if not torch.equal(got[name], expected[name]))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(scenes, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_importing_the_rasterizer_does_not_import_numba():
    check = "import sys, ovs3d_nerfstudio.gaussians.rasterization; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=300)


def test_the_signature_is_gsplat_s():
    ours, theirs = (inspect.signature(function).parameters for function in (rasterization, gsplat.rasterization))
    assert list(ours) == list(theirs)
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}


def test_gsplat_s_strategy_trains_on_what_we_return():
    tensors = {name: tensor.float() for name, tensor in scene(60).items()}
    params = {name: torch.nn.Parameter(tensors[name]) for name in ("means", "scales", "quats", "opacities", "colors")}
    optimizers = {name: torch.optim.Adam([param], lr=1e-3) for name, param in params.items()}
    for packed, absgrad in ((False, False), (True, True)):
        strategy = gsplat.DefaultStrategy(refine_start_iter=0, refine_every=1, absgrad=absgrad, grow_grad2d=1e-9)
        state = strategy.initialize_state()
        before = len(params["means"])
        for step in (1, 2):
            shown = {**tensors, **params, "scales": params["scales"].exp(), "opacities": params["opacities"].sigmoid()}
            picture, _, meta = rasterize(shown, packed=packed, absgrad=absgrad)
            strategy.step_pre_backward(params, optimizers, state, step, meta)
            picture.square().sum().backward()
            strategy.step_post_backward(params, optimizers, state, step, meta, packed=packed)
        assert len(params["means"]) > before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sparse_grad": True}, "sparse_grad=True needs CUDA"),
        ({"tile_size": 8}, "tile_size must be 16"),
        ({"render_mode": "depth"}, "render_mode must be"),
        ({"sh_degree": 1}, "colors must be .* K of at least 4"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        rasterize(scene(), **options)


def test_a_viewer_that_interrupts_renders_leaves_no_half_of_a_compiler_behind():
    """nerfstudio's raises at any traced line: none is traced where numba is imported and where it compiles."""
    seen = set()

    def trace(frame, event, arg):
        seen.add(frame.f_code.co_name)
        return trace

    tensors = scene(dtype=torch.float32)
    values, before = tensors.pop("colors"), sys.gettrace()
    with SetTrace(trace):
        plan_views(*tensors.values(), WIDTH, HEIGHT).composite(values)
        assert sys.gettrace() is trace
    sys.settrace(before)
    assert "composite" in seen and not {"may_be_seen", "bin_gaussians", "plan_views", "composite_visible"} & seen
