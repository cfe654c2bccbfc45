"""Geometry with labels: a point cloud with its objects, a mesh of ns-export, or the Gaussians of a splatfacto run. A class id
is a prompt's place in the list, from 1; 0 is none, as in label images; classes.json says what an id means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Union

import numpy as np
import tyro
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from ovs3d_nerfstudio.cli.cloud import sample_cloud
from ovs3d_nerfstudio.cli.common import ShownOptions, ask, open_run
from ovs3d_nerfstudio.cli.labels import ids
from ovs3d_nerfstudio.cli.ply import positions_of, read_vertices, vertex_table, with_labels, write_ply
from ovs3d_nerfstudio.cli.points import label_positions, objects
from ovs3d_nerfstudio.data.frames import Frame, frame_of
from ovs3d_nerfstudio.engine.option_checks import COUNT, POSITIVE, SHARE, SIZE, check_fields
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.files import mask_stem, write_json
from ovs3d_nerfstudio.pipeline import OVS3DPipeline
from ovs3d_nerfstudio.prompts.palette import colorize, save_legend


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

    def opened(self) -> OVS3DPipeline:
        """The run, answering for the prompts; classes.json and legend.png are written."""
        _, pipeline, _, _ = open_run(self.load_config, data=self.data)
        ask(pipeline, self.prompts, self.prompts_file)
        segmenter = pipeline.model.segmenter
        self.stays = self.flags(segmenter.prompts)
        write_json(self.output_dir / "classes.json", ids(segmenter.prompts, segmenter.colors.cpu().numpy()))
        save_legend(self.output_dir / "legend.png", segmenter.prompts, segmenter.colors.cpu())
        return pipeline

    def path_of(self, class_id: int, prompt: str, kind: str = "") -> Path:
        """The file of one class: its number keeps names apart that a file system would not."""
        return self.output_dir / f"{class_id:03d}-{mask_stem(prompt)[:80]}{kind}.ply"

    def said(self, path: Path, what: str) -> None:
        CONSOLE.print(f"{what}: {escape(str(path))}")


@dataclass
class ExportPointCloud(_Export):
    """Export a point cloud with class id, probability and colour a point (point_cloud.ply), and the connected objects of each
    class with box and centroid (objects.json)."""

    num_points: int = 1_000_000
    """Points to sample; outliers are taken out afterwards."""
    color: Literal["class", "photo"] = "class"
    """What a point is painted with."""
    frame: Literal["data", "model"] = "data"
    """data: coordinates of the data, those of its poses; model: the scaled and turned ones that nerfstudio trains in."""
    file_a_class: bool = False
    """Write the points of each class as a file of their own too."""
    object_gap: float = 0.01
    """Points of a class farther apart than this belong to different objects; a share of the diagonal of the
    box around the cameras."""
    smallest_object: float = 0.05
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
        pipeline = self.opened()
        cloud = sample_cloud(pipeline, self.num_points, self.num_rays_per_batch, self.std_ratio)
        cloud = cloud[self.stays[cloud.class_id - 1]]
        if not len(cloud.positions):
            raise CommandError("No point belongs to what --only and --without leave; show more, or sample more points.")
        diagonal = camera_diagonal(pipeline)
        if self.farthest > 0:
            near = cloud.distance <= self.farthest * diagonal
            CONSOLE.print(
                f"{near.mean():.0%} of the points lie within {self.farthest * diagonal:.3g} of their cameras."
            )
            if not near.any():
                raise CommandError(f"--farthest {self.farthest} leaves no point; raise it, or give 0 to keep all.")
            cloud = cloud[near]
        low, high = np.quantile(cloud.positions, [0.01, 0.99], axis=0)
        if self.frame == "data":
            frame = frame_of(pipeline.datamanager)
            cloud.positions, diagonal = frame.to_data(cloud.positions), diagonal / frame.scale
        segmenter = pipeline.model.segmenter
        found = objects(
            cloud,
            self.object_gap * diagonal,
            self.smallest_object,
            lambda class_id: segmenter.prompts[class_id - 1],
        )
        colors = cloud.colors
        if self.color == "class":
            colors = colorize(cloud.class_id - 1, segmenter.colors.cpu().numpy())
        table = vertex_table(cloud.positions, colors, cloud.class_id, cloud.probability)
        write_ply(self.output_dir / "point_cloud.ply", table)
        if self.file_a_class:
            for class_id in np.unique(cloud.class_id).tolist():
                write_ply(self.path_of(class_id, segmenter.prompts[class_id - 1]), table[cloud.class_id == class_id])
        write_json(self.output_dir / "objects.json", {"frame": self.frame, "objects": found})
        self.said(self.output_dir / "point_cloud.ply", f"{len(table)} points")
        self.said(self.output_dir / "objects.json", f"{len(found)} objects")
        CONSOLE.print(
            f"For a mesh of this part of the scene, give ns-export tsdf: {box_options(low, high)}", soft_wrap=True
        )


@dataclass
class ExportMesh(_Export):
    """Label a mesh that ns-export made of this run (tsdf, poisson or marching-cubes): mesh.ply with class id, probability and
    colour a vertex."""

    mesh: Path = Path("tsdf_mesh.ply")
    """The mesh, in any form that open3d reads, as ns-export left it."""
    frame: Literal["data", "model"] = "data"
    """Coordinates of the result, as in `pointcloud`; the mesh itself is taken to be in the model's."""

    def main(self) -> None:
        """Raises CommandError, OptionError and the errors of prompts and encoders."""
        # Imported here: it takes seconds.
        import open3d

        if not self.mesh.is_file():
            raise CommandError(f"{self.mesh} does not exist; make a mesh with ns-export tsdf or poisson first.")
        mesh = open3d.io.read_triangle_mesh(self.mesh)
        positions, faces = np.asarray(mesh.vertices), np.asarray(mesh.triangles)
        if not len(faces):
            raise CommandError(f"{self.mesh} cannot be read as a mesh with triangles; export it again.")
        pipeline = self.opened()
        labels, probability = label_positions(pipeline.model, positions)
        if not self.stays.all():
            used, faces = np.unique(faces[self.stays[labels][faces].all(-1)], return_inverse=True)
            positions, labels, probability, faces = (
                positions[used],
                labels[used],
                probability[used],
                faces.reshape(-1, 3),
            )
        colors = colorize(labels, pipeline.model.segmenter.colors.cpu().numpy())
        if self.frame == "data":
            frame = frame_of(pipeline.datamanager)
            positions = frame.to_data(positions)
            if np.linalg.det(frame.transform[:, :3]) < 0:
                faces = faces[:, ::-1]  # a reflection turns triangles inside out
        write_ply(self.output_dir / "mesh.ply", vertex_table(positions, colors, labels + 1, probability), faces)
        self.said(self.output_dir / "mesh.ply", f"{len(positions)} vertices, {len(faces)} triangles")


@dataclass
class ExportSplat(_Export):
    """Label the Gaussians that ns-export gaussian-splat made of a splatfacto run on the same data. Coordinates stay as they
    are, for shapes and colours of Gaussians turn with them. Leaves splat.ply (the same with class_id and probability) and, for
    each class, the object alone and the scene without it."""

    splat: Path = Path("splat.ply")
    """The PLY of ns-export gaussian-splat."""
    splat_config: Path | None = None
    """The splatfacto run's config.yml, where its frame is not this run's: another dataparser, or other options of it."""
    least_probability: float = 0.0
    """Gaussians whose class is less probable than this become 0, none."""

    def main(self) -> None:
        """Raises CommandError, OptionError and the errors of prompts and encoders."""
        check_fields("--", self, {"least_probability": SHARE})
        table = read_vertices(self.splat)
        positions = positions_of(table, self.splat)
        theirs = Frame.of_run(self.splat_config.parent) if self.splat_config is not None else None
        pipeline = self.opened()
        if theirs is not None:
            positions = frame_of(pipeline.datamanager).to_model(theirs.to_data(positions))
        labels, probability = label_positions(pipeline.model, positions)
        class_id = np.where(probability >= self.least_probability, labels + 1, 0)
        stays = self.stays[class_id - 1]
        table, class_id, probability = table[stays], class_id[stays], probability[stays]
        write_ply(self.output_dir / "splat.ply", with_labels(table, class_id, probability))
        self.said(self.output_dir / "splat.ply", f"{len(table)} Gaussians")
        for label, prompt in enumerate(pipeline.model.segmenter.prompts, start=1):
            chosen = class_id == label
            write_ply(self.path_of(label, prompt), table[chosen])
            write_ply(self.path_of(label, prompt, "-removed"), table[~chosen])
            CONSOLE.print(escape(f"{prompt}: {chosen.sum()} Gaussians"))


def box_options(low: Float[np.ndarray, " 3"], high: Float[np.ndarray, " 3"]) -> str:
    """A box in the model's frame, as options of ns-export tsdf, whose own box is about the cameras and cuts through scenes."""
    corners = (" ".join(f"{value:.2f}" for value in corner) for corner in (low, high))
    return " ".join(f"--bounding-box-{end} {corner}" for end, corner in zip(("min", "max"), corners, strict=True))


def camera_diagonal(pipeline: OVS3DPipeline) -> float:
    """Diagonal of the box around the training cameras, in the model's units."""
    origins = pipeline.datamanager.train_dataset.cameras.camera_to_worlds[..., 3]
    return max(float((origins.amax(0) - origins.amin(0)).norm()), 1e-6)


Command = Union[  # noqa: UP007 (tyro wants names for the parts)
    Annotated[ExportPointCloud, tyro.conf.subcommand(name="pointcloud")],
    Annotated[ExportMesh, tyro.conf.subcommand(name="mesh")],
    Annotated[ExportSplat, tyro.conf.subcommand(name="splat")],
]
