"""The demo scene: complete, exact, the same every time, readable by nerfstudio, and never half there."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovs3d_nerfstudio.demo import scene as demo
from ovs3d_nerfstudio.demo.raycast import Camera, Floor, Texture, cast, render

SIZE = {"width": 96, "train_views": 5, "test_views": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return demo.make_scene(tmp_path_factory.mktemp("demo") / "scene", **SIZE)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cameras_of(folder: Path) -> dict[str, Camera]:
    meta = json.loads((folder / "transforms.json").read_text())
    return {
        Path(frame["file_path"]).stem: Camera(np.array(frame["transform_matrix"]), meta["w"], meta["h"], meta["fl_x"])
        for frame in meta["frames"]
    }


def masks_of(folder: Path, view: str) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)) for path in (folder / "segmentations" / view).glob("*.png")}


def test_the_scene_has_all_its_files(folder):
    images = {path.stem: Image.open(path).size for path in (folder / "images").iterdir()}
    assert images == dict.fromkeys([f"train_{i:02d}" for i in range(5)] + ["test_00", "test_01"], (96, 72))
    annotated = sorted(path.name for path in (folder / "segmentations").iterdir() if path.is_dir())
    assert [name for name in annotated if name.startswith("test")] == ["test_00", "test_01"]
    assert len([name for name in annotated if name.startswith("train")]) == 4


def test_every_annotated_pixel_has_exactly_one_class(folder):
    classes = (folder / "segmentations" / "classes.txt").read_text().splitlines()
    assert classes == sorted(classes) and len(classes) == 7
    for view in filter(Path.is_dir, (folder / "segmentations").iterdir()):
        masks = masks_of(folder, view.name)
        assert sorted(masks) == classes
        assert all(mask.shape == (72, 96) and set(np.unique(mask)) == {0, 255} for mask in masks.values())
        assert (sum(mask // 255 for mask in masks.values()) == 1).all()


def test_the_same_arguments_give_the_same_bytes(folder, tmp_path):
    assert contents(demo.make_scene(tmp_path / "again", **SIZE)) == contents(folder)


def test_points_of_a_block_project_into_its_mask(folder):
    boxes = {name: np.array(box) for name, box in json.loads((folder / "scene.json").read_text())["boxes"].items()}
    assert set(boxes) == {"cat", "espresso", "motorbike", "palace", "space rocket"}
    solids = {solid.name: solid for solid in demo.demo_solids()}
    for view, camera in cameras_of(folder).items():
        if not (folder / "segmentations" / view).is_dir():
            continue
        masks = masks_of(folder, view)
        for name in ("cat", "espresso"):
            # Nothing stands before these two: the middle of their tops is seen from everywhere.
            low, high = boxes[name]
            top = np.array([[*(low + high)[:2] / 2, high[2]]])
            (place,), (depth,) = camera.project(top)
            column, row = np.floor(place).astype(int)
            assert masks[name][row, column] == 255
            _, depths = cast(list(solids.values()), camera)
            assert depths[row, column] == pytest.approx(depth, abs=0.05)


def test_what_is_seen_of_a_block_lies_in_its_bounds(folder):
    solids, camera = demo.demo_solids(), cameras_of(folder)["test_00"]
    index, depth = cast(solids, camera)
    origins, directions = camera.rays(1)
    points = (origins + depth.ravel() * directions).T
    assert np.isfinite(depth).all()
    for i, solid in enumerate(solids):
        low, high = solid.bounds()
        assert ((points > low - 1e-3) & (points < high + 1e-3))[index.ravel() == i].all()


def test_projecting_undoes_casting(folder):
    camera = cameras_of(folder)["train_02"]
    _, depth = cast(demo.demo_solids(), camera)
    origins, directions = camera.rays(1)
    places, depths = camera.project((origins + depth.ravel() * directions).T.astype(float))
    y, x = np.mgrid[:72, :96] + 0.5
    np.testing.assert_allclose(places, np.stack([x.ravel(), y.ravel()], -1), atol=1e-2)
    np.testing.assert_allclose(depths, depth.ravel(), rtol=1e-4)


def test_textures_fade_to_their_mean_where_they_are_too_fine_to_see():
    board = np.indices((64, 64)).sum(0)[..., None].repeat(3, -1) % 2 * np.uint8(200)
    floor = Floor("board", Texture(board), (0.1, 0.1))
    far = Camera.looking_at((0, -30, 30), (0, 0, 0), 32, 24, 32.0)
    picture = render([floor], far).astype(float)
    assert picture.std() < 1 and picture.min() > 50


def test_cameras_stand_in_the_room_and_held_out_views_are_new():
    wall = next(solid for solid in demo.demo_solids() if solid.name == "books")
    train, test = demo.train_cameras(40, 400), demo.held_out_cameras(8, 400)
    for camera in train + test:
        assert np.hypot(*(camera.pose[:2, 3] - wall.centre)) < wall.radius
    for camera in test:
        assert min(np.linalg.norm(camera.pose[:3, 3] - other.pose[:3, 3]) for other in train) > 0.01


def test_nerfstudio_reads_the_splits_and_keeps_z_up(folder):
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    parser = NerfstudioDataParserConfig(data=folder)
    outputs = {split: parser.setup().get_dataparser_outputs(split) for split in ("train", "val", "test")}
    names = {split: [path.stem for path in output.image_filenames] for split, output in outputs.items()}
    assert names["train"] == [f"train_{i:02d}" for i in range(5)]
    assert names["test"] == names["val"] == ["test_00", "test_01"]
    assert outputs["train"].dataparser_transform[:, :3].numpy() == pytest.approx(np.eye(3))
    assert (outputs["train"].cameras.height == 72).all()


def test_a_complete_scene_is_left_as_it_is(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert demo.make_scene(folder, **SIZE) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_making_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo, "transforms", stop)
        with pytest.raises(KeyboardInterrupt):
            demo.make_scene(tmp_path / "scene", **SIZE)
    assert list(tmp_path.iterdir()) == []
    demo.make_scene(tmp_path / "scene", **SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["scene"]


@pytest.mark.parametrize("damage", ["other arguments", "a lost picture", "somebody's file"])
def test_a_folder_that_is_not_the_scene_is_neither_used_nor_overwritten(damage, tmp_path):
    small = {"width": 16, "train_views": 1, "test_views": 1}
    folder = tmp_path / "scene"
    if damage == "somebody's file":
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine")
    else:
        demo.make_scene(folder, **small)
    if damage == "a lost picture":
        (folder / "images" / "train_00.png").unlink()
    before = contents(folder)
    with pytest.raises(demo.DemoError, match="move it away"):
        demo.make_scene(folder, **{**small, "width": 32 if damage == "other arguments" else 16})
    assert contents(folder) == before


def test_missing_photographs_are_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(demo.DemoError, match=r"chelsea.*pip install 'ovs3d-nerfstudio\[demo\]'"):
        demo.make_scene(tmp_path / "scene", **SIZE)
    assert list(tmp_path.iterdir()) == []
