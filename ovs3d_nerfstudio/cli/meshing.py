"""A mesh of what cameras see: their depth fused by open3d into signed distances, of which the zero is the surface."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track
from scipy.spatial import cKDTree

from ovs3d_nerfstudio.cli.boxes import Box
from ovs3d_nerfstudio.cli.depth import DepthView
from ovs3d_nerfstudio.errors import CommandError

CELLS = 400
"""Voxels along the diagonal of the box, by default."""
BLOCK = 8
"""Voxels along a side of a block, which open3d takes up as one."""
REACH = 5.0
"""Voxels before and behind a surface within which distances are kept."""
SEEN_BY = 1.5
"""A surface is one that more views than this bear out; one view alone may have a veil before its lens."""
ON = 2.5
"""Voxels from what a view sees up to which it bears out a vertex."""
CRUMB = 0.005
"""Parts that have a smaller share of the surface than this, and are connected to nothing, are crumbs."""
TOO_NEAR = 0.35
"""What is connected to nothing and nearer to a camera than this share of the median depth stands free before everything."""
TAIL = 0.005
"""Share of what is seen that the box leaves out on each side of each axis."""
ROOM = 0.03
"""By what share of its diagonal the box is larger then."""
MOST_BLOCKS = 400_000
"""More (about 5 GB) are refused."""


@dataclass
class Mesh:
    """Triangles; all in the frame of the views."""

    vertices: Float[np.ndarray, "N 3"]
    faces: Int[np.ndarray, "F 3"]
    colors: Float[np.ndarray, "N 3"]
    """As the views show them, in [0, 1]."""

    def only(self, kept: Bool[np.ndarray, " N"]) -> Mesh:
        """The triangles all of whose corners are kept, and their vertices."""
        faces = self.faces[kept[self.faces].all(-1)]
        used = np.zeros(len(kept), bool)
        used[faces.ravel()] = True
        place = np.cumsum(used) - 1
        return Mesh(self.vertices[used], place[faces], self.colors[used])


def typical_depth(views: Sequence[DepthView]) -> float:
    """The median depth of what the views see. Raises CommandError when that is nothing."""
    seen = np.concatenate([view.depth[::4, ::4][view.depth[::4, ::4] > 0] for view in views])
    if not len(seen):
        raise CommandError("The pixels of this run end nowhere; train it longer before you export it.")
    return float(np.median(seen))


def usual_voxel(views: Sequence[DepthView], box: Box) -> float:
    """A voxel's side for what is in the box: `CELLS` along its diagonal, but no less than a pixel is wide there."""
    low, high = box.bounds()
    return max(float(np.linalg.norm(high - low)) / CELLS, _pixel_width(views))


def _pixel_width(views: Sequence[DepthView]) -> float:
    return typical_depth(views) / float(np.median([view.intrinsics[0, 0] for view in views]))


def seen_box(views: Sequence[DepthView], farthest: float) -> Box:
    """The box around what the views see up to the depth `farthest`, where there is something."""
    points = np.concatenate([_near(view, farthest).points(4) for view in views])
    if not len(points):
        raise CommandError("No surface is that near; give a larger --farthest.")
    low, high = np.quantile(points, [TAIL, 1 - TAIL], axis=0)
    room = max(ROOM * float(np.linalg.norm(high - low)), 1e-9)
    return Box.between(low - room, high + room)


def _near(view: DepthView, farthest: float) -> DepthView:
    return DepthView(np.where(view.depth <= farthest, view.depth, 0), *list(vars(view).values())[1:])


def fused(views: Sequence[DepthView], voxel: float, farthest: float, box: Box) -> Mesh:
    """The surfaces in the box that views have no farther away than `farthest`.

    Every view speaks about all the space before what it sees, so that what floats before one is cut away by the others;
    about what is behind a camera or hidden it says nothing. What is connected to nothing and small, or stands right before
    a camera, is left out.

    Raises CommandError when the voxels are too many, or so small that some lie between the pixels.
    """
    if voxel < _pixel_width(views) / 2:
        raise CommandError(
            f"--voxel {voxel:.2g} is finer than half a pixel; give a larger one, or a lower --downscale."
        )
    distances = Distances(voxel)
    near = [_near(view, farthest) for view in views]
    found = [distances.blocks_of(view) for view in near if view.depth.any()]
    blocks = np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 3), int)
    side, (low, high) = voxel * BLOCK, box.bounds()
    blocks = blocks[((blocks * side + side >= low) & (blocks * side <= high)).all(-1)]
    if len(blocks) > MOST_BLOCKS:
        raise CommandError(f"--voxel {voxel:.2g} makes {len(blocks)} blocks of {BLOCK}³ voxels; give a larger one.")
    if len(blocks):
        distances.integrate(track(views, "Fusing", console=CONSOLE), blocks)
        seen_by = min(SEEN_BY, len(views) - 0.5)
        mesh = distances.mesh(seen_by)
        mesh = mesh.only(box.within(mesh.vertices))
        mesh = mesh.only(_borne_out(mesh.vertices, views, ON * voxel) > seen_by)
        if len(mesh.faces):
            return mesh.only(_stands(mesh, views))
    return Mesh(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3)))


class Distances:
    """open3d's grid of blocks of voxels, each of which keeps its signed distance to the surface."""

    def __init__(self, voxel: float):
        open3d, self.voxel = _open3d(), voxel
        kinds, shapes = (open3d.core.float32,) * 3, (1, 1, 3)
        self.grid = open3d.t.geometry.VoxelBlockGrid(("tsdf", "weight", "color"), kinds, shapes, voxel, BLOCK, 1000)

    def blocks_of(self, view: DepthView) -> Int[np.ndarray, "n 3"]:
        """The blocks about the surfaces of a view."""
        depth, _, intrinsics, pose = _tensors(view)
        far = float(view.depth.max()) + 1
        return self.grid.compute_unique_block_coordinates(depth, intrinsics, pose, 1.0, far, REACH).numpy()

    def integrate(self, views: Iterable[DepthView], blocks: Int[np.ndarray, "n 3"]) -> None:
        """Has all views speak about all voxels of the blocks."""
        places = _blocks(blocks)
        for view in views:
            depth, colors, intrinsics, pose = _tensors(view)
            self.grid.integrate(places, depth, colors, intrinsics, intrinsics, pose, 1.0, float("inf"), REACH)

    def at(self, blocks: Int[np.ndarray, "n 3"]) -> tuple[Int[np.ndarray, "N 3"], Float[np.ndarray, " N"]]:
        """The voxels of the blocks, counted from the origin, and their distances, at most `REACH` voxels.

        It is above 0 before a surface, and below where no view sees.
        """
        buffers, _ = self.grid.hashmap().find(_blocks(blocks))
        places, indices = self.grid.voxel_coordinates_and_flattened_indices(buffers)
        chosen = indices.numpy()
        distance, weight = (self.grid.attribute(name).numpy().ravel()[chosen] for name in ("tsdf", "weight"))
        cells = np.rint(places.numpy() / self.voxel).astype(int)
        return cells, np.where(weight > 0, distance, -1.0) * (REACH * self.voxel)

    def mesh(self, seen_by: float) -> Mesh:
        """The surface that more views than `seen_by` bear out."""
        found = self.grid.extract_triangle_mesh(seen_by)
        vertices, colors = found.vertex.positions.numpy().astype(float), found.vertex.colors.numpy().clip(0, 1)
        return Mesh(vertices, found.triangle.indices.numpy(), colors)


def _open3d() -> Any:
    """open3d, which takes seconds to import, and whose types know nothing of its own overloads."""
    import open3d

    return open3d


def _blocks(blocks: Int[np.ndarray, "n 3"]) -> Any:
    return _open3d().core.Tensor(np.ascontiguousarray(blocks, dtype=np.int32))


def _tensors(view: DepthView) -> tuple[Any, Any, Any, Any]:
    open3d = _open3d()
    images = (np.ascontiguousarray(view.depth, dtype=np.float32), view.colors.astype(np.float32) / 255)
    return (
        *(open3d.t.geometry.Image(open3d.core.Tensor(image)) for image in images),
        open3d.core.Tensor(view.intrinsics),
        open3d.core.Tensor(view.world_to_camera),
    )


def _borne_out(points: Float[np.ndarray, "n 3"], views: Sequence[DepthView], near: float) -> Int[np.ndarray, " n"]:
    """How many views see what is so near to each point: of the skirts that a fusion has behind edges, none does."""
    count = np.zeros(len(points), int)
    for view in views:
        count += np.abs(view.before(points)) < near  # what is not a number is not
    return count


def _stands(mesh: Mesh, views: Sequence[DepthView]) -> Bool[np.ndarray, " N"]:
    """Which vertices are of no crumb and do not hang before a camera."""
    open3d = _open3d()
    as_open3d = open3d.geometry.TriangleMesh(
        open3d.utility.Vector3dVector(mesh.vertices), open3d.utility.Vector3iVector(mesh.faces)
    )
    part, _, areas = (np.asarray(values) for values in as_open3d.cluster_connected_triangles())
    kept = areas >= CRUMB * areas.sum()
    of_vertex = np.zeros(len(mesh.vertices), int)
    of_vertex[mesh.faces.ravel()] = np.repeat(part, 3)
    distance = cKDTree(np.stack([view.place for view in views])).query(mesh.vertices)[0]
    near = TOO_NEAR * typical_depth(views)
    for one in np.flatnonzero(kept):
        kept[one] = one == areas.argmax() or np.median(distance[of_vertex == one]) >= near
    left_out = ~kept
    if left_out.any():
        share = areas[left_out].sum() / areas.sum()
        CONSOLE.print(f"{left_out.sum()} parts that hang free are left out, {share:.1%} of the surface.")
    return kept[of_vertex]
