"""The same seed is the same run: whether features were cached or made, and another seed is another run."""

import shutil
from pathlib import Path

import children
import pytest
import torch
from children import checkpoint_folder

from ovs3d_nerfstudio.engine.checkpoints import checkpoints, read_checkpoint


@pytest.fixture(scope="module")
def runs(scene, weights, tmp_path_factory) -> dict[str, dict]:
    """Checkpoints of: a run that extracts, one that finds the features cached, one with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    data = shutil.copytree(scene, folder / "scene", ignore=shutil.ignore_patterns(".ovs3d-cache"))
    results = {}
    for name, seed in (("made", 1), ("cached", 1), ("other", 2)):
        out: Path = folder / name
        out.mkdir()
        settings = {"machine__seed": seed, **children.specs(weights)}
        child = children.start(out / "log", children.train, data, out, 6, 100, **settings)
        assert child.end() == 0, child.text
        assert ("8 to make" in child.text) == (name == "made")
        results[name] = read_checkpoint(checkpoints(checkpoint_folder(out))[0])["pipeline"]
    return results


def test_the_same_seed_is_the_same_training(runs):
    for name, value in runs["made"].items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, runs["cached"][name], rtol=1e-4, atol=1e-6), name


def test_another_seed_is_another_training(runs):
    names = ["_model.field.mlp_head.layers.0.weight", "_model.semantic_field.last.weight"]
    assert not any(torch.allclose(runs["made"][name], runs["other"][name], atol=1e-3) for name in names)


def test_extraction_is_the_same_bit_for_bit(scene, weights, tmp_path):
    pictures = sorted((scene / "images").iterdir())[:4]
    made = []
    for name in "ab":
        cache = tmp_path / name
        child = children.start(tmp_path / f"{name}.log", children.extract, pictures, weights, cache, tmp_path / "begun")
        assert child.end() == 0, child.text
        made.append({path.relative_to(cache): path.read_bytes() for path in cache.rglob("*.safetensors")})
    assert made[0] == made[1] and len(made[0]) == 8
