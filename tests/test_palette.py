"""Promises of `palette.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovs3d_nerfstudio.prompts.palette import class_color, colorize, colors_for, legend, palette, save_legend

words = st.lists(st.text("abcdefgh", min_size=1, max_size=3), max_size=40, unique=True)


def test_the_first_thirty_colours_are_told_apart_also_by_the_colour_blind():
    color = pytest.importorskip("skimage.color")
    # Machado et al. 2009, severity 1, on linear sRGB.
    sights = {
        "normal": np.eye(3),
        "deuteranopia": np.array(
            [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
        ),
        "protanopia": np.array(
            [
                [0.152286, 1.052583, -0.204868],
                [0.114503, 0.786281, 0.099216],
                [-0.003882, -0.048116, 1.051998],
            ]
        ),
    }
    colors = np.concatenate([palette(30), np.zeros((1, 3))]).astype(np.float64)
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    for sight, matrix in sights.items():
        seen = (linear @ matrix.T).clip(0, 1)
        seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab = color.rgb2lab(seen[None])[0]
        distance = color.deltaE_ciede2000(lab[:, None], lab[None]) + 1e3 * np.eye(31)
        assert distance[:12, :12].min() > 11.5, sight
        assert distance.min() > 7.9, sight


def test_five_hundred_colours_all_differ_on_a_screen_and_none_is_black():
    colors = (palette(500) * 255).round().astype(int)
    assert len(np.unique(colors, axis=0)) == 500
    assert colors.max(axis=1).min() > 60


def test_the_palette_is_a_prefix_of_a_longer_one():
    assert np.array_equal(palette(40)[:25], palette(25))
    assert palette(0).shape == (0, 3)
    assert palette(3).dtype == np.float32
    assert np.allclose(palette(40)[39], class_color(39))


@settings(max_examples=150, deadline=None)
@given(words, words, st.randoms(use_true_random=False))
def test_a_trained_prompt_keeps_its_colour_wherever_it_stands(trained, others, random):
    prompts = list(dict.fromkeys(trained + others))
    random.shuffle(prompts)
    colors = colors_for(prompts, trained)
    for prompt, color in zip(prompts, colors, strict=True):
        if prompt in trained:
            assert np.array_equal(color, palette(len(trained))[trained.index(prompt)])


@settings(max_examples=150, deadline=None)
@given(words, words, words)
def test_adding_prompts_behind_recolours_none_and_all_colours_differ(trained, prompts, more):
    before = colors_for(prompts, trained)
    after = colors_for(list(dict.fromkeys(prompts + more)), trained)
    assert np.array_equal(before, after[: len(prompts)])
    assert len(np.unique(after, axis=0)) == len(after)


def test_new_prompts_are_told_apart_from_all_colours_in_use_at_a_glance():
    color = pytest.importorskip("skimage.color")
    trained = [f"class {i}" for i in range(7)]
    for new in (["placemat", "zebra"], ["dog", "tea", "sky", "grass"], ["cup"]):
        lab = color.rgb2lab(colors_for([*trained, *new], trained)[None].astype(float))[0]
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e3 * np.eye(len(lab))
        assert apart[7:].min() > 30, new


def test_the_colour_of_a_new_prompt_depends_on_its_text_not_on_its_place_or_case():
    trained = ["grass", "sheep"]
    alone = colors_for(["lamp"], trained)[0]
    assert np.array_equal(alone, colors_for(["sheep", "LAMP", "grass"], trained)[1])
    # A known colour: the hash must not depend on the process, the machine or the version of Python.
    assert "".join(f"{round(255 * float(c)):02X}" for c in alone) == "00E1A5"
    assert not any(np.array_equal(alone, color) for color in palette(2))


def test_two_hundred_new_prompts_get_two_hundred_colours():
    colors = colors_for([f"thing {i}" for i in range(200)], ["a", "b"])
    assert len(np.unique((colors * 255).round(), axis=0)) == 200


def test_labels_are_painted_alike_as_array_and_tensor_and_unlabelled_is_black():
    labels = np.array([[0, 1, -1], [2, -1, 0]])
    colors = palette(3)
    painted = colorize(labels, colors)
    assert painted.shape == (2, 3, 3) and painted.dtype == np.float32
    assert np.array_equal(painted[0, 2], [0, 0, 0]) and np.array_equal(painted[1, 0], colors[2])
    tensor = colorize(torch.from_numpy(labels), colors)
    assert tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), painted)
    assert np.array_equal(colorize(labels, torch.from_numpy(colors)), painted)
    with pytest.raises(IndexError):
        colorize(np.array([3]), colors)
    assert colorize(torch.full((2, 2), -1), palette(0)).sum() == 0


def test_a_legend_shows_every_colour_and_grows_by_columns():
    prompts = [f"class {i}" for i in range(30)]
    picture = legend(prompts, palette(30), max_rows=10)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    shown = {tuple(color) for color in np.unique(picture.reshape(-1, 3), axis=0).tolist()}
    assert {tuple(color) for color in (palette(30) * 255).round().astype(int).tolist()} <= shown
    assert legend(prompts[:20], palette(20), max_rows=10).shape[0] == picture.shape[0]
    assert legend(prompts[:20], palette(20), max_rows=10).shape[1] < picture.shape[1]


def test_a_legend_survives_any_script_and_any_length():
    prompts = ["桌子", "椅子", "أريكة", "стол", "🪑 émoji", "x" * 300]
    picture = legend(prompts, torch.from_numpy(palette(6)))
    assert picture.shape[1] < 1000
    # No two rows of characters without a font look alike: the escapes differ.
    first, second = legend(prompts[:1], palette(1)), legend(prompts[1:2], palette(1))
    assert first.shape != second.shape or not np.array_equal(first, second)
    assert legend([], palette(0)).size > 0


def test_a_legend_with_too_few_colours_is_refused():
    with pytest.raises(ValueError, match="2 prompts and 1 colours"):
        legend(["a", "b"], palette(1))


def test_a_saved_legend_is_the_drawn_one(tmp_path):
    path = tmp_path / "new" / "legend.png"
    save_legend(path, ["grass"], palette(1))
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), legend(["grass"], palette(1)))
