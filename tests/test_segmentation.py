"""From coefficients to classes: what prompts are compared by, and in which units their temperature is."""

import pytest
import torch
import torch.nn.functional as F

from ovs3d_nerfstudio.answers import Question
from ovs3d_nerfstudio.segmentation import Segmenter

TRAINED = ["apple", "table"]


def segmenter_of(by: str = "cosine") -> Segmenter:
    """A scene of three things in six dimensions, one axis each; two of them are the training's prompts."""
    torch.manual_seed(0)
    segmenter, axes = Segmenter(), torch.eye(6)
    sample = axes[torch.randint(3, (3000,))] + 0.05 * torch.randn(3000, 6)
    # The encoder hardly answers to the table, wherever it looks.
    table = F.normalize(0.2 * axes[1] + axes[4], dim=0)
    segmenter.configure(TRAINED, torch.stack([axes[0], table]), torch.eye(6), sample, "none", "none", by)
    return segmenter


def test_by_relevancies_a_prompt_the_encoder_hardly_answers_to_has_its_place():
    segmenter = segmenter_of()
    apple, table, third = torch.eye(6)[:3]
    assert segmenter.class_scores(segmenter.similarities(table), "relevancy").argmax() == 1
    assert segmenter.class_scores(segmenter.similarities(apple), "relevancy").argmax() == 0
    between = segmenter.similarities(0.4 * apple + table)
    assert segmenter.class_scores(between, "cosine").argmax() == 0, "by cosines the apple takes the table"
    assert segmenter.class_scores(between, "relevancy").argmax() == 1


def test_a_prompt_of_what_is_not_there_is_not_stretched_until_it_is_found():
    segmenter, axes = segmenter_of(), torch.eye(6)
    before = segmenter.range.clone()
    elephant = F.normalize(0.1 * axes[2] + axes[5], dim=0)  # varies a little over the scene, as anything does
    segmenter.ask(["elephant", "cup", "apple"], torch.stack([elephant, axes[2], axes[0]]))
    scores = segmenter.class_scores(segmenter.similarities(segmenter.sample), "relevancy")
    assert scores[:, 0].quantile(0.99) < 0.5, "the elephant is nowhere"
    assert scores[:, 1].quantile(0.99) > 0.95, "the cup was no training prompt, and is there"
    torch.testing.assert_close(segmenter.range[:, 2], before[:, 0], msg="a prompt of the training keeps its range")
    segmenter.ask(TRAINED, segmenter_of().text)
    torch.testing.assert_close(segmenter.range, before, msg="and so do all of them when they are asked again")


@pytest.mark.parametrize("by", ["cosine", "relevancy"])
def test_the_spread_is_of_what_classes_are_compared_by(by):
    segmenter = segmenter_of(by)
    scores = segmenter.class_scores(segmenter.similarities(segmenter.sample), by)
    assert float(segmenter.spread) == pytest.approx(float(scores.std(-1).mean()), rel=1e-5)
    assert Question(segmenter, by).temperature == pytest.approx(float(segmenter.spread), rel=1e-5)


def test_one_class_or_none_spreads_by_one():
    for count in (0, 1):
        segmenter = Segmenter()
        segmenter.configure([f"{i}" for i in range(count)], torch.eye(3)[:count], torch.eye(3), torch.eye(3), "", "")
        assert float(segmenter.spread) == 1
