"""What a scene is like before it is trained: cameras and their coverage, photos, points, masks, prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from jaxtyping import Float, UInt8
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from ovs3d_nerfstudio.data.capture import LOOKING_THERE, capture_of, nearest_to_axes
from ovs3d_nerfstudio.data.scene_checks import check_cameras, check_files, check_pictures, readable_scene
from ovs3d_nerfstudio.data.seeds import points_of_data
from ovs3d_nerfstudio.data.sparse_points import names_points
from ovs3d_nerfstudio.doctor.findings import Finding, good_or, refused
from ovs3d_nerfstudio.errors import UserError, errors_raised
from ovs3d_nerfstudio.evaluation.evaluation import Evaluator
from ovs3d_nerfstudio.pictures import (
    Header,
    PictureError,
    evenly,
    list_pictures,
    open_picture,
    picture_header,
    view_names,
)
from ovs3d_nerfstudio.prompts.prompts import choose_prompts

T = TypeVar("T")

FEW, PLENTY = 20, 30
"""Photos below which pictures fill with floaters, and from which on they seldom do."""
GAP = 45.0
"""Degrees between neighbours of a full turn from which on what lies between is not seen from two sides."""
SHARED = 0.6
"""Least share of a picture that its neighbour should see too."""
BLURRED = 0.3
"""Sharpness, as a share of that of the photos around, below which a photo is called blurred."""
JUMP = 1.35
"""Ratio of brightness between neighbours from which on exposure is said to jump."""
LARGE = 1600
"""Longer side in pixels beyond which a photo brings time and memory rather than quality."""
EYE = 512
"""Longer side in pixels at which photos are looked at."""
LOOKED_AT = 100
"""Photos whose pixels are read, at most, evenly chosen."""


def scene_findings(parser: DataParserConfig, data: Path) -> list[Finding]:
    """Looks at a scene as `parser` reads it."""
    try:
        parsed, held_out, validated = read(parser, data, "train", "test", "val")
        check_cameras(parsed.cameras, str(data))
    except UserError as error:
        return [refused("scene", error)]
    photos, poses = parsed.image_filenames, parsed.cameras.camera_to_worlds.double()
    headers, unusable = files(parsed, held_out, validated)
    chosen = [photos[i] for i in evenly(len(photos), LOOKED_AT)]
    others = [*held_out.image_filenames, *(parsed.mask_filenames or ()), *(held_out.mask_filenames or ())]
    chosen += [others[i] for i in evenly(len(others), LOOKED_AT)]
    grey, undecodable = readable(thumbnail, [path for path in chosen if path in headers])
    return [
        *cameras(photos, held_out.image_filenames, poses),
        *overlap(parsed.cameras, photos),
        *unusable,
        *undecodable,
        *sizes([headers[path] for path in photos if path in headers]),
        *pixels({path: grey[path] for path in photos if path in grey}, dict(zip(photos, poses[:, :3, 3].numpy(), strict=True))),
        points(parser, data, parsed),
        *masks(data, parsed, held_out),
        prompts(data),
    ]  # fmt: skip


def read(parser: DataParserConfig, data: Path, *splits: str) -> list[DataparserOutputs]:
    """Splits of a scene. Raises UserError when it cannot be read."""
    try:
        with errors_raised(), readable_scene(parser, data):
            reader = parser.setup()
            return [reader.get_dataparser_outputs(split) for split in splits]
    except UserError as error:
        if getattr(parser, "downscale_factor", 1) is not None:
            raise
        # nerfstudio's parser looks at the first photo to choose a size: a broken one should not hide the rest.
        parser.downscale_factor = 1  # type: ignore[attr-defined]
        try:
            return read(parser, data, *splits)
        except UserError:
            raise error from None  # that was not it


def files(*parts: DataparserOutputs) -> tuple[dict[Path, Header], list[Finding]]:
    """The headers of those photos and masks that have one, and what training would refuse of any."""
    paths = [path for part in parts for path in part.image_filenames]
    headers, found = readable(picture_header, [*paths, *(mask for part in parts for mask in part.mask_filenames or ())])
    try:
        check_files(paths, torch.cat([part.cameras.camera_to_worlds for part in parts]))
        view_names(paths)
        for part in parts:
            check_pictures(part.image_filenames, headers, part.cameras, None if found else part.mask_filenames)
    except UserError as error:
        found.append(refused("files", error))
    return headers, found


def readable(read: Callable[[Path], T], paths: Iterable[Path]) -> tuple[dict[Path, T], list[Finding]]:
    """What `read` makes of each picture; and that there are some of which it makes nothing, the first by name."""

    def attempted(path: Path) -> T | PictureError:
        try:
            return read(path)
        except PictureError as error:
            return error

    paths = [*dict.fromkeys(paths)]
    with ThreadPoolExecutor(4) as readers:
        results = dict(zip(paths, readers.map(attempted, paths), strict=True))
    errors = [error for error in results.values() if isinstance(error, PictureError)]
    found = [refused("files", error) for error in errors[:1]]
    if len(errors) > 1:
        found = [replace(found[0], what=f"{found[0].what} Nor can {len(errors) - 1} more be read.")]
    return {path: made for path, made in results.items() if not isinstance(made, PictureError)}, found


def cameras(photos: Sequence[Path], held_out: Sequence[Path], poses: Float[torch.Tensor, "N 3 4"]) -> list[Finding]:
    """How many cameras, where they stand, and whether their axes are OpenGL's."""
    count, found = len(photos), []
    more = "Take more, overlapping by two thirds; with few, take ovs3d-splat or ovs3d-splat-lite."
    level = "warning" if count < FEW else "note"
    found.append(good_or(count >= PLENTY, level, "photos", f"{count} training photos, {len(held_out)} held out.", more))  # type: ignore[arg-type]
    beside = len(list_pictures(photos[0].parent))
    known = sum(path.parent == photos[0].parent for path in {*photos, *held_out})
    if beside and known < 0.9 * beside:
        found.append(
            Finding("warning", "poses", f"Only {known} of the {beside} pictures in {photos[0].parent} have a pose.",
                    "Take more photos between those that are missing, and find the cameras again.")
        )  # fmt: skip
    views = -torch.nn.functional.normalize(poses[..., 2], dim=-1)
    capture = capture_of(poses)
    if capture.there < 1 - LOOKING_THERE:
        found.append(
            Finding("warning", "axes", f"{1 - capture.there:.0%} of the cameras have what they look at behind them: the poses seem to be in "
                    "OpenCV's axes (z forwards, y down).", "nerfstudio's are OpenGL's: multiply the second and third column of each "
                    "transform_matrix by −1. If the photos look outwards on purpose, all is well.")
        )  # fmt: skip
    else:
        kind = (
            f"all around ({capture.turn:.0f}°)"
            if capture.around
            else f"from the front or outwards ({capture.turn:.0f}°)"
        )
        found.append(Finding("good", "coverage", f"Captured {kind}."))
    gap = widest_gap(views) if capture.around else 0.0
    if gap > GAP:
        found.append(
            Finding("warning", "coverage", f"A gap of {gap:.0f}° in the turn around the scene.", "Take photos there too, every 15° or so.")
        )  # fmt: skip
    return found


def widest_gap(views: Float[torch.Tensor, "N 3"]) -> float:
    """The largest angle in degrees from a viewing direction to the one that is nearest to it."""
    cosines = views @ views.T - 2 * torch.eye(len(views)).to(views)
    return float(torch.rad2deg(torch.arccos(cosines.max(1).values.clamp(-1, 1))).max())


def overlap(cameras: Any, photos: Sequence[Path]) -> list[Finding]:
    """The share of each picture that its best neighbours see too, if all lies at the distance that cameras look at."""
    shares = shared(cameras)
    alone = [photos[i].name for i in np.flatnonzero(shares < SHARED / 2)]
    what = f"Neighbouring photos share {np.median(shares):.0%} of what they see"
    if alone:
        shown = ", ".join(alone[:3]) + (f" and {len(alone) - 3} more" if len(alone) > 3 else "")
        return [Finding("warning", "overlap", f"{what}, but {shown} hardly anything with any other.", "Take photos between them and the rest, or leave them out.")]  # fmt: skip
    return [good_or(bool(np.median(shares) >= SHARED), "warning", "overlap", f"{what}.", "Take more between them: two thirds should be shared.")]  # fmt: skip


def shared(cameras: Any) -> Float[np.ndarray, " N"]:
    """See `overlap`; the mean over the two best neighbours."""
    poses = cameras.camera_to_worlds.double()
    origins, rotations = poses[..., 3], torch.nn.functional.normalize(poses[..., :3], dim=-2)
    forwards = -rotations[..., 2]
    ahead = ((nearest_to_axes(origins, forwards) - origins) * forwards).sum(-1)
    depth = torch.where(ahead > 0, ahead, ahead.abs().median()).clamp(min=1e-6)
    half = torch.stack([cameras.width / cameras.fx, cameras.height / cameras.fy], -1)[:, 0].double() / 2
    grid = torch.cartesian_prod(*(torch.linspace(-0.9, 0.9, 6).double(),) * 2)
    rays = torch.cat([grid * half[:, None], -torch.ones(len(half), len(grid), 1).double()], -1)
    places = torch.einsum("nij,nkj->nki", rotations, rays * depth[:, None, None]) + origins[:, None]
    best = []
    for i in range(len(poses)):
        local = torch.einsum("nij,nki->nkj", rotations, places[i][None] - origins[:, None])
        inside = (local[..., 2] < 0) & (local[..., :2].abs() <= -local[..., 2:] * half[:, None]).all(-1)
        alike = (forwards @ forwards[i])[:, None] > 0  # from behind, other sides of things are seen
        share = (inside & alike).double().mean(1)
        share[i] = 0
        best.append(share.topk(min(2, len(poses) - 1)).values.mean())
    return torch.stack(best).numpy()


def sizes(headers: Sequence[Header]) -> list[Finding]:
    """How large photos are, and what they take in memory."""
    if not headers:
        return []
    wide = {(header.width, header.height) for header in headers}
    side = max(max(size) for size in wide)
    memory = sum(3 * header.width * header.height for header in headers)
    what = (
        f"{side} pixels along the longer side, {memory / 2**30:.2f} GB in memory for splats, four times that for rays."
    )
    smaller = "Name nerfstudio-data --downscale-factor 2 (or 4) at the end of the training command, with the folder images_2 that ns-process-data makes."
    free = psutil.virtual_memory().available
    if 4 * memory > free:
        return [
            Finding(
                "error" if memory > free else "warning", "sizes", f"{what} Free are {free / 2**30:.1f} GB.", smaller
            )
        ]
    found = [good_or(side <= LARGE, "note", "sizes", what, smaller)]
    if len(wide) > 1:
        found.append(Finding("note", "sizes", f"Photos of {len(wide)} sizes.", "A common one trains faster."))
    return found


def pixels(
    grey: Mapping[Path, UInt8[np.ndarray, "h w"]], origins: Mapping[Path, Float[np.ndarray, "3"]]
) -> list[Finding]:
    """Sharpness, and exposure from neighbour to neighbour, of small photos."""
    if len(grey) < 2:
        return []
    chosen = [*grey]
    places = np.array([origins[path] for path in chosen])
    near = np.linalg.norm(places[:, None] - places[None], axis=-1).argsort(1)[:, 1:6]
    sharp = np.array([sharpness(picture) for picture in grey.values()])
    bright = np.array([max(1.0, float(picture.mean())) for picture in grey.values()])
    around = np.array([np.median(sharp[row]) for row in near])
    blurred = [chosen[i].name for i in np.flatnonzero(sharp < BLURRED * around)]
    ratios = np.array([bright[i] / np.median(bright[row[:2]]) for i, row in enumerate(near)])
    jumps = [chosen[i].name for i in np.flatnonzero(np.maximum(ratios, 1 / ratios) > JUMP)]

    def listed(names: list[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    return [
        good_or(not blurred, "warning", "sharpness", f"{len(blurred)} of {len(chosen)} photos are much less sharp than those around" + (f": {listed(blurred)}." if blurred else "."), "Leave them out, or take them again."),
        good_or(not jumps, "warning", "exposure", f"{len(jumps)} of {len(chosen)} photos are much brighter or darker than their neighbours" + (f": {listed(jumps)}." if jumps else "."), "Lock exposure and white balance; leave out what differs."),
    ]  # fmt: skip


def thumbnail(path: Path) -> UInt8[np.ndarray, "h w"]:
    """A photo in grey, small; large JPEGs are decoded small. Raises PictureError when it cannot be read."""
    grey = open_picture(path, side=EYE).convert("L")
    grey.thumbnail((EYE, EYE), Image.Resampling.BOX)
    return np.asarray(grey)


def sharpness(grey: UInt8[np.ndarray, "h w"]) -> float:
    """Variance of the Laplacian as a share of that of the picture, which forgets how much contrast there is."""
    import cv2

    picture = grey.astype(np.float32)
    return float(cv2.Laplacian(picture, cv2.CV_32F).var() / max(1.0, picture.var()))


def points(parser: DataParserConfig, data: Path, parsed: DataparserOutputs) -> Finding:
    """The sparse points, and whether cameras see them."""
    try:
        if isinstance(parser, NerfstudioDataParserConfig) and names_points(data):
            parser.load_3D_points = True
            (parsed,) = read(parser, data, "train")
        given = parsed.metadata.get("points3D_xyz")
        if given is None or not len(given):
            return Finding(
                "note", "points", "No sparse points come with the data; for splats they are found in the photos."
            )
        points_of_data(given, None)
    except UserError as error:
        return refused("points", error)
    xyz = given.double()[:: 1 + len(given) // 5000]
    cameras = parsed.cameras
    poses = cameras.camera_to_worlds.double()[:: 1 + len(cameras) // 30]
    half = torch.stack([cameras.width / cameras.fx, cameras.height / cameras.fy], -1)[:: 1 + len(cameras) // 30, 0] / 2
    local = torch.einsum("nij,nki->nkj", poses[..., :3], xyz[None] - poses[:, None, :, 3])
    seen = ((local[..., 2] < 0) & (local[..., :2].abs() <= -local[..., 2:] * half[:, None].double()).all(-1)).any(0)
    share = float(seen.double().mean())
    return good_or(
        share > 0.5, "error", "points", f"{len(given):,} sparse points; cameras see {share:.0%} of them.",
        "Points and poses are not in the same coordinates: write both again with ns-process-data, or take ply_file_path out of transforms.json.",
    )  # fmt: skip


def masks(data: Path, parsed: DataparserOutputs, test: DataparserOutputs) -> list[Finding]:
    """Masks of what to ignore, and those of classes, to evaluate by."""
    found, held_out = [], test.image_filenames
    if parsed.mask_filenames:
        found.append(Finding("good", "masks", "Each photo has a mask of what counts."))
    try:
        evaluator = Evaluator.of_scene(data, held_out, [*parsed.image_filenames, *held_out])
        if evaluator is not None:
            evaluator.check(torch.cat([test.cameras.height, test.cameras.width], -1).tolist())
    except UserError as error:
        return [*found, refused("masks", error)]
    if not held_out:
        remedy = "Training needs none; to evaluate, end the command with nerfstudio-data --eval-mode interval."
        found.append(Finding("note", "held out", "No photo is held out.", remedy))
    if evaluator is not None:
        annotated = len({*evaluator.views} & {*evaluator.annotations.views})
        found.append(
            Finding(
                "good",
                "classes",
                f"{len(evaluator.annotations.classes)} classes with masks, {annotated} held-out photos.",
            )
        )
    return found


def prompts(data: Path) -> Finding:
    """What the scene says that is to be looked for."""
    try:
        chosen, origin = choose_prompts("", None, data)
    except UserError as error:
        return refused("prompts", error)
    if not chosen:
        return Finding(
            "note",
            "prompts",
            origin,
            "Say what to look for with --pipeline.prompts, and try them first: ovs3d preview --data … --prompts …",
        )
    if len(chosen) == 1:
        return Finding(
            "note",
            "prompts",
            origin,
            "A single prompt takes everything by argmax: name the rest too, or ask with a threshold.",
        )
    return Finding("good", "prompts", origin)
