"""Questions and their answers: probabilities, labels and pictures, whoever asks."""

import pytest
import torch

from ovs3d_nerfstudio.prompts.answers import Answering, Answers, Question, packed
from ovs3d_nerfstudio.prompts.segmentation import Segmenter
from ovs3d_nerfstudio.viewer.live import FeatureCache
from ovs3d_nerfstudio.viewer.panel import legend


def plain_question(prompts: int = 3, negatives: int = 2, **answering) -> Question:
    torch.manual_seed(0)
    segmenter = Segmenter()
    unit = torch.nn.functional.normalize
    basis = torch.linalg.qr(torch.randn(8, 5)).Q
    words = [f"word {i}" for i in range(prompts)]
    segmenter.configure(words, unit(torch.randn(prompts, 8), dim=-1), basis, torch.randn(50, 5), "none", "none")
    return Question(segmenter, Answering(**answering), unit(torch.randn(negatives, 8), dim=-1))


def test_a_prompt_is_weighed_against_each_negative_by_itself():
    question = plain_question(mode="threshold", temperature=0.7)
    directions = torch.nn.functional.normalize(torch.randn(40, 5), dim=-1)
    z, other = directions @ question.text, directions @ question.others
    pairs = torch.stack([z[:, :, None].expand(-1, -1, 2), other[:, None].expand(-1, 3, -1)], -1)
    slow = (pairs / question.temperature).softmax(-1)[..., 0].amin(-1)
    assert torch.allclose(question.probabilities(directions), slow, atol=1e-6)
    labels = question.labels(directions)
    assert {-1, 0, 1, 2} >= set(labels.tolist()) and (labels == -1).any() and (labels >= 0).any()
    assert torch.equal(labels >= 0, slow.amax(-1) >= 0.5)


def test_what_belongs_to_no_prompt_keeps_its_colour_in_the_overlay():
    question = plain_question(mode="threshold", opacity=1.0)
    directions = torch.nn.functional.normalize(torch.randn(6, 4, 5), dim=-1)
    answers = Answers(question, directions, torch.rand(6, 4, 3), torch.rand(6, 4, 3))
    none = answers.labels < 0
    assert torch.equal(answers["segmentation_overlay"][none], answers.rgb[none])
    assert (answers["segmentation"][none] == 0).all() and answers["segmentation"].shape == (6, 4, 3)


@pytest.mark.parametrize("mode", ["argmax", "threshold"])
@pytest.mark.parametrize("pack", [False, True])
def test_where_there_is_nothing_there_is_no_class(mode, pack):
    question = plain_question(mode=mode, threshold=0.0, opacity=1.0)
    directions = torch.nn.functional.normalize(torch.randn(6, 4, 5), dim=-1)
    directions[2:5, 1] = 0
    nothing = (directions == 0).all(-1)
    answers = Answers(question, packed(directions) if pack else directions, torch.rand(6, 4, 3), torch.rand(6, 4, 3))
    assert torch.equal(answers.labels < 0, nothing)
    for name in ("segmentation", "segmentation_overlay", "features_pca"):
        assert torch.equal((answers[name] == answers.rgb).all(-1), nothing), name
    assert all((answers[name][nothing] == 0).all() for name in question.names)
    assert all(answers[name].isfinite().all() for name in answers)


def test_probabilities_of_the_argmax_are_those_of_a_softmax_and_may_be_shown():
    question = plain_question(normalise=False, temperature=2.0)
    directions = torch.nn.functional.normalize(torch.randn(9, 5), dim=-1)
    answers = Answers(question, directions, torch.rand(9, 2), torch.rand(9, 3))
    shown = torch.cat([answers[name] for name in question.names], -1)
    assert torch.allclose(shown, (directions @ question.text / question.temperature).softmax(-1))
    assert torch.equal(shown.argmax(-1), answers.labels)


def test_features_that_outgrow_their_room_are_let_go_the_oldest_first():
    cache, made = FeatureCache(kept_bytes=100), []
    render = lambda: made.append(1) or {"directions": torch.zeros(10)}  # noqa: E731
    for view in ("a", "b", "c"):
        cache.get("weights", view, render)
    assert len(made) == 3
    cache.get("weights", "c", render), cache.get("weights", "b", render)
    assert len(made) == 3
    cache.get("weights", "a", render)
    assert len(made) == 4


def test_prompts_in_the_legend_are_never_code():
    hostile = ["{1+1}", '"}<img src=x onerror=alert(1)>', "![a](/etc/passwd)", "`x`", "a | b", "🦔 שלום\\"]
    text = legend(hostile, [[0, 0.5, 1]] * len(hostile), [0.1] * len(hostile))
    assert text.isascii() and "![" not in text and "onerror" in text and "<img" not in text and "`" not in text
    assert "#0080ff" in text and text.count("<tr>") == 7
