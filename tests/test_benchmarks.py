"""The benchmarks in short forms. Quality: a small scene, half of the training; the field must be worth its trouble. Cost: one turn."""

import json
from pathlib import Path

import pytest
from conftest import command

from ovs3d_nerfstudio.demo.scene import make_scene

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STEPS, MARGIN = 750, 0.05


def test_the_full_method_is_clearly_above_the_2d_pyramid_alone(tmp_path):
    scene = make_scene(tmp_path / "scene", width=320, train_views=24, test_views=3)
    words = ["--scene", scene, "--encoder", "offline", "--seeds", 0, "--json", "quality.json", "--steps", STEPS]
    printed = command("python", BENCHMARKS / "quality.py", *words, "--rows", "pyramid-2d", "full", cwd=tmp_path).stdout
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    held_out = {row["row"]: row["miou"] for row in rows if row["split"] == "test"}
    assert held_out["full"] > held_out["pyramid-2d"] + MARGIN, held_out
    assert {row["split"] for row in rows} == {"test", "train"}
    assert "Held-out protocol" in printed and "Paper protocol" in printed and "| **full** |" in printed
    assert list((tmp_path / "outputs" / "quality" / "pictures").glob("scene-offline.png"))


def test_every_part_of_the_cost_benchmark_runs(tmp_path):
    """What it measures is not judged: the sizes are tiny, and the machine is busy."""
    scene = make_scene(tmp_path / "scene", width=160, train_views=6, test_views=2)
    words = ["--scene", scene, "--encoder", "offline", "--quick", "--profile", "--json", "cost.json"]
    printed = command("python", BENCHMARKS / "cost.py", *words, cwd=tmp_path).stdout
    results = json.loads((tmp_path / "cost.json").read_text())
    assert (
        results["ratios"].keys() == results["details"].keys() >= {"cache", "extraction", "step", "render", "basis_step"}
    )
    assert all(ratio > 0 for ratio in results["ratios"].values()), results["ratios"]
    assert "A step takes" in printed and "semantic losses: colour" in printed
