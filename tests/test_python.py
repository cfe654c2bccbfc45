"""A run from Python: what it answers is what its pictures show, in the coordinates of the data, for several threads at once."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import answers_are_those_of_its_pictures, pinhole, the_catalogue_is_whole, the_files_listed
from nerfstudio.cameras.cameras import Cameras

import ovs3d_nerfstudio as ovs3d
from ovs3d_nerfstudio.engine.option_checks import OptionError
from ovs3d_nerfstudio.errors import UserError, errors_raised, user_errors
from ovs3d_nerfstudio.objects.thumbnails import LONGER_SIDE, crops
from ovs3d_nerfstudio.prompts.prompts import PromptError
from ovs3d_nerfstudio.prompts.segmentation import alike
from ovs3d_nerfstudio.run import RunError


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "nerfstudio", "numpy")
    code = f"import sys, ovs3d_nerfstudio; sys.exit(bool(set({heavy}) & set(sys.modules)) or not ovs3d_nerfstudio.__version__)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_lends_what_it_says():
    assert set(ovs3d.__all__) <= set(dir(ovs3d)) and all(getattr(ovs3d, name) for name in ovs3d.__all__)
    assert ovs3d.UserError is UserError
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        ovs3d.load_runs  # noqa: B018


def test_errors_end_a_command_and_are_raised_to_a_program(capsys):
    with pytest.raises(SystemExit), user_errors():
        raise RunError("no")
    with pytest.raises(RunError), errors_raised(), user_errors():
        raise RunError("no")
    with pytest.raises(FileNotFoundError), errors_raised(), user_errors():
        Path("nowhere").read_bytes()
    with pytest.raises(SystemExit), user_errors(), errors_raised(), user_errors():
        raise RunError("the outermost decides")
    assert "the outermost decides" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_what_is_no_run_is_said(tmp_path, place):
    with pytest.raises(UserError, match="does not exist"):
        ovs3d.load_run(tmp_path / place)


def test_prompts_that_vary_alike_over_a_scene_are_named():
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows, rows[:, 1:2] * 3 + 0.1 * rows[:, :1]], 1)
    ((one, other, correlation),) = alike(rows)
    assert (one, other) == (1, 3) and 0.95 < correlation < 1


def looking_at(origins: np.ndarray) -> Cameras:
    """Cameras that look along −z, 100 × 80 pixels."""
    poses = torch.eye(4)[:3].repeat(len(origins), 1, 1)
    poses[:, :, 3] = torch.from_numpy(origins)
    return Cameras(poses, 100.0, 100.0, 50.0, 40.0, 100, 80)


def test_a_thumbnail_shows_the_object_from_where_it_is_not_hidden():
    rng = np.random.default_rng(0)
    thing = rng.uniform(-0.1, 0.1, (300, 3)) + np.array([0, 0, -5])
    wall = np.stack([*rng.uniform(-0.4, 0.4, (2, 20_000)), np.full(20_000, -2.0)], -1)
    positions = np.concatenate([thing, wall])
    # The first looks at it through the wall, the second past it, the third away.
    cameras = looking_at(np.array([[0, 0, 0], [1.5, 0, 0], [30, 0, 0]]))
    (crop,) = crops(positions, [np.arange(300)], cameras)
    assert crop.camera_to_world[0, 3] == 1.5 and max(crop.size) == LONGER_SIDE
    there = (thing - crop.camera_to_world[:, 3]) * [1, -1, -1]
    pixels = there[:, :2] / there[:, 2:] * crop.intrinsics[[0, 1], [0, 1]] + crop.intrinsics[:2, 2]
    assert ((pixels > 0) & (pixels < crop.size)).all() and np.ptp(pixels[:, 0]) > 0.6 * crop.size[0]
    assert crops(positions + np.array([0, 0, 100]), [np.arange(300)], cameras) == [None]


@pytest.fixture(autouse=True)
def small_clouds(monkeypatch):
    monkeypatch.setattr("ovs3d_nerfstudio.run.CLOUD_POINTS", 20_000)


@pytest.fixture(scope="module")
def run(trained):
    return ovs3d.load_run(trained[0].parent)


@pytest.mark.slow
def test_a_nerf_answers_as_its_pictures_show(run, scene):
    answers_are_those_of_its_pictures(run, scene)


@pytest.mark.slow
def test_threads_ask_for_prompts_of_their_own(run, scene):
    pose, intrinsics, size = pinhole(scene, 1)
    asked = [run.prompts, run.prompts[:3], run.prompts[::-1], run.prompts[2:5]]
    points = np.random.default_rng(0).normal(size=(500, 3))
    before = run.pipeline.model.segmenter.prompts

    def answers(prompts):
        view, found = run.render_view(pose, intrinsics, size, prompts), run.label_points(points, prompts)
        return view.prompts, view.labels, view.probabilities, found.labels

    alone = [answers(prompts) for prompts in asked]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(answers, asked * 2))
    for got, expected in zip(together, alone * 2, strict=True):
        assert got[0] == expected[0] and all(map(np.array_equal, got[1:], expected[1:]))
    assert run.pipeline.model.segmenter.prompts is before


@pytest.mark.slow
def test_a_threshold_leaves_points_to_nobody(run):
    points = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    nobody = run.label_points(points, ["cat"], threshold=1.0)
    anybody = run.label_points(points, ["cat"], threshold=0.0)
    assert (nobody.labels == -1).all() and (anybody.labels == 0).all()
    assert np.array_equal(nobody.probabilities, anybody.probabilities)


@pytest.mark.slow
def test_bad_input_gets_a_sentence(run, scene):
    pose, intrinsics, size = pinhole(scene, 0)
    nan, skewed, inverse = pose.copy(), intrinsics.copy(), np.eye(4)
    nan[0, 0], skewed[0, 1], inverse[3, 0] = np.nan, 3, 1
    wrong = {
        "shape 5×2; give N×3": lambda: run.label_points(np.zeros((5, 2))),
        "of a single number": lambda: run.label_points(3.0),
        "3 of the numbers of the points are NaN": lambda: run.features_at(np.full((1, 3), np.nan)),
        "cannot be read as numbers": lambda: run.label_points([["a", "b", "c"]]),
        "no frame 'world'": lambda: run.label_points(np.zeros((1, 3)), frame="world"),
        "1 of the numbers of the pose are NaN": lambda: run.render_view(nan, intrinsics, size),
        "off perpendicular ones": lambda: run.render_view(pose[:3] * 2, intrinsics, size),
        "shape 2×2; give a camera-to-world": lambda: run.render_view(np.eye(2), intrinsics, size),
        "is mirrored": lambda: run.render_view(pose @ np.diag([1, 1, -1, 1]), intrinsics, size),
        "last row": lambda: run.render_view(inverse, intrinsics, size),
        "give 3×3": lambda: run.render_view(pose, np.eye(4), size),
        "first rows": lambda: run.render_view(pose, skewed, size),
        "The size .* is none": lambda: run.render_view(pose, intrinsics, (10.5, 10)),
        "no frame 'x'": lambda: run.objects(frame="x"),
    }
    for sentence, call in wrong.items():
        with pytest.raises(RunError, match=sentence):
            call()
    numbers = {
        "threshold 2 .* give a number, from 0 to 1": lambda: run.label_points(np.zeros((1, 3)), threshold=2),
        "threshold a": lambda: run.objects(threshold="a"),
        **{f"gap {gap} .* above 0": lambda gap=gap: run.objects(gap=gap) for gap in (0, -1, np.nan, np.float32(-1))},
        **{f"smallest {share}": lambda share=share: run.objects(smallest=share) for share in (2, -1)},
    }
    for sentence, call in numbers.items():
        with pytest.raises(OptionError, match=sentence):
            call()
    for prompts in ([], ["cat", "Cat"], ["cat; dog"], [" "]):
        with pytest.raises(PromptError):
            run.label_points(np.zeros((1, 3)), prompts)
    assert run.label_points(np.zeros((0, 3))).probabilities.shape == (0, len(run.prompts))
    with pytest.raises(UserError, match="device pretend"):
        ovs3d.load_run(run.checkpoint.parent.parent, device="pretend")


@pytest.mark.slow
def test_the_catalogue_of_a_nerf_is_whole(trained, tmp_path, ovs3d):
    words = ["--load-config", trained[0], "--output-dir", tmp_path, "--prompts", "cat; espresso; books; wall"]
    status, printed = ovs3d("objects", *words)
    assert status == 0 and "Objects, in the coordinates of the data" in printed
    the_catalogue_is_whole(tmp_path, "points", "data")
    # A later call leaves nothing of it, and takes nothing that is somebody's own.
    before, own = [*(tmp_path / "objects").iterdir()], tmp_path / "objects" / "001-my notes.ply"
    own.touch()
    assert ovs3d("objects", *words[:-1], "a cat; a wall", "--no-scenes-without", "--smallest-object", 0.2)[0] == 0
    left = the_files_listed(tmp_path)
    assert left and {*(tmp_path / "objects").iterdir()} == left | {own} and not left & {*before}
