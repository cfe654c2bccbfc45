"""The embedded demo scene: blocks covered with photographs, on a puzzle mat before a wall of books.

Made in seconds from photographs that scikit-image and scikit-learn ship, so that the whole method can be tried without a
download, and with geometry and labels that are known exactly. It is made for the offline encoder, which knows the ImageNet
classes: the photographs show what such a network can name, and lie so large on the blocks that a patch of the pyramid
holds enough of them. The wall and the mat are drawn, for no photograph at hand shows a surface that it can name.

Photographs: cat by Stefan van der Walt and coffee by Rachel Michetti (CC0), rocket by SpaceX (public domain), motorcycle
of the Middlebury 2014 stereo benchmark, palace by danielbuechele (CC BY 2.0).
"""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from ovs3d_nerfstudio.demo.raycast import Box, Camera, Cylinder, Floor, Solid, Texture, cast, render
from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.prompts.prompts import CLASSES_FILE

SCENE_FILE = "scene.json"
"""Beside transforms.json: what the scene was made with, and where its blocks stand."""
VERSION = 1
"""Counts changes of the scene: pictures of another version are not taken for this one's."""
ANNOTATED_TRAIN_VIEWS = 4
"""Training views that have masks as well, for the paper's protocol."""
VIEW_ANGLE = 48.7
"""Horizontal angle of view of the cameras, in degrees."""
TARGET = (0.0, 0.0, 0.45)
"""What all cameras have in the middle of their pictures."""


class DemoError(UserError):
    """The demo scene cannot be made."""


def make_scene(folder: Path, width: int = 400, train_views: int = 40, test_views: int = 8) -> Path:
    """Makes the demo scene in `folder`, which then is a nerfstudio dataset with annotations; returns `folder`.

    A complete scene of the same arguments is left as it is. The scene is made in a folder beside `folder` and renamed, so
    that there is never half of one. Equal arguments give equal files.

    Args:
        width: of the pictures in pixels; they are three quarters as high. A multiple of 4.
        train_views: pictures to train with; four of them (or all, if there are fewer) are annotated too.
        test_views: pictures held out, all annotated.

    Raises DemoError when the photographs are not installed, or `folder` holds something else.
    """
    made_of = {"version": VERSION, "width": width, "train_views": train_views, "test_views": test_views}
    if _is_complete(folder, made_of):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoError(
            f"{folder} is there but is not the demo scene as asked for; move it away or name another folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(beside, made_of)
        beside.chmod(0o755)
        try:
            beside.replace(folder)
        except OSError:
            # Somebody else made it meanwhile: a folder that is not empty cannot be replaced.
            if not _is_complete(folder, made_of):
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _is_complete(folder: Path, made_of: dict[str, int]) -> bool:
    """Whether `folder` holds this very scene; a scene is renamed into place whole, so what it lacks was removed since."""
    try:
        if json.loads((folder / SCENE_FILE).read_text())["made_of"] != made_of:
            return False
        frames = json.loads((folder / "transforms.json").read_text())["frames"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (folder / CLASSES_FILE).is_file() and all((folder / frame["file_path"]).is_file() for frame in frames)


def _write(folder: Path, made_of: dict[str, int]) -> None:
    solids = demo_solids()
    train = train_cameras(made_of["train_views"], made_of["width"])
    test = held_out_cameras(made_of["test_views"], made_of["width"])
    cameras = {f"train_{i:02d}": camera for i, camera in enumerate(train)}
    cameras |= {f"test_{i:02d}": camera for i, camera in enumerate(test)}
    spread = np.linspace(0, len(train) - 1, min(ANNOTATED_TRAIN_VIEWS, len(train))).round().astype(int)
    annotated = {f"train_{i:02d}" for i in spread} | {stem for stem in cameras if stem.startswith("test")}
    classes = sorted({solid.name for solid in solids})
    (folder / "images").mkdir()
    (folder / CLASSES_FILE).parent.mkdir()
    (folder / CLASSES_FILE).write_text("".join(f"{name}\n" for name in classes))

    def write_view(stem: str) -> None:
        Image.fromarray(render(solids, cameras[stem])).save(folder / "images" / f"{stem}.png")
        if stem in annotated:
            _write_masks(folder / CLASSES_FILE.parent / stem, solids, cameras[stem])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_view, cameras))
    (folder / "transforms.json").write_text(json.dumps(transforms(cameras), indent=1) + "\n")
    boxes = {solid.name: solid.bounds().tolist() for solid in blocks(solids)}
    (folder / SCENE_FILE).write_text(json.dumps({"made_of": made_of, "boxes": boxes}, indent=1) + "\n")


def _write_masks(folder: Path, solids: Sequence[Solid], camera: Camera) -> None:
    """One mask for each class that the camera sees, exact at the centres of the pixels."""
    index, _ = cast(solids, camera)
    folder.mkdir()
    for name in {solid.name for solid in solids}:
        mask = np.isin(index, [i for i, solid in enumerate(solids) if solid.name == name])
        if mask.any():
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}.png")


def transforms(cameras: dict[str, Camera]) -> dict:
    """The content of transforms.json."""
    files = {stem: f"images/{stem}.png" for stem in cameras}
    camera = next(iter(cameras.values()))
    held_out = [path for stem, path in files.items() if stem.startswith("test")]
    return {
        "camera_model": "OPENCV",
        "fl_x": camera.focal,
        "fl_y": camera.focal,
        "cx": camera.width / 2,
        "cy": camera.height / 2,
        "w": camera.width,
        "h": camera.height,
        # The cameras look down from one side, so their mean up vector, nerfstudio's default, is not the scene's.
        "orientation_override": "none",
        "train_filenames": [path for stem, path in files.items() if stem.startswith("train")],
        # Nerfstudio evaluates on `val` while it trains, and afterwards on `test`; a split that is not listed raises.
        "val_filenames": held_out,
        "test_filenames": held_out,
        "frames": [
            {"file_path": files[stem], "transform_matrix": camera.pose.tolist()} for stem, camera in cameras.items()
        ],
    }


def demo_solids() -> list[Solid]:
    """The scene's geometry. Each solid's name is a prompt of what is seen on it.

    Raises DemoError when the photographs are not installed.
    """
    cat = _photograph("skimage/data/chelsea.png", (75, 0, 375, 300))
    coffee = _photograph("skimage/data/coffee.png", (140, 0, 420, 280))
    rocket = _photograph("skimage/data/rocket.jpg", (285, 105, 355, 350))
    motorbike = _photograph("skimage/data/motorcycle_left.png", (120, 110, 620, 450))
    palace = _photograph("sklearn/datasets/images/china.jpg", (168, 95, 335, 305))
    # Whole photographs fit on the fronts of the boxes and go an integer number of times round the cylinders.
    return [
        Box("cat", Texture(cat), (0.95, 0.95), (-0.98, -0.48), (0.95, 0.95, 0.95), turn=15),
        Cylinder("espresso", Texture(coffee), (2 * np.pi * 0.45 / 3,) * 2, (0.21, -1.03), 0.45, 0.59),
        Box("motorbike", Texture(motorbike), (1.36, 0.925), (1.15, -0.2), (1.36, 0.65, 0.925), turn=-15),
        Cylinder("space rocket", Texture(rocket), (2 * np.pi * 0.46 / 6, 1.75), (-0.95, 0.58), 0.46, 1.75),
        Box("palace", Texture(palace), (1.3, 1.635), (0.35, 0.92), (1.3, 1.0, 1.635)),
        Cylinder("books", Texture(_bookshelf()), (2.54, 1.8), (0.0, -1.8), 3.7, 12.0, hollow=True),
        Floor("puzzle pieces", Texture(_puzzle()), (1.4, 1.4)),
    ]


def blocks(solids: Sequence[Solid]) -> list[Solid]:
    """The solids that stand in the room: all but its wall and its floor."""
    return [solid for solid in solids if isinstance(solid, Box) or (isinstance(solid, Cylinder) and not solid.hollow)]


def train_cameras(count: int, width: int) -> list[Camera]:
    """Cameras on an arc of ±46° before the scene, at heights and distances that never repeat."""
    golden = np.arange(count) * 0.618034 % 1, np.arange(count) * 0.754878 % 1
    return [
        _camera(azimuth, 25 + 13 * up, 3.7 + 0.35 * out, width)
        for azimuth, up, out in zip(np.linspace(-46, 46, count), *golden, strict=True)
    ]


def held_out_cameras(count: int, width: int) -> list[Camera]:
    """Cameras between those of the training, along a smooth path."""
    return [
        _camera(azimuth, 31 + 4 * np.sin(np.radians(4 * azimuth)), 3.9, width)
        for azimuth in np.linspace(-38, 38, count)
    ]


def direction(azimuth: float, elevation: float) -> Float[ndarray, "3"]:
    """The unit vector `azimuth` degrees right of the front and `elevation` degrees up."""
    a, e = np.radians([azimuth, elevation])
    return np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])


def _camera(azimuth: float, elevation: float, distance: float, width: int) -> Camera:
    """A camera `azimuth` degrees right of the front and `elevation` degrees up, `distance` from the target."""
    away = distance * direction(azimuth, elevation)
    focal = width / 2 / np.tan(np.radians(VIEW_ANGLE / 2))
    return Camera.looking_at((TARGET + away).tolist(), TARGET, width, width * 3 // 4, float(focal))


def _photograph(path: str, crop: tuple[int, int, int, int]) -> UInt8[ndarray, "h w 3"]:
    """A part (left, top, right, bottom) of a photograph that lies in an installed package, whose name `path` starts with."""
    package, _, inside = path.partition("/")
    # The package is found, not imported: that would take seconds, and scikit-image might want to download.
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / inside).is_file():
            with Image.open(Path(folder) / inside) as photograph:
                return np.asarray(photograph.convert("RGB").crop(crop))
    raise DemoError(f"The demo scene needs the photograph {path}; run: pip install 'ovs3d-nerfstudio[demo]'")


def _puzzle(pieces: int = 6, side: int = 64) -> UInt8[ndarray, "h w 3"]:
    """A drawn jigsaw puzzle of `pieces` × `pieces` pieces of `side` pixels in six colours; it repeats without a seam."""
    rng = np.random.default_rng(0)
    palette = np.array([[214, 60, 50], [240, 180, 40], [60, 150, 80], [50, 110, 190], [235, 120, 40], [120, 80, 160]])
    colours = np.full((pieces, pieces), -1)
    for row, column in np.ndindex(pieces, pieces):
        around = [(row - 1, column), (row, column - 1), ((row + 1) % pieces, column), (row, (column + 1) % pieces)]
        free = set(range(len(palette))) - {int(colours[place]) for place in around}
        colours[row, column] = rng.choice(sorted(free))
    y, x = np.mgrid[: pieces * side, : pieces * side] / side
    piece = y.astype(int) * pieces + x.astype(int)
    outwards = rng.choice([-1, 1], (2, pieces, pieces))
    # Each piece's lower and right edge has a knob, into it or out of it; row and column −1 are the last ones, seen again.
    for row, column in np.ndindex(pieces + 1, pieces + 1):
        i, j = row - 1, column - 1
        for sign, (down, right) in zip(outwards[:, i, j], ((1, 0), (0, 1)), strict=True):
            knob_y, knob_x = i + (1 + down) / 2 + 0.12 * sign * down, j + (1 + right) / 2 + 0.12 * sign * right
            owner_row, owner_column = (i, j) if sign > 0 else (i + down, j + right)
            knob = (y - knob_y) ** 2 + (x - knob_x) ** 2 < 0.2**2
            piece[knob] = owner_row % pieces * pieces + owner_column % pieces
    tone = 0.94 + 0.12 * rng.random(pieces**2)
    picture = palette[colours.ravel()[piece]] * tone[piece][..., None]
    edge = (piece != np.roll(piece, 1, 0)) | (piece != np.roll(piece, 1, 1))
    edge |= np.roll(edge, -1, 0) | np.roll(edge, -1, 1)
    light = np.roll(edge, (2, 2), (0, 1))
    picture[light] = 0.6 * picture[light] + 0.4 * 255
    picture[edge] *= 0.35
    return picture.clip(0, 255).astype(np.uint8)


def _bookshelf(shelves: int = 3, shelf: int = 170, width: int = 720) -> UInt8[ndarray, "h w 3"]:
    """Drawn shelves of `shelf` pixels' height, full of books with titles and gilded bands."""
    rng = np.random.default_rng(0)
    board, wood, gold, cream = 14, np.array([120, 80, 45]), np.array([230, 200, 110]), np.array([235, 225, 190])
    picture = np.empty((shelves * shelf, width, 3))
    for bottom in range(shelf - board, shelves * shelf, shelf):
        picture[bottom + board - shelf : bottom] = 0.28 * wood
        picture[bottom : bottom + board] = 1.15 * wood
        picture[bottom : bottom + 3] = 1.5 * wood
        left = 0
        while left < width:
            right = min(left + int(rng.integers(11, 30)), width)
            height = int(rng.uniform(0.66, 0.93) * (shelf - board))
            hue = rng.choice([0, 0.02, 0.08, 0.12, 0.35, 0.55, 0.6, 0.65, 0.95])
            cover = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.15, 0.8), rng.uniform(0.25, 0.9)))
            spine = np.broadcast_to(cover, (height, right - left, 3)).copy()
            if rng.random() < 0.75:
                title = int(height * rng.uniform(0.1, 0.3))
                label = 0.3 * cover + 0.7 * cream if cover.mean() < 150 else 0.35 * cover
                spine[title : title + int(height * rng.uniform(0.05, 0.3)), 2:-2] = label
            for band in (int(0.06 * height), int(0.9 * height)):
                spine[band : band + 2] = (cover + gold) / 2
            # Spines are round: darker towards their edges.
            across = np.linspace(-1, 1, right - left)[:, None]
            picture[bottom - height : bottom, left:right] = spine * (1 - 0.5 * across**4) * (1 - 0.12 * across)
            left = right
    return picture.clip(0, 255).astype(np.uint8)
