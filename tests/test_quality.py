"""The quality benchmark in a short form: a small scene, half of the training. The field must be worth its trouble, and what
is exported of it must stand where the scene does."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import command
from PIL import Image
from plyfile import PlyData

from ovs3d_nerfstudio.demo.raycast import cast
from ovs3d_nerfstudio.demo.scene import blocks, demo_solids, make_scene, train_cameras
from ovs3d_nerfstudio.prompts import CLASSES_FILE, read_prompts_file

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "quality.py"
STEPS, MARGIN, WIDTH, VIEWS = 750, 0.05, 320, 24
NEAR = 0.03
"""A point stands on what a camera sees when it is nearer to it than this share of its depth."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return make_scene(tmp_path_factory.mktemp("quality") / "scene", width=WIDTH, train_views=VIEWS, test_views=3)


def benchmark(scene: Path, *words: object) -> str:
    """What the benchmark prints; it leaves its files beside the scene."""
    words = ("--scene", scene, "--encoder", "offline", "--seeds", 0, "--json", "quality.json", "--steps", STEPS, *words)
    return command("python", BENCHMARK, *words, cwd=scene.parent).stdout


def test_the_full_method_is_clearly_above_the_2d_pyramid_alone(scene):
    printed = benchmark(scene, "--rows", "pyramid-2d", "full")
    rows = json.loads((scene.parent / "quality.json").read_text())["rows"]
    held_out = {row["row"]: row["miou"] for row in rows if row["split"] == "test"}
    assert held_out["full"] > held_out["pyramid-2d"] + MARGIN, held_out
    assert {row["split"] for row in rows} == {"test", "train"}
    assert "Held-out protocol" in printed and "Paper protocol" in printed and "| **full** |" in printed
    assert list((scene.parent / "outputs" / "quality" / "pictures").glob("scene-offline.png"))


def test_what_is_exported_stands_where_the_scene_does(scene):
    """Of a run that was taught the true classes: what is wrong then is geometry, or the export."""
    write_label_maps(scene)
    benchmark(scene, "--rows", "truth", "--keep-runs")
    (config,) = scene.parent.rglob("truth-0/config.yml")
    out = scene.parent / "exports"
    words = ["--load-config", config, "--output-dir", out, "--num-points", 60000]
    command("ovs3d", "export", "pointcloud", *words, cwd=scene.parent)
    vertices = PlyData.read(str(out / "point_cloud.ply"))["vertex"].data
    truth = true_names(np.stack([vertices[axis] for axis in "xyz"], -1).astype(float))
    classes = json.loads((out / "classes.json").read_text())
    named = np.array([classes[str(class_id)]["prompt"] for class_id in vertices["class_id"]], object)
    stands = truth != ""
    assert stands.mean() > 0.65 and (named == truth)[stands].mean() > 0.95
    found = json.loads((out / "objects.json").read_text())["objects"]
    for solid in blocks(demo_solids()):
        low, high = solid.bounds()
        largest = next(entry for entry in found if entry["prompt"] == solid.name)
        box, size = largest["box"], (high - low).max()
        # What the cameras see of it: its left, its front, its right and its top. Two things stand behind others.
        off = [*np.array(box["min"])[:2] - low[:2], box["max"][0] - high[0], box["max"][2] - high[2]]
        assert np.abs(off).max() < (0.25 if solid.name in ("palace", "space rocket") else 0.08) * size, (
            solid.name,
            off,
        )


def write_label_maps(scene: Path) -> None:
    """What the row `truth` learns from: each pixel's class, as its line in classes.txt."""
    listed = read_prompts_file(scene / CLASSES_FILE)
    solids = demo_solids()
    (scene / "label_maps").mkdir()
    for i, camera in enumerate(train_cameras(VIEWS, WIDTH)):
        lines = np.array([listed.index(solid.name) for solid in solids], np.uint8)[cast(solids, camera)[0]]
        Image.fromarray(lines).save(scene / "label_maps" / f"train_{i:02d}.png")


def true_names(points: np.ndarray) -> np.ndarray:
    """The name of what each point stands on, "" where it stands on nothing that a camera of the training sees."""
    solids, names, least = demo_solids(), np.full(len(points), "", object), np.full(len(points), NEAR)
    of_solid = np.array([solid.name for solid in solids], object)
    for camera in train_cameras(VIEWS, WIDTH)[::3]:
        index, depth = cast(solids, camera)
        pixels, distance = camera.project(points)
        x, y = np.floor(pixels).astype(int).T
        inside = np.flatnonzero((distance > 0) & (x >= 0) & (x < camera.width) & (y >= 0) & (y < camera.height))
        there = y[inside], x[inside]
        error = np.abs(distance[inside] - depth[there]) / distance[inside]
        nearer = error < least[inside]
        least[inside[nearer]], names[inside[nearer]] = error[nearer], of_solid[index[there][nearer]]
    return names
