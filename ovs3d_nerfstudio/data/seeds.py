"""Where geometry begins: Gaussians at the points that come with the data, else at points found in the photos by their known
cameras, and where the photos show none, at random; a NeRF by `sightings` of those found.

Finding takes seconds to a minute and is done once: the points lie in the feature cache, under the hash of the photos,
masks, cameras and settings that they were found with.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, UInt8
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from numpy import ndarray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ovs3d_nerfstudio.data import stereo, triangulation
from ovs3d_nerfstudio.data.capture import capture_of
from ovs3d_nerfstudio.data.stereo import densify, stereo_pairs
from ovs3d_nerfstudio.data.triangulation import NO_POINTS, Features, Points, find_features, joined, pairs, triangulate
from ovs3d_nerfstudio.data.views import View, read_view
from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.features.cache import FeatureCache, picture_key

COUNT = 30_000
"""Points to find."""
FEATURE_SIDE, STEREO_SIDE = 1600, 640
"""Pixels that the longer side of a photo has at most, for features and for stereo."""
CERTAIN = 3
"""Views that must show a feature. Of those in two views only, a quarter is more than 5 % off."""
FEWEST, RANDOM = 500, 10_000
"""With fewer points than `FEWEST`, random ones fill them up to `RANDOM`."""
TRIES = 4
"""How many times as many random points are drawn as are kept: those that most cameras see."""
THREADS = 4
"""At most, for each holds up to 250 MB."""
VERSION = 2
"""Counts changes of what is found that no constant tells."""


class SeedsError(UserError):
    """The data cannot say where Gaussians begin."""


@dataclass(frozen=True)
class Seeds:
    """Where Gaussians begin."""

    positions: Float32[ndarray, "N 3"]
    """In the frame of the training cameras."""
    colors: UInt8[ndarray, "N 3"]
    origin: str
    """Where they are from, as a sentence."""
    point: Int32[ndarray, " K"]
    view: Int32[ndarray, " K"]
    """Point `point[k]` was found in photo `view[k]`. Nobody knows where points that come with the data were."""
    place: Float32[ndarray, "K 2"]
    """And there at these shares of the width and the height."""


def seed_points(
    dataparser_outputs: DataparserOutputs,
    image_filenames: Sequence[Path],
    cameras: Cameras,
    cache_dir: Path,
    console: Console,
) -> Seeds:
    """The points that come with the data, as they are; else points found in the photos.

    nerfstudio's parsers read the data's points only where their `load_3D_points` is set.

    Args:
        dataparser_outputs: of the training photos; its metadata may hold points, its `mask_filenames` say what counts.
        image_filenames, cameras: the training photos and their cameras, in the order of the masks.
        cache_dir: of the features.

    Raises SeedsError for points or cameras that cannot be used, PictureError for a photo, CacheError for the cache.
    """
    given = dataparser_outputs.metadata.get("points3D_xyz")
    if given is not None and len(given):
        return points_of_data(given, dataparser_outputs.metadata.get("points3D_rgb"))
    return found_points(image_filenames, dataparser_outputs.mask_filenames, cameras, cache_dir, console)


def found_points(
    image_filenames: Sequence[Path],
    mask_filenames: Sequence[Path] | None,
    cameras: Cameras,
    cache_dir: Path,
    console: Console,
) -> Seeds:
    """Points found in the photos: now, or by whoever asked before. Arguments and errors as for `seed_points`."""
    if strange := unfit(cameras):
        raise SeedsError(
            f"Points cannot be found in photos of {min(kind.name for kind in strange)} cameras, only of PERSPECTIVE and FISHEYE; "
            "give points with the data (ply_file_path in transforms.json)."
        )
    masks: Sequence[Path | None] = mask_filenames or [None] * len(image_filenames)
    cache = FeatureCache(cache_dir, "seeds", settings())
    key = content_key(image_filenames, masks, cameras)

    def make() -> dict[str, torch.Tensor]:
        found, places, counts = find_points(image_filenames, masks, cameras, console)
        tensors = {"positions": found.positions.astype(np.float32), "colors": found.colors, "counts": np.array(counts)}
        tensors |= {"point": found.point.astype(np.int32), "view": found.view.astype(np.int32)}
        tensors["place"] = places.astype(np.float32)
        return {name: torch.from_numpy(array) for name, array in tensors.items()}

    cache.fill(key, make, wait=True)
    # Copies: what the cache loads lies in its file, which may change under a long run.
    tensors = {name: tensor.numpy().copy() for name, tensor in cache.load(key).items()}
    origin = _origin(*tensors["counts"].tolist())
    return Seeds(origin=origin, **{name: tensor for name, tensor in tensors.items() if name != "counts"})


def unfit(cameras: Cameras) -> set[CameraType]:
    """The kinds of cameras among these in whose photos no points can be found."""
    return {CameraType(int(kind)) for kind in cameras.camera_type.flatten().unique()} - {
        CameraType.PERSPECTIVE,
        CameraType.FISHEYE,
    }


def points_of_data(positions: torch.Tensor, colors: torch.Tensor | None) -> Seeds:
    """The points that come with the data. Raises SeedsError for what are no points."""
    positions = positions.detach().cpu().float()
    if positions.ndim != 2 or positions.shape[1] != 3 or not positions.isfinite().all():
        raise SeedsError(
            f"The {len(positions):,} points that come with the data are not of three finite numbers each; write their PLY again, "
            "or take ply_file_path out of transforms.json and points are found in the photos."
        )
    grey = colors is None or len(colors) != len(positions)
    rgb = torch.full(positions.shape, 127) if colors is None or grey else colors.detach().cpu()
    remark = ", which have no colours and begin grey" if grey else ""
    return Seeds(
        positions.numpy(),
        rgb.to(torch.uint8).numpy(),
        f"Gaussians begin at the {len(positions):,} points that come with the data{remark}.",
        point=np.zeros(0, np.int32),
        view=np.zeros(0, np.int32),
        place=np.zeros((0, 2), np.float32),
    )


def _origin(features: int, dense: int, random: int) -> str:
    found = f"{features:,} features of several photos, {dense:,} by stereo"
    if not random:
        return f"Gaussians begin at {features + dense:,} points found in the photos ({found})."
    return (
        f"Gaussians begin at {features + dense:,} points found in the photos ({found}) and, as these are few, at {random:,} "
        "random ones where most cameras look; photos with more texture, or points with the data, make a better start."
    )


def settings() -> dict:
    """All that decides what is found in given photos."""
    constants = {
        f"{module}.{name}": value
        for module, names in (("seeds", globals()), ("triangulation", vars(triangulation)), ("stereo", vars(stereo)))
        for name, value in names.items()
        if name.isupper() and isinstance(value, int | float | tuple)
    }
    return {"opencv": cv2.__version__, **constants}


def content_key(photos: Sequence[Path], masks: Sequence[Path | None], cameras: Cameras) -> str:
    """Hash of the pixels, masks and cameras that points are found with."""
    digest = hashlib.sha256()
    for photo, mask in zip(photos, masks, strict=True):
        digest.update(f"{picture_key(photo)} {mask and picture_key(mask)}\n".encode())
    names = ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height", "distortion_params", "camera_type")
    for name in names:
        tensor = getattr(cameras, name)
        digest.update(name.encode() if tensor is None else tensor.double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def find_points(
    photos: Sequence[Path], masks: Sequence[Path | None], cameras: Cameras, console: Console
) -> tuple[Points, Float[ndarray, "K 2"], tuple[int, int, int]]:
    """Points found in photos, filled up with random ones (found in none) where they are few; where in the photos each was
    found, as shares of width and height; and how many are features', of stereo, and random."""
    columns = (
        TextColumn("[cyan]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    threads = min(THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, Progress(*columns, console=console) as progress:

        def bar(words: str, total: int) -> Callable[[], None]:
            task = progress.add_task(words, total=total)
            return lambda: progress.advance(task)

        advance = bar("Finding features", len(photos))

        def looked_at(i: int) -> tuple[View, Features]:
            view = read_view(photos[i], masks[i], cameras, i).smaller(FEATURE_SIDE)
            features = find_features(view)
            advance()
            # The large photos are not kept: hundreds would fill the memory.
            return view.smaller(STEREO_SIDE), features

        views, features = map(list, zip(*pool.map(looked_at, range(len(photos))), strict=True))
        chosen = pairs(views)
        known = triangulate(views, features, chosen, pool, bar("Matching photos", len(chosen)))
        close = stereo_pairs(views, known)
        dense = densify(views, known, close, COUNT, pool, bar("Stereo", len(close))) if close else NO_POINTS
    certain = known.views_of() >= CERTAIN
    if certain.sum() + len(dense.positions) < FEWEST:
        certain[:] = True
    # Half at most, or what has little texture has few.
    sparse = np.random.default_rng(0).permutation(np.flatnonzero(certain))[: COUNT // 2]
    room = COUNT - len(sparse)
    found = joined(known.only(sparse), dense.only(np.arange(len(dense.positions))[:room]))
    counts = len(sparse), len(found.positions) - len(sparse)
    places, seen = np.zeros((len(found.point), 2)), np.zeros(len(found.point), bool)
    for i, view in enumerate(views):
        mine = found.view == i
        pixels, _ = view.project(found.positions[found.point[mine]])
        places[mine], seen[mine] = pixels / view.size, view.inside(pixels)
    # A few lie a pixel off their feature, and beyond the edge.
    found, places = replace(found, point=found.point[seen], view=found.view[seen]), places[seen]
    if len(found.positions) >= FEWEST:
        return found, places, (*counts, 0)
    more = random_points(views, depth_range(views, cameras, known), RANDOM - len(found.positions))
    return joined(found, replace(NO_POINTS, positions=more[0], colors=more[1])), places, (*counts, len(more[0]))


def depth_range(views: Sequence[View], cameras: Cameras, known: Points) -> tuple[float, float]:
    """Nearest and farthest depth worth filling: of the known points where there are a few, else from a third to three times
    the way to where the cameras look, else of the cameras' spread."""
    if len(known.positions) >= 30:
        depths = [(known.positions[known.of(i)] - view.centre) @ view.forward for i, view in enumerate(views)]
        near, far = np.quantile(np.concatenate(depths), [0.01, 0.99])
        return 0.8 * float(near), 1.25 * float(far)
    capture = capture_of(cameras.camera_to_worlds[:, :3].cpu())
    centres = np.stack([view.centre for view in views])
    spread = float(np.linalg.norm(centres - centres.mean(0), axis=-1).max())
    middle = capture.distance if capture.distance > spread else (3 * spread or 1.0)
    return middle / 3, middle * 3


def random_points(
    views: Sequence[View], depths: tuple[float, float], count: int
) -> tuple[Float[ndarray, "N 3"], UInt8[ndarray, "N 3"]]:
    """Points along the rays of random pixels that count, as many in each equal step of inverse depth, with their pixels'
    colours: of `TRIES` times as many, those that most views have in their picture."""
    draw = np.random.default_rng(0)
    near, far = depths
    positions, colors = [], []
    for view in views:
        pixels = draw.random((TRIES * count // len(views) + 1, 2)) * view.size
        pixels = pixels[view.inside(pixels)]
        rays = view.rays(pixels)
        depth = 1 / draw.uniform(1 / far, 1 / near, len(rays))
        positions.append(view.centre + rays * (depth / (rays @ view.forward).clip(0.1))[:, None])
        colors.append(view.colours(pixels))
    points, pixel_colors = np.concatenate(positions), np.concatenate(colors)
    seen = sum((view.inside(view.project(points)[0]).astype(int) for view in views), np.zeros(len(points), int))
    order = draw.permutation(len(points))
    kept = order[np.argsort(-seen[order], kind="stable")][:count]
    return points[kept], pixel_colors[kept]
