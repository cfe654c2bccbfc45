"""`ovs3d render`: what ns-render makes, and label images and masks that say the same as the pictures."""

import json
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import command, read_labels
from nerfstudio.cameras.cameras import Cameras, CameraType
from PIL import Image

from ovs3d_nerfstudio.cli.around import around
from ovs3d_nerfstudio.cli.labels import LabelFolder
from ovs3d_nerfstudio.cli.nearest import NearestPhotos
from ovs3d_nerfstudio.cli.poses import poses_of
from ovs3d_nerfstudio.cli.render import RenderCameraPath, video_path
from ovs3d_nerfstudio.cli.rendering import WholeVideo, crop_in_model, crop_of
from ovs3d_nerfstudio.data.annotations import Annotations
from ovs3d_nerfstudio.data.frames import Frame
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.prompts.palette import colorize, palette

ASIDE = Path("a side.v1")


def test_masks_are_read_back_as_annotations_whatever_the_prompts_are_called(tmp_path):
    prompts = ["a/b: c", "../../up", "δέντρο"]
    labels = np.random.default_rng(0).integers(-1, 3, (6, 4))
    folder = LabelFolder(tmp_path / "out", prompts, palette(3), masks=True)
    folder.write(ASIDE, labels)
    annotations = Annotations(tmp_path / "out", [Path("a side.v1.jpg")])
    order = [prompts.index(name) for name in annotations.classes]
    read = annotations.labels(ASIDE.name, 6, 4)
    assert np.array_equal(np.array([*order, -1])[read], labels)
    assert np.array_equal(read_labels(tmp_path / "out" / "labels" / "a side.v1.png"), labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_views_in_folders_keep_masks_of_their_own(tmp_path):
    folder = LabelFolder(tmp_path, ["cat", "dog"], palette(2), masks=True)
    for view, label in (("a/0", 0), ("b/0", 1)):
        folder.write(Path(view), np.full((2, 2), label))
    annotations = Annotations(tmp_path, [Path("images/a/0.jpg"), Path("images/b/0.jpg")])
    assert annotations.views == ["a/0", "b/0"]
    assert [int(annotations.labels(view, 2, 2).max()) for view in annotations.views] == [0, 1]


def test_a_view_that_is_written_anew_has_no_masks_of_before(tmp_path):
    for prompts, labels in ((["cat", "dog"], [[0, 1]]), (["cat", "cup"], [[1, 1]])):
        folder = LabelFolder(tmp_path, prompts, palette(2), masks=True)
        for view in ("a", "a/0"):
            folder.write(Path(view), np.array(labels))
    masks = [
        path.relative_to(tmp_path / "segmentations").as_posix() for path in tmp_path.rglob("segmentations/a/**/*.png")
    ]
    assert sorted(masks) == ["a/0/cup.png", "a/cup.png"]


def test_masks_that_no_render_made_are_let_be(tmp_path):
    mask = tmp_path / "segmentations" / "a" / "cat.png"
    mask.parent.mkdir(parents=True)
    mask.write_bytes(b"by hand")
    with pytest.raises(CommandError, match=r"segmentations holds masks that no render made.*--output-path"):
        LabelFolder(tmp_path, ["cat"], palette(1), masks=True)
    assert mask.read_bytes() == b"by hand" and not (tmp_path / "labels.json").exists()
    LabelFolder(tmp_path, ["cat"], palette(1), masks=False)


def test_two_prompts_with_one_mask_are_refused_unless_masks_are_left_out(tmp_path):
    with pytest.raises(CommandError, match=r"both have the mask A_b\.png"):
        LabelFolder(tmp_path, ["a/b", "A:b"], palette(2), masks=True)
    LabelFolder(tmp_path, ["a/b", "A:b"], palette(2), masks=False)


CROP = {"crop_center": [0, 1, 2], "crop_scale": [1, 2, 1], "crop_bg_color": {"r": 200, "g": 0, "b": 60}}


def test_a_crop_box_may_be_written_in_whole_numbers():
    whole = crop_of({"crop": {**CROP, "crop_rot": [0, 0, 0]}})
    assert whole.obb.R.is_floating_point() and torch.equal(whole.obb.R, torch.eye(3).to(whole.obb.R))
    assert whole.obb.within(torch.tensor([[0.4, 1.9, 2.4], [0.6, 1, 2]])).tolist() == [True, False]
    assert torch.equal(crop_of({"crop": CROP}).obb.R, whole.obb.R)
    assert crop_of({}) is None and crop_of({"crop": None}) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop_rot", [0, 0]),
        ("crop_scale", [1, 0, 1]),
        ("crop_center", [0, "x", 0]),
        ("crop_center", None),
        ("crop_center", [0, 0, float("nan")]),
        ("crop_bg_color", [200, 0, 60]),
        ("crop_bg_color", {"r": 200}),
    ],
)
def test_what_is_no_crop_box_is_said_before_rendering(tmp_path, key, value):
    path = {"render_height": 36, "render_width": 48, "seconds": 1, "fps": 2, "camera_type": "perspective"}
    path["camera_path"] = [{"camera_to_world": np.eye(4).flatten().tolist(), "fov": 60, "aspect": 4 / 3}]
    (tmp_path / "path.json").write_text(json.dumps({**path, "crop": {**CROP, key: value}}))
    asked = RenderCameraPath(Path("none.yml"), camera_path_filename=tmp_path / "path.json")
    with pytest.raises(CommandError, match=r"path\.json has a crop box that cannot be used \(.*\); export"):
        asked.main()


def looking_at_the_origin(azimuths: np.ndarray, heights: np.ndarray) -> Cameras:
    """Cameras 2 units from a vertical axis, at these azimuths in degrees."""
    angle = np.radians(azimuths)
    origins = np.stack([2 * np.sin(angle), -2 * np.cos(angle), heights], -1)
    back = origins / np.linalg.norm(origins, axis=-1, keepdims=True)
    right = np.stack([np.cos(angle), np.sin(angle), 0 * angle], -1)
    poses = np.stack([right, np.cross(back, right), back, origins], -1)
    return Cameras(torch.from_numpy(poses).float(), 100.0, 100.0, 40.0, 30.0, 80, 60)


@pytest.mark.parametrize(("span", "closed"), [(345, True), (100, False)], ids=["all around", "from the front"])
def test_the_way_around_a_scene_is_smooth_and_sees_all_of_it(span, closed):
    rng = np.random.default_rng(0)
    photos = looking_at_the_origin(rng.permutation(np.linspace(0, span, 24)), rng.choice([0.5, 1.5], 24))
    way = around(photos, 96)
    poses = way.camera_to_worlds.numpy()
    assert len(way) == 96 and (int(way.width[0]), int(way.height[0])) == (80, 60)
    azimuths = np.degrees(np.unwrap(np.arctan2(poses[:, 0, 3], -poses[:, 1, 3])))
    assert abs(np.ptp(azimuths)) > 0.85 * span
    step = np.linalg.norm(np.diff(poses[..., 3], axis=0), axis=-1)
    assert step.max() < 3 * np.median(step)
    to_origin = -poses[..., 3] / np.linalg.norm(poses[..., 3], axis=-1, keepdims=True)
    assert ((-poses[..., 2] * to_origin).sum(-1) > 0.95).all()
    assert np.allclose(np.linalg.det(poses[:, :, :3]), 1, atol=1e-4)
    assert (np.linalg.norm(poses[0, :, 3] - poses[-1, :, 3]) < 3 * np.median(step)) == closed


@pytest.mark.parametrize(("seen", "walls", "nearest"), [(False, 2, 1), (True, 0, 1), (True, 1, 2), (True, 2, 1)])
def test_a_photo_that_does_not_see_the_place_of_a_view_is_not_the_nearest(seen, walls, nearest):
    """Unless none does."""
    cameras = looking_at_the_origin(np.array([40.0, 0, 10]), np.ones(3))
    pose = looking_at_the_origin(np.array([3.0]), np.ones(1)).camera_to_worlds[0]
    to_nearest = torch.nn.functional.normalize(cameras.camera_to_worlds[1, :, 3] - pose[:, 3], dim=0)

    def features_along(_, along, box):
        walled = walls == 2 or (walls == 1 and float(along @ to_nearest) > 0.99)
        return {"accumulation": torch.ones(1, 1), "depth": torch.full((1, 1), 0.01 if walled else 9.0)}

    model = SimpleNamespace(device="cpu", features_along=features_along)
    data = SimpleNamespace(train_dataset=SimpleNamespace(cameras=cameras))
    assert NearestPhotos(SimpleNamespace(model=model, datamanager=data), seen).place(pose) == nearest


def test_poses_of_a_transforms_json_are_rendered_through_their_lenses():
    frames = [{"transform_matrix": np.eye(4).tolist(), "w": 4 + i, "k1": 0.1 * i} for i in range(3)]
    frames[1]["camera_model"] = "PINHOLE"
    shared = {"fl_x": 50, "fl_y": 60, "cx": 2, "cy": 1.5, "h": 3, "camera_model": "OPENCV_FISHEYE"}
    cameras, seconds = poses_of({**shared, "frames": frames})
    assert cameras.width.flatten().tolist() == [4, 5, 6] and (cameras.height == 3).all() and (cameras.fy == 60).all()
    assert cameras.distortion_params[:, 0].tolist() == pytest.approx([0, 0.1, 0.2]) and seconds == 3 / 24
    fisheye, perspective = CameraType.FISHEYE.value, CameraType.PERSPECTIVE.value
    assert cameras.camera_type.flatten().tolist() == [fisheye, perspective, fisheye]
    with pytest.raises(LookupError):
        poses_of({"frames": [{"transform_matrix": np.eye(4).tolist()}]})


def test_a_crop_box_of_the_data_lies_where_the_model_has_it():
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    frame = Frame(np.c_[turn, [1, 2, 3]], 0.5)
    crop = crop_of({"crop": {**CROP, "crop_rot": [0.3, 0.2, 0.1]}})
    points = np.random.default_rng(0).uniform([-1, 0, 1], [1, 2, 3], (200, 3))
    inside = crop.obb.within(torch.from_numpy(points).float())
    moved = crop_in_model(crop, frame).obb.within(torch.from_numpy(frame.to_model(points)).float())
    assert torch.equal(inside, moved) and 0 < inside.sum() < 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transforms", "path"])
def test_a_pose_of_the_data_is_rendered_as_its_photo(trained, scene, tmp_path, ovs3d, kind):
    """The picture of a frame is that of `render dataset`, which is rendered at the pose that the parser made of it."""
    meta = json.loads((scene / "transforms.json").read_text())
    meta["frames"] = [frame for frame in meta["frames"] if "test_01" in frame["file_path"]]
    words = ["--camera-path-filename", tmp_path / "path.json"]
    if kind == "path":
        fov = 2 * np.degrees(np.arctan(meta["h"] / 2 / meta["fl_y"]))
        matrix = np.array(meta["frames"][0]["transform_matrix"]).ravel().tolist()
        camera = {"camera_to_world": matrix, "fov": fov, "aspect": meta["w"] / meta["h"]}
        meta = {"render_height": meta["h"], "render_width": meta["w"], "seconds": 1, "camera_path": [camera]}
        words += ["--frame", "data"]
    (tmp_path / "path.json").write_text(json.dumps(meta))
    words += ["--output-format", "images", "--output-path", tmp_path / "poses"]
    common = ["--load-config", trained[0], "--image-format", "png", "--rendered-output-names", "rgb"]
    assert ovs3d("render", "camera-path", *words, *common)[0] == 0
    assert ovs3d("render", "dataset", "--output-path", tmp_path / "all", *common)[0] == 0
    one = np.asarray(Image.open(tmp_path / "poses" / "00000.png")).astype(int)
    other = np.asarray(Image.open(tmp_path / "all" / "test" / "rgb" / "test_01.png")).astype(int)
    assert np.abs(one - other).max() <= 2


def test_a_video_that_is_interrupted_leaves_nothing_and_a_whole_one_has_its_name(tmp_path):
    def write(interrupted: bool) -> None:
        with WholeVideo(tmp_path / "v.mp4", shape=(36, 48), fps=5) as video:
            video.add_image(np.zeros((36, 48, 3), np.uint8))
            if interrupted:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(True)
    assert not list(tmp_path.iterdir())
    write(False)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_a_video_without_a_suffix_is_an_mp4(tmp_path):
    names = [video_path("--output-path", tmp_path / name) for name in ("v", "v.MOV", "v.mp4")]
    assert [path.name for path in names] == ["v.mp4", "v.MOV", "v.mp4"]


@pytest.mark.slow
def test_a_rendered_split_has_labels_masks_and_pictures_that_agree(trained, tmp_path):
    words = [
        "ovs3d",
        "render",
        "dataset",
        "--load-config",
        trained[0],
        "--output-path",
        tmp_path / "out",
        "--image-format",
        "png",
    ]
    command(*words, "--prompts", "books; cat; space rocket; kitten", cwd=tmp_path)
    meaning = json.loads((tmp_path / "out" / "test" / "labels.json").read_text())
    assert [meaning[key]["prompt"] for key in meaning] == ["books", "cat", "space rocket", "kitten"]
    colors = np.array([meaning[key]["color"] for key in meaning]) / 255
    for stem in ("test_00", "test_01", "test_02"):
        labels = read_labels(tmp_path / "out" / "test" / "labels" / f"{stem}.png")
        shown = np.asarray(Image.open(tmp_path / "out" / "test" / "segmentation" / f"{stem}.png")).astype(int)
        agree = np.abs(shown - colorize(labels, colors) * 255).max(-1) < 2
        assert agree[labels >= 0].all() and (labels >= 0).mean() > 0.5
        assert Image.open(tmp_path / "out" / "test" / "segmentation_overlay" / f"{stem}.png").size == (96, 72)
        masks = list((tmp_path / "out" / "test" / "segmentations" / stem).glob("*.png"))
        assert sum((np.asarray(Image.open(mask)) == 255).sum() for mask in masks) == (labels >= 0).sum()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["interpolate", "spiral"])
def test_videos_have_a_label_image_a_frame(trained, tmp_path, ovs3d, mode):
    steps = ["--interpolation-steps", 2] if mode == "interpolate" else ["--seconds", 1, "--frame-rate", 2]
    words = ["render", mode, "--load-config", trained[0], "--output-path", tmp_path / "v.mp4", *steps]
    status, _ = ovs3d(*words, "--downscale-factor", 2, "--masks", "False", "--rendered-output-names", "relevancy_cat")
    assert status == 0
    with av.open(str(tmp_path / "v.mp4")) as video:
        frames = len(list(video.decode(video=0)))
    labels = sorted((tmp_path / "v" / "labels").iterdir())
    assert len(labels) == frames and Image.open(labels[0]).size == (48, 36)
    assert not (tmp_path / "v" / "segmentations").exists()


@pytest.mark.slow
def test_pictures_and_labels_of_only_some_prompts_show_nothing_else(trained, tmp_path, ovs3d):
    words = ["render", "dataset", "--load-config", trained[0], "--output-path", tmp_path, "--image-format", "png"]
    words += ["--prompts", "books; cat; space rocket", "--downscale-factor", 2]
    status, printed = ovs3d(*words, "--only", "kitten; cat")
    assert (
        status == 1 and "--only names 'kitten', which is not among the prompts; they are: books; cat; space" in printed
    )
    assert ovs3d(*words, "--only", "cat; books")[0] == 0
    for path in (tmp_path / "test" / "labels").iterdir():
        labels = read_labels(path)
        shown = np.asarray(Image.open(tmp_path / "test" / "segmentation" / path.name))
        assert set(np.unique(labels)) <= {-1, 0, 1} and (labels == -1).any() and (labels >= 0).any()
        assert all(len(np.unique(shown[labels == label], axis=0)) == 1 for label in (0, 1) if (labels == label).any())


@pytest.mark.slow
def test_a_camera_path_is_rendered_with_other_prompts(trained, tmp_path, ovs3d):
    pose = np.eye(4)
    pose[2, 3] = 1
    path = {"render_height": 36, "render_width": 48, "seconds": 1, "fps": 2, "camera_type": "perspective"}
    path["camera_path"] = [{"camera_to_world": pose.flatten().tolist(), "fov": 60, "aspect": 4 / 3}] * 2
    (tmp_path / "path.json").write_text(json.dumps(path))
    words = ["render", "camera-path", "--load-config", trained[0], "--camera-path-filename", tmp_path / "path.json"]
    words += ["--output-path", tmp_path / "i", "--output-format", "images", "--prompts", "dog; books"]
    status, _ = ovs3d(*words, "--rendered-output-names", "relevancy_dog", "segmentation")
    assert status == 0
    assert len(list((tmp_path / "i").glob("*.jpg"))) == 2 and len(list((tmp_path / "i" / "labels").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{}", "x", '{"seconds": 1, "camera_path": []}', None])
def test_what_is_no_camera_path_ends_with_a_sentence(trained, tmp_path, ovs3d, text):
    if text is not None:
        (tmp_path / "path.json").write_text(text)
    words = ["--load-config", trained[0], "--camera-path-filename", tmp_path / "path.json"]
    status, printed = ovs3d("render", "camera-path", *words)
    assert status == 1 and "path.json" in printed and "Error" in printed
