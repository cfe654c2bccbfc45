"""Objects of a mesh as bodies: what cameras saw of one, closed where none looked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import distance_transform_edt, label
from scipy.spatial import ConvexHull, cKDTree

from ovs3d_nerfstudio.cli.depth import DepthView
from ovs3d_nerfstudio.cli.meshing import BLOCK, Distances, Mesh
from ovs3d_nerfstudio.objects.points import connected

MOST_CELLS = 1_500_000
"""Voxels of a body's box; where there would be more, they are larger."""
LEAST_VERTICES = 20
"""Fewer are no object, whatever their share."""
HULL = 64
"""Points are gathered to so many steps along the diagonal before their hull is taken: fewer facets, hardly another hull."""


def surfaces(
    mesh: Mesh, labels: Int[np.ndarray, " N"], gap: float, least: float
) -> list[tuple[int, Int[np.ndarray, " n"]]]:
    """The connected parts of each class: its label, and the vertices of the part; see `points.objects`."""
    found = []
    for class_label in np.unique(labels).tolist():
        chosen = np.flatnonzero(labels == class_label)
        part = connected(mesh.vertices[chosen], gap)
        for one in range(part.max() + 1):
            vertices = chosen[part == one]
            if len(vertices) < max(least * len(chosen), LEAST_VERTICES):
                break
            found.append((class_label, vertices))
    return found


def body(
    mesh: Mesh, chosen: Int[np.ndarray, " n"], views: Sequence[DepthView], voxel: float
) -> tuple[Mesh | None, Int[np.ndarray, " V"]]:
    """A watertight body of a part of a mesh, and the vertex of the mesh that is nearest to each of its own.

    It is what lies within the convex hull of the part's vertices, where no camera sees through, and nearer to them than to
    other vertices. So its seen sides are as the cameras see them, and its back and its foot are flat. None where no cell is
    inside.

    Args:
        chosen: the part's vertices.
        voxel: side of a cell.
    """
    own = mesh.vertices[chosen]
    closed = _closed(own, np.delete(mesh.vertices, chosen, axis=0), views, voxel)
    if closed is None:
        return None, chosen[:0]
    vertices, faces = closed
    nearest = chosen[cKDTree(own).query(vertices)[1]]
    return Mesh(vertices, faces, mesh.colors[nearest]), nearest


def _closed(
    own: Float[np.ndarray, "n 3"], other: Float[np.ndarray, "m 3"], views: Sequence[DepthView], voxel: float
) -> tuple[Float[np.ndarray, "N 3"], Int[np.ndarray, "F 3"]] | None:
    """Vertices and triangles of the body of the points `own`, with the points `other` around it."""
    low, high = own.min(0), own.max(0)
    voxel = max(voxel, float(np.prod(high - low + 4 * voxel) / MOST_CELLS) ** (1 / 3))
    planes = _hull(own, max(float(np.linalg.norm(high - low)) / HULL, 1e-12))
    side = voxel * BLOCK
    first, last = np.floor(low / side).astype(int) - 1, np.floor(high / side).astype(int) + 1
    blocks = np.stack(np.meshgrid(*map(np.arange, first, last + 1), indexing="ij"), -1).reshape(-1, 3)
    blocks = blocks[_outside((blocks + 0.5) * side, planes) < side]  # others are outside of it all over
    distances = Distances(voxel)
    distances.integrate(views, blocks)
    cells, free = distances.at(blocks)
    solid = np.flatnonzero(free < 2 * voxel)
    # A voxel of room, so that what is flat is a slab.
    field = np.maximum(free[solid], _outside(cells[solid] * voxel, planes) - voxel)
    solid, field = solid[field < 2 * voxel], field[field < 2 * voxel]
    if not len(solid):
        return None
    first = cells[solid].min(0) - 1
    shape = tuple(cells[solid].max(0) - first + 2)
    place = tuple((cells[solid] - first).T)
    volume = np.full(shape, 2 * voxel, np.float32)
    theirs = _steps_to(other / voxel - first, shape)
    nearer = (_steps_to(own / voxel - first, shape)[place] - theirs[place]) * voxel / 2
    volume[place] = np.maximum(field, nearer)
    vertices, faces = _surface(volume, 1e-3 * voxel)
    return ((vertices + first) * voxel, faces) if len(faces) else None


def _steps_to(points: Float[np.ndarray, "n 3"], shape: tuple[int, ...]) -> Float[np.ndarray, "x y z"]:
    """How many cells each cell of a volume is away from the nearest that holds a point; many where none does."""
    cells = np.rint(points).astype(int)
    cells = cells[((cells >= 0) & (cells < shape)).all(-1)]
    if not len(cells):
        return np.full(shape, float(sum(shape)), np.float32)
    empty = np.ones(shape, bool)
    empty[tuple(cells.T)] = False
    return distance_transform_edt(empty).astype(np.float32)


def _hull(points: Float[np.ndarray, "n 3"], step: float) -> Float[np.ndarray, "p 4"]:
    """The planes of a convex hull, their normals outwards; points that lie in a plane are shaken."""
    _, chosen = np.unique(np.floor(points / step).astype(np.int64), axis=0, return_index=True)
    return ConvexHull(points[chosen], qhull_options="QJ").equations


def _outside(points: Float[np.ndarray, "n 3"], planes: Float[np.ndarray, "p 4"]) -> Float[np.ndarray, " n"]:
    """How far outside of a hull points lie; below 0 inside."""
    farthest = np.full(len(points), -np.inf)
    for plane in planes:
        np.maximum(farthest, points @ plane[:3] + plane[3], out=farthest)
    return farthest


def _surface(
    volume: Float[np.ndarray, "x y z"], least: float
) -> tuple[Float[np.ndarray, "N 3"], Int[np.ndarray, "F 3"]]:
    """The surface around the largest connected part of what is below 0, in cells; values nearer to 0 than `least` are not
    told from it, for they would make triangles without area."""
    from skimage.measure import marching_cubes  # here: it takes a while

    parts, count = label(volume < -least)
    if not count:
        return np.zeros((0, 3)), np.zeros((0, 3), int)
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    vertices, faces, _, _ = marching_cubes(np.where(largest, volume, np.maximum(volume, least)), 0.0)
    return vertices, faces
