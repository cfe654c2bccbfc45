"""The benchmarks in short forms. Quality: a small scene, half of the training; the field must be worth its trouble. Cost: one turn."""

import json
import sys
from pathlib import Path

import pytest
from conftest import command
from PIL import Image

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


def test_both_geometries_stand_in_one_table(tmp_path):
    scene = make_scene(tmp_path / "scene", width=96, train_views=6, test_views=1)
    words = ["--scene", scene, "--encoder", "offline", "--steps", 8, "--repeats", 1, "--size", 24, 16]
    words += ["--json", "figures.json", "--plot", "times.png"]
    printed = command("python", BENCHMARKS / "geometries.py", *words, cwd=tmp_path).stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"NeRF", "Gaussians"}
    assert all(figures[name][what] > 0 for name in figures for what in ("minutes", "psnr", "rgb", "view", "change"))
    assert printed.count("\n| ") == 10 and " × |" in printed
    assert Image.open(tmp_path / "times.png").size[0] == 1040


def test_the_gpu_benchmark_makes_every_row_and_says_which_limit_was_missed(tmp_path, monkeypatch):
    """On a CPU, in tiny sizes: so every line of it runs before somebody has a GPU."""
    page, results = tmp_path / "page.md", tmp_path / "results"
    page.write_text("Before\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nbehind\n")
    words = ["--device", "cpu", "--quick", "--methods", "ovs3d-splat", "--results", results, "--page", page]
    done = command("python", BENCHMARKS / "gpu.py", *words, cwd=tmp_path, ok=False)
    assert done.returncode == 1, "30 000 steps take longer than five minutes here"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "gpu_report", raising=False)
    import gpu_report

    rows = [gpu_report.Row(**row) for row in json.loads((results / "gpu-cpu.json").read_text())["rows"]]
    assert not [row for row in rows if row.failed], done.stdout[-4000:]
    names = {row.name for row in rows}
    assert names >= {"extraction_patches", "extraction_dense", "grid_ours_ms", "grid_torch_ms", "grid_tcnn_ms"}
    assert names >= {"ovs3d_step_ms", "ovs3d_gib", "ovs3d-splat_step_ms", "ovs3d-splat_gib"}
    assert (
        names >= {"picture_s", "picture_rgb_s", "enter_ms", "two_step_ms", "two_extraction"} | gpu_report.LIMITS.keys()
    )
    assert all(row.value > 0 for row in rows if row.value is not None)
    assert [row.name for row in rows if row.value is None] == ["grid_tcnn_ms"]

    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("behind\n") and "old" not in text
    assert all(f"| {row.what} |" in text for row in rows)
    missed = [line for line in text.splitlines() if line.endswith("| ✗ |")]
    assert any("40 views" in line and "| ≤ 5 minutes |" in line for line in missed)
    assert len(gpu_report.missed(rows)) == len(missed) and "(asked: ≤ 5)" in done.stdout

    lax = {name: gpu_report.Limit("≤", 1e9) for name in gpu_report.LIMITS}
    monkeypatch.setattr(gpu_report, "LIMITS", lax)
    assert gpu_report.status(rows) == 0 and not gpu_report.missed(rows)
    assert gpu_report.status([row for row in rows if row.name != "change_ms"]) == 1, "what was not measured is not met"
    assert gpu_report.status([*rows, gpu_report.Row("x", "x", note="OutOfMemoryError", failed=True)]) == 1
    monkeypatch.setitem(lax, "change_ms", gpu_report.Limit("≥", 1e9))
    assert gpu_report.status(rows) == 1 and len(gpu_report.missed(rows)) == 1


def test_without_a_gpu_its_benchmark_says_that_it_needs_one(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    done = command("python", BENCHMARKS / "gpu.py", cwd=tmp_path, env=hidden, ok=False)
    assert done.returncode == 1 and "there is an NVIDIA card" in " ".join(done.stdout.split()), done.stdout


def test_the_geometry_benchmark_tells_photos_and_depth_and_goes_on_where_it_was(tmp_path):
    """On a scene that is made for it."""
    told = command("python", BENCHMARKS / "generated.py", "made", "--views", 8, 1, cwd=tmp_path).stdout
    scenes = sorted(folder.name for folder in (tmp_path / "made").iterdir())
    assert all(f"--scene made/{name}" in told for name in scenes) and len(scenes) == 6
    words = ["--scene", "made/low", "--rows", "full", "no-depth+views-5", "--steps", 3, "--seeds"]
    command("python", BENCHMARKS / "geometry.py", *words, 0, cwd=tmp_path)
    printed = command("python", BENCHMARKS / "geometry.py", *words, 0, 1, cwd=tmp_path).stdout
    results = json.loads((tmp_path / "geometry.json").read_text())
    assert [(r["row"], r["seed"]) for r in results] == [(row, seed) for seed in (0, 1) for row in words[3:5]]
    assert all(r["psnr"] > 5 and 0 <= r["wrong"] <= 1 and r["error"] > 0 for r in results)
    assert "| low | full | 2 |" in printed and "| low | no-depth+views-5 | 2 |" in printed
    assert printed.count("rays end, for geometry to begin there") == 1
