"""Scenes that cannot be used: each ends training before it begins, with a sentence and status 1, and leaves nothing behind."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from bad_input import HEIGHT, VIEWS, WIDTH, opened, refused, small_config
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from ovs3d_nerfstudio.data.dataparser import OVS3DDataParserConfig
from ovs3d_nerfstudio.data.images import OVS3DImagesConfig
from ovs3d_nerfstudio.doctor.scene import scene_findings

NAN = float("nan")


def text(content: str | bytes):
    """transforms.json with this content."""
    encoded = content.encode() if isinstance(content, str) else content
    return lambda scene: (scene / "transforms.json").write_bytes(encoded)


def meta(**changes):
    """transforms.json with entries changed; ... removes one."""

    def spoil(scene: Path) -> None:
        path = scene / "transforms.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return spoil


def frame(number: int = 3, **changes):
    """transforms.json with entries of one frame changed; ... removes one."""

    def spoil(scene: Path) -> None:
        path = scene / "transforms.json"
        content = json.loads(path.read_text())
        changed = content["frames"][number] | changes
        content["frames"][number] = {key: value for key, value in changed.items() if value is not ...}
        path.write_text(json.dumps(content))

    return spoil


def frames(change):
    """transforms.json with a new list of frames, and no lists of splits."""

    def spoil(scene: Path) -> None:
        content = json.loads((scene / "transforms.json").read_text())
        splits = {f"{split}_filenames": ... for split in ("train", "val", "test")}
        meta(frames=change(content["frames"]), **splits)(scene)

    return spoil


def one_place(listed: list[dict]) -> list[dict]:
    return [entry | {"transform_matrix": listed[0]["transform_matrix"]} for entry in listed]


def fisheye(listed: list[dict]) -> list[dict]:
    return [entry | {"camera_model": "OPENCV_FISHEYE", "k1": 0.1} for entry in listed]


def turned(listed: list[dict], signs: list[int]) -> list[dict]:
    """The frames with columns of their poses negated."""
    return [entry | {"transform_matrix": (np.array(entry["transform_matrix"]) * signs).tolist()} for entry in listed]


def picture(content: bytes | Image.Image, name: str = "03.png"):
    """One picture replaced."""

    def spoil(scene: Path) -> None:
        path = scene / "images" / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)

    return spoil


def masked(mask: Image.Image | None):
    """Every frame with a mask, one of them this (None: none at all)."""

    def spoil(scene: Path) -> None:
        (scene / "masks").mkdir()
        content = json.loads((scene / "transforms.json").read_text())
        for i, entry in enumerate(content["frames"]):
            entry["mask_path"] = f"masks/{i:02d}.png"
            Image.new("L", (WIDTH, HEIGHT), 255).save(scene / entry["mask_path"])
        (scene / "masks" / "03.png").unlink()
        if mask is not None:
            mask.save(scene / "masks" / "03.png")
        (scene / "transforms.json").write_text(json.dumps(content))

    return spoil


def pose(place, value) -> list[list[float]]:
    matrix = np.eye(4)
    matrix[place] = value
    return matrix.tolist()


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(file, format=kind)
    return file.getvalue()


def annotation(path: str, content: bytes | str | Image.Image | None):
    """A file of `segmentations` replaced; None removes it."""

    def spoil(scene: Path) -> None:
        file = scene / "segmentations" / path
        file.parent.mkdir(exist_ok=True)
        if content is None:
            file.unlink()
        elif isinstance(content, Image.Image):
            content.save(file)
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


TRANSFORMS = {
    "no folder": (shutil.rmtree, ["scene does not exist", "--data"]),
    "no transforms.json": (
        lambda scene: (scene / "transforms.json").unlink(),
        ["has no transforms.json", "ovs3d-data"],
    ),
    "empty": (text(""), ["transforms.json is empty", "ns-process-data"]),
    "no JSON": (text("{'frames': }"), "is no JSON"),
    "cut off": (text('{"frames": ['), "is no JSON"),
    "no UTF-8": (text(b"\xff\xfe{}"), "is no JSON in UTF-8"),
    "byte order mark": (text(b"\xef\xbb\xbf{}"), "is no JSON in UTF-8"),
    "nested without end": (text("[" * 100_000), "is no JSON"),
    "a list": (text("[]"), "has no list of frames"),
    "a number": (text("7"), "has no list of frames"),
    "no frames": (meta(frames=...), "has no list of frames"),
    "frames of text": (meta(frames="all"), "has no list of frames"),
    "frames of numbers": (meta(frames=[1, 2]), "has no list of frames"),
    "an empty list of frames": (meta(frames=[]), "has no frame"),
    "one image": (frames(lambda listed: listed[:1]), "has one frame"),
    "unknown camera model": (meta(camera_model="PINHOLE_CUBE"), ["PINHOLE_CUBE", "OPENCV"]),
    "no file path": (frame(file_path=...), "frame 3 (None) has no file_path"),
    "a file path that is a number": (frame(file_path=3), "frame 3 (3) has no file_path"),
    "no pose": (frame(transform_matrix=...), ["frame 3 (images/03.png)", "4 × 4 finite numbers"]),
    "NaN in a pose": (frame(transform_matrix=pose((0, 3), NAN)), ["frame 3", "4 × 4 finite numbers"]),
    "infinity in a pose": (frame(transform_matrix=pose((1, 1), float("inf"))), "4 × 4 finite numbers"),
    "a pose of 3 × 4": (frame(transform_matrix=np.eye(4)[:3].tolist()), "4 × 4 finite numbers"),
    "a ragged pose": (frame(transform_matrix=[[1, 0], [1]]), "4 × 4 finite numbers"),
    "a pose of text": (frame(transform_matrix=[["a"] * 4] * 4), "4 × 4 finite numbers"),
    "a pose of zeros": (frame(transform_matrix=np.zeros((4, 4)).tolist()), "turns space flat"),
    "all cameras at one place": (frames(one_place), ["All 7 cameras", "one place (0, 0, 1)", "different places"]),
    "no focal length": (meta(fl_x=...), "has no fl_x"),
    "a focal length of zero": (meta(fl_y=0), "has the fl_y 0"),
    "a focal length of NaN": (meta(fl_x=NAN), "has the fl_x nan"),
    "a centre of text": (meta(cx="middle"), "has the cx 'middle'"),
    "a negative width": (meta(w=-48), "has the w -48"),
    "no height": (meta(h=None), "has the h None"),
    "distortion of text": (meta(k1="much"), ["NerfstudioDataParserConfig cannot read", "much"]),
    "a panorama among photos": (
        frame(camera_model="EQUIRECTANGULAR"),
        ["(EQUIRECTANGULAR, PERSPECTIVE)", "FISHEYE and PERSPECTIVE may stand together", "apart"],
    ),
    "distortion at the top, and two camera models": (
        lambda scene: [meta(k1=0.1)(scene), frame(camera_model="OPENCV_FISHEYE")(scene)],
        ["has k1 at the top, but camera models in its frames"],
    ),
    "a fisheye's crop at the top, and its camera model in frames": (
        lambda scene: [meta(camera_model=..., fisheye_crop_radius=12.0)(scene), frames(fisheye)(scene)],
        ["has fisheye_crop_radius at the top", "write one camera_model at the top"],
    ),
    "an unknown camera model in a frame": (frame(camera_model="LENS"), ["frame 3", "'LENS'"]),
    "a fisheye of another program": (meta(is_fisheye=True), ["is_fisheye", '"camera_model": "OPENCV_FISHEYE"']),
    "distortion in a frame and at the top": (
        lambda scene: [meta(k1=0.1)(scene), frame(k1=0.2)(scene)],
        ["frame 3 (images/03.png) has the k1 0.2, but what counts is 0.1"],
    ),
    "other distortion in a frame than at the top": (
        lambda scene: [meta(k1=0.1)(scene), frame(p2=0.2)(scene)],
        ["frame 3 (images/03.png) has the p2 0.2, but what counts is 0.0"],
    ),
    "a focal length in a frame and at the top": (frame(fl_x=60), ["the fl_x 60, but what counts is 50"]),
    "k4 alone": (meta(k4=0.1), "no k4"),
    "two frames of one picture": (
        frame(file_path="images/../images/02.png"),
        ["frame 3 (images/../images/02.png) is the picture of frame 2 too"],
    ),
    "mirrored cameras": (frames(lambda listed: turned(listed, [1, 1, -1, 1])), ["cameras", "are mirrored", "negate"]),
    "a mirrored camera": (
        frame(transform_matrix=np.diag([1.0, -1, 1, 1]).tolist()),
        ["1 of 6 cameras", "3 (counted from 0)"],
    ),
    "some masks": (frame(mask_path="masks/3.png"), "a mask_path for 1 of 7 frames"),
}

SPLITS = {
    "two views of one name": (
        lambda scene: [
            shutil.copy(scene / "images" / "03.png", scene / "images" / "02.webp"),
            frame(file_path="images/02.webp")(scene),
            meta(train_filenames=["images/02.png", "images/02.webp", "images/01.png"])(scene),
        ],
        ["images/02.png", "images/02.webp", "both be the view 02"],
    ),
    "a split of no frame": (meta(val_filenames=["images/99.png"]), ["cannot read", "99.png"]),
    "a split left out": (meta(val_filenames=...), ["train_filenames and test_filenames, but no val_filenames"]),
    "the split left out that opening needs": (meta(test_filenames=...), ["but no test_filenames", "cannot be opened"]),
    "a split of something else": (meta(test_filenames="images/06.png"), "test_filenames that are no list"),
    "a split of no frame, that opening needs": (meta(test_filenames=["images/99.png"]), ["cannot read", "99.png"]),
    "a split of nothing": (meta(train_filenames=[]), "has no photo to train on"),
    "train views at one place": (meta(train_filenames=["images/00.png"]), "All 1 cameras"),
}

PICTURES = {
    "gone": (lambda scene: (scene / "images" / "03.png").unlink(), "03.png does not exist"),
    "the first gone": (lambda scene: (scene / "images" / "00.png").unlink(), ["00.png does not exist", "put it there"]),
    "the first without a suffix": (frame(0, file_path="images/00"), "images/00 does not exist, but 00.png does"),
    "of another suffix": (
        lambda scene: (scene / "images" / "03.png").rename(scene / "images" / "03.JPG"),
        ["03.png does not exist, but 03.JPG does", "with its suffix"],
    ),
    "all gone": (lambda scene: shutil.rmtree(scene / "images"), "images"),
    "of zero bytes": (picture(b""), "03.png cannot be read as a picture (it is empty)"),
    "the first of zero bytes": (picture(b"", "00.png"), "00.png"),
    "no picture": (picture(b"GIF, really"), "03.png cannot be read as a picture (of no known kind)"),
    "a PNG cut off": (picture(encoded("PNG")[:1500]), "03.png cannot be read as a picture"),
    "a JPEG cut off": (picture(encoded("JPEG")[:900]), "03.png cannot be read as a picture"),
    "a held-out one broken": (picture(b"x", "06.png"), "06.png cannot be read"),
    "a folder": (
        lambda scene: [(scene / "images" / "03.png").unlink(), (scene / "images" / "03.png").mkdir()],
        "03.png cannot be read",
    ),
    "1×1": (picture(Image.new("RGB", (1, 1))), ["03.png is 1 × 1 pixels", "its camera 48 × 36"]),
    "larger than its camera": (picture(Image.new("RGB", (WIDTH + 1, HEIGHT))), "03.png is 49 × 36 pixels"),
    "turned": (picture(Image.new("RGB", (HEIGHT, WIDTH))), "03.png is 36 × 48 pixels"),
    "of floating-point numbers": (
        lambda scene: Image.new("F", (WIDTH, HEIGHT), 0.5).save(scene / "images" / "03.png", format="TIFF"),
        ["03.png", "floating-point"],
    ),
    "of more than 16 bits": (
        lambda scene: Image.new("I", (WIDTH, HEIGHT), 1 << 20).save(scene / "images" / "03.png", format="TIFF"),
        ["03.png", "more than 16 bits"],
    ),
    "a mask gone": (masked(None), "masks/03.png does not exist"),
    "a mask of another size": (masked(Image.new("L", (WIDTH, HEIGHT + 1))), ["mask", "48 × 37", "03.png 48 × 36"]),
    "a mask of colours": (masked(Image.new("RGB", (WIDTH, HEIGHT))), ["masks/03.png has colours (RGB)", "grey"]),
}

PLY = "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\nend_header\n"


def points(content: str | None):
    """transforms.json with sparse points, whose file has this content (None: is not there)."""

    def spoil(scene: Path) -> None:
        meta(ply_file_path="sparse_pc.ply")(scene)
        if content is not None:
            (scene / "sparse_pc.ply").write_text(content)

    return spoil


POINTS = {
    "not there": (points(None), ["sparse_pc.ply, is not there", "or take ply_file_path out of transforms.json"]),
    "of zero bytes": (points(""), ["sparse_pc.ply cannot be read as a PLY", "write that ply_file_path"]),
    "cut off": (points(PLY + "0 0 0\n1"), "sparse_pc.ply cannot be read as a PLY"),
    "more than fit": (points(PLY.replace("vertex 2", "vertex 9999999999999")), "sparse_pc.ply cannot be read as a PLY"),
    "without a place": (points(PLY.replace(" z", " w") + "0 0 0\n1 1 1\n"), "sparse_pc.ply have no x, y and z"),
    "with lists for places": (
        points(PLY.replace("float x", "list uchar int x") + "1 0 0 0\n1 1 1 1\n"),
        "no x, y and z",
    ),
    "with NaN": (points(PLY + "0 0 0\nnan 1 1\n"), "2 points that come with the data are not of three finite numbers"),
}

GRASS = "06/grass.png"
ANNOTATIONS = {
    "no class": (annotation("classes.txt", "\n# none\n"), "There is no prompt"),
    "classes that are not UTF-8": (annotation("classes.txt", b"\xff\xff"), "not UTF-8"),
    "a mask of an unknown class": (annotation("06/wolf.png", Image.new("L", (4, 3))), ["wolf.png", "classes.txt"]),
    "masks of a view that is none": (annotation("07/grass.png", Image.new("L", (4, 3))), "segmentations/07"),
    "a view without masks": (annotation("05/notes.txt", "later"), "05 has no mask"),
    "a mask that is none": (annotation(GRASS, "white"), "grass.png cannot be read"),
    "a mask of zero bytes": (annotation(GRASS, b""), "grass.png cannot be read as a picture (it is empty)"),
    "a mask of another shape": (annotation(GRASS, Image.new("L", (HEIGHT, WIDTH))), ["36 by 48", "48 by 36"]),
    "a mask of 0 and 1": (annotation(GRASS, Image.new("L", (WIDTH, HEIGHT), 1)), "0 and 1 only"),
    "a JPEG as mask": (annotation("06/sheep.jpg", Image.new("L", (WIDTH, HEIGHT))), ["sheep.jpg", "save it as PNG"]),
    "two masks of a class": (annotation("06/GRASS.png", Image.new("L", (WIDTH, HEIGHT))), "masks of one class"),
    "classes of one mask name": (annotation("classes.txt", "a/b\na:b\n"), ["a_b.png", "rename"]),
}


def ids(*tables):
    return [pytest.param(*case, id=name) for table in tables for name, case in table.items()]


@pytest.mark.parametrize("spoil, said", ids(TRANSFORMS, SPLITS, PICTURES, ANNOTATIONS))
def test_training_is_refused(small, tmp_path, capsys, spoil, said):
    spoil(small)
    refused(capsys, tmp_path, lambda: opened(small_config(small)), said)
    found_by_the_doctor(NerfstudioDataParserConfig(data=small), said)


def found_by_the_doctor(parser, said) -> None:
    """Asserts that the doctor says the same, and that it will not work."""
    errors = [finding for finding in scene_findings(parser, parser.data) if finding.level == "error"]
    printed = " ".join(f"{error.what} {error.remedy}" for error in errors).lower()
    assert errors and all(part.lower() in printed for part in ([said] if isinstance(said, str) else said)), printed


@pytest.mark.parametrize("spoil, said", ids(POINTS))
def test_sparse_points_are_refused_where_gaussians_would_begin_at_them(small, tmp_path, capsys, spoil, said):
    spoil(small)
    config = OVS3DImagesConfig(data=small, dataparser=NerfstudioDataParserConfig(), scales=(2.0, 3.0))
    refused(capsys, tmp_path, lambda: config.setup(device="cpu", test_mode="val"), said)
    found_by_the_doctor(NerfstudioDataParserConfig(data=small), said)
    config.setup(device="cpu", test_mode="test")


@pytest.mark.parametrize("spoil, said", ids(TRANSFORMS))
def test_the_ovs3d_command_says_the_same(small, tmp_path, capsys, spoil, said):
    from ovs3d_nerfstudio.cli.scenes import SceneOptions
    from ovs3d_nerfstudio.errors import user_errors

    spoil(small)

    def act():
        with user_errors():
            SceneOptions(small).training_pictures()

    refused(capsys, tmp_path, act, said)


def llff(change):
    """poses_bounds.npy with its array changed."""

    def spoil(scene: Path) -> None:
        path = scene / "poses_bounds.npy"
        np.save(path, change(np.load(path)))

    return spoil


def cell(column, value):
    def change(rows):
        rows[3, column] = value
        return rows

    return llff(change)


def same_place(rows):
    rows[:, [3, 8, 13]] = 0.5
    return rows


def written(make):
    return lambda scene: (scene / "poses_bounds.npy").write_bytes(make())


def packed() -> bytes:
    file = io.BytesIO()
    np.savez(file, poses=np.zeros((VIEWS, 17)))
    return file.getvalue()


POSES_BOUNDS = {
    "gone": (lambda scene: (scene / "poses_bounds.npy").unlink(), "poses_bounds.npy does not exist"),
    "empty": (written(lambda: b""), "no array of numbers"),
    "text": (written(lambda: b"0 1 2"), "no array of numbers"),
    "a pickle": (written(lambda: pickle.dumps([1, 2])), "no array of numbers"),
    "an array of objects": (llff(lambda rows: rows.astype(object)), "no array of numbers"),
    "an archive": (written(packed), "no array of numbers"),
    "an array of text": (llff(lambda rows: rows.astype(str)), "of 17 finite numbers"),
    "complex": (llff(lambda rows: rows.astype(complex)), "of 17 finite numbers"),
    "cut off": (lambda s: written(lambda: (s / "poses_bounds.npy").read_bytes()[:400])(s), "no array of numbers"),
    "a number": (llff(lambda rows: np.float64(3)), "17 finite numbers"),
    "of 14 columns": (llff(lambda rows: rows[:, :14]), "(7, 14)"),
    "of three dimensions": (llff(lambda rows: rows[None]), "(1, 7, 17)"),
    "with NaN": (cell(2, NAN), "17 finite numbers"),
    "with infinity": (cell(16, np.inf), "17 finite numbers"),
    "of fewer photos": (llff(lambda rows: rows[:-1]), "has 6 cameras, but there are 7 photos"),
    "of more photos": (llff(lambda rows: np.concatenate([rows, rows])), "has 14 cameras"),
    "a pose of zeros": (cell(slice(0, 15), 0), ["poses_bounds.npy", "camera 3"]),
    "a focal length of zero": (cell(14, 0), ["poses_bounds.npy", "camera 3"]),
    "a negative width": (cell(9, -48), ["poses_bounds.npy", "camera 3"]),
    "one place": (llff(same_place), "at one place"),
    "no photos": (lambda scene: shutil.rmtree(scene / "images"), "no photos in"),
    "a broken photo": (picture(b"x"), "03.png cannot be read"),
    "an annotated photo that is none": (annotation("99/grass.png", Image.new("L", (4, 3))), "segmentations/99"),
}
PARSER_OPTIONS = {
    "no protocol of ours": ({"protocol": "mine"}, ["--protocol mine", "paper"]),
    "a factor of zero": ({"downscale_factor": 0}, "--downscale-factor 0"),
    "no size of the scene": ({"scene_scale": 0.0}, "--scene-scale 0.0"),
    "NaN as scale": ({"scale_factor": NAN}, "--scale-factor nan"),
    "no way up of ours": ({"orientation_method": "down"}, "--orientation-method down"),
}


@pytest.mark.parametrize("spoil, said", ids(POSES_BOUNDS))
def test_an_llff_scene_is_refused(small, tmp_path, capsys, spoil, said):
    spoil(small)
    config = small_config(small)
    config.pipeline.datamanager.dataparser = OVS3DDataParserConfig()
    refused(capsys, tmp_path, lambda: opened(config), said)
    found_by_the_doctor(OVS3DDataParserConfig(data=small), said)


@pytest.mark.parametrize("options, said", ids(PARSER_OPTIONS))
def test_an_option_of_the_dataparser_is_refused(small, tmp_path, capsys, options, said):
    config = small_config(small)
    config.pipeline.datamanager.dataparser = OVS3DDataParserConfig(**options)
    refused(capsys, tmp_path, lambda: opened(config), said)


def test_a_picture_too_small_for_its_patches_is_refused_before_anything_is_extracted(small, tmp_path, capsys):
    config = small_config(small)
    config.pipeline.datamanager.scales = (2.0, 10.0)
    said = refused(capsys, tmp_path, lambda: opened(config), ["00.png", "48×36 pixels", "1/10"])
    assert "needs 40 pixels" in said


def smaller(scene: Path) -> None:
    """Photos in folders, some of one name, and their smaller copies where nerfstudio looks for them: in one folder."""
    content = json.loads((scene / "transforms.json").read_text())
    (scene / "images_2").mkdir()
    names = {}
    for i, entry in enumerate(content["frames"]):
        old = scene / entry["file_path"]
        names[entry["file_path"]] = entry["file_path"] = f"images/{'ab'[i % 2]}/{i // 2}.png"
        (scene / entry["file_path"]).parent.mkdir(exist_ok=True)
        with Image.open(old) as photo:
            photo.resize((WIDTH // 2, HEIGHT // 2)).save(scene / "images_2" / f"{i // 2}.png")
        old.rename(scene / entry["file_path"])
    for split in ("train", "val", "test"):
        content[f"{split}_filenames"] = [names[name] for name in content[f"{split}_filenames"]]
    shutil.rmtree(scene / "segmentations")
    (scene / "transforms.json").write_text(json.dumps(content))


def test_smaller_photos_that_are_one_file_for_two_cameras_are_refused(small, tmp_path, capsys):
    smaller(small)
    config = small_config(small)
    config.pipeline.datamanager.scales = (1.0,)
    config.pipeline.datamanager.dataparser.downscale_factor = 2
    refused(capsys, tmp_path, lambda: opened(config), ["images_2/", "two cameras", "--downscale-factor 1"])
    config.pipeline.datamanager.dataparser.downscale_factor = 1
    config.pipeline.prompts = "grass"
    opened(config)


def test_a_question_on_the_terminal_is_a_sentence_that_names_the_option(small, tmp_path, capsys):
    from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig

    model = small / "colmap" / "sparse" / "0"
    model.mkdir(parents=True)
    (model / "cameras.txt").write_text(f"1 PINHOLE {WIDTH} {HEIGHT} 50 50 24 18\n")
    (model / "images.txt").write_text(
        "".join(f"{i + 1} 1 0 0 0 {i / 9} {i % 3 / 5} 0 1 {i:02d}.png\n\n" for i in range(VIEWS))
    )
    (model / "points3D.txt").write_text("1 1 0 0 9 9 9 0.1 1 0\n")
    config = small_config(small)
    config.pipeline.datamanager.dataparser = ColmapDataParserConfig(downscale_factor=2)
    refused(capsys, tmp_path, lambda: opened(config), ["downscale the images", "--downscale-factor 1"])


def test_an_error_that_is_no_parsers_is_not_blamed_on_the_data(small, monkeypatch):
    from ovs3d_nerfstudio.data.dataset import OVS3DDataset

    def broken(self, image_idx):
        raise TypeError("function takes exactly 2 arguments (1 given)")

    monkeypatch.setattr(OVS3DDataset, "get_numpy_image", broken)
    with pytest.raises(TypeError, match="exactly 2 arguments"):
        opened(small_config(small))


def test_masks_that_blur_what_is_ignored_are_said(small, capsys):
    masked(Image.new("L", (WIDTH, HEIGHT), 255))(small)
    Image.new("L", (WIDTH, HEIGHT), 255).save(small / "masks" / "03.jpg")
    frame(mask_path="masks/03.jpg")(small)
    opened(small_config(small))
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 6 masks are in a format that blurs (such as 03.jpg)" in printed and "Save them as PNG" in printed
