"""Meshes of what cameras see: fused from true depth, so that what is wrong is the fusion."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import trimesh
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.scene_box import OrientedBox

from ovs3d_nerfstudio.cli import meshing
from ovs3d_nerfstudio.cli.boxes import Box, BoxOptions
from ovs3d_nerfstudio.cli.depth import DepthView, _pinholes, mixed
from ovs3d_nerfstudio.cli.meshing import Mesh, fused, seen_box, typical_depth, usual_voxel
from ovs3d_nerfstudio.cli.solids import body, surfaces
from ovs3d_nerfstudio.data.frames import Frame
from ovs3d_nerfstudio.demo.raycast import cast
from ovs3d_nerfstudio.demo.scene import blocks, demo_solids, train_cameras
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.gaussians.shown import view_matrix

VIEWS, VOXEL = 10, 0.03


def true_view(solids, camera) -> DepthView:
    """What a camera of the demo sees; red is the number of the solid."""
    index, depth = cast(solids, camera)
    intrinsics = np.array([[camera.focal, 0, camera.width / 2], [0, camera.focal, camera.height / 2], [0, 0, 1.0]])
    intrinsics[:2, 2] -= 0.5
    pose = view_matrix(torch.from_numpy(np.asarray(camera.pose, np.float64))[None, :3])[0].numpy()
    return DepthView(depth, np.repeat(index[..., None] * 20, 3, -1).astype(np.uint8), intrinsics, pose)


@pytest.fixture(scope="module")
def views() -> list[DepthView]:
    """Of two sizes, as photos may be."""
    solids = demo_solids()
    cameras = [train_cameras(VIEWS, width)[i] for i, width in enumerate([160, 200] * (VIEWS // 2))]
    return [true_view(solids, camera) for camera in cameras]


@pytest.fixture(scope="module")
def mesh(views) -> Mesh:
    farthest = 3 * typical_depth(views)
    return fused(views, VOXEL, farthest, seen_box(views, farthest))


def off_surfaces(points: np.ndarray, views: list[DepthView]) -> np.ndarray:
    """How far points are from what a view sees at their pixel, along its axis, at least; none sees those at infinity."""
    least = np.full(len(points), np.inf)
    for view in views:
        x, y, z = view.world_to_camera[:3, :3] @ points.T + view.world_to_camera[:3, 3:]
        focal, (height, width) = view.intrinsics[0, 0], view.depth.shape
        column = np.rint(focal * x / z + view.intrinsics[0, 2]).astype(int)
        row = np.rint(focal * y / z + view.intrinsics[1, 2]).astype(int)
        inside = np.flatnonzero((z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height))
        error = np.abs(view.depth[row[inside], column[inside]] - z[inside])
        least[inside] = np.minimum(least[inside], error)
    return least


def test_points_of_a_view_lie_on_what_it_sees(views):
    points = views[0].points(3)
    assert off_surfaces(points, views[:1]).max() < 1e-4 and len(points) > 1000


def test_a_mesh_lies_on_the_scene_and_faces_the_cameras(mesh, views):
    off = off_surfaces(mesh.vertices, views)
    assert np.isfinite(off).all() and (off < 2 * VOXEL).mean() > 0.98
    faces = mesh.vertices[mesh.faces]
    normals = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0])
    faced = [((view.place - faces.mean(1)) * normals).sum(-1) > 0 for view in views]
    assert np.any(faced, axis=0).mean() > 0.95
    assert set(np.rint(mesh.colors[:, 0] * 255 / 20)) >= set(range(7))


def test_what_one_view_alone_has_before_its_lens_is_left_out(mesh, views):
    veiled = [*views[1:], dataclasses.replace(views[0], depth=np.full_like(views[0].depth, 0.4))]
    farthest = 3 * typical_depth(veiled)
    again = fused(veiled, VOXEL, farthest, seen_box(veiled, farthest))
    assert np.linalg.norm(again.vertices - views[0].place, axis=1).min() > 1.5
    assert len(again.vertices) > 0.8 * len(mesh.vertices)


def test_what_hangs_free_right_before_cameras_is_left_out(views):
    """A sheet that three views see, and no other looks through; so large that it is no crumb."""
    first = views[4]
    sheet = dataclasses.replace(first, depth=np.full_like(first.depth, 1.2))
    veiled = [*(view for view in views if view is not first), *[sheet] * 3]
    kept = fused(veiled, VOXEL, 12, Box.between(np.full(3, -9.0), np.full(3, 9.0)))
    assert np.linalg.norm(kept.vertices - first.place, axis=1).min() > 1.5


def test_a_box_that_holds_nothing_leaves_nothing(views):
    assert not len(fused(views, VOXEL, np.inf, Box.turned((50, 50, 50), (0, 0, 0), (1, 1, 1))).faces)


def test_voxels_without_end_are_refused(views, monkeypatch):
    monkeypatch.setattr(meshing, "MOST_BLOCKS", 100)
    with pytest.raises(CommandError, match=r"--voxel 0\.03 makes .* blocks"):
        fused(views, VOXEL, np.inf, seen_box(views, 12))
    with pytest.raises(CommandError, match=r"--voxel 0\.001 is finer than half a pixel"):
        fused(views, 0.001, np.inf, seen_box(views, 12))
    assert 0.005 < usual_voxel(views, seen_box(views, 12)) < 0.05


@pytest.fixture(scope="module")
def parts(mesh) -> list[tuple[str, np.ndarray]]:
    labels = np.rint(mesh.colors[:, 0] * 255 / 20).astype(int)
    return [(demo_solids()[label].name, chosen) for label, chosen in surfaces(mesh, labels, 2 * VOXEL, 0.3)]


def test_objects_become_watertight_bodies_where_they_stand(mesh, views, parts):
    boxes = {solid.name: solid.bounds() for solid in blocks(demo_solids())}
    for name in ("cat", "motorbike"):
        (chosen,) = (chosen for part, chosen in parts if part == name)
        closed, nearest = body(mesh, chosen, views, VOXEL)
        shape = trimesh.Trimesh(closed.vertices, closed.faces, process=False)
        assert shape.is_watertight and shape.volume > 0 and len(nearest) == len(closed.vertices)
        low, high = boxes[name]
        # The back is not seen, and is as far behind as what is seen of the sides.
        off = np.abs(shape.bounds - boxes[name])[[0, 0, 0, 1, 1], [0, 1, 2, 0, 2]]
        assert off.max() < 0.06 * np.linalg.norm(high - low), (name, off)
        assert 0.35 < shape.volume / np.prod(high - low) < 1


def test_what_is_flat_becomes_a_slab(mesh, views, parts):
    closed, _ = body(mesh, dict(parts)["puzzle pieces"], views, VOXEL)
    shape = trimesh.Trimesh(closed.vertices, closed.faces, process=False)
    assert shape.is_watertight and np.ptp(shape.bounds[:, 2]) < 8 * VOXEL


def test_pixels_between_what_is_before_and_behind_are_mixed():
    depth = torch.full((5, 7), 2.0)
    depth[:, 4:] = 1.0
    depth[:, 3] = 1.4
    assert mixed(depth)[:, 3].all() and mixed(depth).sum() == 5


def test_any_camera_is_looked_at_as_a_pinhole():
    pose = torch.eye(4)[None, :3]
    (fisheye,) = _pinholes(Cameras(pose, 100.0, 110.0, 60.0, 40.0, 120, 80, camera_type=CameraType.FISHEYE), 2.0)
    assert (int(fisheye.width), int(fisheye.height)) == (60, 40) and float(fisheye.fx) == 50 and float(fisheye.cy) == 20
    sides = list(_pinholes(Cameras(pose, 1.0, 1.0, 60.0, 30.0, 120, 60, camera_type=CameraType.EQUIRECTANGULAR), 1.0))
    axes = torch.cat([side.camera_to_worlds[..., 2] for side in sides])
    assert torch.allclose(axes @ axes.T, torch.eye(4) - torch.eye(4).roll(2, 0), atol=1e-6)
    assert all(torch.det(side.camera_to_worlds[0, :, :3]).isclose(torch.tensor(1.0)) for side in sides)


# Boxes.


def test_a_turned_box_holds_what_nerfstudios_holds():
    words = ((0.1, -0.2, 0.3), (0.4, 0.5, -0.6), (1.0, 2.0, 0.5))
    points = np.random.default_rng(0).uniform(-1.5, 1.5, (2000, 3))
    theirs = OrientedBox.from_params(*words)
    box = BoxOptions(*words).box(None)
    inside = box.within(points)
    assert np.array_equal(inside, theirs.within(torch.from_numpy(points)).numpy()) and 50 < inside.sum() < 1000
    low, high = box.bounds()
    assert (points[inside] >= low).all() and (points[inside] <= high).all()


def test_an_objects_box_is_found_in_either_frame(tmp_path):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    frame = Frame(np.c_[rotation, [1, 2, 3]], 0.3)
    entries = [{"box": {"min": [0, 0, 0], "max": [1, 2, 3]}}, {"box": {"min": [5, 5, 5], "max": [6, 6, 6]}}]
    points = np.random.default_rng(1).uniform(-1, 4, (3000, 3))
    true = ((points >= -0.19) & (points <= np.array([1, 2, 3]) + 0.19)).all(-1)  # 5 % of the diagonal of 3.74
    for name in ("data", "model"):
        (tmp_path / "objects.json").write_text(json.dumps({"frame": name, "objects": entries}))
        box = BoxOptions(object=1).box(tmp_path).in_model(frame)
        inside = box.within(frame.to_model(points) if name == "data" else points)
        assert (inside == true).mean() > 0.997 and inside.any()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"obb_center": (0, 0, 0)}, "--obb-center alone"),
        ({"obb_rotation": (0, 0, 0), "obb_scale": (1, 1, 1)}, "--obb-rotation alone"),
        ({"obb_center": (0, 0, 0), "obb_scale": (1, 0, 1)}, "--obb-scale 1 0 1 is no box"),
        ({"obb_center": (0, 0, np.nan), "obb_scale": (1, 1, 1)}, "--obb-center 0 0 nan"),
        ({"object": 1, "obb_scale": (1, 1, 1)}, "both name a box"),
        ({"object": 7}, "has no object 7; choose one of its ids: 3, 2"),
        ({"object": 2}, "Object 2 of .* has an empty box"),
        ({"object": 1, "objects_file": "nowhere.json"}, "nowhere.json does not exist"),
        ({"object": 1, "objects_file": "BROKEN"}, "is no list of objects"),
    ],
)
def test_what_is_no_box_is_told(tmp_path, options, said):
    (tmp_path / "broken.json").write_text('{"objects": 3}')
    listed = [{"id": 3, "box": {"min": [0] * 3, "max": [1] * 3}}, {"id": 2, "box": {"min": [1] * 3, "max": [1] * 3}}]
    (tmp_path / "objects.json").write_text(json.dumps({"frame": "data", "objects": listed}))
    if "objects_file" in options:
        name = "broken.json" if options["objects_file"] == "BROKEN" else options["objects_file"]
        options = {**options, "objects_file": tmp_path / name}
    with pytest.raises(CommandError, match=said):
        BoxOptions(**options).box(tmp_path)


def test_no_option_no_box(tmp_path):
    assert BoxOptions().box(tmp_path) is None
