"""`ovs3d extract` fills the very cache that training reads; `ovs3d demo` runs the demo."""

import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import command
from PIL import Image

from ovs3d_nerfstudio import __version__


@pytest.fixture(scope="module")
def three(scene, tmp_path_factory) -> Path:
    """The demo scene without its cache and masks."""
    copy = tmp_path_factory.mktemp("extract") / "scene"
    shutil.copytree(scene, copy, ignore=shutil.ignore_patterns(".ovs3d-cache", "segmentations"))
    return copy


@pytest.mark.slow
def test_extract_fills_the_cache_and_resumes_it(three, ovs3d):
    words = ["extract", "--data", three, "--method", "ovs3d-lite", "--scales", 3, 4]
    printed = command("ovs3d", *words, cwd=three).stdout
    assert "0 of 8 views are cached" in printed and "MB a view" in printed and "train_indices" not in printed
    files = sorted((three / ".ovs3d-cache").glob("*/*.safetensors"))
    assert len(files) == 16
    files[0].unlink()
    files[-1].write_bytes(b"damaged")
    status, printed = ovs3d(*words)
    assert status == 0 and "2 to make" in printed
    assert sorted((three / ".ovs3d-cache").glob("*/*.safetensors")) == files


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, said",
    [
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "SCENE", "--method", "nerfacto"], "nerfacto is none of ours"),
        (["--data", "SCENE", "--method", "ovs3d-lite", "--image-text-encoder", "x"], "no encoder 'x'"),
        (["--data", "SCENE", "--method", "ovs3d-lite", "--device", "abacus"], "--device abacus cannot be used"),
        (["--data", "SCENE", "blender-data"], "transforms_train.json"),
    ],
)
def test_extract_ends_a_users_mistake_with_a_sentence(three, ovs3d, words, said):
    status, printed = ovs3d("extract", *(three if word == "SCENE" else word for word in words))
    assert status == 1 and said in printed


@pytest.mark.slow
def test_extract_names_the_picture_that_cannot_be_used(three, ovs3d, tmp_path):
    scene = shutil.copytree(three, tmp_path / "scene")
    broken = scene / "images" / "train_03.png"
    broken.write_bytes(b"no picture")
    status, printed = ovs3d("extract", "--data", scene, "--method", "ovs3d-lite", "--scales", 3)
    assert status == 1 and "train_03.png" in printed
    Image.new("RGB", (4, 3)).save(broken)
    status, printed = ovs3d("extract", "--data", scene, "--method", "ovs3d-lite", "--scales", 3)
    assert status == 1 and "too small" in printed


@pytest.mark.slow
def test_the_command_is_installed_and_explains_itself(tmp_path):
    assert "--no-video" in command("ovs3d", "demo", "--help", cwd=tmp_path).stdout
    done = command("ovs3d", cwd=tmp_path, ok=False)
    assert done.returncode == 1 and "usage: ovs3d" in done.stdout and "Traceback" not in done.stdout


def test_demo_runs_what_it_is_told(ovs3d, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("ovs3d_nerfstudio.demo.run.run_demo", lambda *arguments: calls.append(arguments))
    assert ovs3d("demo", "--folder", tmp_path / "d", "--steps", 7, "--no-video", "--no-splat")[0] == 0
    assert calls == [(tmp_path / "d", 7, False, False)]
    status, printed = ovs3d("demo", "--steps", 0)
    assert status == 1 and "--steps 0" in printed and len(calls) == 1


def test_demo_leaves_a_folder_of_something_else_alone(ovs3d, tmp_path):
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "letter.txt").write_text("dear")
    status, printed = ovs3d("demo", "--folder", tmp_path)
    assert status == 1 and "not the demo scene" in printed
    assert [path.name for path in (tmp_path / "scene").iterdir()] == ["letter.txt"]


def test_the_version_names_what_an_answer_depends_on(ovs3d):
    status, said = ovs3d("--version")
    assert status == 0
    assert re.fullmatch(rf"ovs3d_nerfstudio {re.escape(__version__)}, nerfstudio 1\.\S+, torch \d\S+, \S.*", said)
    assert version("ovs3d-nerfstudio") == __version__
