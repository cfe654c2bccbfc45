"""From coefficients to classes: what prompts are compared by, and in which units their temperature is."""

import pytest
import torch
import torch.nn.functional as F

from ovs3d_nerfstudio.prompts.answers import Answering, Answers, Question
from ovs3d_nerfstudio.prompts.likes import Like
from ovs3d_nerfstudio.prompts.segmentation import ClassScores, Segmenter, at_home, chosen_scores
from ovs3d_nerfstudio.prompts.shown import Shown

TRAINED = ["apple", "table"]


def segmenter_of(scores: ClassScores = "cosine") -> Segmenter:
    """A scene of three things in six dimensions, one axis each; two of them are the training's prompts."""
    torch.manual_seed(0)
    segmenter, axes = Segmenter(), torch.eye(6)
    sample = axes[torch.randint(3, (3000,))] + 0.05 * torch.randn(3000, 6)
    # The encoder hardly answers to the table, wherever it looks.
    table = F.normalize(0.1 * axes[1] + axes[4], dim=0)
    segmenter.configure(TRAINED, torch.stack([axes[0], table]), torch.eye(6), sample, "none", "none", scores)
    return segmenter


@pytest.mark.parametrize("by", ["centred", "relevancy"])
def test_a_prompt_the_encoder_hardly_answers_to_has_its_place(by):
    cosine, other = segmenter_of("cosine"), segmenter_of(by)
    apple, table = torch.eye(6)[:2]

    def label(segmenter: Segmenter, features: torch.Tensor) -> int:
        return int(segmenter.class_scores(segmenter.similarities(features)).argmax())

    assert (label(other, apple), label(other, table)) == (0, 1)
    between = 0.4 * apple + table
    assert label(cosine, between) == 0, "by cosines the apple takes the table"
    assert label(other, between) == 1


def test_centred_a_prompt_that_is_near_to_everything_takes_no_other_place():
    """The encoder is by 0.4 nearer to the table than to the apple, whatever it sees."""
    axes = torch.eye(6)
    sample = F.normalize(axes[torch.randint(2, (3000,), generator=torch.Generator().manual_seed(0))] + axes[4], dim=-1)
    text = torch.stack([F.normalize(axes[0], dim=0), F.normalize(axes[1] + axes[4], dim=0)])
    labels = {}
    for by in ("cosine", "centred"):
        segmenter = Segmenter()
        segmenter.configure(TRAINED, text, torch.eye(6), sample, "none", "none", by)
        at_an_apple = F.normalize(0.7 * axes[0] + 0.3 * axes[1] + axes[4], dim=0)
        labels[by] = int(segmenter.class_scores(segmenter.similarities(at_an_apple)).argmax())
    assert labels == {"cosine": 1, "centred": 0}


@pytest.mark.parametrize("by", ["centred", "relevancy"])
def test_a_prompt_of_what_is_not_there_is_not_stretched_until_it_is_found(by):
    segmenter, axes = segmenter_of(by), torch.eye(6)
    before = segmenter.range.clone()
    elephant = F.normalize(0.1 * axes[2] + axes[5], dim=0)  # varies a little over the scene, as anything does
    segmenter.ask(["elephant", "cup", "apple"], torch.stack([elephant, axes[2], axes[0]]))
    scores = segmenter.class_scores(segmenter.similarities(segmenter.sample))
    assert scores[:, 0].quantile(0.99) < (0.5 if by == "relevancy" else 0), "the elephant is nowhere"
    assert scores[:, 1].quantile(0.99) > (0.95 if by == "relevancy" else 0.4), (
        "the cup was no training prompt, and is there"
    )
    torch.testing.assert_close(segmenter.range[:, 2], before[:, 0], msg="a prompt of the training keeps its range")
    segmenter.ask(["Apple", " TABLE"], segmenter_of().text)
    torch.testing.assert_close(segmenter.range, before, msg="and so do all of them when asked again, however spelled")


@pytest.mark.parametrize("by", ["cosine", "centred", "relevancy"])
def test_the_spread_is_of_what_classes_are_compared_by(by):
    segmenter = segmenter_of(by)
    scores = segmenter.class_scores(segmenter.similarities(segmenter.sample))
    assert float(segmenter.spread) == pytest.approx(float(scores.std(-1).mean()), rel=1e-5)
    assert Question(segmenter).temperature == pytest.approx(float(segmenter.spread), rel=1e-5)


@pytest.mark.parametrize(
    ("bias", "wins", "chosen"), [(0.2, 1.0, "cosine"), (0.945, 0.6, "centred"), (1.2, 0.0, "centred")]
)
def test_cosines_are_centred_where_a_prompt_loses_its_own_place(bias, wins, chosen):
    """Cups cover a twentieth of the scene, of which the most like one has 1, the next 0.99 and so on; and the encoder is nearer to
    the other prompt by `bias`, whatever it sees."""
    cups = 1 - 0.01 * torch.arange(50.0)  # ten of them are a hundredth of the scene
    similarities = torch.zeros(1000, 2)
    similarities[:50, 0] = cups
    similarities[:, 1] = bias
    similarities[50:, 1] += 1
    assert at_home(similarities).tolist() == pytest.approx([wins, 1.0])
    assert chosen_scores("auto", similarities) == chosen
    assert chosen_scores("relevancy", similarities) == "relevancy", "what is asked for is not chosen"


def test_one_prompt_or_none_has_none_to_lose_to():
    assert {chosen_scores("auto", torch.zeros(5, n)) for n in (0, 1)} == {"cosine"}
    assert at_home(torch.zeros(0, 3)).tolist() == [1, 1, 1], "nor has any where nothing is seen"


def test_a_checkpoint_tells_what_was_chosen():
    trained, loaded = segmenter_of("relevancy"), Segmenter()
    loaded.load_state_dict(trained.state_dict())
    assert loaded.scores == "relevancy"
    state = trained.get_extra_state()
    with pytest.raises(ValueError, match="'votes'"):
        loaded.set_extra_state({**state, "class_scores": "votes"})
    older = Segmenter()
    older.scores = "relevancy"  # by its config, as that of a run whose checkpoint does not say it
    older.set_extra_state({name: value for name, value in state.items() if name != "class_scores"})
    assert older.scores == "relevancy"


def test_one_class_or_none_spreads_by_one():
    for count in (0, 1):
        segmenter = Segmenter()
        segmenter.configure([f"{i}" for i in range(count)], torch.eye(3)[:count], torch.eye(3), torch.eye(3), "", "")
        assert float(segmenter.spread) == 1


@pytest.mark.parametrize("by", ["cosine", "centred", "relevancy"])
def test_a_prompt_without_words_has_what_is_like_it_and_words_keep_the_rest(by):
    """Features are far more like each other than like any words, and still neither takes the other's place."""
    segmenter, axes = segmenter_of(by), torch.eye(6)
    cup = segmenter.gathered(F.normalize(axes[2] + 0.2 * axes[5], dim=0))  # clicked at its rim
    assert float(cup @ axes[2]) > 0.99, "the middle of what is like it"
    things = F.normalize(axes[:3] + 0.1 * torch.randn(200, 1, 6), dim=-1)
    before = Question(segmenter).labels(things.view(-1, 6)).view(200, 3)
    segmenter.ask([*TRAINED, Like("like 1", cup.tolist(), "none")], torch.stack([*segmenter.text, cup]))
    labels = Question(segmenter).labels(things.view(-1, 6)).view(200, 3)
    assert torch.equal(labels[:, :2], before[:, :2]) and (labels[:, 2] == 2).all()
    threshold = Question(segmenter, Answering("threshold"), 0.1 * axes[3:4] + 0.3 * axes[:1])
    assert (threshold.labels(things[:, 2]) == 2).all() and (threshold.labels(things[:, 1]) != 2).all()
    segmenter.ask(["like 1"], cup[None])
    assert not segmenter.wordless, "the same name typed is words"
    segmenter.ask([Like("like 1", cup.tolist(), "none")], cup[None])
    assert Question(segmenter).labels(things[:, 0]).tolist() == [0] * 200, "alone it fits best everywhere"


def test_what_is_hidden_has_no_label_and_where_it_stood_there_is_nothing_to_see():
    segmenter, axes = segmenter_of(), torch.eye(6)
    apple, between = axes[0], F.normalize(axes[0] + 0.05 * axes[1], dim=0)
    rays = torch.stack([apple, between, axes[4]])
    everything = Question(segmenter)
    assert everything.kept is None and everything.hiding is None and everything.keeps(rays).all()
    question = Question(segmenter, shown=Shown(without=("APPLE",)))
    assert question.keeps(rays).tolist() == [False, False, True]
    left = torch.stack([apple, torch.zeros(6), axes[4]])  # rendered without the apple: behind it is nothing
    answers = Answers(question, left[:, None], torch.ones(3, 1, 1), torch.rand(3, 1, 3))
    assert answers.labels[:, 0].tolist() == [1, -1, 1], (
        "at the border of two things that are shown, a third may fit best"
    )
    assert torch.equal(answers["segmentation"][1], answers.rgb[1]) and (answers["relevancy_apple"][1] == 0).all()
    assert torch.equal(answers["segmentation_overlay"][1], answers.rgb[1])
    again = Question(segmenter, Answering(opacity=0.1), shown=Shown(without=("apple",)))
    assert again.hiding == question.hiding is not None, "opacity hides nothing"
    only = Question(segmenter, Answering("threshold", threshold=0.9), axes[5:], Shown(only=("apple",)))
    assert only.keeps(torch.stack([apple, axes[5], axes[4]])).tolist() == [True, False, False], "none is not the apple"
    assert len({question.hiding, only.hiding, Question(segmenter, shown=Shown(only=("apple",))).hiding}) == 3
