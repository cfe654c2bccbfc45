"""`ovs3d preview`: a sheet of the right shape, and hints that say what is the matter."""

import json

import numpy as np
import pytest
from conftest import command
from PIL import Image

from ovs3d_nerfstudio.cli.sheet import CELL_HEIGHT, PreviewedView, contact_sheet, relevancy
from ovs3d_nerfstudio.prompts.palette import palette


def test_relevancy_fills_the_range_of_each_prompt():
    stretched = relevancy(np.random.default_rng(0).normal(size=(6, 5, 3)))
    assert np.allclose(stretched.min((0, 1)), 0) and np.allclose(stretched.max((0, 1)), 1)
    assert not relevancy(np.full((2, 2, 1), 0.3)).any()


def test_the_winner_is_painted_in_the_colour_of_its_prompt():
    maps = np.zeros((2, 2, 2))
    maps[:, 1, 1] = 1
    view = PreviewedView("p", np.zeros((72, 96, 3), np.uint8), [maps])
    sheet = contact_sheet([view], ["a", "b"], palette(2), [5.0], np.array([0.5, 0.5]))
    winner = sheet[34 + CELL_HEIGHT + 4 :][:CELL_HEIGHT, -168:-8]
    expected = (palette(2) * 255).round()
    assert np.array_equal(winner[60, 20], expected[0]) and np.array_equal(winner[60, 140], expected[1])


@pytest.mark.slow
def test_preview_shows_views_prompts_and_scales(scene, tmp_path):
    words = [
        "ovs3d",
        "preview",
        "--data",
        scene,
        "--method",
        "ovs3d-lite",
        "--feature-cache-dir",
        tmp_path / "cache",
        "--views",
        2,
    ]
    words += [
        "--scales",
        3,
        5,
        "--output-path",
        tmp_path / "out" / "p.png",
        "--prompts",
        "cat; kitten; espresso; books",
    ]
    assert "Contact sheet" in command(*words, cwd=tmp_path).stdout
    said = json.loads((tmp_path / "out" / "p.json").read_text())
    assert len(said["views"]) == 2 and abs(sum(said["shares"].values()) - 1) < 1e-6
    assert all(f"'{prompt}'" in " ".join(said["hints"]) for prompt, share in said["shares"].items() if share < 0.005)
    sheet = Image.open(tmp_path / "out" / "p.png")
    assert sheet.height == 34 + 6 * 124 and sheet.width == 26 * 15 + 2 * (2 * 164 + 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, said", [(["--views", 0], "--views 0"), (["--prompts", "a", "--prompts-file", "b"], "only one of them")]
)
def test_preview_ends_a_users_mistake_with_a_sentence(scene, ovs3d, words, said):
    status, printed = ovs3d("preview", "--data", scene, "--method", "ovs3d-lite", *words)
    assert status == 1 and said in printed
