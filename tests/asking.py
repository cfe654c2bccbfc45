"""What holds for a run of either geometry that is asked from Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData

from ovs3d_nerfstudio.demo.raycast import Camera, cast
from ovs3d_nerfstudio.demo.scene import demo_solids, train_cameras
from ovs3d_nerfstudio.objects.thumbnails import LONGER_SIDE
from ovs3d_nerfstudio.run import Run


def pinhole(scene: Path, view: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Pose, intrinsics and size of a training view, as they stand in the data's file."""
    meta = json.loads((scene / "transforms.json").read_text())
    frames = [frame for frame in meta["frames"] if frame["file_path"] in meta["train_filenames"]]
    intrinsics = np.array([[meta["fl_x"], 0, meta["cx"]], [0, meta["fl_y"], meta["cy"]], [0, 0, 1]])
    return np.array(frames[view]["transform_matrix"]), intrinsics, (meta["w"], meta["h"])


def true_view(scene: Path, view: int) -> tuple[Camera, np.ndarray]:
    """A training camera of the demo scene, and its true depth along the axis."""
    width = pinhole(scene, view)[2][0]
    camera = train_cameras(8, width)[view]
    return camera, cast(demo_solids(), camera)[1]


def answers_are_those_of_its_pictures(run: Run, scene: Path, depth_error: float = np.inf) -> None:
    """Views, points and features of a run say the same, in the coordinates of the data; the median error of depth, of a run whose
    geometry is good, is at most a share of it."""
    pose, intrinsics, size = pinhole(scene, 2)
    view = run.render_view(pose, intrinsics, size)
    model, cameras = run.pipeline.model, run.pipeline.datamanager.train_dataset.cameras
    with torch.no_grad():
        shown = model.get_outputs_for_camera(cameras[2:3].to(model.device))
    assert np.allclose(view.rgb, shown["rgb"].cpu(), atol=0.01)
    there = view.accumulation >= 0.5
    labels = model.segmenter.labels_of(shown["segmentation"]).cpu().numpy()
    assert (view.labels == labels)[there].mean() > 0.99 and (view.labels == -1)[~there].all()
    assert np.isnan(view.depth[~there]).all() and np.allclose(view.probabilities.sum(-1), 1, atol=1e-4)
    z = shown["depth"][..., 0].cpu()
    if not run.is_splat:  # along the ray
        z = z * (cameras[2:3].generate_rays(0).directions @ -cameras.camera_to_worlds[2, :, 2]).view_as(z)
    # A NeRF's is the median along the ray, which jumps where two things weigh the same.
    assert np.isclose(view.depth[there] * run.frame.scale, z.numpy()[there], rtol=0.01).mean() > 0.98
    # Depth and where it leads to, as the scene truly is.
    _, depth = true_view(scene, 2)
    seen = there & np.isfinite(depth)
    assert np.median(np.abs(view.depth - depth)[seen] / depth[seen]) < depth_error
    cols, rows = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    (fx, _, cx), (_, fy, cy), _ = intrinsics
    rays = np.stack([(cols - cx) / fx, (cy - rows) / fy, -np.ones_like(rows)], -1)
    points = ((rays * view.depth[..., None]) @ pose[:3, :3].T + pose[:3, 3])[there]
    found = run.label_points(points)
    assert (found.labels == view.labels[there]).mean() > 0.6 and found.prompts == view.prompts == run.prompts
    assert found.probabilities.shape == (len(points), len(run.prompts)) == (len(points), len(run.colors))
    again = run.label_points(run.frame.to_model(points), frame="model")
    assert (again.labels == found.labels).mean() > 0.999
    model_view = run.render_view(cameras[2].camera_to_worlds.numpy(), intrinsics, size, frame="model")
    alike = np.isclose(model_view.depth[there], view.depth[there] * run.frame.scale, rtol=0.01)
    assert alike.mean() > 0.98
    # In the encoder's own space, text is compared with what is there.
    features = run.features_at(points)
    assert np.allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-4)
    cosines = torch.from_numpy(features) @ model.segmenter.text.cpu().T
    scores = model.segmenter.class_scores(cosines.to(model.device)).argmax(-1).cpu().numpy()
    assert (scores == found.labels).mean() > 0.9
    things = run.objects()
    assert things and {thing.prompt for thing in things} <= set(run.prompts)
    for thing in things:
        assert (thing.box_min <= thing.centroid).all() and (thing.centroid <= thing.box_max).all()
        assert len(thing.members) == thing.count and 0 < thing.probability <= 1


def the_files_listed(folder: Path) -> set[Path]:
    """Those of the objects of a catalogue."""
    entries = json.loads((folder / "objects.json").read_text())["objects"]
    return {folder / entry[kind] for entry in entries for kind in ("file", "without", "thumbnail") if kind in entry}


def the_catalogue_is_whole(folder: Path, kind: str, file_frame: str) -> None:
    """objects.json, the file of each object, the scene without it and its picture agree."""
    saved = json.loads((folder / "objects.json").read_text())
    assert (saved["frame"], saved["kind"], saved["file_frame"]) == ("data", kind, file_frame)
    assert saved["objects"] and [entry["id"] for entry in saved["objects"]] == [*range(1, len(saved["objects"]) + 1)]
    total = set()
    for entry in saved["objects"]:
        alone, without = (PlyData.read(folder / entry[name])["vertex"].data for name in ("file", "without"))
        assert len(alone) == entry["count"] and (alone["class_id"] == entry["class_id"]).all()
        assert alone["probability"].mean() == pytest.approx(entry["probability"], abs=1e-3)
        total.add(len(alone) + len(without))
        low, high = np.array(entry["box"]["min"]), np.array(entry["box"]["max"])
        assert (low < entry["centroid"]).all() and (high > entry["centroid"]).all()
        if file_frame == "data":
            middle = np.median([alone[axis] for axis in "xyz"], -1)
            assert (low < middle).all() and (middle < high).all()
        if "thumbnail" in entry:
            assert max(Image.open(folder / entry["thumbnail"]).size) == LONGER_SIDE
    assert len(total) == 1
