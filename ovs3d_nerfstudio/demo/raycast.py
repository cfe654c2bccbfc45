"""A small ray caster for scenes of a few analytic solids covered with photographs.

World: right-handed, z up, one unit is about a metre. Cameras are OpenGL's: x right, y up, looking along −z. Surfaces are
diffuse, so that a point has one colour from everywhere, and textures are averaged over the footprint of a ray (mipmaps) so
that views of different resolution agree. Everything is exact but the colour: depths and labels hold at pixel centres.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from numpy import ndarray

Floats = Float32[ndarray, " N"]
Vectors = Float32[ndarray, "3 N"]
"""Component by component: numpy reduces a short *last* axis ten times more slowly than a short first one."""

SUN = np.array([[-0.36], [-0.6], [0.7143]], np.float32)
"""Unit vector towards the light."""
AMBIENT = 0.62
"""Brightness of a surface turned away from the light; one that faces it has brightness 1."""
GRAZE = 1e-3
"""How far from a surface its shadow ray starts, so that it does not hit the surface itself."""


class Texture:
    """A picture that repeats over the plane, with its mipmaps."""

    def __init__(self, picture: UInt8[ndarray, "h w 3"]):
        self.levels = [picture.astype(np.float32)]
        while min(self.levels[-1].shape[:2]) >= 4:
            # An odd last row or column is dropped: the picture moves by less than a texel of the level.
            height, width = (size // 2 * 2 for size in self.levels[-1].shape[:2])
            finer = self.levels[-1][:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
            self.levels.append(np.ascontiguousarray(finer.mean((1, 3))))

    def sample(self, u: Floats, v: Floats, footprint: Floats) -> Float32[ndarray, "N 3"]:
        """Colours (0–255) at places in pictures, v upwards; `footprint` is a ray's width in picture heights."""
        level = np.log2((footprint * len(self.levels[0])).clip(1, 2.0 ** (len(self.levels) - 1)))
        finer = level.astype(np.intp)
        colours = np.empty((len(u), 3), np.float32)
        for k in range(len(self.levels)):
            chosen = np.flatnonzero(finer == k)
            blend = (level[chosen] - k)[:, None]
            fine, coarse = (
                _bilinear(self.levels[min(j, len(self.levels) - 1)], u[chosen], v[chosen]) for j in (k, k + 1)
            )
            colours[chosen] = fine + blend * (coarse - fine)
        return colours


def _bilinear(picture: Float32[ndarray, "h w 3"], u: Floats, v: Floats) -> Float32[ndarray, "N 3"]:
    height, width = picture.shape[:2]
    x, y = u * width - 0.5, -v * height - 0.5
    left, top = np.floor(x), np.floor(y)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    left, top = left.astype(np.intp) % width, top.astype(np.intp) % height * width
    right, bottom = (left + 1) % width, (top + width) % (height * width)
    texels = picture.reshape(-1, 3)
    above = texels[top + left] + fx * (texels[top + right] - texels[top + left])
    below = texels[bottom + left] + fx * (texels[bottom + right] - texels[bottom + left])
    return above + fy * (below - above)


@dataclass
class Solid(ABC):
    """Something that rays hit. Subclasses are placed by their own fields."""

    name: str
    """The class that it belongs to."""
    texture: Texture
    tile: tuple[float, float]
    """Width and height in world units of one repetition of the texture."""

    @abstractmethod
    def distance(self, origins: Vectors, directions: Vectors) -> Floats:
        """Where rays first meet the solid, in lengths of `directions`; inf where they miss."""

    @abstractmethod
    def surface(self, points: Vectors) -> tuple[Vectors, Floats, Floats]:
        """Unit normals of surface points, and their places to the right and upwards on the unrolled surface."""

    @abstractmethod
    def bounds(self) -> Float[ndarray, "2 3"]:
        """Smallest and largest corner of the axis-aligned box around the solid."""


@dataclass
class Box(Solid):
    """A box standing on the floor, turned about the vertical."""

    centre: tuple[float, float]
    size: tuple[float, float, float]
    """Width, depth, height before it is turned."""
    turn: float = 0.0
    """Degrees, counter-clockwise seen from above."""

    def __post_init__(self):
        c, s = np.cos(np.radians(self.turn)), np.sin(np.radians(self.turn))
        self._axes = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32)
        self._half = np.array(self.size, np.float32)[:, None] / 2
        self._middle = np.array([*self.centre, self.size[2] / 2], np.float32)[:, None]

    def distance(self, origins, directions):
        start, along = self._axes @ (origins - self._middle), self._axes @ directions
        with np.errstate(divide="ignore", invalid="ignore"):
            one, other = (-self._half - start) / along, (self._half - start) / along
        enter, leave = np.fmin(one, other).max(0), np.fmax(one, other).min(0)
        return np.where((enter <= leave) & (enter > 0), enter, np.inf)

    def surface(self, points):
        local = self._axes @ (points - self._middle)
        axis = (np.abs(local) / self._half).argmax(0)
        sign = np.sign(np.take_along_axis(local, axis[None], 0)[0])
        x, y, z = local + self._half
        # As seen from outside: the front (−y) reads along +x, the right side (+x) along +y, and so on round the box.
        across = np.choose(axis, [sign * y, -sign * x, x])
        return self._axes.T[:, axis] * sign, across, np.where(axis == 2, y, z)

    def bounds(self):
        reach = np.abs(self._axes.T) @ self._half
        return np.stack([self._middle - reach, self._middle + reach])[..., 0].astype(float)


@dataclass
class Cylinder(Solid):
    """An upright cylinder on the floor."""

    centre: tuple[float, float]
    radius: float
    height: float
    hollow: bool = False
    """Seen from inside only, without a lid: a round wall about the scene."""

    def distance(self, origins, directions):
        x, y = origins[0] - self.centre[0], origins[1] - self.centre[1]
        dx, dy, dz = directions
        a, b, c = dx**2 + dy**2, x * dx + y * dy, x**2 + y**2 - self.radius**2
        with np.errstate(divide="ignore", invalid="ignore"):
            side = (-b + (1 if self.hollow else -1) * np.sqrt(b**2 - a * c)) / a
            z = origins[2] + side * dz
            side = np.where((side > 0) & (z >= 0) & (z <= self.height), side, np.inf)
            if self.hollow:
                return side
            lid = (self.height - origins[2]) / dz
            within = (x + lid * dx) ** 2 + (y + lid * dy) ** 2 <= self.radius**2
        return np.where((lid > 0) & within, np.minimum(side, lid), side)

    def surface(self, points):
        facing = -1 if self.hollow else 1
        x, y, z = points[0] - self.centre[0], points[1] - self.centre[1], points[2]
        reach = np.hypot(x, y)
        lid = (self.height - z < self.radius - reach) & (not self.hollow)
        outwards = np.stack([x / reach, y / reach, np.zeros_like(x)]) * facing
        normals = np.where(lid, np.array([[0], [0], [1]], np.float32), outwards)
        around = np.arctan2(x, -y) * self.radius * facing  # 0 at the front (−y), growing to the right
        return normals, np.where(lid, x + self.radius, around), np.where(lid, y + self.radius, z)

    def bounds(self):
        (x, y), r = self.centre, self.radius
        return np.array([[x - r, y - r, 0], [x + r, y + r, self.height]])


@dataclass
class Floor(Solid):
    """The plane z = 0."""

    def distance(self, origins, directions):
        with np.errstate(divide="ignore", invalid="ignore"):
            t = -origins[2] / directions[2]
        return np.where(t > 0, t, np.inf)

    def surface(self, points):
        return np.array([[0], [0], [1]], np.float32) + 0 * points, points[0], points[1]

    def bounds(self):
        return np.array([[-np.inf, -np.inf, 0], [np.inf, np.inf, 0]])


@dataclass
class Camera:
    """A pinhole camera whose principal point is the middle of the picture."""

    pose: Float[ndarray, "4 4"]
    """Camera to world, OpenGL axes."""
    width: int
    height: int
    focal: float
    """Focal length in pixels."""

    @staticmethod
    def looking_at(eye: Sequence[float], target: Sequence[float], width: int, height: int, focal: float) -> Camera:
        """A level camera (its x axis is horizontal) at `eye` that has `target` in the middle of its picture."""
        back = np.subtract(eye, target) / np.linalg.norm(np.subtract(eye, target))
        right = np.cross([0.0, 0.0, 1.0], back)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(back, right), back, np.asarray(eye, float)], -1)
        return Camera(pose, width, height, focal)

    def rays(self, samples: int) -> tuple[Vectors, Vectors]:
        """Origins and directions (one unit of depth long) of `samples` × `samples` rays a pixel, row by row."""
        y, x = np.mgrid[: self.height * samples, : self.width * samples].reshape(2, -1) + 0.5
        x, y = x / samples - self.width / 2, self.height / 2 - y / samples
        local = np.stack([x / self.focal, y / self.focal, np.full_like(x, -1)])
        return self.pose[:3, 3:].astype(np.float32), (self.pose[:3, :3] @ local).astype(np.float32)

    def project(self, points: Float[ndarray, "N 3"]) -> tuple[Float[ndarray, "N 2"], Float[ndarray, " N"]]:
        """Picture x and y in pixels, and depth, of world points."""
        x, y, z = self.pose[:3, :3].T @ (points.T - self.pose[:3, 3:])
        return np.stack([self.width / 2 - self.focal * x / z, self.height / 2 + self.focal * y / z], -1), -z


def _first_hits(solids: Sequence[Solid], origins: Vectors, directions: Vectors) -> tuple[Int[ndarray, " N"], Floats]:
    index, nearest = np.full(directions.shape[1], -1), np.full(directions.shape[1], np.inf, np.float32)
    for i, solid in enumerate(solids):
        distance = solid.distance(origins, directions)
        nearer = distance < nearest
        index[nearer], nearest[nearer] = i, distance[nearer]
    return index, nearest


def cast(solids: Sequence[Solid], camera: Camera) -> tuple[Int[ndarray, "H W"], Float32[ndarray, "H W"]]:
    """Index of the solid and depth (along the viewing axis) at each pixel's centre; −1 and inf where there is none."""
    index, depth = _first_hits(solids, *camera.rays(1))
    return index.reshape(camera.height, camera.width), depth.reshape(camera.height, camera.width)


def render(solids: Sequence[Solid], camera: Camera, samples: int = 2) -> UInt8[ndarray, "H W 3"]:
    """The camera's picture, the mean of `samples` × `samples` rays a pixel; black where there is nothing."""
    origins, directions = camera.rays(samples)
    index, depth = _first_hits(solids, origins, directions)
    lengths = np.sqrt((directions**2).sum(0))
    colours = np.zeros((len(index), 3), np.float32)
    for i, solid in enumerate(solids):
        hit = np.flatnonzero(index == i)
        points = origins + depth[hit] * directions[:, hit]
        normals, u, v = solid.surface(points)
        # The footprint is an ellipse, longer by 1 / slant; a circle of its area is a compromise of blur and aliasing.
        slant = (-(normals * directions[:, hit]).sum(0) / lengths[hit]).clip(0.05)
        footprint = depth[hit] * lengths[hit] / (camera.focal * samples * np.sqrt(slant))
        colour = solid.texture.sample(u / solid.tile[0], v / solid.tile[1], footprint / solid.tile[1])
        colours[hit] = colour * _brightness(solids, points, normals)[:, None]
    pixels = colours.reshape(camera.height, samples, camera.width, samples, 3).mean((1, 3))
    return pixels.round().clip(0, 255).astype(np.uint8)


def _brightness(solids: Sequence[Solid], points: Vectors, normals: Vectors) -> Floats:
    """Share of a surface's colour that is seen: Lambert's law, with shadows."""
    casters = [solid for solid in solids if not (isinstance(solid, Cylinder) and solid.hollow)]
    _, blocked = _first_hits(casters, points + GRAZE * normals, np.broadcast_to(SUN, points.shape))
    return AMBIENT + (1 - AMBIENT) * (normals * SUN).sum(0).clip(0) * np.isinf(blocked)
