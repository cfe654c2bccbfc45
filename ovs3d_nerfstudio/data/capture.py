"""How a scene was captured, read off its cameras, and how its geometry should start.

A field starts as fog, and each camera sees the fog before its own lens alone. Where that fog is dense, cameras paint it: 12 dB
are lost on held-out views. Where it is thin, what has little texture ends far behind its place, in whatever fog is met
first. Photos from the front need the thin start; among cameras that look at one place from all around, fog may stand where
they look, as long as none stands before the lens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FULL_TURN = 180.0
"""Degrees of turning from which on cameras stand around the scene. A full turn has up to 360, an arc before it up to 120."""
LOOKING_THERE = 0.9
"""Share of the cameras that must have the common point before them, or they look outwards."""
THIN_DENSITY, NERFACTO_NEAR = 0.3, 0.05
"""Start from the front: density per unit of length, and nerfacto's near plane. Chosen on two scenes, two to four seeds a value:
nerfacto's 1 is painted before the lenses (12 dB held out), and 0.01 leaves depth untold (of ten views 23 dB; with 0.3 29 dB)."""
AROUND_DEPTH = 0.75
"""Start all around: optical depth of the fog from a close camera to the common point. Chosen on one scene with a white
mattress, one or two seeds a value: two thirds of it left the mattress three times too far, and three times as much was
painted before the lenses (4 dB held out)."""
AROUND_NEAR = 0.4
"""Start all around: near plane, as a share of the way from a close camera to the common point."""

THIN, DENSE = 0.1, 1.5
"""How many times less and more fog than by the capture is worth a try: twice as much has cost 6 dB, a sixth 1 dB, before points told depth."""


@dataclass(frozen=True)
class Capture:
    """What the cameras say of a capture."""

    around: bool
    """Whether the cameras stand around what they look at; otherwise they stand before it, or look outwards, or everywhere."""
    turn: float
    """Degrees about the vertical that the viewing directions span: 360 less the widest gap between them."""
    distance: float
    """Of a close camera (the 5th percentile) to the point that is nearest to all optical axes."""
    there: float = 1.0
    """Share of the cameras that have that point before them."""
    panoramas: bool = False
    """Whether pictures see all around, so that no camera looks anywhere."""

    @property
    def described(self) -> str:
        """For the log."""
        if self.panoramas:
            return "in panoramas, which see all around"
        outwards = self.turn > FULL_TURN and self.there < LOOKING_THERE
        kind = "all around the scene" if self.around else "from the middle outwards" if outwards else "from the front"
        return f"{kind} (the cameras turn through {self.turn:.0f}°)"

    def start(self) -> tuple[float, float]:
        """Density at the start per unit of length, and near plane."""
        if not self.around:
            return THIN_DENSITY, NERFACTO_NEAR
        return AROUND_DEPTH / self.distance, AROUND_NEAR * self.distance

    def warnings(self, density: float | None, near: float | None) -> list[str]:
        """What speaks against a start that somebody chose, in sentences; None is what nobody did."""
        found = []
        least, most = THIN * self.start()[0], DENSE * self.start()[0]
        if density is not None and not least <= density <= most:
            fault = "is painted before the lenses" if density > most else "tells no depth where there is little texture"
            found.append(
                f"--pipeline.model.average-init-density {density:.2g} is far from what fits this capture: such fog {fault}. Give "
                f"{least:.2g} to {most:.2g}, or leave it out for {self.start()[0]:.2g}."
            )
        # Of other captures nobody knows whether cameras look at one thing.
        if near is not None and self.around and near > self.distance / 2:
            found.append(
                f"--pipeline.model.near-plane {near:.2g} is more than half of the way from a close camera to what is looked at "
                f"({self.distance:.2g}): nothing before it can be seen. Give less, or leave it out for {self.start()[1]:.2g}."
            )
        return found


def capture_of(poses: Float[Tensor, "N 3 4"], panoramas: bool = False) -> Capture:
    """The capture of cameras with these camera-to-world poses (OpenGL axes); `panoramas` if their pictures see all around."""
    poses = poses.double()
    origins, views = poses[..., 3], -F.normalize(poses[..., 2], dim=-1)
    to_point = nearest_to_axes(origins, views) - origins
    there = float(((to_point * views).sum(-1) > 0).double().mean())
    turn = turn_of(views, F.normalize(poses[..., 1].mean(0), dim=0))
    distance = float(to_point.norm(dim=-1).quantile(0.05))
    around = bool(turn > FULL_TURN and there >= LOOKING_THERE and distance > 0 and not panoramas)
    return Capture(around, turn, distance, there, panoramas)


def diagonal_of(poses: Float[Tensor, "N 3 4"]) -> float:
    """Diagonal of the box around cameras; a little where they stand in one place."""
    origins = poses[..., 3]
    return max(float((origins.amax(0) - origins.amin(0)).norm()), 1e-6)


def nearest_to_axes(origins: Float[Tensor, "N 3"], views: Float[Tensor, "N 3"]) -> Float[Tensor, "3"]:
    """The point with the least sum of squared distances to the lines from `origins` along the unit vectors `views`."""
    across = torch.eye(3).to(views) - views[:, :, None] * views[:, None]
    # The pseudo-inverse: parallel axes are near no point more than to another.
    return torch.linalg.pinv(across.sum(0)) @ (across @ origins[..., None]).sum(0)[:, 0]


def turn_of(views: Float[Tensor, "N 3"], up: Float[Tensor, "3"]) -> float:
    """Degrees about `up` that the directions `views` span. Those within 10° of the vertical have no azimuth and are left out."""
    level = views - (views @ up)[:, None] * up
    level = level[level.norm(dim=-1) > 0.17]
    if len(level) < 2:
        return 0.0
    first = F.normalize(level[0], dim=0)
    azimuths = torch.atan2(level @ torch.linalg.cross(up, first), level @ first).rad2deg().sort().values
    gaps = torch.cat([azimuths, azimuths[:1] + 360]).diff()
    return 360 - float(gaps.max())
