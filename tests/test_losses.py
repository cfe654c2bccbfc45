"""The losses against the slow, obvious formula (3D-OVS §3.2–3.3)."""

import math

import pytest
import torch
import torch.nn.functional as F

from ovs3d_nerfstudio.features.teachers import Patches, Windows
from ovs3d_nerfstudio.losses import color, paper, patches
from ovs3d_nerfstudio.losses.apart import told_apart
from ovs3d_nerfstudio.losses.depth import depth_loss


def distributions(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def slow_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


def slow_js(p, q):
    m = (p + q) / 2
    return (slow_kl(p, m) + slow_kl(q, m)) / 2


def test_js_is_the_mean_divergence_from_the_mixture():
    log_p, log_q = distributions(6, 4), distributions(6, 4, seed=1)
    expected = [slow_js(p, q) for p, q in zip(log_p.exp(), log_q.exp(), strict=True)]
    assert torch.allclose(paper.js_divergence(log_p, log_q), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_js_ends_at_ln_2_where_kl_does_not():
    log_p = torch.tensor([[50.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    log_q = log_p.flip(-1)
    assert paper.js_divergence(log_p, log_q).item() == pytest.approx(math.log(2))
    assert paper.kl_divergence(log_p, log_q).item() == pytest.approx(50)


def test_js_of_equal_distributions_is_zero_with_a_finite_gradient():
    logits = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    value = paper.js_divergence(logits.log_softmax(-1), logits.log_softmax(-1)).sum()
    value.backward()
    assert value.item() == 0 and torch.isfinite(logits.grad).all()


def slow_fda(p, tokens, pairs, seen, shift, divergence, rebalance, apart):
    positive, negative, count_p, count_n, count = 0.0, 0.0, 0, 0, 0
    for w in range(len(p)):
        for i, (a, b) in enumerate(zip(*pairs[:, w].tolist(), strict=True)):
            g = F.cosine_similarity(tokens[w, a], tokens[w, b], dim=0).item() - shift
            if not (seen[w, a] and seen[w, b]):
                g = 0
            j = (slow_js if divergence == "js" else slow_kl)(p[w, a], p[w, b])
            differ = 1 if apart is None else float(apart[w, i])
            positive, count_p = positive + max(g, 0) * j, count_p + (g > 0)
            negative, count_n = negative + min(g, 0) * j * differ, count_n + (g < 0)
            count += 1
    return (positive / count_p, negative / count_n) if rebalance else (positive / count, negative / count)


@pytest.mark.parametrize("divergence", ["js", "kl"])
@pytest.mark.parametrize(("rebalance", "weighed"), [(True, False), (False, False), (True, True)])
def test_fda_is_the_loop_over_pairs(divergence, rebalance, weighed):
    log_p = distributions(2, 5, 3)
    tokens = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs = paper.sample_pairs(2, 5, 25, "cpu")
    seen = torch.tensor([[True] * 5, [True, False, True, True, False]])
    apart = torch.rand(2, 25, generator=torch.Generator().manual_seed(4), dtype=torch.float64) if weighed else None
    fast = paper.fda_loss(log_p, tokens, pairs, 0.1, divergence, rebalance, seen, apart)
    slow = slow_fda(log_p.exp(), tokens, pairs, seen, 0.1, divergence, rebalance, apart)
    assert [value.item() for value in fast] == pytest.approx(slow, abs=1e-12)


def test_fda_has_the_right_gradient():
    logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    pairs = paper.sample_pairs(1, 4, 16, "cpu")
    for part in (0, 1):
        assert torch.autograd.gradcheck(
            lambda x, part=part: paper.fda_loss(x.log_softmax(-1), tokens, pairs, 0.1)[part], (logits,)
        )


def apart_of(logits: list, colors: list) -> float:
    scores, pairs = torch.tensor(logits, requires_grad=True), torch.tensor([0, 1]).view(2, 1, 1)
    apart = told_apart(scores.log_softmax(-1)[None], torch.tensor(colors)[None], pairs, 0.05)
    assert apart.shape == (1, 1) and not apart.requires_grad, "no gradient goes through the doubt"
    return float(apart)


def test_told_apart_are_pixels_that_may_be_two_and_differ_in_more_than_brightness():
    red_and_green = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]
    sure, unsure = [[6.0, 0.0], [5.0, 0.0]], [[0.6, 0.0], [0.0, 0.0]]
    p, q = torch.tensor(unsure).softmax(-1)
    assert apart_of(unsure, red_and_green) == pytest.approx(1 - float(p @ q), rel=1e-5)
    assert apart_of([[9.0, 0.0], [0.0, 9.0]], red_and_green) == pytest.approx(1, abs=1e-3)
    assert apart_of(sure, red_and_green) < 0.02, "one class of many looks is let be"
    assert apart_of(unsure, [[0.8, 0.6, 0.4], [0.4, 0.3, 0.2]]) < 1e-3, "and so is what lies in shadow"
    assert apart_of(unsure, [[0.0, 0.0, 0.0], [0.1, 0.8, 0.1]]) < 1e-3, "black has no colour"
    # Gray and a gray with a tinge of red: the sine of the angle between them times their length.
    gray, tinged = [0.5, 0.5, 0.5], [0.56, 0.5, 0.5]
    crossed = torch.linalg.cross(torch.tensor(gray), torch.tensor(tinged)).norm() ** 2
    distance = float(crossed / (torch.tensor(gray).norm() * torch.tensor(tinged).norm()))
    expected = (1 - float(p @ q)) * (1 - math.exp(-distance / (2 * 0.05**2)))
    assert apart_of(unsure, [gray, tinged]) == pytest.approx(expected, rel=1e-4) and 0.1 < expected < 0.4


def test_all_pairs_are_taken_when_they_fit_and_a_subset_when_not():
    every = paper.sample_pairs(2, 4, 16, "cpu")
    assert sorted(zip(*every[:, 1].tolist(), strict=True)) == [(a, b) for a in range(4) for b in range(4)]
    assert paper.sample_pairs(3, 100, 64, "cpu").shape == (2, 3, 64)


def test_rda_is_zero_only_for_equal_distributions():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert paper.rda_loss(logits, logits + 3).item() == pytest.approx(0, abs=1e-15)
    expected = sum(slow_js(p, q) for p, q in zip(logits.softmax(-1), logits.flip(0).softmax(-1), strict=True)) / 5
    assert paper.rda_loss(logits, logits.flip(0)).item() == pytest.approx(expected)


def test_rda_and_feature_loss_have_the_right_gradient():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: paper.rda_loss(x, y), (x,))
    assert torch.autograd.gradcheck(lambda x: paper.cosine_loss(x, y), (x,))


def test_feature_loss_is_one_minus_cosine():
    x, y = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [5.0, 5.0]])
    assert paper.cosine_loss(x, y).item() == pytest.approx((1 + 0) / 2)


def test_patch_loss_is_zero_when_blurred_features_give_the_patches_back():
    generator = torch.Generator().manual_seed(9)
    features = torch.randn(1, 4, 4, 5, generator=generator, dtype=torch.float64)
    rows = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.25, 0.5, 0.25]], dtype=torch.float64)
    cols = torch.tensor([[0, 1.0, 0, 0]], dtype=torch.float64)
    slow = torch.stack(
        [sum(r[i] * c[j] * features[0, i, j] for i in range(4) for j in range(4)) for r in rows for c in cols]
    )
    seen = Patches.joined([(rows, cols.expand(2, 4), 3 * slow)])
    windows = Windows(torch.zeros(16, 3), torch.zeros(1, 16, 2), seen, 4)
    assert patches.patch_loss(*patches.patch_distances([features.view(16, 5)], windows)).item() == pytest.approx(
        0, abs=1e-12
    )
    seen.coefficients = -seen.coefficients
    assert patches.patch_loss(*patches.patch_distances([features.view(16, 5)], windows)).item() == pytest.approx(2)


def test_an_aperture_weighs_the_centre_of_a_patch_as_a_gaussian_does():
    side, aperture = 12, 0.8
    low, high = torch.tensor([2.0, 0.0]), torch.tensor([8.0, 12.0])
    rows = (torch.arange(side)[None] >= low[:, None]) & (torch.arange(side)[None] < high[:, None])
    rows = rows / rows.sum(1, keepdim=True)
    rays = torch.randn(side * side, 5, generator=torch.Generator().manual_seed(0))
    embeddings = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    windows = Windows(torch.zeros(0, 3), torch.zeros(0), Patches.joined([(rows, rows, embeddings)]), side)
    slow = []
    for p in range(2):
        mean, centre, half = torch.zeros(5), (low[p] + high[p]) / 2, (high[p] - low[p]) / 2
        for i in range(int(low[p]), int(high[p])):
            for j in range(int(low[p]), int(high[p])):
                u, v = (i + 0.5 - centre) / half, (j + 0.5 - centre) / half
                mean += torch.exp(-aperture * (u**2 + v**2)) * rays[i * side + j]
        slow.append(1 - F.cosine_similarity(mean, embeddings[p], dim=0))
    assert torch.allclose(*patches.patch_distances([rays], windows, aperture), torch.stack(slow), atol=1e-5)


def test_windows_with_more_and_with_fewer_patches_do_not_mix():
    side = 6
    generator = torch.Generator().manual_seed(2)
    rays = torch.randn(3, side * side, 5, generator=generator)
    groups = []
    for count in (3, 0, 1):
        covered = torch.rand(2, count, side, generator=generator)
        groups.append((*(covered / covered.sum(-1, keepdim=True)), torch.randn(count, 5, generator=generator)))

    def distances(rays, groups):
        windows = Windows(torch.zeros(0, 3), torch.zeros(0), Patches.joined(groups), side)
        return patches.patch_distances([rays, rays.square()], windows, 0.7)

    together = distances(rays.flatten(0, 1), groups)
    alone = [distances(part, [group]) for part, group in zip(rays, groups, strict=True)]
    for answer, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert len(answer) == 4 and torch.allclose(answer, torch.cat(parts), atol=1e-6)


def test_unmixing_counts_for_little_where_classes_cannot_explain_a_patch():
    features = torch.tensor([0.05, 0.05, 0.05])
    classes = torch.tensor([0.04, 0.05, 0.5], requires_grad=True)
    patches.unmixing_loss(classes, features).backward()
    known, equal, unknown = (3 * classes.grad).tolist()
    assert known == pytest.approx(1) and equal == pytest.approx(1) and unknown == pytest.approx((0.051 / 0.501) ** 4)
    assert patches.unmixing_loss(torch.zeros(0), torch.zeros(0)) == patches.patch_loss(torch.zeros(0)) == 0


def slow_color_loss(p, colors, bandwidth, seen, side):
    total, pairs = 0.0, 0
    for window in range(len(p)):
        for y, x in [(y, x) for y in range(side) for x in range(side)]:
            for down, right in color.NEIGHBOURS:
                if y + down < side and 0 <= x + right < side:
                    a, b = y * side + x, (y + down) * side + x + right
                    alike = math.exp(-(colors[window, a] - colors[window, b]).square().sum() / (2 * bandwidth**2))
                    counts = bool(seen[window, a] and seen[window, b])
                    total, pairs = total + counts * alike * slow_js(p[window, a], p[window, b]), pairs + 1
    return total / pairs


def test_color_loss_is_its_formula_and_its_gradient_is_right():
    log_p = distributions(2, 16, 3)
    generator = torch.Generator().manual_seed(2)
    colors = torch.rand(2, 16, 3, generator=generator, dtype=torch.float64) / 5
    seen = torch.rand(2, 16, generator=generator) < 0.7
    everything = torch.ones_like(seen)
    for mask, given in ((seen, seen), (everything, None)):
        expected = slow_color_loss(log_p.exp(), colors, 0.1, mask, 4)
        assert color.color_loss(log_p, colors, 0.1, given).item() == pytest.approx(expected, abs=1e-12)
    logits = torch.randn(1, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: color.color_loss(x.log_softmax(-1), colors[:1, :9], 0.1), logits)


def test_color_loss_lets_classes_change_where_colors_do_and_nowhere_else():
    labels = (torch.arange(16) % 4 >= 2).long()
    log_p = (20 * F.one_hot(labels, 2).float()).log_softmax(-1)[None]
    edge, plain = labels[None, :, None].expand(1, 16, 3).float(), torch.zeros(1, 16, 3)
    assert color.color_loss(log_p, edge, 0.05) < 1e-6 < 0.1 < color.color_loss(log_p, plain, 0.05)
    assert color.color_loss(log_p[:, :1], plain[:, :1], 0.05) == 0  # a single ray has no neighbour


def test_the_depth_loss_is_the_weight_that_lies_elsewhere():
    edges = torch.rand(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(-1)
    weights = distributions(5, 8).exp() * 0.9  # a tenth of each ray goes on
    distances = edges[:, 0] + torch.rand(5, generator=torch.Generator().manual_seed(1)) * (edges[:, -1] - edges[:, 0])
    elsewhere = []
    for ray, along, distance in zip(weights.tolist(), edges.tolist(), distances.tolist(), strict=True):
        samples = zip(ray, along[:-1], along[1:], strict=True)
        there = sum(w for w, start, end in samples if start <= 1.05 * distance and end >= 0.95 * distance)
        elsewhere.append(1 - there)
    loss = depth_loss(weights, edges[:, :-1], edges[:, 1:], distances, tolerance=0.05)
    assert loss.item() == pytest.approx(sum(elsewhere) / 5) and 0.1 < loss.item() < 1


def test_no_ray_pulls_harder_than_others_in_the_depth_loss():
    """A wrong distance must not outweigh many right ones."""
    weights = torch.tensor([[0.999, 0.001], [0.001, 0.999]], requires_grad=True)
    edges = torch.tensor([[0.0, 1, 2]]).expand(2, -1)
    depth_loss(weights, edges[:, :-1], edges[:, 1:], torch.tensor([0.5, 0.5])).backward()
    assert weights.grad.tolist() == [[-0.5, 0], [-0.5, 0]]
