"""`ovs3d-data`: scenes in the layout of the 3D-OVS data set, whose cameras are LLFF's.

SCENE/images/…                photos; sorted by name they are in the order of the cameras
SCENE/poses_bounds.npy        a row of 17 numbers a photo: 3×5 of pose and intrinsics, then nearest and farthest depth
SCENE/segmentations/…         masks of some of the photos, see `annotations`

nerfstudio imports this module while it lists its dataparsers: it must import no datamanager and no pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras import camera_utils
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.plugins.registry_dataparser import DataParserSpecification
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.markup import escape
from torch import Tensor

from ovs3d_nerfstudio.data.annotations import Annotations
from ovs3d_nerfstudio.data.scene_checks import flat
from ovs3d_nerfstudio.engine.option_checks import POSITIVE, SIZE, check_fields
from ovs3d_nerfstudio.errors import CommandError, user_errors
from ovs3d_nerfstudio.files import written_beside
from ovs3d_nerfstudio.pictures import SUFFIXES, list_pictures, opened_picture, picture_size, view_names
from ovs3d_nerfstudio.prompts.prompts import find_classes_file

HOLD_EVERY = 8
"""Where nothing is annotated, every eighth photo is held out, as is usual with LLFF scenes."""
UNREAD = (".heic", ".heif", ".avif", ".dng")
"""Photos as phones write them too, which nothing here reads."""
MAX_SIDE = 1600
"""Longer sides of photos than this many pixels are halved until they are not, as nerfstudio does."""


@dataclass
class OVS3DDataParserConfig(DataParserConfig):
    """Scenes in the layout of the 3D-OVS data set: images, poses_bounds.npy (LLFF), segmentations."""

    _target: type = field(default_factory=lambda: OVS3DDataParser)
    data: Path = Path()
    """The scene's folder, or its poses_bounds.npy."""
    protocol: Literal["held-out", "paper"] = "held-out"
    """held-out: annotated photos are not trained on; paper: they are, as in 3D-OVS. Their masks are never trained on, and
    either way they are what is evaluated. Without annotations, every eighth photo takes their place."""
    downscale_factor: int | None = None
    """How much smaller to make the photos; copies go to images_<factor>. Default: halve until no side is above 1600 pixels."""
    scale_factor: float = 1.0
    """How much to scale the camera origins by, after `auto_scale_poses`."""
    scene_scale: float = 1.0
    """Half the side of the region of interest, after scaling."""
    orientation_method: Literal["pca", "up", "vertical", "none"] = "up"
    """What turns the scene upright."""
    center_method: Literal["poses", "focus", "none"] = "poses"
    """What becomes the origin."""
    auto_scale_poses: bool = True
    """Whether to scale the cameras into ±1."""


class OVS3DDataParser(DataParser):
    """Reads an LLFF scene; a scene that cannot be used ends the command with a sentence."""

    config: OVS3DDataParserConfig

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs) -> DataparserOutputs:
        with user_errors():
            return self._read(split)

    def _read(self, split: str) -> DataparserOutputs:
        config = self.config
        check_fields("--", config, {"downscale_factor": SIZE, "scale_factor": POSITIVE, "scene_scale": POSITIVE})
        root = config.data.parent if config.data.is_file() else config.data
        photos = list_photos(root / "images")
        poses, sizes, focals = read_poses_bounds(root / "poses_bounds.npy", len(photos))
        evaluated = self._evaluated(root, photos)
        photos = downscaled(photos, config.downscale_factor)
        chosen = np.flatnonzero(evaluated) if split != "train" else np.arange(len(photos))
        if split == "train" and config.protocol == "held-out":
            chosen = np.flatnonzero(~evaluated)
        if not len(chosen):
            raise CommandError(
                f"All {len(photos)} photos of {root} are evaluated, so the held-out protocol leaves none to train on; choose "
                "--protocol paper, or add photos."
            )
        oriented, transform = camera_utils.auto_orient_and_center_poses(
            poses, method=config.orientation_method, center_method=config.center_method
        )
        scale = config.scale_factor
        if config.auto_scale_poses:
            scale /= max(float(oriented[:, :3, 3].abs().max()), 1e-9)
        oriented[:, :3, 3] *= scale
        actual = torch.tensor([picture_size(photos[i]) for i in chosen], dtype=torch.float32)
        focal = focals[chosen, None] * actual / sizes[chosen]
        cameras = Cameras(
            camera_to_worlds=oriented[chosen, :3],
            fx=focal[:, :1],
            fy=focal[:, 1:],
            cx=actual[:, :1] / 2,
            cy=actual[:, 1:] / 2,
            width=actual[:, :1].int(),
            height=actual[:, 1:].int(),
            camera_type=CameraType.PERSPECTIVE,
        )
        return DataparserOutputs(
            image_filenames=[photos[i] for i in chosen],
            cameras=cameras,
            scene_box=SceneBox(aabb=config.scene_scale * torch.tensor([[-1.0] * 3, [1.0] * 3])),
            dataparser_transform=transform,
            dataparser_scale=scale,
        )

    def _evaluated(self, root: Path, photos: list[Path]) -> np.ndarray:
        """Which photos are evaluated, one truth value each."""
        if find_classes_file(root) is None:
            CONSOLE.log(escape(f"{root} has no annotations: every {HOLD_EVERY}th photo is evaluated."))
            return np.arange(len(photos)) % HOLD_EVERY == 0
        annotated = set(Annotations(root, photos).views)
        CONSOLE.log(escape(f"Protocol '{self.config.protocol}': {len(annotated)} annotated photos are evaluated."))
        return np.array([name in annotated for name in view_names(photos).values()])


def list_photos(folder: Path) -> list[Path]:
    """The photos of a folder, sorted by name. Raises CommandError when there is none."""
    photos = list_pictures(folder)
    if not photos:
        raise CommandError(f"There are no photos in {folder}; put them there, as {', '.join(SUFFIXES)}.")
    unread = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in UNREAD and path.name[0] != ".")
    if unread:
        CONSOLE.print(
            f"[bold yellow]Warning:[/bold yellow] {len(unread)} photos of {escape(str(folder))} are left out, as "
            f"{', '.join(sorted({Path(name).suffix for name in unread}))} cannot be read: {escape(', '.join(unread))}. Save "
            "them as JPEG to have them used."
        )
    return photos


def read_poses_bounds(
    path: Path, count: int
) -> tuple[Float[Tensor, "N 4 4"], Float[Tensor, "N 2"], Float[Tensor, " N"]]:
    """Cameras of an LLFF file: OpenGL camera-to-world poses; width and height, and focal length, in pixels.

    Raises CommandError when the file is missing, no such array, or not of `count` photos.
    """
    again = "write it again with LLFF's imgs2poses"
    try:
        rows = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise CommandError(
            f"{path} does not exist; a scene of ovs3d-data needs it, nerfstudio-data does not."
        ) from None
    except OSError:
        raise
    except Exception as error:  # the reader of NumPy's header lets out SyntaxError, TokenError, MemoryError…
        raise CommandError(f"{path} is no array of numbers ({error}); {again}.") from None
    if not isinstance(rows, np.ndarray):
        raise CommandError(f"{path} is no array of numbers but an archive of {', '.join(rows)}; {again}.")
    with np.errstate(over="ignore"):  # a number too large for 32 bits is as bad as infinity
        numbers = rows.dtype.kind in "iuf" and np.isfinite(rows.astype(np.float32)).all()
    if rows.ndim != 2 or rows.shape[1] != 17 or not numbers:
        raise CommandError(f"{path} is an array of {rows.shape}; it must be of 17 finite numbers a photo; {again}.")
    if len(rows) != count:
        raise CommandError(f"{path} has {len(rows)} cameras, but there are {count} photos; remove what has no partner.")
    table = torch.from_numpy(rows[:, :15].astype(np.float32)).view(-1, 3, 5)
    down, right, back, origin, intrinsics = table.unbind(-1)
    broken = flat(table[..., :3].numpy()) | (intrinsics <= 0).any(-1).numpy()
    if broken.any():
        raise CommandError(
            f"{path}: camera {int(broken.argmax())}, counted from 0, has no rotation, or a size or focal length of 0 or less; "
            f"{again}."
        )
    poses = torch.eye(4).repeat(count, 1, 1)
    poses[:, :3] = torch.stack([right, -down, back, origin], -1)
    return poses, intrinsics[:, [1, 0]], intrinsics[:, 2]


def downscaled(photos: list[Path], factor: int | None) -> list[Path]:
    """The photos `factor` times smaller, made in `images_<factor>` beside their folder where they are not there yet.

    Raises PictureError for a photo that cannot be read.
    """
    if factor is None:
        factor, side = 1, max(picture_size(photos[0]))
        while side / factor > MAX_SIDE:
            factor *= 2
    if factor == 1:
        return photos
    folder = photos[0].parent.with_name(f"{photos[0].parent.name}_{factor}")
    folder.mkdir(exist_ok=True)
    missing = [photo for photo in photos if not (folder / photo.name).exists()]
    if missing:
        CONSOLE.log(escape(f"Making {len(missing)} photos of 1/{factor} the size in {folder}."))
    for photo in missing:
        with opened_picture(photo) as picture:
            # As nerfstudio's own copies: not turned by the photo's tag, for its cameras are not.
            width, height = (max(1, side // factor) for side in picture.size)
            small, kind = picture.resize((width, height), Image.Resampling.LANCZOS), picture.format
        with written_beside(folder / photo.name) as beside:
            small.save(beside, format=kind, quality=95)
    return [folder / photo.name for photo in photos]


ovs3d_data = DataParserSpecification(OVS3DDataParserConfig(), "3D-OVS layout: images, poses_bounds.npy, segmentations.")
