"""`ovs3d-data`: LLFF cameras are those of transforms.json up to similarity, in both protocols; mistakes are sentences."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from ovs3d_nerfstudio.data.dataparser import OVS3DDataParserConfig, read_poses_bounds


def write_poses_bounds(scene: Path) -> None:
    """LLFF's file of a scene with transforms.json; OpenGL's right, up, back are LLFF's −down, right, back."""
    meta = json.loads((scene / "transforms.json").read_text())
    rows = []
    for frame in sorted(meta["frames"], key=lambda frame: frame["file_path"]):
        right, up, back, origin = np.array(frame["transform_matrix"])[:3].T
        pose = np.stack([-up, right, back, origin, [meta["h"], meta["w"], meta["fl_x"]]], -1)
        rows.append([*pose.ravel(), 1.0, 8.0])
    np.save(scene / "poses_bounds.npy", rows)


@pytest.fixture
def llff(scene, tmp_path) -> Path:
    """The demo scene in LLFF's layout, without transforms.json."""
    copy = Path(shutil.copytree(scene, tmp_path / "scène à part", ignore=shutil.ignore_patterns(".ovs3d-cache")))
    write_poses_bounds(copy)
    (copy / "transforms.json").unlink()
    return copy


def outputs(data: Path, split="train", **options):
    return OVS3DDataParserConfig(data=data, **options).setup().get_dataparser_outputs(split)


def relations(cameras) -> tuple[torch.Tensor, torch.Tensor]:
    """What no similarity changes: rotations between cameras, and distances between them by their mean."""
    rotations = cameras.camera_to_worlds[:, :, :3]
    origins = cameras.camera_to_worlds[:, :, 3]
    distances = torch.cdist(origins, origins)
    return rotations[:1].transpose(1, 2) @ rotations, distances / distances.mean()


def test_cameras_are_those_of_transforms_json_up_to_similarity(scene, llff):
    by_llff = outputs(llff, "train")
    by_json = NerfstudioDataParserConfig(data=scene).setup().get_dataparser_outputs("train")
    # Some training photos of the demo are annotated, so the held-out protocol leaves fewer.
    names = [path.name for path in by_llff.image_filenames]
    same = [i for i, path in enumerate(by_json.image_filenames) if path.name in names]
    assert 2 <= len(same) == len(names)
    for one, other in zip(relations(by_llff.cameras), relations(by_json.cameras[torch.tensor(same)]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_llff.cameras.fx, by_json.cameras.fx[same])
    assert (by_llff.cameras.width == 96).all() and (by_llff.cameras.cy == 36).all()


def test_poses_go_back_to_the_frame_of_the_data(llff):
    parsed = outputs(llff, protocol="paper", orientation_method="vertical", center_method="focus", scale_factor=0.7)
    poses, _, _ = read_poses_bounds(llff / "poses_bounds.npy", 11)
    back = parsed.transform_poses_to_original_space(parsed.cameras.camera_to_worlds, "opengl")
    torch.testing.assert_close(back, poses[:, :3], atol=1e-4, rtol=0)


def test_both_protocols_evaluate_the_annotated_photos(llff):
    annotated = sorted(path.name for path in (llff / "segmentations").iterdir() if path.is_dir())
    for protocol in ("held-out", "paper"):
        train = [path.stem for path in outputs(llff, "train", protocol=protocol).image_filenames]
        for split in ("val", "test"):
            assert [path.stem for path in outputs(llff, split, protocol=protocol).image_filenames] == annotated
        assert len(train) == (11 if protocol == "paper" else 11 - len(annotated))
        assert protocol == "paper" or not set(train) & set(annotated)


def test_without_annotations_every_eighth_photo_is_held_out(llff):
    shutil.rmtree(llff / "segmentations")
    assert len(outputs(llff, "test").image_filenames) == 2 and len(outputs(llff).image_filenames) == 9
    assert len(outputs(llff, protocol="paper").image_filenames) == 11


def test_smaller_copies_are_made_once_beside_the_photos(llff):
    whole, half = outputs(llff), outputs(llff, downscale_factor=2)
    assert {path.parent.name for path in half.image_filenames} == {"images_2"}
    assert Image.open(half.image_filenames[0]).size == (48, 36) and len(list((llff / "images_2").iterdir())) == 11
    torch.testing.assert_close(half.cameras.fx, whole.cameras.fx / 2)
    times = {path: path.stat().st_mtime_ns for path in (llff / "images_2").iterdir()}
    (llff / "images_2" / "test_00.png").unlink()
    outputs(llff, downscale_factor=2)
    assert len(times) == 11 and all(
        path.stat().st_mtime_ns == time for path, time in times.items() if path.name != "test_00.png"
    )


def test_a_photo_of_which_no_smaller_copy_can_be_made_is_named(llff, capsys):
    photo = llff / "images" / "train_03.png"
    photo.write_bytes(photo.read_bytes()[:1500])
    with pytest.raises(SystemExit):
        outputs(llff, downscale_factor=2)
    assert "train_03.png cannot be read as a picture" in " ".join(capsys.readouterr().out.split())
    assert not list((llff / "images_2").glob("*train_03*"))


def test_large_photos_are_halved_by_themselves(llff):
    for path in (llff / "images").iterdir():
        Image.open(path).resize((1700, 1275)).save(path)
    parsed = outputs(llff)
    assert parsed.image_filenames[0].parent.name == "images_2" and int(parsed.cameras.width[0]) == 850


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda scene: (scene / "poses_bounds.npy").unlink(), "does not exist"),
        (lambda scene: (scene / "poses_bounds.npy").write_text("x"), "no array of numbers"),
        (lambda scene: np.save(scene / "poses_bounds.npy", np.zeros((11, 16))), "(11, 16)"),
        (lambda scene: np.save(scene / "poses_bounds.npy", np.full((11, 17), np.nan)), "17 finite numbers"),
        (lambda scene: (scene / "images" / "test_01.png").unlink(), "11 cameras, but there are 10 photos"),
        (lambda scene: shutil.rmtree(scene / "images"), "no photos in"),
        (lambda scene: (scene / "images" / "train_01.png").write_text("x"), "cannot be read as a picture"),
        (lambda scene: (scene / "segmentations" / "train_99").mkdir(), "train_99"),
    ],
)
def test_a_scene_that_cannot_be_used_ends_with_a_sentence(llff, capsys, spoil, said):
    spoil(llff)
    with pytest.raises(SystemExit) as end:
        outputs(llff)
        outputs(llff, "test")
    assert end.value.code == 1 and said in " ".join(capsys.readouterr().out.split())


def test_a_factor_below_one_is_refused(llff, capsys):
    with pytest.raises(SystemExit):
        outputs(llff, downscale_factor=0)
    assert "--downscale-factor 0" in capsys.readouterr().out


def test_nerfstudio_knows_the_dataparser():
    assert isinstance(all_dataparsers["ovs3d-data"], OVS3DDataParserConfig)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["nerfstudio.configs.dataparser_configs", "ovs3d_nerfstudio.data.dataparser"])
def test_no_import_goes_in_a_circle(first, tmp_path):
    code = (
        f"import sys, {first}; print([m for m in sys.modules if m.endswith(('.datamanager', '.pipeline'))]); "
        "import nerfstudio.configs.method_configs as m; print('ovs3d' in m.all_methods)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "True"]


@pytest.mark.slow
def test_features_are_extracted_of_the_parsers_training_photos(llff, ovs3d):
    words = ["extract", "--data", llff, "--method", "ovs3d-lite", "--scales", 2]
    status, printed = ovs3d(*words, "ovs3d-data", "--protocol", "paper")
    assert status == 0 and "0 of 11 views are cached" in printed
    status, printed = ovs3d(*words, "ovs3d-data")
    assert status == 0 and "0 to make" in printed


def test_photos_that_cannot_be_read_are_said_by_name(llff, capsys):
    for name in ("IMG_1.HEIC", "IMG_2.heic", ".hidden.heic"):
        (llff / "images" / name).touch()
    outputs(llff)
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 photos of" in printed and "IMG_1.HEIC, IMG_2.heic. Save them as JPEG" in printed
