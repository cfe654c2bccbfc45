"""Geometry with labels: a point cloud with its objects, a mesh with its objects, or the Gaussians of a splatfacto run. A class id
is a prompt's place in the list, from 1; 0 is none, as in label images; classes.json says what an id means."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import numpy as np
import tyro

from ovs3d_nerfstudio.cli.boxes import BoxOptions
from ovs3d_nerfstudio.cli.common import ShownOptions, ask
from ovs3d_nerfstudio.engine.option_checks import COUNT, POSITIVE, SHARE, SIZE, check_fields
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.files import mask_stem, write_json
from ovs3d_nerfstudio.objects import OBJECT_GAP, SMALLEST_OBJECT
from ovs3d_nerfstudio.ply import vertex_table, with_labels, write_ply

if TYPE_CHECKING:
    import trimesh
    from rich.table import Table

    from ovs3d_nerfstudio.cli.depth import DepthView
    from ovs3d_nerfstudio.cli.meshing import Mesh
    from ovs3d_nerfstudio.data.frames import Frame
    from ovs3d_nerfstudio.run import Run

# What reads a run is imported where it is used, as in every subcommand: `--help` needs none of it.


@dataclass
class _Export(ShownOptions):
    """What all exports ask."""

    load_config: Path
    """The run's config.yml, or the folder it lies in."""
    output_dir: Path = Path("exports")
    """Folder for what is written."""
    prompts: str = ""
    """Prompts to ask for, separated by semicolons; default: those of the training."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, in place of `prompts`."""
    data: Path | None = None
    """Where the scene is now, if it moved since the training."""

    def opened(self) -> Run:
        """The run, answering for the prompts; classes.json and legend.png are written."""
        from ovs3d_nerfstudio.cli.labels import ids
        from ovs3d_nerfstudio.prompts.palette import save_legend
        from ovs3d_nerfstudio.run import load_run

        run = load_run(self.load_config, data=self.data)
        prompts = ask(run, self.prompts, self.prompts_file)
        self.stays = self.flags(prompts)
        write_json(self.output_dir / "classes.json", ids(prompts, run.colors))
        save_legend(self.output_dir / "legend.png", prompts, run.colors)
        return run

    def path_of(self, class_id: int, prompt: str, kind: str = "") -> Path:
        """The file of one class: its number keeps names apart that a file system would not."""
        return self.output_dir / f"{class_id:03d}-{mask_stem(prompt)}{kind}.ply"

    def files_of_classes(self, *kinds: str) -> set[str]:
        """The names of the files of the classes that classes.json lists; none where there is no such list."""
        try:
            entries = json.loads((self.output_dir / "classes.json").read_text(encoding="utf-8"))
            listed = [(int(key), entry["prompt"], kind) for key, entry in entries.items() for kind in kinds]
            return {self.path_of(*each).name for each in listed}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return set()

    def said(self, path: Path, what: str) -> None:
        from nerfstudio.utils.rich_utils import CONSOLE
        from rich.markup import escape

        CONSOLE.print(f"{what}: {escape(str(path))}")


@dataclass
class ExportPointCloud(BoxOptions, _Export):
    """Export a point cloud with class id, probability and colour a point (point_cloud.ply), and the connected objects of each
    class with box and centroid (objects.json)."""

    num_points: int = 1_000_000
    """Points to sample; outliers are taken out afterwards."""
    color: Literal["class", "photo"] = "class"
    """What a point is painted with."""
    frame: Literal["data", "model"] = "data"
    """data: coordinates of the data, those of the poses in its file (and of sparse_pc.ply); model: the scaled and turned ones
    that nerfstudio trains in."""
    file_a_class: bool = False
    """Write the points of each class as a file of their own too."""
    object_gap: float = OBJECT_GAP
    """Points of a class farther apart than this belong to different objects; a share of the diagonal of the
    box around the cameras."""
    smallest_object: float = SMALLEST_OBJECT
    """Smallest share of a class's points that counts as an object."""
    num_rays_per_batch: int = 8192
    """Rays rendered at once."""
    farthest: float = 10.0
    """Points seen from farther than this many diagonals of the box around the cameras are left out, for what has no texture
    may lie anywhere behind. 0 keeps all."""
    std_ratio: float = 10.0
    """Points are outliers from so many standard deviations of their distance to their neighbours on; 0 keeps all."""

    def main(self) -> None:
        """Raises CommandError, OptionError and the errors of prompts and encoders."""
        positive = {"num_points": SIZE, "num_rays_per_batch": SIZE, "object_gap": POSITIVE}
        check_fields("--", self, {**positive, "smallest_object": SHARE, "farthest": COUNT, "std_ratio": COUNT})
        box = self.box(self.output_dir)
        earlier = self.files_of_classes("")
        from nerfstudio.utils.rich_utils import CONSOLE

        from ovs3d_nerfstudio.catalogue import listed, remove_left, write_objects
        from ovs3d_nerfstudio.objects.points import find_objects
        from ovs3d_nerfstudio.objects.samples import sample_cloud
        from ovs3d_nerfstudio.prompts.palette import colorize

        run = self.opened()
        within = box.in_model(run.frame).within if box else None
        samples = sample_cloud(run.pipeline, self.num_points, self.num_rays_per_batch, self.std_ratio, within)
        cloud, diagonal = samples.labelled(run.question()), run.camera_diagonal
        cloud = cloud[self.stays[cloud.class_id - 1]]
        if not len(cloud.positions):
            raise CommandError("No point belongs to what --only and --without leave; show more, or sample more points.")
        if self.farthest > 0:
            near = cloud.distance <= self.farthest * diagonal
            CONSOLE.print(
                f"{near.mean():.0%} of the points lie within {self.farthest * diagonal:.3g} of their cameras."
            )
            if not near.any():
                raise CommandError(f"--farthest {self.farthest} leaves no point; raise it, or give 0 to keep all.")
            cloud = cloud[near]
        if self.frame == "data":
            cloud.positions, diagonal = run.frame.to_data(cloud.positions), diagonal / abs(run.frame.scale)
        found = find_objects(cloud, self.object_gap * diagonal, self.smallest_object, run.prompts)
        colors = colorize(cloud.class_id - 1, run.colors) if self.color == "class" else cloud.colors
        table = vertex_table(cloud.positions, colors, cloud.class_id, cloud.probability)
        write_ply(self.output_dir / "point_cloud.ply", table)
        if self.file_a_class:
            files = {i: self.path_of(i, run.prompts[i - 1]) for i in np.unique(cloud.class_id).tolist()}
            for class_id, path in files.items():
                write_ply(path, table[cloud.class_id == class_id])
            remove_left(self.output_dir, earlier, [path.name for path in files.values()])
        self.said(self.output_dir / "point_cloud.ply", f"{len(table)} points")
        if self.object is None:  # else it may be the very list that the object is taken from
            path = write_objects(self.output_dir, found, listed(found), self.frame, "points")
            self.said(path, f"{len(found.objects)} objects")


@dataclass
class ExportMesh(BoxOptions, _Export):
    """Make a mesh of what the training cameras see, with class id, probability and colour a vertex (mesh.ply), and a watertight
    one of each object (mesh_objects.json lists them); or label a mesh that there is."""

    mesh: Path | None = None
    """Label this mesh instead, in any form that open3d reads and in the model's frame, as ns-export leaves it."""
    frame: Literal["data", "model"] = "data"
    """Coordinates of the result, as in `pointcloud`."""
    color: Literal["class", "photo"] = "class"
    """What a vertex is painted with; a mesh that there is has classes only."""
    voxel: float | None = None
    """Size of the finest detail, in units of `frame`; default: 1/400 of the box's diagonal, but no less than a pixel's width."""
    downscale: float | None = None
    """How many times smaller than the photos depth is rendered; default: so that the longer side has at most 240 pixels, or 640
    of Gaussians."""
    farthest: float = 3.0
    """Without a box, what is seen from farther than so many times the median depth is left out. 0 keeps all."""
    object_meshes: bool = True
    """Write a watertight mesh of each object too. Where no camera looked, its back or its foot, it is closed flat."""
    object_gap: float = OBJECT_GAP
    """Parts of a class farther apart than this are different objects, as in `pointcloud`."""
    smallest_object: float = SMALLEST_OBJECT
    """Smallest share of a class's vertices that counts as an object."""

    def main(self) -> None:
        """Raises CommandError, OptionError and the errors of prompts and encoders."""
        ranges = {"voxel": POSITIVE, "downscale": SIZE, "farthest": COUNT, "object_gap": POSITIVE}
        check_fields("--", self, {**ranges, "smallest_object": SHARE})
        from nerfstudio.utils.rich_utils import CONSOLE
        from rich.progress import track

        from ovs3d_nerfstudio.catalogue import remove_left
        from ovs3d_nerfstudio.cli.depth import depth_views
        from ovs3d_nerfstudio.cli.meshing import fused, seen_box, typical_depth, usual_voxel
        from ovs3d_nerfstudio.cli.solids import body, surfaces
        from ovs3d_nerfstudio.prompts.palette import colorize

        given = None if self.mesh is None else self._given(self.mesh)
        box = self.box(self.output_dir)
        earlier = self._files_listed()
        run = self.opened()
        scale = abs(run.frame.scale) if self.frame == "data" else 1.0
        box = box and box.in_model(run.frame)
        views: list[DepthView] = []
        if given is None:
            views = depth_views(run.pipeline, self.downscale)
            farthest = self.farthest * typical_depth(views) if box is None and self.farthest else math.inf
            region = box or seen_box(views, farthest)
            voxel = self.voxel * scale if self.voxel else usual_voxel(views, region)
            CONSOLE.print(f"Voxels of {voxel / scale:.3g} (--voxel).")
            found = fused(views, voxel, farthest, region)
        else:
            found = given if box is None else given.only(box.within(given.vertices))
        if not len(found.faces):
            if box is not None:
                raise CommandError(f"There is no surface in {self.named_box()}; choose another one.")
            raise CommandError("Two views of this run agree on no surface; train it longer before you export it.")
        labels, probability = run.winners_at(found.vertices, frame="model")
        if not self.stays.all():
            found = found.only(self.stays[labels])
            labels, probability = run.winners_at(found.vertices, frame="model")
        if given is not None or self.color == "class":
            found.colors = colorize(labels, run.colors)
        self._write(self.output_dir / "mesh.ply", found, labels, probability, run.frame)
        self.said(self.output_dir / "mesh.ply", f"{len(found.vertices)} vertices, {len(found.faces)} triangles")
        if given is not None or not self.object_meshes:
            return
        gap = max(self.object_gap * run.camera_diagonal, 2 * voxel)
        parts = surfaces(found, labels, gap, self.smallest_object)
        listed: list[dict[str, Any]] = []
        for label, chosen in track(parts, "Closing objects", console=CONSOLE):
            closed, nearest = body(found, chosen, views, voxel)
            if closed is None:
                continue
            prompt, class_id = run.prompts[label], label + 1
            number = sum(entry["class_id"] == class_id for entry in listed) + 1
            path = self.path_of(class_id, prompt, f"-mesh-{number}")
            shape = self._write(path, closed, labels[nearest], probability[nearest], run.frame)
            said = {"id": len(listed) + 1, "prompt": prompt, "class_id": class_id, "file": path.name}
            listed.append(said | _measured(shape) | {"probability": float(probability[chosen].mean())})
        write_json(self.output_dir / "mesh_objects.json", {"frame": self.frame, "objects": listed})
        remove_left(self.output_dir, earlier, self._files_listed())
        CONSOLE.print(_table(listed))
        self.said(self.output_dir / "mesh_objects.json", f"{len(listed)} objects")

    def _write(
        self, path: Path, mesh: Mesh, labels: np.ndarray, probability: np.ndarray, frame: Frame
    ) -> trimesh.Trimesh:
        """Writes a mesh with the labels of its vertices in the frame asked for; returns it so."""
        import trimesh

        positions, faces = mesh.vertices, mesh.faces
        if self.frame == "data":
            positions = frame.to_data(positions)
            if np.linalg.det(frame.transform[:, :3]) < 0:
                faces = faces[:, ::-1]  # a reflection turns triangles inside out
        write_ply(path, vertex_table(positions, mesh.colors, labels + 1, probability), faces)
        return trimesh.Trimesh(positions, faces, process=False)

    def _files_listed(self) -> set[str]:
        """The meshes of objects that mesh_objects.json lists."""
        from ovs3d_nerfstudio.catalogue import files_listed

        return files_listed(self.output_dir / "mesh_objects.json", ("file",), r"\d{3,}-[^/\\]+-mesh-\d+\.ply")

    @staticmethod
    def _given(path: Path) -> Mesh:
        """A mesh that there is. Raises CommandError."""
        import open3d

        from ovs3d_nerfstudio.cli.meshing import Mesh

        if not path.is_file():
            raise CommandError(f"{path} does not exist; name a mesh of this run, or leave --mesh out to have one made.")
        mesh = open3d.io.read_triangle_mesh(path)
        positions, faces = np.asarray(mesh.vertices), np.asarray(mesh.triangles)
        if not len(faces):
            raise CommandError(f"{path} cannot be read as a mesh with triangles; export it again.")
        return Mesh(positions, faces, np.zeros_like(positions))


def _measured(shape: trimesh.Trimesh) -> dict[str, Any]:
    """What mesh_objects.json says of a mesh's shape."""
    low, high = shape.bounds
    return {
        "vertices": len(shape.vertices),
        "triangles": len(shape.faces),
        "watertight": bool(shape.is_watertight),
        "volume": float(shape.volume),
        "centroid": shape.vertices.mean(0).tolist(),
        "box": {"min": low.tolist(), "max": high.tolist()},
    }


def _table(listed: list[dict[str, Any]]) -> Table:
    """The objects as a table on the screen."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("id", "object", "triangles", "watertight", "volume", "file")
    for entry in listed:
        closed = "yes" if entry["watertight"] else "no"
        cells = (entry["id"], entry["prompt"], entry["triangles"], closed, f"{entry['volume']:.3g}", entry["file"])
        table.add_row(*(escape(str(cell)) for cell in cells))
    return table


@dataclass
class ExportSplat(_Export):
    """Label Gaussians: those of the run itself, where it is one of Gaussians, in the data's frame; or those of a PLY, by the run's
    semantic field at their centres. A PLY's coordinates stay as they are, for shapes and colours of Gaussians turn with them; they
    are taken to be those that nerfstudio trains in, as ns-export gaussian-splat writes them. Leaves splat.ply (all columns, class_id
    and probability) and, for each class, the object alone and the scene without it."""

    splat: Path | None = None
    """The PLY of a splat; default: the Gaussians of the run."""
    splat_config: Path | None = None
    """The config.yml of the run that the PLY was made of, or the folder it lies in, where its frame is not this run's: another
    dataparser, or other options of it."""
    least_probability: float = 0.0
    """Gaussians whose class is less probable than this become 0, none."""

    def main(self) -> None:
        """Raises CommandError, SplatError, OptionError and the errors of prompts and encoders."""
        check_fields("--", self, {"least_probability": SHARE})
        if self.splat_config is not None and self.splat is None:
            raise CommandError(
                f"--splat-config {self.splat_config} is the run of a PLY, and none is given; name it with --splat, or leave "
                "--splat-config out."
            )
        from nerfstudio.utils.rich_utils import CONSOLE
        from rich.markup import escape

        from ovs3d_nerfstudio.catalogue import remove_left
        from ovs3d_nerfstudio.data.frames import Frame
        from ovs3d_nerfstudio.data.ways import back, way_of
        from ovs3d_nerfstudio.gaussians.splat_files import read_splat, splat_table
        from ovs3d_nerfstudio.models.splat import OVS3DSplatModel

        given = read_splat(self.splat) if self.splat is not None else None
        theirs = None
        if self.splat_config is not None:
            made_of = self.splat_config if self.splat_config.is_dir() else self.splat_config.parent
            theirs = Frame.of_run_outputs(made_of)
        earlier = self.files_of_classes("", "-removed")
        run = self.opened()
        model = run.pipeline.model
        if given is not None:
            table, positions = given[0], given[1].means.numpy().astype(np.float64)
            if theirs is not None:
                ours = Frame.of_outputs(run.pipeline.datamanager.train_dataparser_outputs)
                positions = ours.to_model(theirs.to_data(positions))
            labels, probability = run.winners_at(positions, frame="model")
            class_id = labels + 1
        elif isinstance(model, OVS3DSplatModel):
            table = splat_table(model.splat.to("cpu").moved(back(way_of(run.frame))))
            labelled = run.samples().labelled(run.question())
            class_id, probability = labelled.class_id, labelled.probability
        else:
            raise CommandError(
                f"{self.load_config} is a NeRF, which has no Gaussians; name the PLY of a splat with --splat."
            )
        class_id = np.where(probability >= self.least_probability, class_id, 0)
        stays = self.stays[class_id - 1]
        table, class_id, probability = table[stays], class_id[stays], probability[stays]
        write_ply(self.output_dir / "splat.ply", with_labels(table, class_id, probability))
        self.said(self.output_dir / "splat.ply", f"{len(table)} Gaussians")
        for label, prompt in enumerate(run.prompts, start=1):
            chosen = class_id == label
            write_ply(self.path_of(label, prompt), table[chosen])
            write_ply(self.path_of(label, prompt, "-removed"), table[~chosen])
            CONSOLE.print(escape(f"{prompt}: {chosen.sum()} Gaussians"))
        remove_left(self.output_dir, earlier, self.files_of_classes("", "-removed"))


Command = Union[  # noqa: UP007 (tyro wants names for the parts)
    Annotated[ExportPointCloud, tyro.conf.subcommand(name="pointcloud")],
    Annotated[ExportMesh, tyro.conf.subcommand(name="mesh")],
    Annotated[ExportSplat, tyro.conf.subcommand(name="splat")],
]
