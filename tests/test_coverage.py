"""Where rays start, on cameras whose overlap is known."""

import math

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras

from ovs3d_nerfstudio.coverage import covered_depth, sees


def side_by_side(count: int, spacing: float) -> Cameras:
    """Cameras on the x axis looking along −z, with a horizontal and vertical angle of view of 90°."""
    poses = torch.eye(4)[:3].repeat(count, 1, 1)
    poses[:, 0, 3] = torch.arange(count) * spacing
    return Cameras(poses, fx=50.0, fy=50.0, cx=50.0, cy=50.0, width=100, height=100)


def test_a_camera_sees_what_projects_into_its_picture():
    points = torch.tensor([[0.0, 0, -1], [0.9, 0, -1], [1.1, 0, -1], [0, 0, 1], [1.9, 0, -1]])
    seen = sees(side_by_side(2, 1.0), points)
    assert seen[0].tolist() == [True, True, False, False, False]
    assert seen[1, 1:].tolist() == [True, True, False, True]


def test_rays_of_cameras_side_by_side_start_where_three_of_them_look():
    # The middle ray of the middle one of three cameras is seen by both others from depth = spacing on, those of the outer
    # ones from twice that on; so it is between the two, and grows with the spacing.
    depth = covered_depth(side_by_side(3, 0.5), grid=1)
    assert depth is not None and 0.5 <= depth < 1.0
    assert covered_depth(side_by_side(3, 1.0), grid=1) == pytest.approx(2 * depth, rel=0.15)


def test_cameras_that_never_overlap_have_no_covered_depth():
    turned = side_by_side(3, 0.0)
    for i in range(3):
        angle = 2 * math.pi * i / 3
        c, s = math.cos(angle), math.sin(angle)
        turned.camera_to_worlds[i, :, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    assert covered_depth(turned) is None
