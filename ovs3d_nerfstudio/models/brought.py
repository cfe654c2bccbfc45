"""What a training of Gaussians begins with where something is brought along: a splat by any trainer, whose frame is found, or
a run of ours of either geometry, whose semantics and prompts come along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.trainer import TrainerConfig
from torch import Tensor

from ovs3d_nerfstudio.data.frames import frame_of
from ovs3d_nerfstudio.data.ways import STAY, Way, back, composed, possible_ways, way_of
from ovs3d_nerfstudio.engine.checkpoints import checkpoints, read_checkpoint
from ovs3d_nerfstudio.engine.run_config import read_config
from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.fields.compositing import SOMETHING
from ovs3d_nerfstudio.gaussians.lenses import lens_of
from ovs3d_nerfstudio.gaussians.shown import picture_of
from ovs3d_nerfstudio.gaussians.splat_files import read_splat
from ovs3d_nerfstudio.gaussians.splats import Splat
from ovs3d_nerfstudio.models.nerf import OVS3DModel
from ovs3d_nerfstudio.models.semantics import SemanticModel, SemanticModelConfig
from ovs3d_nerfstudio.models.splat import OVS3DSplatModel

LOOKS_ALIKE = 3.0
"""Decibels by which a picture of the splat must be nearer to the photo than the photo's mean colour is, to be of its scene."""
COMPARED_SIDE = 320
"""Pixels that the longer side of a compared picture has at most."""
POINTS = 40_000
"""Gaussians that begin at the depth of a NeRF."""
RAYS_AT_ONCE = 1 << 13
SAME_FRAME = 1e-4
"""Coordinates that differ by less than this share are those of one frame."""


class BroughtError(UserError):
    """What is to be begun with cannot be."""


def begin_from(source: Path, model: OVS3DSplatModel, datamanager: Any) -> list[str]:
    """Has `model` begin with what `source` is: a PLY, or the folder or config.yml of a run. Returns what was taken, in
    sentences.

    Raises SplatError, BroughtError, ConfigError, CheckpointError and the errors of an open run.
    """
    if source.is_dir() or source.suffix in (".yml", ".yaml"):
        return _begin_from_run(source, model, datamanager)
    _, splat = read_splat(source)
    way, said = find_way(splat, datamanager)
    model.begin_with(splat.moved(way))
    return [f"Training begins with the {len(splat.means):,} Gaussians of {source}. {said}"]


# The frame of a splat.


def find_way(splat: Splat, datamanager: Any) -> tuple[Way, str]:
    """The way from the splat's coordinates to those of the training cameras: the one of `possible_ways` under which two of
    the photos look most like the splat; and a sentence that says so.

    Raises BroughtError when under none of them they look like it.
    """
    dataset = datamanager.train_dataset
    views = sorted({len(dataset) // 4, 3 * len(dataset) // 4})
    photos = [_small(dataset.get_image_float32(view)) for view in views]
    plain = decibels(photos, [photo.mean((0, 1)).expand_as(photo) for photo in photos])
    splat = splat.to(datamanager.device)
    found = {}
    for name, way in possible_ways(datamanager).items():
        moved = splat.moved(way)
        pairs = zip(views, photos, strict=True)
        pictures = [_shown(moved, dataset.cameras[view : view + 1], photo) for view, photo in pairs]
        found[name] = (decibels(photos, pictures), way)
    figures = ", ".join(f"{psnr:.1f} dB in {name}" for name, (psnr, _) in found.items())
    best, (psnr, way) = max(found.items(), key=lambda entry: entry[1][0])
    if not psnr > plain + LOOKS_ALIKE:  # NaN neither
        raise BroughtError(
            f"The splat does not look like the photos of {datamanager.config.data} ({figures}; a picture of their mean colour has "
            f"{plain:.1f} dB); name the data that it was made of, with the poses of then."
        )
    return way, f"It lies in {best}: {psnr:.1f} dB against {len(views)} photos ({figures})."


def _small(photo: Float[Tensor, "H W c"]) -> Float[Tensor, "h w 3"]:
    """A photo as it is compared; what is transparent has the mean colour of the rest."""
    if photo.shape[-1] == 4:
        color, alpha = photo.split([3, 1], -1)
        mean = (color * alpha).sum((0, 1)) / alpha.sum().clamp(min=1e-6)
        photo = color * alpha + mean * (1 - alpha)
    factor = min(1.0, COMPARED_SIDE / max(photo.shape[:2]))
    size = [max(1, round(side * factor)) for side in photo.shape[:2]]
    return F.interpolate(photo.permute(2, 0, 1)[None], size, mode="area")[0].permute(1, 2, 0)


def _shown(splat: Splat, camera: Cameras, photo: Float[Tensor, "h w 3"]) -> Float[Tensor, "h w 3"]:
    """A splat in the frame of one camera as a photo of its that may be smaller, before the photo's mean colour."""
    height, width = photo.shape[:2]
    across, down = width / int(camera.width), height / int(camera.height)
    focal, principal = (camera.fx * across, camera.fy * down), (camera.cx * across, camera.cy * down)
    like = (camera.distortion_params, camera.camera_type)
    small = Cameras(camera.camera_to_worlds, *focal, *principal, width, height, *like).to("cpu")
    pose, mean, lens = small.camera_to_worlds[0], photo.mean((0, 1)), lens_of(small[0:1])
    if lens is None:
        return picture_of(splat, pose, small.get_intrinsics_matrices()[0], width, height, mean)
    return lens.seen_through(picture_of(splat, pose, lens.intrinsics()[0], *lens.size, mean))


def decibels(photos: Sequence[Tensor], pictures: Sequence[Tensor]) -> float:
    """PSNR over all pixels of pictures in [0, 1]."""
    errors = [(one - other).square().flatten() for one, other in zip(photos, pictures, strict=True)]
    return -10 * float(torch.cat(errors).mean().clamp(min=1e-10).log10())


# A run of ours.


def _begin_from_run(source: Path, model: OVS3DSplatModel, datamanager: Any) -> list[str]:
    run = open_source(source, Path(datamanager.config.data), str(model.device))
    theirs, mine = (way_of(frame_of(manager)) for manager in (run.datamanager, datamanager))
    way = composed(mine, back(theirs))
    same = bool(np.abs(way - STAY).max() < SAME_FRAME)
    way = STAY if same else way
    if isinstance(run.model, OVS3DSplatModel):
        model.begin_with(run.model.splat.moved(way))
        said = f"Training begins with the {model.num_points:,} Gaussians of the run {source}."
    else:
        points, colors = points_of_nerf(run.model, run.datamanager.train_dataset.cameras, POINTS)
        turn = torch.from_numpy(way).to(points)
        model.begin_at(points @ turn[:, :3].T + turn[:, 3], colors)
        said = f"Training begins with {len(points):,} Gaussians at the depth of the NeRF {source}."
    return [said, _take_semantics(run.model, model, same)]


def open_source(source: Path, data: Path, device: str) -> Any:
    """The pipeline of a run, ready to be asked; where its data is no longer there, with `data` in its place."""
    path = source / "config.yml" if source.is_dir() else source
    remedy = "name the PLY of a splat, or the folder or config.yml of a run of this version."
    if not path.is_file():
        raise BroughtError(f"There is no {path} to begin with; {remedy}")
    written = read_config(path, remedy)
    if not isinstance(written, TrainerConfig) or not isinstance(written.pipeline.model, SemanticModelConfig):
        raise BroughtError(f"{path} is no run of ours, so training cannot begin with it; {remedy}")
    saved = checkpoints(path.parent / written.relative_model_dir)
    if not saved:
        raise BroughtError(f"There is no checkpoint beside {path}; train that run until its first one is saved.")
    state = read_checkpoint(saved[0])
    manager: Any = written.pipeline.datamanager
    if not Path(manager.data or manager.dataparser.data).exists():
        manager.data = data
    pipeline = written.pipeline.setup(device=device, test_mode="inference")
    pipeline.load_pipeline(state["pipeline"], state["step"])
    pipeline.eval()
    if not pipeline.model.segmenter.ready:
        raise BroughtError(f"{saved[0]} holds no features yet; train it beyond the start of the semantic losses.")
    return pipeline


@torch.no_grad()
def points_of_nerf(
    model: SemanticModel, cameras: Cameras, count: int
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Where the rays of random pixels of the cameras end, in the model's frame, and what colours are seen there; at most
    `count`, as rays that end nowhere are left out.

    Raises BroughtError when all end nowhere.
    """
    assert isinstance(model, OVS3DModel)
    share = -(-count // len(cameras))
    points, colors = [], []
    for view in range(len(cameras)):
        camera = cameras[view : view + 1].to(model.device)
        size = torch.tensor([int(camera.height), int(camera.width)])
        rays = camera.generate_rays(0, coords=torch.rand(share, 2).mul(size).floor().add(0.5).to(model.device))
        for start in range(0, share, RAYS_AT_ONCE):
            part = rays[start : start + RAYS_AT_ONCE]
            outputs = model(part, semantics=False)
            ends = outputs["accumulation"][:, 0] > SOMETHING
            points.append((part.origins + part.directions * outputs["depth"])[ends])
            colors.append(outputs["rgb"][ends])
    found = torch.cat(points)
    if len(found) < 4:
        raise BroughtError("The rays of that NeRF end nowhere, so no Gaussian can begin there; train it longer.")
    return found[:count], torch.cat(colors)[:count]


def _take_semantics(old: SemanticModel, new: SemanticModel, same_frame: bool) -> str:
    """Basis, prompts, and the semantic field where it is of the same kind and in the same frame. Returns what came along.

    Raises BroughtError when the two look at patches of different sizes.
    """
    if old.config.num_scales != new.config.num_scales:
        raise BroughtError(
            f"That run has {old.config.num_scales} scales and this one {new.config.num_scales}; give --pipeline.datamanager.scales as "
            "in that run."
        )
    new.segmenter.load_state_dict(old.segmenter.state_dict())
    new.mixture.load_state_dict(old.mixture.state_dict())
    field, mine = old.semantic_field.state_dict(), new.semantic_field
    sizes = {name: value.shape[1:] for name, value in mine.state_dict().items() if name != "last.bias"}
    fits = {name: value.shape[1:] for name, value in field.items() if name != "last.bias"} == sizes
    mine.resize(old.semantic_field.dim)
    if fits and same_frame:
        mine.load_state_dict(field)
        return "Its semantic field, basis and prompts come along."
    why = "as its sizes are others" if same_frame else "as the data now has other coordinates"
    return f"Its basis and prompts come along; its semantic field is learned anew, {why}."
