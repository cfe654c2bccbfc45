"""What other programs write goes all the way: read by nerfstudio's own converters and parsers, then previewed, trained for a few
steps, evaluated, rendered and exported. Small, and made by hand after each program's documented layout."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from children import configured, run_folder, specs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.utils import colmap_parsing_utils as colmap
from nerfstudio.process_data import (
    colmap_utils,
    metashape_utils,
    polycam_utils,
    realitycapture_utils,
    record3d_utils,
)
from PIL import Image
from scipy.spatial.transform import Rotation

from ovs3d_nerfstudio.demo.raycast import Camera, cast, render
from ovs3d_nerfstudio.demo.scene import demo_solids, train_cameras

SIZE, SHOTS = (48, 36), 8
CAMERAS = [Camera(camera.pose, *SIZE, 40.0) for camera in train_cameras(SHOTS, SIZE[0])]
TURNED = [Camera(camera.pose, *(SIZE if i % 2 == 0 else SIZE[::-1]), camera.focal) for i, camera in enumerate(CAMERAS)]
"""The same with every other photo taken upright."""
OPENCV = np.array([1, -1, -1, 1])
"""From nerfstudio's axes of a camera to OpenCV's, and back."""


def stems(form: str) -> list[str]:
    return [form.format(i + 1) for i in range(SHOTS)]


def write_polycam(scene: Path, work: Path) -> list[str]:
    """Polycam's keyframes: a JSON a photo, its world turned."""
    names = stems("frame_{:05d}")
    for i, camera in enumerate(CAMERAS):
        rows = camera.pose[[1, 2, 0]]
        entry = {f"t_{r}{c}": float(rows[r, c]) for r in range(3) for c in range(4)}
        entry |= {"fx": camera.focal, "fy": camera.focal, "cx": SIZE[0] / 2, "cy": SIZE[1] / 2}
        entry |= {"width": SIZE[0], "height": SIZE[1], "blur_score": 100.0}
        (work / f"{i}.json").write_text(json.dumps(entry))
    polycam_utils.polycam_to_json([work / f"{i}.jpg" for i in range(SHOTS)], [], None, work, scene)
    return names


def write_record3d(scene: Path, work: Path) -> list[str]:
    """Record3D's metadata: quaternions with the scalar last, the matrix of intrinsics by columns."""
    names = stems("{}")
    poses = [[*Rotation.from_matrix(camera.pose[:3, :3]).as_quat(), *camera.pose[:3, 3]] for camera in CAMERAS]
    focal = CAMERAS[0].focal
    matrix = [focal, 0, 0, 0, focal, 0, SIZE[0] / 2, SIZE[1] / 2, 1]
    (work / "metadata.json").write_text(
        json.dumps({"poses": np.array(poses).tolist(), "K": matrix, "w": SIZE[0], "h": SIZE[1]})
    )
    paths = [Path(f"images/{name}.jpg") for name in names]
    convert = record3d_utils.record3d_to_json
    # nerfstudio's main branch takes points too, and is told that there are none.
    no_points = dict.fromkeys({"ply_dirname", "voxel_size"} & set(signature(convert).parameters))
    convert(paths, work / "metadata.json", scene, np.arange(SHOTS), **no_points)
    return names


def write_metashape(scene: Path, work: Path) -> list[str]:
    """Metashape's cameras as XML, in OpenCV's axes."""
    names = stems("DJI_{:04d}")
    root = ElementTree.Element("document", version="2.0.0")
    chunk = ElementTree.SubElement(root, "chunk")
    sensor = ElementTree.SubElement(ElementTree.SubElement(chunk, "sensors"), "sensor", id="0", type="frame")
    ElementTree.SubElement(sensor, "resolution", width=str(SIZE[0]), height=str(SIZE[1]))
    ElementTree.SubElement(ElementTree.SubElement(sensor, "calibration"), "f").text = str(CAMERAS[0].focal)
    cameras = ElementTree.SubElement(chunk, "cameras")
    for i, (name, camera) in enumerate(zip(names, CAMERAS, strict=True)):
        entry = ElementTree.SubElement(cameras, "camera", id=str(i), sensor_id="0", label=name)
        matrix = (camera.pose * OPENCV)[[1, 2, 0, 3]]
        ElementTree.SubElement(entry, "transform").text = " ".join(map(str, matrix.ravel()))
    ElementTree.ElementTree(root).write(work / "cameras.xml")
    photos = {name: Path(f"images/{name}.jpg") for name in names}
    metashape_utils.metashape_to_json(photos, work / "cameras.xml", scene)
    return names


def write_realitycapture(scene: Path, work: Path) -> list[str]:
    """RealityCapture's table: angles, and a focal length as of 35 mm film."""
    names = stems("IMG_{:03d}")
    with (work / "cameras.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ["#name", "x", "y", "alt", "heading", "pitch", "roll", "f", "px", "py", "k1", "k2", "k3", "k4", "t1", "t2"]
        )
        for name, camera in zip(names, CAMERAS, strict=True):
            yaw, pitch, roll = Rotation.from_matrix(camera.pose[:3, :3]).as_euler("ZXY", degrees=True)
            lens = [camera.focal * 36 / max(SIZE), *[0] * 8]
            table.writerow([f"{name}.jpg", *camera.pose[:3, 3], -yaw, pitch, roll, *lens])
    photos = {name: Path(f"images/{name}.jpg") for name in names}
    write_photos(scene, names, CAMERAS)  # the converter looks at their sizes
    realitycapture_utils.realitycapture_to_json(photos, work / "cameras.csv", None, scene)
    return names


def write_colmap(scene: Path, work: Path) -> list[str]:
    """COLMAP's model, of photos in folders with names that repeat."""
    names = [f"{folder}/{i}" for folder in ("left", "right") for i in range(SHOTS // 2)]
    write_model(scene / "colmap" / "sparse" / "0", names, CAMERAS)
    return names


def write_phone(scene: Path, work: Path) -> list[str]:
    """What ns-process-data makes of a phone's photos, some of them upright: COLMAP's model, and its points."""
    names = stems("frame_{:05d}")
    write_model(work, names, TURNED)
    colmap_utils.colmap_to_json(work, scene)
    return names


def write_model(folder: Path, names: list[str], cameras: list[Camera]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = sorted({(camera.width, camera.height) for camera in cameras}, reverse=True)
    images, nothing = {}, (np.zeros((0, 2)), np.zeros(0, int))
    for i, (name, camera) in enumerate(zip(names, cameras, strict=True), start=1):
        rotation = (camera.pose * OPENCV)[:3, :3].T
        shift = -rotation @ camera.pose[:3, 3]
        kind = 1 + sizes.index((camera.width, camera.height))
        images[i] = colmap.Image(i, colmap.rotmat2qvec(rotation), shift, kind, f"{name}.jpg", *nothing)
    focal = cameras[0].focal
    lens = {size: [focal, focal, size[0] / 2, size[1] / 2, 0, 0, 0, 0] for size in sizes}
    kinds = {n: colmap.Camera(n, "OPENCV", *size, lens[size]) for n, size in enumerate(sizes, start=1)}
    point = np.array([0.1, 0.2, 0.3])
    points = {1: colmap.Point3D(1, point, np.array([9, 9, 9]), 0.1, np.zeros(0, int), np.zeros(0, int))}
    colmap.write_cameras_binary(kinds, folder / "cameras.bin")
    colmap.write_images_binary(images, folder / "images.bin")
    colmap.write_points3D_binary(points, folder / "points3D.bin")


def write_photos(scene: Path, names: list[str], cameras: list[Camera]) -> None:
    solids = demo_solids()
    for name, camera in zip(names, cameras, strict=True):
        path = scene / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(solids, camera, 1)).save(path, quality=95)


def write_masks(scene: Path, names: list[str]) -> None:
    """Exact masks of the first and the fifth view, which are held out."""
    solids = demo_solids()
    classes = np.array([solid.name for solid in solids])
    for i in (0, 4):
        seen = classes[cast(solids, CAMERAS[i])[0]]
        folder = scene / "segmentations" / names[i]
        folder.mkdir(parents=True)
        for name in set(classes):
            Image.fromarray(seen == name).save(folder / f"{name}.png")
    (scene / "segmentations" / "classes.txt").write_text("\n".join(sorted(set(classes))))


@dataclass
class Layout:
    write: Callable[[Path, Path], list[str]]
    """Writes all but photos and masks of a scene, given its folder and one for what the program itself writes; returns the
    names of the views."""
    parser: Callable = NerfstudioDataParserConfig
    words: tuple[str, ...] = ()
    """Behind a command of ours."""
    cameras: list[Camera] = field(default_factory=lambda: CAMERAS)


LAYOUTS = {
    "phone": Layout(write_phone, cameras=TURNED),
    "polycam": Layout(write_polycam),
    "record3d": Layout(write_record3d),
    "metashape": Layout(write_metashape),
    "realitycapture": Layout(write_realitycapture),
    "colmap": Layout(write_colmap, ColmapDataParserConfig, ("colmap",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_other_programs_write_goes_all_the_way(tmp_path, weights, checkpoints, ovs3d, monkeypatch, name):
    from nerfstudio.scripts.train import main

    monkeypatch.chdir(tmp_path)
    layout, scene, work = LAYOUTS[name], tmp_path / "scene", tmp_path / "work"
    scene.mkdir(), work.mkdir()
    names = layout.write(scene, work)
    write_photos(scene, names, layout.cameras), write_masks(scene, names)

    encoders = [word for option, spec in checkpoints.items() for word in (f"--{option.replace('_', '-')}", spec)]
    words = ["--data", scene, "--method", "ovs3d-lite", "--scales", 2, 3, "--views", 1, *encoders, *layout.words]
    assert ovs3d("preview", *words)[0] == 0 and Path("preview.png").is_file()

    parser = layout.parser(eval_mode="interval", eval_interval=4)
    settings = {"pipeline__datamanager__dataparser": parser, **specs(weights)}
    config = configured(scene, tmp_path / "out", 6, **settings)
    main(config)
    run = run_folder(tmp_path / "out") / "config.yml"

    status, printed = ovs3d("eval", "--load-config", run, "--output-path", "metrics.json")
    figures = json.loads(Path("metrics.json").read_text())
    assert status == 0, printed
    assert sorted(figures["views"]) == sorted([names[0], names[4]]) and figures["psnr"] > 3
    status, printed = ovs3d("render", "dataset", "--load-config", run, "--output-path", "renders")
    assert status == 0, printed
    labels = Path("renders/test/labels")
    shown = {path.relative_to(labels).with_suffix("").as_posix() for path in labels.rglob("*.png")}
    assert shown == {names[0], names[4]} and len(list(Path("renders/test").glob("segmentations/**/*.png"))) >= 2
    few = ["--num-points", 300, "--std-ratio", 0, "--farthest", 0]
    status, printed = ovs3d("export", "pointcloud", "--load-config", run, "--output-dir", "cloud", *few)
    assert status == 0 and Path("cloud/point_cloud.ply").is_file(), printed

    # Cameras are what they were, up to the frame that each program has.
    parser.data = scene
    parsed = parser.setup().get_dataparser_outputs("train")
    places = [
        names.index(path.relative_to(scene / "images").with_suffix("").as_posix()) for path in parsed.image_filenames
    ]
    assert places == [1, 2, 3, 5, 6, 7]
    read = parsed.cameras.camera_to_worlds[:, :, :3].double()
    true = torch.from_numpy(np.stack([CAMERAS[i].pose[:3, :3] for i in places]))
    torch.testing.assert_close(read[0].T @ read, true[0].T @ true, atol=1e-4, rtol=0)
