"""A run keeps its frame and its cameras: data that change after the training move nothing, and what changed is said."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bad_input import VIEWS, opened, small_config
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.datamanagers.base_datamanager import DataManager
from test_frames import add, turned  # noqa: F401 (a fixture)

from ovs3d_nerfstudio.data.frames import Frame
from ovs3d_nerfstudio.data.run_views import RunViews

METHODS = ["ovs3d-lite", "ovs3d-splat-lite"]


def config_of(method: str, scene: Path):
    config = copy.deepcopy(all_methods[method].pipeline.datamanager)
    config.data, config.scales = scene, (2.0, 3.0)
    return config


def datamanager(method: str, scene: Path, **options) -> DataManager:
    config = config_of(method, scene)
    for name, value in options.items():
        setattr(config.dataparser, name, value)
    return config.setup(device="cpu", test_mode="test")


def poses(manager: DataManager, split: str = "train") -> dict[str, np.ndarray]:
    dataset = getattr(manager, f"{split}_dataset")
    names = [path.name for path in dataset.image_filenames]
    return dict(zip(names, dataset.cameras.camera_to_worlds.numpy().copy(), strict=True))


def without(scene: Path, folder: Path, *names: str) -> Path:
    """A copy of the scene that has lost some photos."""
    copied = Path(shutil.copytree(scene, folder))
    meta = json.loads((copied / "transforms.json").read_text())
    meta["frames"] = [frame for frame in meta["frames"] if Path(frame["file_path"]).name not in names]
    meta["train_filenames"] = [name for name in meta["train_filenames"] if Path(name).name not in names]
    (copied / "transforms.json").write_text(json.dumps(meta))
    return copied


@pytest.mark.parametrize("method", METHODS)
def test_photos_that_went_or_came_move_nothing_and_are_named(turned, tmp_path, capsys, method):  # noqa: F811
    whole = turned[0]
    add(whole, applied_transform=[[0, 1, 0, 2], [1, 0, 0, 0], [0, 0, -1, 0]], applied_scale=0.7)
    part = without(whole, tmp_path / "part", "00.png", "05.png")
    for trained_on, opened_on, said in (
        (whole, part, "2 of its 6 training photos went (such as images/00.png)."),
        (part, whole, "2 came (such as images/00.png)."),
    ):
        run, manager = datamanager(method, trained_on), datamanager(method, opened_on)
        assert not np.allclose(poses(manager)["03.png"], poses(run)["03.png"], atol=1e-2)
        capsys.readouterr()
        manager.set_extra_state(json.loads(json.dumps(run.get_extra_state())))
        printed = " ".join(capsys.readouterr().out.split())
        assert f"The data are not as at the training: {said} All cameras are put where the run has them." in printed
        for split in ("train", "eval"):
            for name, pose in poses(manager, split).items():
                if name in poses(run, split):
                    np.testing.assert_allclose(pose, poses(run, split)[name], atol=1e-5)
        for made in manager.cameras_in_use():
            assert made.camera_to_worlds[..., 3].abs().max() < 2
        outputs, before = manager.train_dataparser_outputs, run.train_dataparser_outputs
        np.testing.assert_allclose(outputs.dataparser_transform, before.dataparser_transform, atol=1e-4)
        assert outputs.dataparser_scale == pytest.approx(before.dataparser_scale, rel=1e-5)
        # nerfstudio's render of a dataset makes a datamanager of the same config beside the one that is loaded into.
        other = manager.config.setup(device="cpu", test_mode="test")
        assert poses(other).keys() == poses(manager).keys() and "not as at" not in capsys.readouterr().out
        np.testing.assert_array_equal(list(poses(other).values()), list(poses(manager).values()))
        assert "run_views" not in yaml.dump(manager.config)


def test_rays_come_from_where_the_run_has_its_cameras(turned, tmp_path):  # noqa: F811
    part = without(turned[0], tmp_path / "part", "00.png")
    run, manager = (datamanager("ovs3d-lite", scene) for scene in (turned[0], part))
    manager.set_extra_state(run.get_extra_state())
    pixels = torch.tensor([[2, 5, 7]])
    rays, same = manager.train_ray_generator(pixels), run.train_ray_generator(pixels + torch.tensor([[1, 0, 0]]))
    torch.testing.assert_close(rays.origins, same.origins, atol=1e-5, rtol=0)
    torch.testing.assert_close(rays.directions, same.directions, atol=1e-5, rtol=0)
    for name in ("fixed_indices_eval_dataloader", "eval_dataloader"):
        (camera, _), (other, _) = (next(iter(getattr(one, name))) for one in (manager, run))
        torch.testing.assert_close(camera.camera_to_worlds, other.camera_to_worlds, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_data_stay_as_they_are_to_the_bit_and_nothing_is_said(turned, capsys, method):  # noqa: F811
    run, manager = datamanager(method, turned[0]), datamanager(method, turned[0])
    capsys.readouterr()
    manager.set_extra_state(run.get_extra_state())
    np.testing.assert_array_equal(list(poses(manager).values()), list(poses(run).values()))
    assert not capsys.readouterr().out


def test_other_options_of_the_dataparser_move_nothing_either(turned, capsys):  # noqa: F811
    run = datamanager("ovs3d-lite", turned[0])
    manager = datamanager("ovs3d-lite", turned[0], orientation_method="none", scale_factor=3.0)
    manager.set_extra_state(run.get_extra_state())
    assert "turned or scaled otherwise. All cameras are put" in " ".join(capsys.readouterr().out.split())
    np.testing.assert_allclose(list(poses(manager).values()), list(poses(run).values()), atol=1e-5)


def test_photos_with_other_poses_are_named(turned, capsys):  # noqa: F811
    run = datamanager("ovs3d-lite", turned[0])
    meta = json.loads((turned[0] / "transforms.json").read_text())
    meta["frames"][1]["transform_matrix"][0][3] += 0.5
    add(turned[0], frames=meta["frames"])
    datamanager("ovs3d-lite", turned[0]).set_extra_state(run.get_extra_state())
    assert "1 have other poses (such as images/01.png)" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_goes_on_starts_where_it_was_trained(turned, tmp_path):  # noqa: F811
    run = datamanager("ovs3d-lite", turned[0])
    config = config_of("ovs3d-lite", without(turned[0], tmp_path / "part", "00.png"))
    config.known({"pipeline": {"datamanager._extra_state": run.get_extra_state()}})
    manager = config.setup(device="cpu", test_mode="test")
    assert manager.train_dataset.metadata["capture"] == run.train_dataset.metadata["capture"]
    np.testing.assert_allclose(poses(manager)["01.png"], poses(run)["01.png"], atol=1e-5)
    config = config_of("ovs3d-lite", turned[0])
    config.known({"pipeline": {}})  # a run of version 0.2
    assert config.run_views is None


def test_a_whole_pipeline_keeps_the_frame_of_its_checkpoint(turned, tmp_path):  # noqa: F811
    trained = opened(small_config(turned[0]), "test")
    state = trained.state_dict()
    part = opened(small_config(without(turned[0], tmp_path / "part", "00.png")), "inference")
    part.load_pipeline(state, 1)
    names = [f"{i:02d}.png" for i in range(1, VIEWS - 1)]
    run = poses(trained.datamanager)
    np.testing.assert_allclose(list(poses(part.datamanager).values()), [run[name] for name in names], atol=1e-5)
    del state["datamanager._extra_state"]  # as version 0.2 left it
    opened(small_config(turned[0]), "inference").load_pipeline(state, 1)
    for broken in ({}, {"frame": {}, "names": [], "poses": []}, {**trained.datamanager.get_extra_state(), "names": []}):
        with pytest.raises(SystemExit):
            opened(small_config(turned[0]), "inference").load_pipeline({**state, "datamanager._extra_state": broken}, 1)


def test_what_is_learned_for_each_view_stays_with_it(turned, tmp_path):  # noqa: F811
    def pipeline(scene):
        config = small_config(scene)
        config.pipeline.model.camera_optimizer.mode = "SO3xR3"
        return opened(config, "inference")

    trained, part = pipeline(turned[0]), pipeline(without(turned[0], tmp_path / "part", "00.png", "03.png"))
    corrections = torch.arange(6.0 * (VIEWS - 1)).view(-1, 6)
    trained.model.camera_optimizer.pose_adjustment.data = corrections
    part.load_pipeline(trained.state_dict(), 1)
    assert torch.equal(part.model.camera_optimizer.pose_adjustment, corrections[[1, 2, 4, 5]])
    trained.load_pipeline(part.state_dict(), 1)
    expected = corrections.clone()
    expected[[0, 3]] = 0
    assert torch.equal(trained.model.camera_optimizer.pose_adjustment, expected)


def test_cameras_at_one_place_are_told_apart_by_their_axes():
    turns = np.stack([np.eye(3), np.diag([-1.0, 1, -1]), np.diag([1.0, -1, -1])])
    places = np.array([[0.0, 0, 0], [0, 0, 0], [1, 0, 0]])
    views = RunViews(Frame(np.eye(4)[:3]), ["a", "b", "c"], np.concatenate([turns, places[..., None]], -1))
    assert views.differences(["x", "y"], views.poses[[0, 2]]) == ["1 of its 3 training photos went (such as b)"]
    assert views.differences(["p", "q", "r"], views.poses[[2, 0, 1]]) == []
