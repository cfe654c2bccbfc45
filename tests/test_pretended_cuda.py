"""On a GPU every method trains, and answers whatever it is asked: proved without one, on a device that is pretended.

In processes of their own (see `pretended`), tensors say that they lie on `cuda:0` and refuse what CUDA refuses, under the
real CUDA autocast, GradScaler and fused Adam. A new method is tested as soon as it is installed; WAITS wants its number.
"""

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from pretended import launch
from pretended.encoders import ALONE, TRAINING
from pretended.method import ASKED, OF_EACH_GEOMETRY, STAGES
from pretended.scenes import write_scenes
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.pretended_cuda,
    pytest.mark.slow,
    pytest.mark.skipif(bool(launch.why_not()), reason=f"no GPU can be pretended: {launch.why_not()}"),
]

METHODS = sorted(
    method.name
    for method in entry_points(group="nerfstudio.method_configs")
    if method.value.startswith("ovs3d_nerfstudio.")
)

WAITS = {"ovs3d": 1, "ovs3d-lite": 1, "ovs3d-paper": 1, "ovs3d-splat": 8, "ovs3d-splat-lite": 8}
"""How often a late step of a method may wait for the device in our own lines. Each wait leaves a GPU without work."""
NERFSTUDIO_WAITS = 36
"""The same for nerfstudio's lines, of which most make rays of pixels."""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """What a process preloads to believe in a GPU."""
    return launch.compiled(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder)
    return folder


@pytest.fixture(scope="module")
def reports(library, scenes, tmp_path_factory):
    """What each method was seen to do; a method works when it is first asked for."""
    known: dict[str, dict] = {}

    def report(method: str) -> dict:
        if method not in known:
            folder = tmp_path_factory.mktemp(method)
            done = launch.run(library, "method", method, scenes, folder, cwd=folder)
            assert done.returncode == 0, done.stdout[-4000:]
            known[method] = json.loads((folder / "report.json").read_text())
        return known[method]

    return report


def test_what_is_pretended_refuses_what_cuda_refuses(library, tmp_path):
    done = launch.run(library, "itself", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_works_on_the_device(reports, method, stage):
    fault = reports(method)["stages"][stage]
    assert not fault, fault


@pytest.mark.parametrize("stage", ASKED)
@pytest.mark.parametrize("method", OF_EACH_GEOMETRY)
def test_a_run_is_asked_on_the_device(reports, method, stage):
    fault = reports(method)["stages"][stage]
    assert not fault, fault


@pytest.mark.parametrize("method", METHODS)
def test_a_late_step_hardly_waits_for_the_device(reports, method):
    waits = reports(method)["waits"]
    assert waits, "some step was counted"
    waits = [wait for wait in waits if "/gaussians/" not in wait[-1]]  # of what stands in for gsplat's kernels
    ours = sum(number for number, package, *_ in waits if package == "ovs3d_nerfstudio")
    theirs = sum(number for number, *_ in waits) - ours
    sites = "\n".join(f"{number:3} {package}: {kind} at {lines}" for number, package, kind, lines in waits)
    assert ours <= WAITS[method] and theirs <= NERFSTUDIO_WAITS, f"{ours} of ours, {theirs} of theirs:\n{sites}"


def test_features_are_the_same_whoever_extracts_them(library, scenes, weights, tmp_path):
    pictures = sorted((scenes / "scene" / "images").iterdir())[:2]
    done = launch.run(library, "encoders", weights, tmp_path, *pictures, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    alone = sorted((tmp_path / ALONE).rglob("*.safetensors"))
    assert len(alone) == len(pictures) * 3 + 2, "patches and dense features of CLIP, tokens of DINO, and prompts twice"
    for file in alone:
        other = load_file(tmp_path / TRAINING / file.relative_to(tmp_path / ALONE))
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all() and tensor.equal(other[name]), f"{name} of {file}"
