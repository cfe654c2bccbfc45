"""Hints on a list of prompts: what is wrong is told, and what is right is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ovs3d_nerfstudio.prompts.hints import NEAREST, Standing, hints, says_less, standing


def win_shares(similarities: torch.Tensor) -> torch.Tensor:
    return torch.bincount(similarities.argmax(-1), minlength=similarities.shape[1]) / len(similarities)


def fine(count: int) -> Standing:
    """Prompts that everything speaks for."""
    return Standing(torch.eye(count), torch.ones(count), torch.ones(count))


@pytest.fixture
def cells() -> torch.Tensor:
    """Similarities with wall, lamp, light and boat: light is as lamp, and boat is nowhere."""
    torch.manual_seed(0)
    wall, lamp = torch.randn(1000), torch.randn(1000)
    return torch.stack([wall, lamp, lamp + 0.1 * torch.randn(1000), wall * 0.5 - 5], -1)


def test_hints_name_what_never_wins_and_what_is_the_same(cells):
    never, wall_twin, lamp_twin = hints(["wall", "lamp", "light", "boat"], cells, win_shares(cells), fine(4))
    assert "'boat' wins almost nowhere" in never and "'wall' fits better" in never
    assert "'wall' and 'boat'" in wall_twin and "'lamp' and 'light'" in lamp_twin
    assert hints(["wall", "lamp"], cells[:, :2], win_shares(cells[:, :2]), fine(2)) == []


def test_nonsense_and_what_is_not_there_are_told_however_much_they_win(cells):
    known = Standing(torch.eye(2), torch.tensor([0.0, 0.5]), torch.tensor([0.1, 0.1]))
    nonsense, absent = hints(["qwxyz", "zebra"], cells[:, :2], torch.tensor([0.25, 0.75]), known)
    assert "'qwxyz' is like no word" in nonsense and "25.0%" in nonsense
    assert "'zebra' wins 75.0%, but fits nothing" in absent
    # A rare word that fits what it wins better than most words do is one that the encoder knows.
    known = Standing(torch.eye(2), torch.tensor([0.0, 0.5]), torch.tensor([0.9, 0.9]))
    assert hints(["espresso", "lamp"], cells[:, :2], torch.tensor([0.25, 0.75]), known) == []


def test_a_small_thing_is_not_called_absent_where_it_stands_out(cells):
    shares = torch.tensor([0.985, 0.015])
    known = Standing(torch.eye(2), torch.ones(2), torch.tensor([0.9, 0.95]))
    assert hints(["wall", "tennis ball"], cells[:, :2], shares, known) == []
    known = Standing(torch.eye(2), torch.ones(2), torch.tensor([0.9, 0.3]))
    (said,) = hints(["wall", "tennis ball"], cells[:, :2], shares, known)
    assert "'tennis ball' hardly wins" in said


def test_near_synonyms_are_told_by_their_text_and_where_they_are(cells):
    kept = torch.stack([cells[:, 0], cells[:, 0] + cells[:, 1]], -1)  # correlation 0.7
    near = Standing(torch.tensor([[1.0, 0.6], [0.6, 1.0]]), torch.ones(2), torch.ones(2))
    (said,) = hints(["cat", "kitten"], kept, win_shares(kept), near)
    assert "'cat' and 'kitten' are nearly the same" in said
    assert hints(["cat", "dog"], kept, win_shares(kept), fine(2)) == []


@pytest.mark.parametrize(
    ("one", "other", "less"),
    [
        ("table", "wooden table", True),
        ("Bulldozer", "lego bulldozer", True),
        ("apple", "apple tree", False),
        ("red mug", "mug", False),
        ("cat", "cat", False),
        ("white table", "wooden table", False),
    ],
)
def test_a_name_with_words_left_out_is_the_same_thing(one, other, less):
    assert says_less(one, other) == less


def test_a_single_prompt_is_told_of_the_threshold():
    (said,) = hints(["cat"], torch.randn(50, 1), torch.ones(1), fine(1))
    assert "'cat' alone" in said and "threshold" in said


def test_standing_is_a_place_among_everyday_words():
    torch.manual_seed(0)
    # Words lie in a plane, and a prompt off it is like none of them.
    words = F.normalize(torch.cat([torch.randn(60, 2), 0.01 * torch.randn(60, 6)], -1), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1.0]]), dim=-1)
    cells = F.normalize(text[:1] + 0.1 * torch.randn(500, 8), dim=-1)
    known = standing(text, words, cells @ text.T, cells @ words.T)
    assert len(words) > NEAREST and known.strange[0] > 0.2 and known.strange[1] == 0
    assert known.fits[0] > 0.9 and known.fits[1] < 0.5
    assert torch.allclose(known.likeness.diagonal(), torch.ones(2), atol=1e-5)
