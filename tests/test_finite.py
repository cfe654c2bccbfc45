"""Losses and gradients stay finite where formulas have their edges, and training ends with a sentence where one does not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.scene_box import SceneBox
from torch.autograd import gradcheck

from ovs3d_nerfstudio.engine.anomaly import PATIENCE, AnomalyError, LossGuard, check_weights
from ovs3d_nerfstudio.features.teachers import Patches, Windows, _coverage
from ovs3d_nerfstudio.fields.compositing import composite, top_samples
from ovs3d_nerfstudio.losses import paper, patches
from ovs3d_nerfstudio.prompts.segmentation import Segmenter, stretched

RAYS, SIDE, DIM, SCALES, WIDTH = 12, 4, 6, 2, 10


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def checked(function, *inputs):
    """Whether the gradient of `function` is what finite differences say, in double precision."""
    return gradcheck(function, [value.detach().double().requires_grad_() for value in inputs], atol=1e-4)


def windows(low, high, coefficients, dtype=torch.float64) -> Windows:
    """One window whose patches cover [low, high] of its side."""
    covered = _coverage(torch.tensor(low), torch.tensor(high), SIDE).to(dtype)
    tokens = noise(1, SIDE * SIDE, 5, seed=3).to(dtype)
    rays = torch.zeros(SIDE * SIDE, 3, dtype=torch.long)
    colors = noise(1, SIDE * SIDE, 3, seed=4).sigmoid().to(dtype)
    return Windows(rays, tokens, Patches.joined([(covered, covered, coefficients.to(dtype))]), SIDE, colors=colors)


# Gradients at the edges of formulas ------------------------------------------------------------------------------------
def test_divergences_of_equal_certain_and_opposite_distributions():
    for logits in (torch.zeros(2, 4), 40 * torch.eye(4)[:2], torch.tensor([[9.0, -9, 0, 0], [-9, 9, 0, 0]])):
        assert checked(
            lambda a, b: paper.js_divergence(a.log_softmax(-1), b.log_softmax(-1)), logits, logits.flip(0) + 1e-3
        )
        assert checked(lambda a: paper.js_divergence(a.log_softmax(-1), a.detach().log_softmax(-1)), logits)
        assert checked(lambda a, b: paper.kl_divergence(a.log_softmax(-1), b.log_softmax(-1)), logits, logits.flip(0))


def test_one_class_alone_costs_nothing_and_pulls_nowhere():
    scores = noise(RAYS, 1).requires_grad_()
    pairs = paper.sample_pairs(1, RAYS, 1000, "cpu")
    parts = paper.fda_loss(scores.log_softmax(-1)[None], noise(1, RAYS, 5), pairs, 0.7)
    total = paper.rda_loss(scores, noise(RAYS, 1, seed=1)) + sum(parts)
    total.backward()
    assert total == 0 and torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("alike", [True, False], ids=["all tokens alike", "all tokens unlike"])
def test_fda_without_a_positive_or_a_negative_pair(alike):
    tokens = torch.ones(1, 5, 5).double() if alike else torch.eye(5).double()[None]
    pairs = paper.sample_pairs(1, 5, 1000, "cpu")
    pairs = pairs if alike else pairs[:, :, (pairs[0] != pairs[1])[0]]  # a token is always like itself
    parts = paper.fda_loss(noise(1, 5, 3).log_softmax(-1), tokens, pairs, 0.7)
    assert parts[alike] == 0 and parts[not alike] != 0
    assert checked(lambda x: sum(paper.fda_loss(x.log_softmax(-1), tokens, pairs, 0.7)), noise(1, 5, 3))


def test_features_of_no_length_have_a_bounded_gradient():
    target = F.normalize(noise(3, DIM), dim=-1).float()
    for scale in (0.0, 1e-30, 1e-8, 1.0):
        features = (scale * noise(3, DIM, seed=1).float()).requires_grad_()
        segmenter = Segmenter()
        segmenter.configure(["a", "b"], target[:2], torch.eye(DIM), noise(50, DIM).float(), "", "")
        value = paper.cosine_loss(features, target) + segmenter.similarities(features).sum()
        value.backward()
        assert torch.isfinite(value) and features.grad.abs().max() < 1e7, scale
    assert checked(lambda x: paper.cosine_loss(x, target.double()), noise(3, DIM, seed=1))


@pytest.mark.parametrize("place", ["empty", "opaque", "even"])
def test_empty_and_opaque_rays(place):
    weights = {"empty": torch.zeros(3, 5, 1), "opaque": torch.eye(5)[[0, 2, 4]][..., None], "even": torch.rand(3, 5, 1)}
    values, positions = noise(3, 2, DIM), noise(3, 5, 3)

    def rendered(w, v):
        return composite(v, top_samples(positions, w, 2)[1])

    assert torch.allclose(top_samples(positions, weights[place].double(), 2)[1].sum(1), torch.ones(3, 1).double())
    # Which samples are heaviest has no gradient: keep ties apart by more than the finite difference.
    apart = weights[place].double() + (1e-3 * torch.arange(5.0)[:, None] if place != "empty" else 0)
    if place == "empty":
        apart.requires_grad_()
        rendered(apart, values).sum().backward()
        assert torch.equal(apart.grad, torch.zeros_like(apart))
    else:
        assert checked(rendered, apart, values)


def test_windows_at_borders_and_apertures_of_every_width():
    low, high = [0.0, 3.9, 1.2, 0.0], [4.0, 4.0, 1.25, 0.5]  # all of it, a sliver at the border, inside a ray, a corner
    drawn = windows(low, high, noise(4, DIM, seed=2))
    rays = noise(SIDE * SIDE, DIM, seed=4)
    for aperture in (0.0, 1.0, 30.0, 1e4):
        assert torch.isfinite(*patches.patch_distances([rays], drawn, aperture)).all()
    single = windows(low, high, noise(4, DIM, seed=2), torch.float32)
    wide = torch.tensor(1e4, requires_grad=True)
    patches.patch_distances([rays.float()], single, wide)[0].sum().backward()
    assert torch.isfinite(wide.grad)
    assert checked(lambda r, a: patches.patch_distances([r], drawn, a)[0], rays, torch.tensor(1.5))


def test_a_window_without_a_patch_costs_nothing():
    drawn = windows([], [], torch.zeros(0, DIM))
    (distances,) = patches.patch_distances([noise(SIDE * SIDE, DIM)], drawn, 1.0)
    assert patches.patch_loss(distances) == 0 and patches.unmixing_loss(distances, distances) == 0


def test_a_class_of_constant_similarity_is_not_blown_up():
    low = torch.full((2,), 0.21)
    rounding = torch.tensor([0.2099, 0.2101])
    assert stretched(rounding, low, low).abs().max() < 0.2


# The whole model -------------------------------------------------------------------------------------------------------
def a_model(text: torch.Tensor, sample: torch.Tensor, **settings):
    config = copy.deepcopy(all_methods["ovs3d-lite"].pipeline.model)
    config.num_scales, config.basis_dim = SCALES, DIM
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    aabb = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    model = config.setup(scene_box=SceneBox(aabb), num_train_data=2, metadata={}, device="cpu").train()
    names = [f"class {n}" for n in range(len(text))]
    model.segmenter.configure(names, text, torch.linalg.qr(noise(WIDTH, DIM).float()).Q, sample, "", "")
    model.mixture.configure(model.segmenter.project(text))
    return model


def some_rays(count: int) -> RayBundle:
    origins = torch.zeros(count, 3)
    directions = F.normalize(noise(count, 3, dtype=torch.float32), dim=-1)
    return RayBundle(origins, directions, torch.full((count, 1), 1e-4), torch.zeros(count, 1, dtype=torch.long))


def learned(model, teachers, ranges, autocast=None):
    """The losses of a step and the gradients of its parameters."""
    batch = {
        "image": torch.rand(RAYS, 3, generator=torch.Generator().manual_seed(1)),
        "teachers": teachers,
        "ranges": ranges,
        "windows": windows([0.0, 1.0], [2.0, 4.0], noise(2, DIM), torch.float32),
        "class_losses": bool(model.segmenter.prompts),
        "told_apart": bool(model.segmenter.prompts),
    }
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        _, result, _ = model(some_rays(RAYS), True, some_rays(SIDE * SIDE), batch)
    sum(result.values()).backward()
    return result, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_finite(result, gradients):
    assert {"feature_loss", "patch_loss"} <= set(result) and "semantic_field.last.weight" in gradients
    broken = [name for name, value in [*result.items(), *gradients.items()] if not torch.isfinite(value).all()]
    assert not broken, broken


TEXTS = {
    "one class": F.normalize(noise(1, WIDTH), dim=-1).float(),
    "no class": torch.zeros(0, WIDTH),
    "two prompts embedded alike": F.normalize(noise(1, WIDTH), dim=-1).float().expand(2, WIDTH),
    "three classes": F.normalize(noise(3, WIDTH), dim=-1).float(),
}


@pytest.mark.parametrize("rda_range", ["view", "scene"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_step_is_finite_whatever_the_classes(text, rda_range):
    model = a_model(TEXTS[text], noise(50, DIM).float(), rda_range=rda_range)
    teachers = noise(RAYS, SCALES, DIM).float()
    classes = len(TEXTS[text])
    assert_finite(
        *learned(model, teachers, torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1).expand(RAYS, SCALES, 2, classes))
    )


@pytest.mark.parametrize("rda_range", ["view", "scene"])
def test_a_step_is_finite_where_a_class_never_appears_and_all_cells_are_alike(rda_range):
    """One prompt lies off everything in the scene; and every cell is the same, so no range is more than rounding."""
    basis = torch.linalg.qr(noise(WIDTH, DIM).float()).Q
    beside = F.normalize(noise(WIDTH).float() - basis @ (basis.T @ noise(WIDTH).float()), dim=0)
    text = torch.stack([basis[:, 0], beside])
    cell = torch.eye(DIM)[0]
    model = a_model(text, cell.expand(50, DIM), rda_range=rda_range)
    similar = model.segmenter.similarities(cell)
    ranges = torch.stack([similar, similar + 1e-7]).expand(RAYS, SCALES, 2, 2)
    result, gradients = learned(model, cell.expand(RAYS, SCALES, DIM), ranges)
    assert_finite(result, gradients)
    assert model.segmenter.relevancies(model.segmenter.similarities(noise(5, DIM).float())).isfinite().all()


@pytest.mark.parametrize("density", [-1e4, 1e4], ids=["empty", "opaque"])
def test_a_step_is_finite_through_empty_and_opaque_space(density):
    model = a_model(TEXTS["three classes"], noise(50, DIM).float())
    handles = [
        part.register_forward_hook(lambda _m, _i, out: out + density)
        for part in (model.field.mlp_base, *(network.mlp_base for network in model.proposal_networks))
    ]
    result, gradients = learned(
        model, noise(RAYS, SCALES, DIM).float(), torch.tensor([-1.0, 1]).view(2, 1).expand(RAYS, SCALES, 2, 3)
    )
    assert_finite(result, gradients)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_gives_the_losses_of_single_precision(precision):
    model = a_model(TEXTS["three classes"], noise(50, DIM).float())
    model.semantic_field.last.bias.data[-1] = 40.0  # a saliency beyond single precision, were it not limited
    ranges = torch.tensor([-1.0, 1]).view(2, 1).expand(RAYS, SCALES, 2, 3)
    teachers = noise(RAYS, SCALES, DIM).float()
    single, _ = learned(model, teachers, ranges)
    model.zero_grad()
    mixed, gradients = learned(model, teachers, ranges, precision)
    assert_finite(mixed, gradients)
    for name in ("feature_loss", "patch_loss", "rda_loss", "unmixing_loss"):
        assert float(mixed[name]) == pytest.approx(float(single[name]), rel=0.05), name


# What is not finite ends the run ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("late", [False, True], ids=["at once", "a step late"])
def test_a_broken_loss_is_named_with_its_step_and_a_remedy(late):
    guard, good = LossGuard(late), torch.tensor(0.5, requires_grad=True)
    guard.check(11, {"rgb_loss": good, "rda_loss": good})
    broken = {"rgb_loss": good, "rda_loss": good * torch.inf, "feature_loss": good * torch.nan}
    with pytest.raises(AnomalyError, match=r"step 12: rda_loss is inf, feature_loss is nan\. .*--optimizers"):
        for step in range(13 - PATIENCE if late else 12, 14):
            guard.check(step, broken if step < 13 else {"rgb_loss": good})


def test_what_a_gradient_scaler_skips_now_and_then_ends_nothing():
    guard, good = LossGuard(late=True), torch.tensor(0.5)
    for step in range(5 * PATIENCE):
        guard.check(step, {"rgb_loss": good if step % PATIENCE == 0 else good * torch.nan})


def test_weights_that_are_not_finite_are_not_saved():
    layer = torch.nn.Linear(2, 2)
    check_weights(layer, 7)
    layer.bias.data[1] = torch.nan
    with pytest.raises(AnomalyError, match=r"No checkpoint was written at step 7, as numbers in bias"):
        check_weights(layer, 7)
