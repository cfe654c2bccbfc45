"""`ovs3d export`: files that other readers open, in the frame of the data, with labels and objects that are right."""

import copy
import json
from pathlib import Path

import numpy as np
import open3d
import pytest
import torch
import trimesh
from conftest import command
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.scripts.exporter import ExportGaussianSplat
from plyfile import PlyData

from ovs3d_nerfstudio.data.frames import Frame, FrameError
from ovs3d_nerfstudio.demo.raycast import cast
from ovs3d_nerfstudio.demo.scene import blocks, demo_solids, train_cameras
from ovs3d_nerfstudio.models.lpips import lpips_optional
from ovs3d_nerfstudio.objects.points import LabelledPoints, connected, find_objects
from ovs3d_nerfstudio.ply import vertex_table, with_labels, write_ply


def demo_cloud() -> tuple[LabelledPoints, list[str]]:
    """The points that the demo scene's cameras see, with their true classes."""
    solids = demo_solids()
    names = sorted({solid.name for solid in solids})
    positions, classes, distances = [], [], []
    for camera in train_cameras(12, 160):
        index, depth = cast(solids, camera)
        seen = (index >= 0).ravel()
        origins, directions = camera.rays(1)
        distances.append((depth.ravel() * np.linalg.norm(directions, axis=0))[seen])
        positions.append((origins + directions * depth.ravel()).T[seen])
        classes.append(np.array([names.index(solid.name) + 1 for solid in solids])[index.ravel()[seen]])
    positions, classes = np.concatenate(positions).astype(float), np.concatenate(classes)
    distance = np.concatenate(distances)
    one = np.ones(len(classes))
    return LabelledPoints(positions, np.zeros_like(positions), classes, one, distance, one), names


def test_objects_of_the_demo_scene_are_where_its_blocks_stand():
    cloud, names = demo_cloud()
    found = find_objects(cloud, 0.02 * float(np.median(cloud.distance)), 0.02, names).objects
    for solid in blocks(demo_solids()):
        (one,) = [thing for thing in found if thing.prompt == solid.name]
        low, high = solid.bounds()
        # The cameras stand before the scene: what faces them, the left, the right and the top, is all that they see.
        size = (high - low).max()
        assert abs(one.box_max[2] - high[2]) < 0.03 * size
        assert np.abs(one.box_min[:2] - low[:2]).max() < 0.05 * size
        assert abs(one.box_max[0] - high[0]) < 0.05 * size
        assert (one.centroid > low).all() and (one.centroid < high).all()


def test_components_are_apart_by_more_than_the_gap_and_sorted_by_size():
    line = np.stack([np.arange(30) * 0.9, np.zeros(30), np.zeros(30)], -1)
    far = line[:5] + np.array([0, 10, 0])
    labels = connected(np.concatenate([far, line]), gap=1.0)
    assert labels.tolist() == [1] * 5 + [0] * 30


def test_a_sparse_bridge_joins_nothing_and_stretches_no_box():
    rng = np.random.default_rng(3)
    one, other = rng.uniform(0, 1, (4000, 3)), rng.uniform([3, 0, 0], [4, 1, 1], (3000, 3))
    bridge = np.stack([np.linspace(0.5, 3.5, 25), np.full(25, 0.5), np.full(25, 0.5)], -1)
    stray = rng.uniform(-2, 5, (20, 3))
    positions = np.concatenate([one, other, bridge, stray])
    cloud = LabelledPoints(positions, positions * 0, *np.ones((4, len(positions)), int))
    first, second = find_objects(cloud, 0.25, 0.02, ["a"]).objects
    for found, (low, high) in ((first, ([0, 0, 0], [1, 1, 1])), (second, ([3, 0, 0], [4, 1, 1]))):
        assert np.abs(found.box_min - low).max() < 0.05
        assert np.abs(found.box_max - high).max() < 0.05


def test_small_parts_are_no_objects():
    positions = np.concatenate([np.random.default_rng(0).uniform(0, 1, (1000, 3)), [[9.0, 9, 9], [9, 9, 9.1]]])
    cloud = LabelledPoints(positions, positions * 0, *np.ones((4, 1002), int))
    few, all_ = find_objects(cloud, 0.3, 0.02, ["a"]), find_objects(cloud, 0.3, 0.001, ["a"])
    assert (len(few.objects), few.crumbs, few.left_out) == (1, 1, 2)
    assert (len(all_.objects), all_.crumbs, all_.left_out) == (2, 0, 0)


def test_faint_gaussians_stretch_no_box_and_go_with_their_object():
    rng = np.random.default_rng(0)
    thing, haze = rng.uniform(0, 1, (2000, 3)), rng.uniform(-0.2, 1.2, (300, 3))
    positions, opacity = np.concatenate([thing, haze]), np.repeat([0.8, 0.05], [2000, 300])
    ones = np.ones(2300, int)
    (one,) = find_objects(
        LabelledPoints(positions, positions * 0, ones, ones, ones, opacity), 0.25, 0.02, ["a"]
    ).objects
    assert np.abs(one.box_min).max() < 0.02 and np.abs(one.box_max - 1).max() < 0.02 and one.count == 2300
    (other,) = find_objects(
        LabelledPoints(positions, positions * 0, ones, ones, ones, opacity), 0.1, 0.02, ["a"]
    ).objects
    assert 2000 < other.count < 2300


def test_a_frame_goes_there_and_back(tmp_path):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    saved = {"transform": np.c_[rotation, [1, 2, 3]].tolist(), "scale": 0.3}
    (tmp_path / "dataparser_transforms.json").write_text(json.dumps(saved))
    frame, points = Frame.of_run(tmp_path), np.random.default_rng(1).normal(size=(5, 3))
    assert np.allclose(frame.to_data(frame.to_model(points)), points)
    assert np.allclose(frame.to_model(points)[0], 0.3 * (rotation @ points[0] + [1, 2, 3]))
    with pytest.raises(FrameError, match="missing or broken"):
        Frame.of_run(tmp_path / "elsewhere")


def test_ply_files_are_read_by_others(tmp_path):
    points = np.random.default_rng(0).uniform(size=(4, 3))
    table = vertex_table(points, np.eye(4)[:, :3], np.arange(4), np.linspace(0, 1, 4))
    write_ply(tmp_path / "m.ply", table, np.array([[0, 1, 2], [1, 2, 3]]))
    mesh = trimesh.load(tmp_path / "m.ply", process=False)
    assert np.allclose(mesh.vertices, points, atol=1e-6) and len(mesh.faces) == 2
    again = open3d.io.read_triangle_mesh(str(tmp_path / "m.ply"))
    assert np.allclose(np.asarray(again.vertex_colors)[1], [0, 1, 0])
    assert with_labels(table, np.full(4, 9), np.ones(4))["class_id"].tolist() == [9] * 4


@pytest.mark.slow
def test_a_point_cloud_lies_in_the_data_and_carries_the_runs_labels(trained, scene, tmp_path):
    words = [
        "ovs3d",
        "export",
        "pointcloud",
        "--load-config",
        trained[0],
        "--output-dir",
        tmp_path,
        "--num-points",
        3000,
    ]
    words += ["--num-rays-per-batch", 1024, "--file-a-class", "--farthest", 0]
    assert "objects" in command(*words, cwd=tmp_path).stdout
    cloud = open3d.t.io.read_point_cloud(str(tmp_path / "point_cloud.ply"))
    vertices = PlyData.read(str(tmp_path / "point_cloud.ply"))["vertex"].data
    assert 1000 < len(cloud.point.positions) == len(vertices) <= 3000
    classes = json.loads((tmp_path / "classes.json").read_text())
    for row in vertices[:200]:
        assert classes[str(row["class_id"])]["color"] == [row["red"], row["green"], row["blue"]]
    assert ((vertices["probability"] > 0) & (vertices["probability"] <= 1)).all()
    files = list(tmp_path.glob("[0-9]*.ply"))
    assert sum(len(PlyData.read(str(path))["vertex"].data) for path in files) == len(vertices)
    # Every point is seen by a camera of the data, in the data's coordinates.
    points = np.stack([vertices[axis] for axis in "xyz"], -1).astype(float)
    inside = np.zeros(len(points), bool)
    for camera in train_cameras(8, 96):
        pixels, depth = camera.project(points)
        inside |= ((pixels >= -1) & (pixels <= [97, 73])).all(-1) & (depth > 0)
    assert inside.all()
    for entry in json.loads((tmp_path / "objects.json").read_text())["objects"]:
        assert (np.array(entry["box"]["min"]) <= entry["box"]["max"]).all() and entry["count"] >= 2


@pytest.mark.parametrize("positions", [np.ones((1, 3)), np.eye(3)[:2], np.zeros((5, 3))])
def test_points_that_are_all_alike_are_no_outliers(positions):
    from ovs3d_nerfstudio.objects.samples import _inliers

    assert _inliers(positions, 10.0).tolist() == [*range(len(positions))]
    assert _inliers(np.concatenate([np.random.default_rng(0).uniform(size=(200, 3)), [[99.0] * 3]]), 3.0).max() == 199


@pytest.mark.slow
def test_points_have_the_labels_of_their_pixels(trained, ovs3d):
    from ovs3d_nerfstudio.objects.samples import sample_cloud
    from ovs3d_nerfstudio.run import load_run

    run = load_run(trained[0])
    pipeline = run.pipeline
    torch.manual_seed(0)
    cloud = sample_cloud(pipeline, 200, 256, 0).labelled(run.question())
    torch.manual_seed(0)
    rays, _ = pipeline.datamanager.next_train(0)
    with torch.no_grad():
        outputs = pipeline.model(rays)
    ends = outputs["accumulation"][:, 0] > 0.5
    expected = pipeline.model.labels_in(outputs)[ends] + 1
    assert np.array_equal(cloud.class_id[: len(expected)], expected.numpy()[:200])


@pytest.mark.slow
def test_a_mesh_carries_the_labels_of_its_places(trained, tmp_path):
    from ovs3d_nerfstudio.run import load_run

    ball = open3d.geometry.TriangleMesh.create_sphere(0.4, 12)
    open3d.io.write_triangle_mesh(str(tmp_path / "ball.ply"), ball)
    words = ["--load-config", trained[0], "--output-dir", tmp_path / "out", "--prompts", "books; cat; espresso"]
    command("ovs3d", "export", "mesh", *words, "--mesh", tmp_path / "ball.ply", cwd=tmp_path)
    mesh = trimesh.load(tmp_path / "out" / "mesh.ply", process=False)
    vertices = PlyData.read(str(tmp_path / "out" / "mesh.ply"))["vertex"].data
    assert len(mesh.faces) == len(ball.triangles) and mesh.is_watertight and mesh.volume > 0
    frame = Frame.of_run(trained[0].parent)
    assert np.allclose(frame.to_model(np.asarray(mesh.vertices)), np.asarray(ball.vertices), atol=1e-4)
    run = load_run(trained[0])
    labels = run.label_points(np.asarray(ball.vertices), frame="model").labels
    # Where one of the three prompts asked for wins among all of the run's, it wins among the three.
    for number, prompt in enumerate(["books", "cat", "espresso"], start=1):
        assert (vertices["class_id"][labels == run.prompts.index(prompt)] == number).all()


EMPTY = ["--obb-center", 50, 50, 50, "--obb-rotation", 0, 0, 0, "--obb-scale", 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pointcloud", "mesh"])
def test_an_empty_box_ends_with_a_sentence(trained, tmp_path, ovs3d, kind):
    words = ["export", kind, "--load-config", trained[0], "--output-dir", tmp_path, *EMPTY]
    words += ["--num-points", 2000, "--num-rays-per-batch", 256] if kind == "pointcloud" else ["--downscale", 4]
    status, printed = ovs3d(*words)
    assert status == 1 and ("lies in the box" in printed or "no surface in the box at 50 50 50" in printed)
    assert not list(tmp_path.glob("*.ply"))


@pytest.mark.slow
def test_points_are_limited_to_an_objects_box(trained, tmp_path, ovs3d):
    box = {"min": [-1.0, -1, -0.5], "max": [1.0, 0.5, 1]}
    listed = json.dumps({"frame": "data", "objects": [{"id": 4, "box": box}]})
    (tmp_path / "objects.json").write_text(listed)
    words = ["--load-config", trained[0], "--output-dir", tmp_path, "--num-points", 500, "--num-rays-per-batch", 512]
    assert ovs3d("export", "pointcloud", *words, "--object", 4, "--farthest", 0, "--std-ratio", 0)[0] == 0
    vertices = PlyData.read(str(tmp_path / "point_cloud.ply"))["vertex"].data
    points, margin = np.stack([vertices[axis] for axis in "xyz"], -1), 0.06 * np.linalg.norm([2, 1.5, 1.5])
    assert len(points) and (points >= np.array(box["min"]) - margin).all()
    assert (points <= np.array(box["max"]) + margin).all()
    assert (tmp_path / "objects.json").read_text() == listed  # the list that the object was taken from stays


@pytest.fixture(scope="module")
def splat(trained, scene, tmp_path_factory) -> tuple[Path, Path]:
    """What `ns-export gaussian-splat` writes of a splatfacto run on the demo scene, and that run's config.

    Gaussians are rasterised on a GPU only, so the run was never trained: its Gaussians are put on the scene's surfaces. Run
    folder, checkpoint, frame and PLY are nerfstudio's own all the same.
    """
    out = tmp_path_factory.mktemp("splat")
    config = copy.deepcopy(all_methods["splatfacto"])
    config.data, config.output_dir, config.experiment_name, config.timestamp = scene, out, "run", "t"
    config.machine.device_type = "cpu"
    config.pipeline.datamanager.data = scene
    # Another frame than that of our run, so that the two must be told apart.
    config.pipeline.datamanager.dataparser.scale_factor = 0.5
    config.pipeline.model.num_random = 2000
    config.save_config()
    # Its LPIPS would be downloaded, as nerfacto's would.
    with lpips_optional():
        pipeline = config.pipeline.setup(device="cpu", test_mode="val")
        parsed = pipeline.datamanager.train_dataparser_outputs
        parsed.save_dataparser_transform(config.get_base_dir() / "dataparser_transforms.json")
        cloud, _ = demo_cloud()
        chosen = np.random.default_rng(0).choice(len(cloud.positions), 2000, replace=False)
        on_surfaces = Frame.of_run(config.get_base_dir()).to_model(cloud.positions[chosen])
        pipeline.model.gauss_params["means"].data = torch.from_numpy(on_surfaces).float()
        config.get_checkpoint_dir().mkdir()
        saved = {"step": 7, "pipeline": pipeline.state_dict()}
        torch.save(saved, config.get_checkpoint_dir() / "step-000000007.ckpt")
        ExportGaussianSplat(config.get_base_dir() / "config.yml", out / "exported").main()
    return out / "exported" / "splat.ply", config.get_base_dir() / "config.yml"


@pytest.mark.slow
def test_gaussians_of_splatfacto_carry_the_labels_of_their_places(trained, splat, tmp_path):
    from ovs3d_nerfstudio.run import load_run

    path, theirs = splat
    words = ["ovs3d", "export", "splat", "--load-config", trained[0], "--output-dir", tmp_path, "--splat", path]
    command(*words, "--splat-config", theirs.parent, cwd=tmp_path)
    before, after = (PlyData.read(str(file))["vertex"].data for file in (path, tmp_path / "splat.ply"))
    assert len(before) == len(after) == 2000 and {"f_dc_0", "f_rest_44", "opacity", "rot_3"} <= set(before.dtype.names)
    assert list(after.dtype.names) == [*before.dtype.names, "class_id", "probability"]
    assert all(np.array_equal(before[name], after[name]) for name in before.dtype.names)
    run = load_run(trained[0])
    found = run.label_points(Frame.of_run(theirs.parent).to_data(np.stack([before[axis] for axis in "xyz"], -1)))
    assert (after["class_id"] == found.labels + 1).mean() > 0.99 and len(np.unique(found.labels)) > 1
    assert np.allclose(after["probability"], found.probabilities.max(-1), atol=1e-3)
    for number, prompt in enumerate(run.prompts, start=1):
        alone, without = (
            PlyData.read(str(tmp_path / f"{number:03d}-{prompt}{kind}.ply"))["vertex"].data for kind in ("", "-removed")
        )
        assert np.array_equal(alone, before[after["class_id"] == number])
        assert np.array_equal(without, before[after["class_id"] != number])


@pytest.mark.slow
def test_improbable_gaussians_are_none(trained, splat, tmp_path, ovs3d):
    words = ["export", "splat", "--load-config", trained[0], "--output-dir", tmp_path, "--splat", splat[0]]
    assert ovs3d(*words, "--least-probability", 0.5)[0] == 0
    after = PlyData.read(str(tmp_path / "splat.ply"))["vertex"].data
    assert np.array_equal(after["class_id"] == 0, after["probability"] < 0.5) and (after["class_id"] == 0).any()


@pytest.mark.slow
def test_no_class_of_an_earlier_call_is_left_beside_those_of_now(trained, splat, tmp_path, ovs3d):
    words = ["export", "splat", "--load-config", trained[0], "--output-dir", tmp_path, "--splat", splat[0]]
    mine = tmp_path / "003-mine.ply"
    mine.touch()
    assert ovs3d(*words, "--prompts", "cat; books")[0] == 0
    assert ovs3d(*words, "--prompts", "Cat")[0] == 0
    left = {path.name for path in tmp_path.glob("*.ply")} - {"splat.ply", mine.name}
    assert {name.casefold() for name in left} == {"001-cat.ply", "001-cat-removed.ply"} and mine.exists()
    (tmp_path / "classes.json").write_text('{"1": ["books"]}')
    assert ovs3d(*words, "--prompts", "cat")[0] == 0, "what is no list of classes names no file"


@pytest.mark.slow
def test_exports_leave_out_what_is_not_to_be_shown(trained, splat, tmp_path, ovs3d):
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=0.7)
    mesh.export(tmp_path / "ball.ply")
    words = ["--load-config", trained[0], "--output-dir", tmp_path]
    assert ovs3d("export", "splat", *words, "--splat", splat[0])[0] == 0
    whole = PlyData.read(str(tmp_path / "splat.ply"))["vertex"].data
    classes = {entry["prompt"]: int(key) for key, entry in json.loads((tmp_path / "classes.json").read_text()).items()}
    name, other = sorted(classes, key=lambda prompt: -(whole["class_id"] == classes[prompt]).sum())[:2]
    assert ovs3d("export", "splat", *words, "--splat", splat[0], "--without", name)[0] == 0
    left = PlyData.read(str(tmp_path / "splat.ply"))["vertex"].data
    assert np.array_equal(left, whole[whole["class_id"] != classes[name]]) and 0 < len(left) < len(whole)
    status, printed = ovs3d("export", "mesh", *words, "--mesh", tmp_path / "ball.ply")
    assert status == 0, printed
    found = PlyData.read(str(tmp_path / "mesh.ply"))["vertex"].data["class_id"]
    commonest = list(classes)[np.bincount(found).argmax() - 1]
    assert ovs3d("export", "mesh", *words, "--mesh", tmp_path / "ball.ply", "--only", commonest)[0] == 0
    part = PlyData.read(str(tmp_path / "mesh.ply"))
    assert set(part["vertex"].data["class_id"]) == {classes[commonest]}
    used = np.concatenate(part["face"].data["vertex_indices"])
    assert set(used) == set(range(len(part["vertex"].data)))
    assert ovs3d("export", "pointcloud", *words, "--num-points", 500, "--only", f"{name}; {other}")[0] == 0
    ids = set(PlyData.read(str(tmp_path / "point_cloud.ply"))["vertex"].data["class_id"])
    assert ids and ids <= {classes[name], classes[other]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, said",
    [
        (["splat", "--splat", "nowhere.ply"], "nowhere.ply does not exist"),
        (["splat", "--splat", "BROKEN"], "cannot be read as a PLY"),
        (["mesh", "--mesh", "nowhere.ply"], "nowhere.ply does not exist"),
        (["mesh", "--mesh", "BROKEN"], "cannot be read as a mesh"),
        (["pointcloud", "--num-points", "0"], "--num-points 0"),
    ],
)
def test_export_ends_a_users_mistake_with_a_sentence(trained, tmp_path, ovs3d, words, said):
    (tmp_path / "broken.ply").write_text("ply? no")
    words = [tmp_path / "broken.ply" if word == "BROKEN" else word for word in words]
    status, printed = ovs3d("export", *words, "--load-config", trained[0], "--output-dir", tmp_path)
    assert status == 1 and said in printed
