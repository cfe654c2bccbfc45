"""What a run says of places in its scene whatever the prompts are: of the places where training pixels end, or of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int16
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import Progress
from scipy.spatial import cKDTree
from torch import Tensor

from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.fields.compositing import SOMETHING
from ovs3d_nerfstudio.gaussians.lenses import tangents_of
from ovs3d_nerfstudio.models.nerf import OVS3DModel
from ovs3d_nerfstudio.models.semantics import SemanticModel
from ovs3d_nerfstudio.models.splat import OVS3DSplatModel
from ovs3d_nerfstudio.objects.points import FAINT, LabelledPoints
from ovs3d_nerfstudio.pipeline import OVS3DPipeline
from ovs3d_nerfstudio.prompts.answers import Question, packed, unpacked

MOST_TRIES = 20
"""Batches without any point after which a run is said to show nothing."""
MOST_PIXELS = 4
"""Pixels looked at for each point that is wanted in a box: where it is small, fewer points are found."""
NEIGHBOURS = 20
"""Neighbours whose mean distance makes a point an outlier, as in ns-export."""
NEAREST = 4
"""Gaussians that a point between them is like."""
CHUNK = 1 << 16
"""Places at which the semantic field is asked at once."""


@dataclass
class Samples:
    """Places in a scene, in the model's frame, and the features there."""

    positions: Float[np.ndarray, "N 3"]
    colors: Float[np.ndarray, "N 3"]
    """In [0, 1]."""
    directions: Int16[Tensor, "N K"]
    """Normalised coefficients, `packed`, on the CPU."""
    distance: Float[np.ndarray, " N"]
    """From the camera that saw it; 0 for Gaussians."""
    opacity: Float[np.ndarray, " N"]
    """Of Gaussians, in [0, 1]; 1 for points."""

    def __getitem__(self, chosen: np.ndarray) -> Samples:
        """The chosen places."""
        return Samples(*(column[chosen] for column in vars(self).values()))

    def labelled(self, question: Question) -> LabelledPoints:
        """The places with the winner of `question` at each, and its probability."""
        label, probability = question.winners(self.directions)
        columns = (self.positions, self.colors, label.numpy() + 1, probability.numpy(), self.distance, self.opacity)
        return LabelledPoints(*columns)


@torch.no_grad()
def directions_at(model: SemanticModel, positions: Float[np.ndarray, "N 3"]) -> Int16[Tensor, "N K"]:
    """Normalised coefficients (`packed`, on the CPU) of points in the model's frame, from the semantic field at these very
    points."""
    parts = [torch.zeros(0, model.semantic_field.dim, dtype=torch.int16)]
    for part in torch.from_numpy(positions.astype(np.float32)).split(CHUNK):
        if len(part):
            coefficients = model.semantic_field(part.to(model.device))[0]
            parts.append(packed(F.normalize(coefficients.float(), dim=-1)).cpu())
    return torch.cat(parts)


@torch.no_grad()
def gaussians(model: OVS3DSplatModel) -> Samples:
    """Every Gaussian of a splat, in its order."""
    positions = model.means.cpu().numpy().astype(np.float64)
    opacity = model.opacities.sigmoid().squeeze(-1).cpu().numpy()
    colors = model.colors.clamp(0, 1).cpu().numpy()
    return Samples(positions, colors, model.directions_of_gaussians().cpu(), np.zeros(len(positions)), opacity)


class Neighbours:
    """The features of a splat at any place: those of the Gaussians that are nearest, by their opacity.

    What was trained are the features of Gaussians, and between them the field is free: of points on the surfaces of a kitchen
    table 99.3 % get their class in this way, 98.8 % by the field at the point itself.
    """

    def __init__(self, splat: Samples):
        solid = splat.opacity >= FAINT
        self.splat = splat[np.flatnonzero(solid if solid.any() else ~solid)]
        self.tree = cKDTree(self.splat.positions)

    def directions_at(self, positions: Float[np.ndarray, "N 3"]) -> Int16[Tensor, "N K"]:
        """As the function of this name, of points in the model's frame."""
        parts = [self.splat.directions[:0]]
        for start in range(0, len(positions), CHUNK):
            part = positions[start : start + CHUNK]
            nearest = self.tree.query(part, min(NEAREST, self.tree.n), workers=-1)[1].reshape(len(part), -1)
            opacity = torch.from_numpy(self.splat.opacity[nearest]).float()
            mixed = (unpacked(self.splat.directions[torch.from_numpy(nearest)]) * opacity[..., None]).sum(1)
            parts.append(packed(F.normalize(mixed, dim=-1)))
        return torch.cat(parts)


@torch.no_grad()
def sample_cloud(
    pipeline: OVS3DPipeline,
    num_points: int,
    rays_per_batch: int,
    std_ratio: float,
    within: Callable[[Float[np.ndarray, "N 3"]], Bool[np.ndarray, " N"]] | None = None,
) -> Samples:
    """The places where random training pixels end; pixels that end nowhere are left out.

    `std_ratio` takes out outliers, see open3d's `remove_statistical_outlier`; 0 keeps all. Where `within` chooses among places in
    the model's frame, there are fewer than asked for if they are rare. Raises CommandError when the pixels end nowhere, or
    nowhere that is chosen.
    """
    along_rays = isinstance(pipeline.model, OVS3DModel)
    parts: list[Samples] = []
    count = tries = pixels = 0
    # A splat's batches are of one view each, and what is chosen may be seen by few.
    patience = MOST_TRIES if along_rays else max(MOST_TRIES, len(pipeline.datamanager.train_dataset))
    with pipeline.model.features_wanted(), Progress(console=CONSOLE) as progress:
        task = progress.add_task("Sampling points", total=num_points)
        for part in (_along_rays if along_rays else _in_views)(pipeline, num_points, rays_per_batch):
            pixels += len(part.positions)
            if within is not None:
                part = part[within(part.positions)]
            found = len(part.positions)
            tries = 0 if found else tries + 1
            parts.append(part)
            count += found
            progress.update(task, completed=min(count, num_points))
            if count >= num_points or tries == patience or pixels >= MOST_PIXELS * num_points:
                break
    if not count:
        if pixels:
            raise CommandError("No point of this run lies in the box; choose another one.")
        raise CommandError("The pixels of this run end nowhere; train it longer before you export it.")
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    joined = (torch.cat(c) if isinstance(c[0], Tensor) else np.concatenate(c) for c in columns)  # type: ignore[arg-type]
    cloud = Samples(*joined)[np.arange(min(count, num_points))]  # type: ignore[arg-type]
    cloud.positions = cloud.positions.astype(np.float64)
    return cloud[_inliers(cloud.positions, std_ratio)] if std_ratio > 0 else cloud


def _along_rays(pipeline: OVS3DPipeline, num_points: int, rays_per_batch: int) -> Iterator[Samples]:
    """Batches of random rays, without end."""
    datamanager = pipeline.datamanager
    assert datamanager.train_pixel_sampler is not None, "an open run has training views"
    datamanager.train_pixel_sampler.num_rays_per_batch = rays_per_batch
    while True:
        rays, _ = datamanager.next_train(0)
        outputs = pipeline.model(rays)
        outputs["directions"] = packed(outputs["directions"])
        yield _ends(rays.origins + rays.directions * outputs["depth"], outputs["depth"], outputs)


def _in_views(pipeline: OVS3DPipeline, num_points: int, rays_per_batch: int) -> Iterator[Samples]:
    """As many random pixels of each training view as it takes, again and again: a splat has whole pictures only."""
    cameras = pipeline.datamanager.train_dataset.cameras
    share = math.ceil(1.1 * num_points / len(cameras))
    across_axes = torch.tensor([1.0, -1.0], device=pipeline.device)
    while True:
        for view in range(len(cameras)):
            camera = cameras[view : view + 1].to(pipeline.device)
            outputs = pipeline.model.get_outputs_for_camera(camera)
            chosen = torch.randint(outputs["depth"].shape[:2].numel(), (share,), device=pipeline.device)
            pixels = {name: output.flatten(0, 1)[chosen] for name, output in outputs.items()}
            # Along the axes of nerfstudio's cameras, with y up and looking along −z; depth is along the last one.
            across = tangents_of(camera).flatten(0, 1)[chosen] * across_axes
            along = torch.cat([across, -torch.ones_like(across[:, :1])], -1) @ camera.camera_to_worlds[0, :, :3].T
            steps = along * pixels["depth"]
            yield _ends(camera.camera_to_worlds[0, :, 3] + steps, steps.norm(dim=-1, keepdim=True), pixels)


def _ends(positions: Float[Tensor, "n 3"], distance: Float[Tensor, "n 1"], outputs: dict) -> Samples:
    """The places where those pixels end that end somewhere."""
    ends = outputs["accumulation"][:, 0] >= SOMETHING
    where, colors, away = (part[ends].cpu().numpy() for part in (positions, outputs["rgb"], distance[:, 0]))
    return Samples(where, colors, outputs["directions"][ends].cpu(), away, np.ones(len(where)))


def _inliers(positions: np.ndarray, std_ratio: float) -> np.ndarray:
    # Imported here: it takes seconds.
    import open3d

    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(positions))
    inliers = np.asarray(cloud.remove_statistical_outlier(NEIGHBOURS, std_ratio)[1], np.int64)
    # Of points that are all as far from their neighbours, as one or two are, none stands out, and open3d leaves none.
    return inliers if len(inliers) else np.arange(len(positions))
