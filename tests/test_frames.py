"""The data's coordinates are those of the poses in its file, for every dataparser, as a run on it and a file of one have them."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from bad_input import VIEWS, make_small_scene, small_config
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGPDataParserConfig
from nerfstudio.data.dataparsers.minimal_dataparser import MinimalDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.utils import colmap_parsing_utils as colmap
from scipy.spatial.transform import Rotation

from ovs3d_nerfstudio.data.dataparser import OVS3DDataParserConfig, read_poses_bounds
from ovs3d_nerfstudio.data.frames import Frame, FrameError
from ovs3d_nerfstudio.data.images import OVS3DImagesConfig

COLMAP = [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]
METASHAPE = [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
SHIFTED = [[0, 0, 2, 3], [2, 0, 0, -1], [0, 2, 0, 5]]


@pytest.fixture
def turned(tmp_path) -> tuple[Path, np.ndarray]:
    """The small scene with cameras that look anywhere from places far from the origin, and their poses in the order of names."""
    scene = make_small_scene(tmp_path / "scene")
    poses = np.tile(np.eye(4), (VIEWS, 1, 1))
    poses[:, :3, :3] = Rotation.random(VIEWS, random_state=0).as_matrix()
    poses[:, :3, 3] = np.random.default_rng(0).normal([20, -7, 4], 3, (VIEWS, 3))
    meta = json.loads((scene / "transforms.json").read_text())
    for frame, pose in zip(meta["frames"], poses, strict=True):
        frame["transform_matrix"] = pose.tolist()
    write(scene, meta)
    return scene, poses[:, :3]


def write(scene: Path, meta: dict) -> None:
    (scene / "transforms.json").write_text(json.dumps(meta))


def add(scene: Path, **entries) -> None:
    write(scene, json.loads((scene / "transforms.json").read_text()) | entries)


def in_the_file(parser, poses: np.ndarray, split: str = "train") -> Frame:
    """Asserts that the frame leads from the cameras of a parser to the poses of its file, and back."""
    parsed = parser.setup().get_dataparser_outputs(split)
    frame = Frame.of_parser(parser, parsed)
    numbers = [int("".join(filter(str.isdigit, path.stem))) for path in parsed.image_filenames]
    cameras = parsed.cameras.camera_to_worlds.double().numpy()
    assert len(cameras) > 1
    np.testing.assert_allclose(frame.poses_to_data(cameras), poses[numbers], atol=1e-4)
    np.testing.assert_allclose(frame.poses_to_model(poses[numbers]), cameras, atol=1e-5)
    np.testing.assert_allclose(frame.to_data(cameras[..., 3]), poses[numbers][..., 3], atol=1e-4)
    return frame


APPLIED = {
    "nothing": {},
    "colmap": {"applied_transform": COLMAP},
    "metashape": {"applied_transform": METASHAPE},
    "scale": {"applied_scale": 2.5},
    "all": {"applied_transform": SHIFTED, "applied_scale": 0.3},
}


@pytest.mark.parametrize("name", APPLIED)
def test_what_had_been_applied_to_the_poses_of_a_file_is_no_part_of_its_frame(turned, name, tmp_path):
    scene, poses = turned
    add(scene, **APPLIED[name])
    parser = NerfstudioDataParserConfig(data=scene)
    frame = in_the_file(parser, poses)
    # A run of nerfstudio's own methods says it through the data that its config names, relative to nobody knows what.
    config = copy.deepcopy(all_methods["splatfacto"])
    config.pipeline.datamanager.data, config.pipeline.datamanager.dataparser = scene, parser
    (tmp_path / "config.yml").write_text(yaml.dump(config))
    parser.setup().get_dataparser_outputs().save_dataparser_transform(tmp_path / "dataparser_transforms.json")
    theirs = Frame.of_run(tmp_path)
    np.testing.assert_allclose(theirs.to_model(poses[..., 3]), frame.to_model(poses[..., 3]), atol=1e-5)
    (scene / "transforms.json").rename(scene / "elsewhere.json")
    with pytest.raises(FrameError, match="cannot be read; put it back"):
        Frame.of_run(tmp_path)
    frame.write(tmp_path)  # as runs of ours do
    np.testing.assert_array_equal(Frame.of_run(tmp_path).transform, frame.transform)


def test_what_nerfstudio_takes_for_applied_beside_colmaps_folder_is_no_part_of_the_frame_either(turned):
    scene, poses = turned
    (scene / "colmap" / "sparse" / "0").mkdir(parents=True)
    in_the_file(NerfstudioDataParserConfig(data=scene), poses)
    in_the_file(NerfstudioDataParserConfig(data=scene / "transforms.json"), poses)


def test_the_frame_of_colmaps_own_files_is_colmaps(turned):
    scene, poses = turned
    images = {}
    for i, pose in enumerate(poses):
        rotation = (pose[:, :3] * [1, -1, -1]).T
        quaternion, nothing = colmap.rotmat2qvec(rotation), (np.zeros((0, 2)), np.zeros(0, int))
        images[i + 1] = colmap.Image(i + 1, quaternion, -rotation @ pose[:, 3], 1, f"{i:02d}.png", *nothing)
    (scene / "colmap" / "sparse" / "0").mkdir(parents=True)
    model = {1: colmap.Camera(1, "PINHOLE", 48, 36, [50.0, 50.0, 24.0, 18.0])}
    colmap.write_cameras_text(model, scene / "colmap" / "sparse" / "0" / "cameras.txt")
    colmap.write_images_text(images, scene / "colmap" / "sparse" / "0" / "images.txt")
    options = {"data": scene, "load_3D_points": False, "downscale_factor": 1}
    in_the_file(ColmapDataParserConfig(**options), poses)
    in_the_file(ColmapDataParserConfig(**options, assume_colmap_world_coordinate_convention=False), poses)


def test_the_frame_of_other_files_is_that_of_their_poses(turned):
    scene, poses = turned
    frames = [
        {"file_path": f"./images/{i:02d}", "transform_matrix": [*pose.tolist(), [0, 0, 0, 1]]}
        for i, pose in enumerate(poses)
    ]
    for split in ("train", "val", "test"):
        (scene / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": 0.9, "frames": frames}))
    in_the_file(BlenderDataParserConfig(data=scene, scale_factor=0.2), poses)
    in_the_file(InstantNGPDataParserConfig(data=scene, scene_scale=0.4), poses)
    rows = [
        [*np.stack([-pose[:, 1], pose[:, 0], pose[:, 2], pose[:, 3], [36, 48, 50]], -1).ravel(), 1, 8] for pose in poses
    ]
    np.save(scene / "poses_bounds.npy", rows)
    assert np.allclose(read_poses_bounds(scene / "poses_bounds.npy", VIEWS)[0][:, :3].numpy(), poses, atol=1e-5)
    in_the_file(OVS3DDataParserConfig(data=scene, protocol="paper", scale_factor=0.7), poses)


def test_poses_that_a_parser_takes_as_they_are_are_in_their_own_frame(turned):
    scene, poses = turned
    ones = np.ones((VIEWS, 1), np.float32)
    cameras = {name: ones * value for name, value in {"fx": 50, "fy": 50, "cx": 24, "cy": 18}.items()}
    cameras |= {"width": ones.astype(int) * 48, "height": ones.astype(int) * 36, "camera_type": ones.astype(int)}
    names = np.array([str(scene / "images" / f"{i:02d}.png") for i in range(VIEWS)])
    entries = {"image_filenames": names, "scene_box": np.array([[-1.0] * 3, [1.0] * 3])}
    entries |= {"cameras": cameras | {"camera_to_worlds": poses.astype(np.float32)}}
    np.savez(
        scene / "train.npz",
        **entries,
        allow_pickle=True,
        applied_scale=3.0,
        applied_transform=np.array(SHIFTED, np.float32),
    )
    in_the_file(MinimalDataParserConfig(data=scene), poses)


def test_axes_of_poses_stay_of_length_one_whatever_the_transform():
    frame = Frame(np.array(SHIFTED, float), 0.3)
    pose = np.c_[Rotation.random(random_state=1).as_matrix(), [1, 2, 3]]
    moved = frame.poses_to_model(pose)
    np.testing.assert_allclose(moved[:, :3] @ moved[:, :3].T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(frame.poses_to_data(moved), pose, atol=1e-12)
    # A camera sees a point at the same place of its picture before and after.
    point = np.array([4.0, -1, 2])
    before, after = ((p - c[:, 3]) @ c[:, :3] for p, c in ((point, pose), (frame.to_model(point), moved)))
    np.testing.assert_allclose(after / np.linalg.norm(after), before / np.linalg.norm(before), atol=1e-12)


@pytest.mark.parametrize("name", APPLIED)
def test_sparse_points_of_the_file_lie_among_the_cameras(turned, name, tmp_path):
    scene, poses = turned
    add(scene, **APPLIED[name], ply_file_path="points.ply")
    points = poses[:, :, 3] - 4 * poses[:, :, 2]
    header = f"ply\nformat ascii 1.0\nelement vertex {VIEWS}\nproperty float x\nproperty float y\nproperty float z\n"
    colors = "property uchar red\nproperty uchar green\nproperty uchar blue\nend_header\n"
    rows = "".join(f"{x} {y} {z} 9 9 9\n" for x, y, z in points)
    (scene / "points.ply").write_text(header + colors + rows)
    parser = NerfstudioDataParserConfig(load_3D_points=True)
    config = OVS3DImagesConfig(data=scene, dataparser=parser, scales=(2.0, 3.0), feature_cache_dir=tmp_path)
    datamanager = config.setup(device="cpu", test_mode="val")
    given = datamanager.train_dataparser_outputs.metadata["points3D_xyz"].double().numpy()
    np.testing.assert_allclose(datamanager.frame.to_data(given), points, atol=1e-4)


def test_an_open_run_has_the_frame_of_its_data(turned):
    scene, poses = turned
    add(scene, **APPLIED["all"])
    datamanager = small_config(scene).pipeline.datamanager.setup(device="cpu", test_mode="inference")
    cameras = datamanager.train_dataset.cameras.camera_to_worlds.double().numpy()
    np.testing.assert_allclose(datamanager.frame.poses_to_data(cameras), poses[: VIEWS - 1], atol=1e-4)
