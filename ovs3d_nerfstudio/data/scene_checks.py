"""What is wrong with a scene, in a sentence: nerfstudio's parser reads transforms.json on trust, and training on poses that
are no numbers goes on for hours. Only what would break is looked at, and of pictures only the headers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE, Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio, NerfstudioDataParserConfig
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from rich.prompt import Confirm
from torch import Tensor

from ovs3d_nerfstudio.data.camera_models import MIXED, EachFramesModel, kind_of, model_of
from ovs3d_nerfstudio.data.capture import Capture, capture_of
from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.pictures import BLURRING, Header, missing_picture, picture_header

ONE_PLACE = 1e-6
"""Cameras that lie within this share of their coordinates are at one place."""
INTRINSICS = ("fl_x", "fl_y", "cx", "cy", "w", "h")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
DISTORTION_AT_THE_TOP = ("k1", "k2", "k3", "p1", "p2", "distortion_params")
"""Keys of which one at the top of a transforms.json has nerfstudio pass over those of the frames."""
ONE_WAY = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.FISHEYE624, CameraType.ORTHOPHOTO)
"""Cameras that look along an axis; the others see all around."""
TURNING = 30.0
"""Degrees through which cameras must turn for the point that they look at to say on which side of them it lies."""
_PARSERS = "mend the data, or name another dataparser at the end of the command"


class SceneError(UserError):
    """A scene cannot be used."""


@contextmanager
def readable_scene(parser: DataParserConfig, data: Path) -> Iterator[None]:
    """Checks `data` before the block has `parser` read it, and frames keep their own camera models; what any parser stumbles
    over, or would ask on a terminal that need not be there, becomes a SceneError. The numbers of all photos, which nerfstudio
    logs, are left out."""
    if not data.exists():
        raise SceneError(f"The scene {data} does not exist; name the folder that holds its data with --data.")
    if isinstance(parser, NerfstudioDataParserConfig):
        check_transforms(data)
        if parser._target is Nerfstudio:
            parser._target = EachFramesModel

    def refuse(question: str = "", **options: Any) -> NoReturn:
        asked = " ".join(str(question).split())
        raise SceneError(
            f"{type(parser).__name__} asks of {data}: '{asked}', and no command asks back; answer by its options at the end of "
            "the command, such as --downscale-factor 1, which takes the photos as they are."
        )

    log = CONSOLE.log

    def shorter(*said: Any, **options: Any) -> None:
        if "_indices to [" not in str(said[:1]):
            log(*said, **options, _stack_offset=2)

    try:
        with mock.patch.object(Confirm, "ask", refuse), mock.patch.object(CONSOLE, "log", shorter):
            yield
    except UserError:
        raise
    except Exception as error:  # a parser lets out whatever its data provoke
        if not _of_a_parser(error):
            raise
        if isinstance(error, OSError) and error.filename is not None:
            file = Path(os.fsdecode(error.filename))
            if isinstance(parser, NerfstudioDataParserConfig) and isinstance(error, FileNotFoundError):
                raise missing_picture(file) from error  # the first, whose size it asks for
            raise SceneError(
                f"{file} cannot be read or written ({error.strerror or error}); check the path and its permissions, or name "
                "another dataparser at the end of the command."
            ) from error
        said = " ".join(str(error).split()) or type(error).__name__
        raise SceneError(f"{type(parser).__name__} cannot read {data} ({said}); {_PARSERS}.") from error


def _of_a_parser(error: Exception) -> bool:
    """Whether a dataparser raised it while it read. What nerfstudio or we do with what was read is not blamed on the data."""
    return any(isinstance(frame.f_locals.get("self"), DataParser) for frame, _ in walk_tb(error.__traceback__))


def check_transforms(data: Path) -> None:
    """Raises SceneError when nerfstudio's parser would fail, or worse would not, on the transforms.json of `data`."""
    path = data if data.suffix == ".json" else data / "transforms.json"
    if not path.is_file():
        raise SceneError(
            f"{data} has no transforms.json; make it with ns-process-data, or name another dataparser at the end of the "
            "command, such as ovs3d-data."
        )
    again = "write it again with ns-process-data"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        what = "is empty" if path.stat().st_size == 0 else f"is no JSON in UTF-8 ({error})"
        raise SceneError(f"{path} {what}; {again}.") from None
    frames = meta.get("frames") if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise SceneError(f"{path} has no list of frames; {again}.")
    if len(frames) < 2:
        raise SceneError(
            f"{path} has {'one frame' if frames else 'no frame'}; a scene needs photos from several places, some dozens for a good field."
        )
    _check_model(str(path), meta, {})
    first: dict[str, int] = {}
    for number, frame in enumerate(frames):
        name = f"{path}: frame {number} ({frame.get('file_path')})"
        _check_frame(name, meta, frame)
        check_what_is_read(name, meta, frame)
        other = first.setdefault(os.path.normpath(frame["file_path"]), number)
        if other != number:
            raise SceneError(
                f"{name} is the picture of frame {other} too; take one of the two out, or give it its own."
            )
    _check_mixture(path, meta)
    masks = sum("mask_path" in frame for frame in frames)
    if 0 < masks < len(frames):
        raise SceneError(
            f"{path} has a mask_path for {masks} of {len(frames)} frames; give one to every frame or to none."
        )
    _check_splits(path, meta)
    check_places(np.array([frame["transform_matrix"] for frame in frames], float)[:, :3, 3], str(path))


def _check_splits(path: Path, meta: dict[str, Any]) -> None:
    """Raises SceneError unless the lists of the splits are all there, or none: a run that was trained without one would not
    open."""
    keys = [f"{split}_filenames" for split in ("train", "val", "test")]
    given = [key for key in keys if key in meta]
    for key in keys if given else ():
        names = meta.get(key)
        if key not in meta:
            raise SceneError(
                f"{path} has {' and '.join(given)}, but no {key}, without which a run on it cannot be opened; add it (the photos "
                "that are held out, as for val_filenames), or take all of these lists out."
            )
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SceneError(f"{path} has {key} that are no list of names; give the file_path of some frames.")


def _check_frame(name: str, meta: dict[str, Any], frame: dict[str, Any]) -> None:
    """Raises SceneError, which begins with `name`, when a frame lacks what its camera and its picture need."""
    if not isinstance(frame.get("file_path"), str) or not frame["file_path"]:
        raise SceneError(f"{name} has no file_path; give the path of its picture, or take the frame out.")
    pose = _numbers(frame.get("transform_matrix"))
    if pose is None or pose.shape != (4, 4):
        raise SceneError(f"{name} has no transform_matrix of 4 × 4 finite numbers; mend it, or take the frame out.")
    if flat(pose[:3, :3]):
        raise SceneError(
            f"{name} has a transform_matrix that turns space flat; give a rotation, or take the frame out."
        )
    for key in INTRINSICS:
        given = meta if key in meta else frame
        value = _numbers(given.get(key))
        if value is None or value.ndim or (value <= 0 and key not in ("cx", "cy")):
            what = f"the {key} {given[key]!r}" if key in given else f"no {key}"
            raise SceneError(f"{name} has {what}; give it in pixels, for all frames together or for each.")


def check_what_is_read(name: str, meta: dict[str, Any], frame: dict[str, Any]) -> None:
    """Raises SceneError, which begins with `name`, when a frame says of its camera what nerfstudio's parser passes over: it takes
    what stands at the top from there for all frames."""
    _check_model(name, meta, frame)
    if (meta.get("is_fisheye") or frame.get("is_fisheye")) and kind_of(meta, frame) is CameraType.PERSPECTIVE:
        raise SceneError(f'{name} is_fisheye, which is not read; write "camera_model": "OPENCV_FISHEYE" in its place.')
    top = any(key in meta for key in DISTORTION_AT_THE_TOP)
    for key in (*INTRINSICS, *DISTORTION, "distortion_params"):
        read = meta.get(key, 0.0 if top and key in DISTORTION else None)
        if key in frame and read is not None and not np.array_equal(frame[key], read):
            raise SceneError(
                f"{name} has the {key} {frame[key]!r}, but what counts is {read!r} of the top of the file; write {key} in one of "
                "the two places."
            )
    if not top and meta.get("k4"):
        raise SceneError(
            f"{name} gets no k4, which stands alone at the top; write k1, k2 and k3 beside it, 0 if need be."
        )


def _check_model(name: str, meta: dict[str, Any], frame: dict[str, Any]) -> None:
    """Raises SceneError, which begins with `name`, for a camera model that there is not."""
    model = model_of(meta, frame)
    if model not in [*CAMERA_MODEL_TO_TYPE]:
        raise SceneError(f"{name} has the camera_model {model!r}; give one of: {', '.join(CAMERA_MODEL_TO_TYPE)}.")


def _check_mixture(path: Path, meta: dict[str, Any]) -> None:
    """Raises SceneError when frames of several camera models cannot be trained together, or what stands at the top of the file
    is not meant for all."""
    kinds = {kind_of(meta, frame) for frame in meta["frames"]}
    if len(kinds) > 1 and not kinds <= MIXED:
        names = ", ".join(sorted(kind.name for kind in kinds))
        raise SceneError(
            f"{path} has frames of several camera models ({names}), of which only {' and '.join(sorted(kind.name for kind in MIXED))} "
            "may stand together; train the others apart."
        )
    shared = [key for key in (*DISTORTION, "distortion_params") if meta.get(key)] if len(kinds) > 1 else []
    if kinds != {kind_of(meta, {})} and "fisheye_crop_radius" in meta:
        shared.append("fisheye_crop_radius")
    if shared:
        raise SceneError(
            f"{path} has {' and '.join(shared)} at the top, but camera models in its frames; write one camera_model at the top "
            "and train pictures of other models apart, or take what is at the top out."
        )


def flat(axes: Float[np.ndarray, "*n 3 3"]) -> Bool[np.ndarray, "*n"]:
    """Whether three axes, the columns, span no space, whatever their lengths."""
    with np.errstate(all="ignore"):  # numbers too large to be multiplied are no axes either
        lengths = np.linalg.norm(axes, axis=-2).prod(-1)
        return ~(np.abs(np.linalg.det(axes)) > 1e-6 * lengths)


def _numbers(value: Any) -> Float[np.ndarray, "..."] | None:
    """`value` as an array, or None when it is not made of finite numbers alone."""
    try:
        array = np.array(value)
    except ValueError:  # ragged
        return None
    return array.astype(float) if array.dtype.kind in "iuf" and np.isfinite(array).all() else None


def check_places(origins: Float[np.ndarray, "N 3"], name: str) -> None:
    """Raises SceneError, which names `name`, when cameras have no parallax."""
    if np.ptp(origins, axis=0).max() <= ONE_PLACE * np.abs(origins).max():
        place = ", ".join(f"{x:g}" for x in origins[0])
        raise SceneError(
            f"All {len(origins)} cameras of {name} are at one place ({place}), and nothing can be measured from there; take photos "
            "from different places, or mend the poses."
        )


def check_cameras(cameras: Cameras, name: str, for_training: bool = True) -> Capture:
    """What the cameras that a parser made of `name` say of the capture.

    Raises SceneError when they cannot be trained from, and says what is odd; a run that is only looked at hears neither of
    mirrored cameras nor of odd ones.
    """
    if not len(cameras):
        raise SceneError(f"{name} has no photo to train on; {_PARSERS}, or its options.")
    if not cameras.camera_to_worlds.isfinite().all():
        raise SceneError(f"{name} has poses that are no finite numbers; {_PARSERS}.")
    for option, focal in (("horizontal", cameras.fx), ("vertical", cameras.fy)):
        if not (focal > 0).all() or not focal.isfinite().all():
            raise SceneError(f"{name} has a {option} focal length of {float(focal.min()):g} pixels; {_PARSERS}.")
    poses = cameras.camera_to_worlds[:, :3]
    check_places(poses[..., 3].double().numpy(), name)
    everywhere = [kind.value for kind in (*CameraType,) if kind not in ONE_WAY]
    capture = capture_of(poses, bool(torch.isin(cameras.camera_type, torch.tensor(everywhere)).any()))
    if for_training:
        check_handedness(poses.double().numpy(), name)
        if remark := axes_remark(capture):
            CONSOLE.print(f"[bold yellow]Warning:[/bold yellow] {escape(remark)}")
    return capture


def check_handedness(poses: Float[np.ndarray, "N 3 4"], name: str) -> None:
    """Raises SceneError when cameras of `name` are mirrored: their axes are no rotation of a camera's."""
    mirrored = np.linalg.det(poses[:, :, :3]) < 0
    if mirrored.any():
        some = "" if mirrored.all() else f", {int(mirrored.argmax())} (counted from 0) the first of them"
        raise SceneError(
            f"{mirrored.sum()} of {len(poses)} cameras of {name} are mirrored (the determinant of their axes is below 0){some}; "
            "negate the column of the axis that points the other way: x to the right, y up, z backwards. Where it is the "
            "world that is left-handed, negate a row of each pose."
        )


def axes_remark(capture: Capture) -> str | None:
    """What to say of cameras that nearly all have behind them what they are turned about; None where there is nothing to say."""
    if capture.panoramas or capture.turn <= TURNING or capture.there >= 0.5:
        return None
    return (
        f"The cameras turn through {capture.turn:.0f}°, and {1 - capture.there:.0%} of them have behind them the point that they "
        "are turned about. Where they look at one thing, the poses are in OpenCV's axes, as COLMAP and SLAM programs give them, "
        "and training would end in noise: negate the columns 1 and 2 (counted from 0) of each transform_matrix. Where they "
        "look outwards, as from the middle of a room, all is well."
    )


def check_files(paths: Sequence[Path], poses: Float[Tensor, "N 3 4"]) -> None:
    """Raises SceneError when one file is the picture of two cameras; views of two splits may be the same."""
    seen: dict[Path, int] = {}
    for i, path in enumerate(paths):
        other = seen.setdefault(path, i)
        if not torch.allclose(poses[other], poses[i], atol=1e-5):
            raise SceneError(
                f"{path} is the picture of two cameras; give each a file of its own. Where smaller photos are taken, nerfstudio "
                "leaves out the folders of their names: take the photos as they are with --downscale-factor 1 behind the "
                "dataparser's name at the end of the command (nerfstudio-data), or give every photo a name of its own."
            )


def check_pictures(
    paths: Sequence[Path], headers: Mapping[Path, Header], cameras: Cameras, masks: Sequence[Path] | None
) -> None:
    """Raises SceneError when a picture, or its mask, is not of its camera's size; says once what loses quality.

    A row or a column less than the camera has is let pass: tools round differently when they shrink. Pictures without a
    header are passed over.
    """
    sizes = zip(cameras.width.flatten().tolist(), cameras.height.flatten().tolist(), strict=True)
    for i, (path, (width, height)) in enumerate(zip(paths, sizes, strict=True)):
        if path not in headers:
            continue
        header = headers[path]
        if not (width - 1 <= header.width <= width and height - 1 <= header.height <= height):
            raise SceneError(
                f"{path} is {header.width} × {header.height} pixels, but its camera {width} × {height}; give the picture its "
                "camera's size, or mend w, h and the focal lengths of the data."
            )
        if masks:
            _check_mask(masks[i], path, header)
    blurred = [mask for mask in masks or () if mask.suffix.lower() in BLURRING]
    if blurred:
        said = f"{len(blurred)} of {len(paths)} masks are in a format that blurs (such as {blurred[0].name})"
        CONSOLE.print(
            f"[bold yellow]Warning:[/bold yellow] {escape(said)}: what is nearly black there counts as seen. Save them as PNG."
        )
    for remark in dict.fromkeys(header.remark for header in headers.values() if header.remark):
        odd = [path.name for path, header in headers.items() if header.remark == remark]
        what, _, loss = remark.partition(": ")
        said = f"{len(odd)} of {len(paths)} pictures {what} (such as {odd[0]}): {loss}."
        CONSOLE.print(f"[bold yellow]Warning:[/bold yellow] {escape(said)}")


def _check_mask(mask: Path, path: Path, header: Header) -> None:
    read = picture_header(mask)
    if (read.width, read.height) != (header.width, header.height):
        raise SceneError(
            f"The mask {mask} is {read.width} × {read.height} pixels, but {path.name} {header.width} × {header.height}; "
            "give both one size."
        )
    if read.mode not in ("1", "L", "P", "I", "I;16"):
        raise SceneError(f"The mask {mask} has colours ({read.mode}); save it in grey, black where nothing counts.")
