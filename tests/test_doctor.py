"""`ovs3d doctor`: each thing that can be the matter is found and comes with what to do, and a good scene is called good."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image, ImageFilter

from ovs3d_nerfstudio.cli.doctor import Command
from ovs3d_nerfstudio.doctor import machine
from ovs3d_nerfstudio.doctor.findings import Finding
from ovs3d_nerfstudio.doctor.scene import scene_findings, shared
from ovs3d_nerfstudio.doctor.trained import classes, pictures
from ovs3d_nerfstudio.encoders import dino, efficientnet, hub


def found(scene: Path) -> dict[str, Finding]:
    """What is not good about a scene, by what it is about."""
    parser = NerfstudioDataParserConfig(data=scene)
    return {finding.about: finding for finding in scene_findings(parser, scene) if finding.level != "good"}


@pytest.fixture
def healthy(scene, tmp_path) -> Path:
    return Path(shutil.copytree(scene, tmp_path / "scene", ignore=shutil.ignore_patterns(".ovs3d-cache")))


def rewrite(scene: Path, change) -> None:
    meta = json.loads((scene / "transforms.json").read_text())
    change(meta)
    (scene / "transforms.json").write_text(json.dumps(meta))


def test_of_a_good_scene_only_its_few_photos_are_said(healthy):
    assert set(found(healthy)) == {"photos", "points"} and "8 training photos" in found(healthy)["photos"].what


def test_a_blurred_and_a_dark_photo_are_named(healthy):
    photos = sorted((healthy / "images").glob("train*"))
    with Image.open(photos[2]) as picture:
        picture.filter(ImageFilter.GaussianBlur(3)).save(photos[2])
    with Image.open(photos[5]) as picture:
        picture.point(lambda value: value // 2).save(photos[5])
    said = found(healthy)
    assert photos[2].name in said["sharpness"].what and photos[5].name not in said["sharpness"].what
    assert photos[5].name in said["exposure"].what and all(said[about].remedy for about in ("sharpness", "exposure"))


def test_poses_in_the_axes_of_opencv_are_recognised(healthy):
    def flip(meta):
        for frame in meta["frames"]:
            frame["transform_matrix"] = (np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1])).tolist()

    rewrite(healthy, flip)
    assert "OpenCV" in found(healthy)["axes"].what and "−1" in found(healthy)["axes"].remedy


def test_a_photo_that_shares_nothing_with_any_other_is_named(healthy):
    def turn(meta):
        frame = next(frame for frame in meta["frames"] if "train_03" in frame["file_path"])
        frame["transform_matrix"] = (np.array(frame["transform_matrix"]) @ np.diag([-1, 1, -1, 1])).tolist()

    rewrite(healthy, turn)
    assert "train_03" in found(healthy)["overlap"].what


def test_photos_without_a_pose_are_counted(healthy):
    for i in range(5):
        shutil.copy(healthy / "images" / "train_00.png", healthy / "images" / f"more_{i}.png")
    assert "11 of the 16 pictures" in found(healthy)["poses"].what


def test_photos_that_cannot_be_read_hide_nothing_else(healthy):
    photos = sorted((healthy / "images").glob("train*"))
    photos[2].write_bytes(photos[2].read_bytes()[:1500])
    said = found(healthy)
    assert set(said) == {"photos", "points", "files"} and said["files"].level == "error"
    assert photos[2].name in said["files"].what and said["files"].remedy
    for photo in photos:  # of the first, nerfstudio's parser asks the size
        photo.write_bytes(b"x")
    said = found(healthy)
    assert set(said) == {"photos", "points", "files"} and f"{photos[0].name} cannot" in said["files"].what
    assert said["files"].what.endswith("Nor can 7 more be read.")


def test_annotated_photos_in_folders_of_one_scene_are_counted(healthy):
    def nest(meta):
        names = {}
        for i, frame in enumerate(meta["frames"]):
            old = frame["file_path"]
            names[old] = frame["file_path"] = f"images/{'ab'[i % 2]}/{Path(old).name}"
            (healthy / names[old]).parent.mkdir(exist_ok=True)
            (healthy / old).rename(healthy / names[old])
        for split in ("train", "val", "test"):
            meta[f"{split}_filenames"] = [names[name] for name in meta[f"{split}_filenames"]]

    def counted() -> str:
        return next(
            finding.what
            for finding in scene_findings(NerfstudioDataParserConfig(data=healthy), healthy)
            if finding.about == "classes"
        )

    before = counted()
    rewrite(healthy, nest)
    assert counted() == before and " 0 held-out" not in before


def test_a_scene_that_cannot_be_read_is_an_error_with_its_remedy(healthy):
    rewrite(healthy, lambda meta: meta.update(fl_x=-1))
    assert found(healthy)["scene"].level == "error" and found(healthy)["scene"].remedy


def test_overlap_is_the_share_that_neighbours_see():
    from nerfstudio.cameras.cameras import Cameras

    poses = torch.eye(4)[:3].repeat(3, 1, 1)
    poses[:, 2, 3] = 2.0
    poses[:, 0, 3] = torch.tensor([-0.5, 0.0, 0.5])
    # They look at one place, two units away, and see two units of it from side to side.
    angles = torch.atan2(poses[:, 0, 3], torch.tensor(2.0))
    poses[:, 0, 0], poses[:, 0, 2] = angles.cos(), angles.sin()
    poses[:, 2, 0], poses[:, 2, 2] = -angles.sin(), angles.cos()
    assert (shared(Cameras(poses, 100.0, 100.0, 100.0, 100.0, 200, 200)) > 0.7).all()


def test_exit_status_is_1_where_it_will_not_work_and_json_says_why(monkeypatch, capsys, healthy):
    monkeypatch.setattr(machine, "machine_findings", lambda _: [Finding("good", "all", "Well.")])
    Command(healthy, json=True).main()
    said = json.loads(capsys.readouterr().out)
    assert said["works"] and {"machine", "scene"} <= set(said)
    with pytest.raises(SystemExit) as end:
        Command(healthy / "nowhere").main()
    printed = capsys.readouterr().out
    assert end.value.code == 1 and "does not exist" in printed and "will not work" in printed


def test_this_machine_can_train_something():
    findings = machine.machine_findings(Path())
    assert {"versions", "device", "kernels", "ffmpeg", "COLMAP", "disk", "method"} <= {f.about for f in findings}
    assert all(finding.remedy for finding in findings if finding.level != "good")


def test_weights_and_packages_that_are_lacking_are_said_with_what_to_do(monkeypatch):
    monkeypatch.setattr(hub, "cached", lambda model, *files: model == dino.DEFAULT)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(efficientnet, "WEIGHTS_PACKAGE", "no_such_package")
    efficientnet.weights_file.cache_clear()
    about = {finding.about: finding for finding in machine.machine_findings(Path())}
    lacking, here = about["encoder open_clip:ViT-B-16@openai"], about["encoder dino:facebook/dino-vitb8"]
    assert lacking.level == "warning" and "does not answer" in lacking.what and "@FILE" in lacking.remedy
    assert here.level == "good" and "on this disk" in here.what
    assert about["encoder offline"].level == "note" and "no-such-package" in about["encoder offline"].what
    assert about["method"].level == "error" and "[offline]" in about["method"].remedy
    monkeypatch.setattr(hub, "reachable", lambda: True)
    about = {finding.about: finding for finding in machine.machine_findings(Path())}
    assert about["encoder open_clip:ViT-B-16@openai"].level == "good"
    assert about["method"].level == "warning" and "--pipeline.image-text-encoder open_clip:" in about["method"].remedy


@pytest.mark.parametrize(
    ("test", "train", "said"),
    [
        ([12.0], [20.0], "ovs3d doctor --data"),
        ([20.0], [29.0], "by heart"),
        ([20.0], [21.0], "first"),
        ([], [15.0], "first"),
    ],
)
def test_bad_pictures_say_where_to_begin(test, train, said):
    (finding,) = pictures(test, train)
    assert finding.level == "warning" and said in finding.what + finding.remedy
    assert pictures([28.0], [30.0])[0].level == "good"


def test_prompts_that_win_nowhere_or_everywhere_are_said():
    labels = np.array([0] * 950 + [1] * 50 + [-1] * 9)
    nowhere, everywhere = classes(["wall", "cup", "dog"], labels, 5)
    assert nowhere.what == "dog: found nowhere in 5 views." and "'wall' takes 95%" in everywhere.what
    assert classes(["wall", "cup"], np.array([0, 1, 1]), 5)[0].level == "good"


@pytest.mark.slow
def test_a_run_is_looked_at(trained, ovs3d):
    status, printed = ovs3d("doctor", "--load-config", trained[0], "--json")
    said = json.loads(printed)
    assert status == (0 if said["works"] else 1) and {"run", "geometry", "floaters"} <= {
        f["about"] for f in said["run"]
    }


@pytest.mark.slow
def test_photos_that_cannot_be_read_hide_nothing_of_a_run_and_are_not_compared_with(trained, healthy, ovs3d):
    photo, other = (min((healthy / "images").glob(f"{split}*")) for split in ("test", "train"))
    photo.write_bytes(photo.read_bytes()[:1500])
    other.write_bytes(b"")
    _, printed = ovs3d("doctor", "--load-config", trained[0], "--data", healthy, "--json")
    said = {finding["about"]: finding for finding in json.loads(printed)["run"]}
    assert {"run", "geometry", "floaters"} <= set(said) and said["photos"]["level"] == "warning"
    assert other.name in said["photos"]["what"] and said["photos"]["remedy"]
    status, printed = ovs3d("eval", "--load-config", trained[0], "--data", healthy, "--output-path", healthy / "a.json")
    assert status and f"{photo.name} cannot be read" in " ".join(printed.split()) and not (healthy / "a.json").exists()
