"""How a scene was captured is read off its cameras, and decides how geometry starts unless the user does."""

import copy
import math

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.configs.method_configs import all_methods

from ovs3d_nerfstudio.data.capture import capture_of, nearest_to_axes, turn_of
from ovs3d_nerfstudio.data.scene_checks import SceneError, axes_remark, check_cameras
from ovs3d_nerfstudio.demo.raycast import Camera
from ovs3d_nerfstudio.demo.scene import train_cameras


def ring(azimuths, distance=2.0, height=1.0, outwards=False) -> torch.Tensor:
    """Cameras on a circle about the origin, looking at it or away from it."""
    poses = []
    for azimuth in map(math.radians, azimuths):
        eye = [distance * math.cos(azimuth), distance * math.sin(azimuth), height]
        target = [2 * x for x in eye] if outwards else [0.0, 0.0, 0.0]
        poses.append(torch.from_numpy(Camera.looking_at(eye, target, 4, 3, 4.0).pose[:3]))
    return torch.stack(poses)


def moved(poses: torch.Tensor, scale: float) -> torch.Tensor:
    """The cameras in another frame."""
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=poses.dtype, generator=torch.Generator().manual_seed(0))).Q
    turn = turn * turn.det()
    poses = turn @ poses
    poses[..., 3] = scale * poses[..., 3] + torch.tensor([3.0, -4.0, 5.0])
    return poses


def test_a_full_turn_is_seen_in_any_frame_and_starts_in_proportion():
    for scale in (0.01, 1.0, 50.0):
        capture = capture_of(moved(ring(range(0, 360, 20)), scale))
        assert capture.around and capture.turn == pytest.approx(340, abs=0.1)
        assert capture.distance == pytest.approx(scale * math.sqrt(5), rel=1e-4)
        density, near = capture.start()
        # As much fog, in optical depths, whatever the unit of length.
        assert density * capture.distance == pytest.approx(0.75) and near / capture.distance == pytest.approx(0.4)


@pytest.mark.parametrize(
    "poses",
    [
        ring(range(-60, 61, 10)),
        ring(range(0, 360, 20), outwards=True),
        ring([5.0]),
        ring([0.0]).repeat(4, 1, 1),
        ring([0.0]) + torch.tensor([0.0, 0, 0, 1]) * torch.rand(9, 3, 1),
    ],
    ids=["arc", "outwards", "one camera", "one place", "parallel"],
)
def test_arcs_parallel_and_outward_cameras_start_thin(poses):
    capture = capture_of(moved(poses, 1.0))
    assert not capture.around and capture.start() == (0.3, 0.05)


def test_looking_straight_down_is_from_the_front():
    poses = torch.eye(4)[:3].repeat(20, 1, 1)
    poses[:, :2, 3] = torch.rand(20, 2)
    tilt = 0.05 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    poses[:, 1, 1] = poses[:, 2, 2] = tilt.cos()
    poses[:, 2, 1], poses[:, 1, 2] = tilt.sin(), -tilt.sin()
    poses[::2, :, :2] *= -1  # every other one upside down, as on the way back of a survey
    assert not capture_of(poses).around


def test_the_demo_is_captured_from_the_front():
    capture = capture_of(torch.stack([torch.from_numpy(camera.pose[:3]) for camera in train_cameras(40, 400)]))
    assert not capture.around and 80 < capture.turn < 100


SCENES = {"arc": ring(range(-60, 61, 10)), "full turn": ring(range(0, 360, 20)), "narrow": ring(range(0, 25, 5))}


@pytest.mark.parametrize("name", SCENES)
def test_poses_in_opencv_axes_are_said_before_training(name):
    right = moved(SCENES[name], 1.0)
    assert axes_remark(capture_of(right)) is None
    said = axes_remark(capture_of(right * torch.tensor([1.0, -1, -1, 1])))
    if name == "narrow":  # too little turning to tell
        assert said is None
    else:
        assert "100% of them have behind them" in said and "negate the columns 1 and 2" in said


def test_odd_cameras_are_said_of_data_that_is_trained_on_and_not_of_a_run_that_is_opened(capsys):
    poses = ring(range(0, 360, 20)).float() * torch.tensor([1.0, -1, -1, 1])
    cameras = Cameras(poses, 9.0, 9.0, 2.0, 2.0, 4, 4)
    check_cameras(cameras, "it")
    assert "OpenCV's axes" in " ".join(capsys.readouterr().out.split())
    check_cameras(cameras, "it", for_training=False)
    cameras.camera_to_worlds = poses * torch.tensor([1.0, 1, -1, 1])
    check_cameras(cameras, "it", for_training=False)
    assert not capsys.readouterr().out
    with pytest.raises(SceneError, match="18 of 18 cameras of it are mirrored"):
        check_cameras(cameras, "it")


def test_panoramas_are_captured_neither_from_the_front_nor_all_around(capsys):
    poses = ring(range(0, 360, 20)).float()
    cameras = Cameras(poses, 4.0, 2.0, 2.0, 1.0, 4, 2, camera_type=CameraType.EQUIRECTANGULAR)
    capture = check_cameras(cameras, "it")
    assert capture.described == "in panoramas, which see all around" and capture.start() == (0.3, 0.05)
    assert axes_remark(capture) is None


def test_the_common_point_is_where_axes_cross():
    views = torch.nn.functional.normalize(torch.randn(6, 3, dtype=torch.double), dim=-1)
    point = torch.tensor([1.0, 2, 3], dtype=torch.double)
    torch.testing.assert_close(nearest_to_axes(point - 2 * views, views), point)


def test_a_turn_is_what_the_widest_gap_leaves():
    angles = torch.tensor([350.0, 0.0, 20.0, 90.0]).deg2rad()
    views = torch.stack([angles.cos(), angles.sin(), torch.zeros(4)], -1)
    assert turn_of(views, torch.tensor([0.0, 0, 1])) == pytest.approx(100, abs=1e-3)
    assert turn_of(torch.tensor([[0.0, 0, -1]] * 5), torch.tensor([0.0, 0, 1])) == 0


@pytest.mark.parametrize("given, kept", [({}, (0.3, 0.05)), ({"near_plane": 0.2}, (0.3, 0.2))])
def test_the_start_is_said_and_what_the_user_gives_stays(scene, capsys, given, kept):
    config = copy.deepcopy(all_methods["ovs3d-lite"].pipeline)
    config.datamanager.data = scene
    for name, value in given.items():
        setattr(config.model, name, value)
    model = config.setup(device="cpu").model
    printed = " ".join(capsys.readouterr().out.split())
    assert "Captured from the front (the cameras turn through" in printed and "--pipeline.model.near-plane" in printed
    assert (model.field.average_init_density, model.collider.near_plane) == kept
    assert {network.average_init_density for network in model.proposal_networks} == {0.3}


def test_a_start_given_whole_needs_no_saying(scene, capsys):
    config = copy.deepcopy(all_methods["ovs3d-lite"].pipeline)
    config.datamanager.data, config.model.average_init_density, config.model.near_plane = scene, 0.4, 0.1
    model = config.setup(device="cpu").model
    assert "Captured" not in capsys.readouterr().out and model.field.average_init_density == 0.4


def test_patches_that_are_all_coarse_are_warned_of(scene, capsys):
    config = copy.deepcopy(all_methods["ovs3d-lite"].pipeline)
    config.datamanager.data = scene
    for scales, warned in (((5.0, 7.0, 10.0), False), ((4.0, 5.0), True)):
        config.datamanager.scales = scales
        config.setup(device="cpu")
        printed = " ".join(capsys.readouterr().out.split())
        assert ("--pipeline.datamanager.scales 4 5 has coarse patches only" in printed) is warned


def test_a_start_far_from_what_fits_the_capture_is_warned_of_with_the_range():
    capture = capture_of(ring(range(0, 360, 20)))
    density, near = capture.start()
    assert capture.warnings(density, near) == [] == capture.warnings(1.4 * density, 1.2 * near)
    (dense,) = capture.warnings(2.15 * density, near)
    assert "average-init-density 0.72" in dense and "painted before the lenses" in dense
    assert f"Give {0.1 * density:.2g} to {1.5 * density:.2g}" in dense
    (thin,) = capture.warnings(0.01 * density, near)
    assert "tells no depth" in thin
    (far,) = capture.warnings(density, 0.6 * capture.distance)
    assert "near-plane 1.3 is more than half of the way" in far and f"leave it out for {near:.2g}" in far
    assert capture.warnings(None, None) == []
    assert capture_of(ring(range(0, 360, 20), outwards=True)).warnings(0.3, 9.0) == []
    assert "from the middle outwards" in capture_of(ring(range(0, 360, 20), outwards=True)).described
