"""The data people bring: every ray must meet what its pixel shows, whatever the cameras, sizes, names and formats."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.utils import colmap_parsing_utils as colmap
from PIL import Image
from test_training import pipeline, train

from ovs3d_nerfstudio.data.frames import frame_of
from ovs3d_nerfstudio.demo.raycast import Camera, _first_hits, cast, render
from ovs3d_nerfstudio.demo.scene import demo_solids, train_cameras
from ovs3d_nerfstudio.evaluation.splits import rendered_views
from ovs3d_nerfstudio.files import mask_stem

SOLIDS = demo_solids()
NAMES = sorted({solid.name for solid in SOLIDS})
LENSES = {
    "OPENCV": (CameraType.PERSPECTIVE, {"k1": -0.2, "k2": 0.05, "p1": 0.01, "p2": -0.01}),
    "OPENCV_FISHEYE": (CameraType.FISHEYE, {"k1": 0.1, "k2": -0.05, "k3": 0.01, "k4": 0.0}),
}


@dataclass
class Lens(Camera):
    """A camera with a distorted picture: its rays are those of nerfstudio's cameras."""

    model: str = "OPENCV"

    def rays(self, samples):
        kind, k = LENSES[self.model]
        tangential = [k.get("p1", 0.0), k.get("p2", 0.0)]
        radial = [k["k1"], k["k2"], k.get("k3", 0.0), k.get("k4", 0.0)]
        camera = Cameras(
            camera_to_worlds=torch.from_numpy(self.pose[None, :3]).float(),
            fx=self.focal,
            fy=self.focal,
            cx=self.width / 2,
            cy=self.height / 2,
            width=self.width,
            height=self.height,
            distortion_params=torch.tensor([radial + tangential]),
            camera_type=kind,
        )
        coords = np.mgrid[: self.height * samples, : self.width * samples].reshape(2, -1).T
        rays = camera.generate_rays(0, coords=torch.from_numpy((coords + 0.5) / samples).float())
        # One unit of depth long, as a Camera's are, so that depths are along the viewing axis.
        directions = rays.directions.numpy().T
        return self.pose[:3, 3:].astype(np.float32), directions / -(self.pose[:3, 2] @ directions).astype(np.float32)


def shots(count=5, sizes=((64, 48),), lens: str | None = None) -> list[Camera]:
    """Cameras before the demo scene, of the given sizes (width, height) in turn."""
    cameras = []
    for i, camera in enumerate(train_cameras(count, 64)):
        width, height = sizes[i % len(sizes)]
        arguments = (camera.pose, width, height, 0.8 * max(width, height))
        cameras.append(Lens(*arguments, model=lens) if lens else Camera(*arguments))
    return cameras


def write_scene(folder: Path, cameras: list[Camera], stem="view {}", alpha=False, masks=False) -> Path:
    """A nerfstudio dataset of these cameras with exact masks of the classes; the last view is held out. Their model stands at the
    top of transforms.json, or in each frame where there are several."""
    models = [camera.model if isinstance(camera, Lens) else "OPENCV" for camera in cameras]
    (folder / "images").mkdir(parents=True)
    frames = []
    for i, camera in enumerate(cameras):
        name = stem.format(i)
        index = write_picture(folder / "images" / f"{name}.png", camera, alpha)
        frame = {"file_path": f"images/{name}.png", "transform_matrix": camera.pose.tolist()}
        frame |= {"fl_x": camera.focal, "fl_y": camera.focal, "cx": camera.width / 2, "cy": camera.height / 2}
        frame |= {"w": camera.width, "h": camera.height}
        if isinstance(camera, Lens):
            frame |= LENSES[camera.model][1]
        if len(set(models)) > 1:
            frame["camera_model"] = models[i]
        if masks:
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray((seen_of(index) * 255).astype(np.uint8)).save(folder / "masks" / f"{name}.png")
            frame["mask_path"] = f"masks/{name}.png"
        (folder / "segmentations" / name).mkdir(parents=True)
        for c, prompt in enumerate(NAMES):
            Image.fromarray(classes_of(index) == c).save(folder / "segmentations" / name / f"{prompt}.png")
        frames.append(frame)
    (folder / "segmentations" / "classes.txt").write_text("\n".join(NAMES))
    files = [frame["file_path"] for frame in frames]
    splits = {"train_filenames": files[:-1], "val_filenames": files[-1:], "test_filenames": files[-1:]}
    top = {"camera_model": models[0]} if len(set(models)) == 1 else {}
    meta = {**top, "orientation_override": "none", **splits, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder


def write_picture(path: Path, camera: Camera, alpha=False) -> np.ndarray:
    """Writes what the camera sees, transparent where it is wall if asked; returns the solid of each pixel."""
    pixels, (index, _) = render(SOLIDS, camera), cast(SOLIDS, camera)
    if alpha:
        opaque = np.where(classes_of(index) == NAMES.index("books"), 0, 255).astype(np.uint8)
        pixels = np.concatenate([pixels, opaque[..., None]], -1)
    Image.fromarray(pixels).save(path)
    return index


def classes_of(index: np.ndarray) -> np.ndarray:
    """The class of each solid's index."""
    return np.array([NAMES.index(solid.name) for solid in SOLIDS])[index]


def seen_of(index: np.ndarray) -> np.ndarray:
    """A mask that ignores the cat, as if it had walked about."""
    return classes_of(index) != NAMES.index("cat")


def classes_along(opened, rays) -> np.ndarray:
    """The class that each ray of a pipeline meets first in the demo scene."""
    frame = frame_of(opened.datamanager)
    origins = frame.to_data(rays.origins.double().numpy())
    ends = frame.to_data((rays.origins + rays.directions).double().numpy())
    index, _ = _first_hits(SOLIDS, origins.T.astype(np.float32), (ends - origins).T.astype(np.float32))
    return classes_of(index)


def check_rays(opened, cameras: dict[str, Camera]) -> None:
    """Rays of photos and windows meet the class of their pixel, up to pixels whose centre lies on a border."""
    datamanager = opened.datamanager
    truth = [classes_of(cast(SOLIDS, cameras[path.stem])[0]) for path in datamanager.train_dataset.image_filenames]
    rays, batch = datamanager.next_train(0)
    window_rays, windows = datamanager.next_windows()
    for bundle, indices in ((rays, batch["indices"]), (window_rays, windows.indices)):
        expected = np.array([truth[view][y, x] for view, y, x in indices.tolist()])
        assert (classes_along(opened, bundle) == expected).mean() > 0.97


KINDS = {
    "portrait": shots(sizes=((48, 64),)),
    "sizes": shots(sizes=((64, 48), (48, 64), (80, 40))),
    "distorted": shots(lens="OPENCV"),
    "fisheye": shots(lens="OPENCV_FISHEYE"),
    "perspective and fisheye": [
        (fisheye if i in (1, 4) else plain)
        for i, (plain, fisheye) in enumerate(zip(shots(), shots(lens="OPENCV_FISHEYE"), strict=True))
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_ray_meets_what_its_pixel_shows(tmp_path, checkpoints, kind):
    cameras = KINDS[kind]
    trained = pipeline(write_scene(tmp_path / "scene", cameras), **checkpoints)
    history = train(trained, 0, 4)
    assert all(np.isfinite(list(step.values())).all() for step in history) and "fda_positive_loss" in history[-1]
    check_rays(trained, {f"view {i}": camera for i, camera in enumerate(cameras)})
    trained.eval()
    outputs = trained.model.get_outputs_for_camera(trained.datamanager.eval_dataset.cameras[:1])
    assert outputs["segmentation"].shape == (cameras[-1].height, cameras[-1].width, 3)
    metrics, _ = trained.get_eval_image_metrics_and_images(0)
    assert 0 <= metrics["miou"] <= 1 and metrics["psnr"] > 5


def test_transparent_pixels_are_white_to_the_encoders_and_black_to_the_colours(tmp_path, checkpoints):
    trained = pipeline(write_scene(tmp_path / "scene", shots(), alpha=True), **checkpoints)
    losses = train(trained, 0, 4)[-1]
    assert np.isfinite(list(losses.values())).all() and "opacity_loss" not in losses
    metrics, images = trained.eval() and trained.get_eval_image_metrics_and_images(0)
    assert 0 <= metrics["miou"] <= 1 and images["segmentation"].shape == (48, 128, 3)
    black = trained.model.renderer_rgb.blend_background(trained.datamanager.eval_dataset.get_image_float32(0))
    (view,) = rendered_views(trained, "test")[1]
    transparent = view.truth == NAMES.index("books")
    assert transparent.any() and not view.photo[transparent].any()
    assert torch.equal(images["segmentation"][:, :64], black)


@pytest.mark.parametrize("sizes", [((64, 48),), ((64, 48), (48, 64))], ids=["one size", "sizes"])
def test_ignored_pixels_are_no_rays_and_teach_nothing(tmp_path, checkpoints, sizes):
    cameras = shots(sizes=sizes)
    trained = pipeline(write_scene(tmp_path / "scene", cameras, masks=True), **checkpoints)
    assert np.isfinite(list(train(trained, 0, 4)[-1].values())).all()
    seen = [seen_of(cast(SOLIDS, camera)[0]) for camera in cameras]
    for _ in range(5):
        _, batch = trained.datamanager.next_train(0)
        assert all(seen[view][y, x] for view, y, x in batch["indices"].tolist())
        _, windows = trained.datamanager.next_windows()
        assert windows.seen.flatten().tolist() == [seen[view][y, x] for view, y, x in windows.indices.tolist()]


def test_names_may_hold_spaces_other_scripts_and_what_file_systems_forbid(tmp_path, checkpoints):
    scene = write_scene(tmp_path / "ma scène № 1", shots(), stem="gâteau δ {} (1)")
    names = [f'{name}: "a/b" ..\\{name}?' for name in NAMES]
    (scene / "segmentations" / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    for folder in (scene / "segmentations").glob("*/"):
        for old, new in zip(NAMES, names, strict=True):
            (folder / f"{old}.png").rename(folder / f"{mask_stem(new)}.png")
    trained = pipeline(scene, **checkpoints)
    train(trained, 0, 4)
    assert trained.model.segmenter.prompts == names
    metrics, _ = trained.eval() and trained.get_eval_image_metrics_and_images(0)
    assert {f"iou_{name}" for name in names} & set(metrics)


def write_blender(scene: Path, cameras: list[Camera]) -> None:
    """The scene in the layout of NeRF's synthetic scenes."""
    angle = 2 * np.arctan(cameras[0].width / 2 / cameras[0].focal)
    for split, chosen in (("train", range(4)), ("val", [4]), ("test", [4])):
        frames = [{"file_path": f"./images/view {i}", "transform_matrix": cameras[i].pose.tolist()} for i in chosen]
        content = {"camera_angle_x": angle, "frames": frames}
        (scene / f"transforms_{split}.json").write_text(json.dumps(content))


def write_colmap(scene: Path, cameras: list[Camera]) -> None:
    """The scene as COLMAP leaves it, without points."""
    model = {1: colmap.Camera(1, "PINHOLE", 64, 48, [cameras[0].focal, cameras[0].focal, 32.0, 24.0])}
    images = {}
    for i, camera in enumerate(cameras):
        # COLMAP's cameras look along +z with y down, and its poses lead from the world to the camera.
        rotation = (camera.pose[:3, :3] * [1, -1, -1]).T
        shift = -rotation @ camera.pose[:3, 3]
        nothing = np.zeros((0, 2)), np.zeros(0, int)
        images[i + 1] = colmap.Image(
            i + 1, colmap.rotmat2qvec(rotation), shift, 1, f"view {i}.png".replace(" ", "_"), *nothing
        )
        (scene / "images" / f"view {i}.png").rename(scene / "images" / f"view_{i}.png")
        (scene / "segmentations" / f"view {i}").rename(scene / "segmentations" / f"view_{i}")
    (scene / "colmap" / "sparse" / "0").mkdir(parents=True)
    colmap.write_cameras_text(model, scene / "colmap" / "sparse" / "0" / "cameras.txt")
    colmap.write_images_text(images, scene / "colmap" / "sparse" / "0" / "images.txt")


PARSERS = {
    "blender": (write_blender, BlenderDataParserConfig()),
    "colmap": (
        write_colmap,
        ColmapDataParserConfig(
            load_3D_points=False, downscale_factor=1, eval_mode="fraction", train_split_fraction=0.8
        ),
    ),
}


@pytest.mark.parametrize("name", PARSERS)
def test_other_dataparsers_work_unchanged(tmp_path, checkpoints, name):
    write, parser = PARSERS[name]
    cameras = shots()
    scene = write_scene(tmp_path / "scene", cameras, alpha=name == "blender")
    (scene / "transforms.json").unlink()
    write(scene, cameras)
    trained = pipeline(scene, dataparser=parser, **checkpoints)
    assert np.isfinite(list(train(trained, 0, 4)[-1].values())).all()
    separator = "_" if name == "colmap" else " "
    check_rays(trained, {f"view{separator}{i}": camera for i, camera in enumerate(cameras)})
    metrics, _ = trained.eval() and trained.get_eval_image_metrics_and_images(0)
    assert 0 <= metrics["miou"] <= 1
    shutil.rmtree(scene / "segmentations")
    assert pipeline(scene, dataparser=parser, **checkpoints, prompts="a cat").model.evaluator is None
