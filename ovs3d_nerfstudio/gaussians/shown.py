"""What a camera of nerfstudio's sees of a splat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ovs3d_nerfstudio.gaussians.rasterization import rasterization
from ovs3d_nerfstudio.gaussians.splats import Splat

FLIPPED = (1.0, -1.0, -1.0)
"""From nerfstudio's axes of a camera (y up, looking along −z) to gsplat's (y down, looking along z)."""


def view_matrix(poses: Float[Tensor, "c 3 4"]) -> Float[Tensor, "c 4 4"]:
    """World to camera in gsplat's axes, from nerfstudio's camera to world."""
    rotation = (poses[:, :3, :3] * poses.new_tensor(FLIPPED)).mT
    shift = -rotation @ poses[:, :3, 3:]
    return F.pad(torch.cat([rotation, shift], -1), (0, 0, 0, 1)) + poses.new_tensor([0.0, 0, 0, 1]).diag()


@torch.no_grad()
def picture_of(
    splat: Splat,
    pose: Float[Tensor, "3 4"],
    intrinsics: Float[Tensor, "3 3"],
    width: int,
    height: int,
    background: Float[Tensor, "3"],
) -> Float[Tensor, "H W 3"]:
    """The colours of a splat in the frame of a camera-to-world pose, in [0, 1] and on the CPU."""
    picture, alpha, _ = rasterization(
        splat.means,
        splat.quats,
        splat.scales.exp(),
        splat.opacities.sigmoid().squeeze(-1),
        torch.cat([splat.base[:, None], splat.rest], 1),
        view_matrix(pose[None]).to(splat.means),
        intrinsics[None].to(splat.means),
        width,
        height,
        sh_degree=splat.degree,
    )
    return (picture[0] + (1 - alpha[0]) * background.to(picture)).clamp(0, 1).cpu()
