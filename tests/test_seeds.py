"""Geometry begins on what the photos show, in the training frame, whatever the cameras; and the log says why it begins there."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from plyfile import PlyData, PlyElement
from rich.console import Console
from test_data import NAMES, SOLIDS, Lens, classes_of, write_scene

from ovs3d_nerfstudio.data import seeds as module
from ovs3d_nerfstudio.data import stereo
from ovs3d_nerfstudio.data.seeds import FEWEST, RANDOM, Seeds, SeedsError, seed_points
from ovs3d_nerfstudio.data.sightings import find_sightings
from ovs3d_nerfstudio.demo.raycast import Camera, _first_hits
from ovs3d_nerfstudio.demo.scene import train_cameras

VIEWS, WIDTH = 12, 160


def cameras(lens: str | None) -> list[Camera]:
    found = []
    for camera in train_cameras(VIEWS, WIDTH):
        arguments = (camera.pose, camera.width, camera.height, 0.8 * WIDTH)
        found.append(Lens(*arguments, model=lens) if lens else Camera(*arguments))
    return found


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A scene of each lens, made when it is first asked for."""
    made: dict[str | None, Path] = {}

    def scene(lens: str | None = None) -> Path:
        if lens not in made:
            folder = tmp_path_factory.mktemp(lens or "pinhole") / "scene"
            made[lens] = write_scene(folder, cameras(lens), masks=lens is None)
        return made[lens]

    return scene


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Shared by the tests that do not ask how seeds are found."""
    return tmp_path_factory.mktemp("cache")


def parsed(scene: Path, masks: bool = False, points: bool = False):
    outputs = NerfstudioDataParserConfig(data=scene, load_3D_points=points).setup().get_dataparser_outputs("train")
    if not masks:
        outputs.mask_filenames = None
    return outputs


def seeds_of(outputs, cache: Path) -> tuple[Seeds, str]:
    """The seeds, and what was printed."""
    printed = io.StringIO()
    return seed_points(
        outputs, outputs.image_filenames, outputs.cameras, cache, Console(file=printed)
    ), printed.getvalue()


def to_data(outputs, points: np.ndarray) -> np.ndarray:
    """Points of the training frame in that of the data."""
    transform = outputs.dataparser_transform.double().numpy()
    return (points.astype(float) / outputs.dataparser_scale - transform[:, 3]) @ transform[:, :3]


def hits(outputs, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each training camera meets on its way to each point: the solid, and where, in lengths of the way."""
    points = to_data(outputs, positions)
    origins = to_data(outputs, outputs.cameras.camera_to_worlds[..., 3].numpy())
    met = [_first_hits(SOLIDS, o[:, None].astype(np.float32), (points - o).T.astype(np.float32)) for o in origins]
    index, distance = map(np.stack, zip(*met, strict=True))
    return index, distance


@pytest.mark.parametrize("lens", [None, "OPENCV", "OPENCV_FISHEYE"])
def test_pixels_become_rays_and_rays_pixels(scenes, lens):
    outputs = parsed(scenes(lens))
    view = module.read_view(outputs.image_filenames[2], None, outputs.cameras, 2)
    for seen in (view, view.smaller(WIDTH // 2)):
        pixels = np.random.default_rng(0).random((500, 2)) * seen.size
        rays = seen.rays(pixels)
        theirs = outputs.cameras.generate_rays(
            2, coords=torch.from_numpy(pixels * WIDTH / seen.size[0]).float().flip(-1)
        )
        np.testing.assert_allclose(rays, theirs.directions.numpy(), atol=1e-4)
        depth = np.linspace(0.1, 10, 500)
        back, depths = seen.project(view.centre + depth[:, None] * rays)
        np.testing.assert_allclose(back, pixels, atol=1e-2)
        np.testing.assert_allclose(depths, depth * (rays @ view.forward), rtol=1e-9)
        assert seen.inside(back).mean() > 0.99 and np.isnan(seen.project(view.centre - rays)[0]).all()


@pytest.mark.parametrize("lens", [None, "OPENCV", "OPENCV_FISHEYE"])
def test_points_lie_on_surfaces_in_the_training_frame(scenes, cache, lens):
    outputs = parsed(scenes(lens))
    seeds, _ = seeds_of(outputs, cache)
    assert seeds.positions.shape == seeds.colors.shape and len(seeds.positions) > 10_000
    assert (seeds.positions.dtype, seeds.colors.dtype) == (np.float32, np.uint8)
    _, distance = hits(outputs, seeds.positions)
    assert (np.abs(distance - 1).min(0) < 0.02).mean() > 0.94  # on what some camera meets first
    assert (distance.max(0) < 1.05).mean() > 0.9  # and before what none does
    assert "random" not in seeds.origin and f"{len(seeds.positions):,} points found in the photos" in seeds.origin


def test_all_things_get_points_with_their_colours(scenes, cache):
    outputs = parsed(scenes())
    seeds, _ = seeds_of(outputs, cache)
    index, distance = hits(outputs, seeds.positions)
    nearest = np.abs(distance - 1).argmin(0)
    solid = np.take_along_axis(index, nearest[None], 0)[0]
    assert set(classes_of(solid[solid >= 0])) == set(range(len(NAMES)))
    # Colours of photos: a point's is near that of the pixel where a camera that sees it has it.
    photo = np.asarray(Image.open(outputs.image_filenames[0])).astype(int)
    pixels, _ = cameras(None)[0].project(to_data(outputs, seeds.positions))
    seen = (np.abs(distance[0] - 1) < 0.01) & (pixels > 1).all(1) & (pixels < np.array(photo.shape[1::-1]) - 1).all(1)
    x, y = pixels[seen].astype(int).T
    off = np.abs(photo[y, x] - seeds.colors[seen]).mean()
    assert seen.sum() > 3000 and off < 15


def sightings_in(outputs, cache: Path):
    """The sightings, and what was printed."""
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    photos, masks = outputs.image_filenames, outputs.mask_filenames
    return find_sightings(photos, masks, outputs.cameras, cache, console, "cpu"), printed.getvalue()


@pytest.mark.parametrize("lens", [None, "OPENCV", "OPENCV_FISHEYE"])
def test_rays_end_where_the_photos_meet_the_scene(scenes, cache, lens):
    outputs = parsed(scenes(lens))
    sightings, printed = sightings_in(outputs, cache)
    assert f"where {len(sightings):,} rays end" in printed
    view, y, x = sightings.pixels.unbind(-1)
    assert set(view.tolist()) == set(range(len(outputs.cameras)))
    # nerfstudio's rays of these pixels.
    rays = outputs.cameras.generate_rays(view[:, None], coords=torch.stack([y, x], -1) + 0.5)
    origins, ends = rays.origins, rays.origins + sightings.distances[:, None] * rays.directions
    origins, ends = (to_data(outputs, points.numpy()) for points in (origins, ends))
    _, met = _first_hits(SOLIDS, origins.T.astype(np.float32), (ends - origins).T.astype(np.float32))
    # Nothing stands before, and something is there.
    assert (np.abs(met - 1) < 0.02).mean() > 0.9
    photos = [np.asarray(Image.open(path))[..., :3] for path in outputs.image_filenames]
    seen = np.stack([photos[i][row, column] for i, row, column in sightings.pixels.tolist()])
    assert np.abs(255 * sightings.colors.numpy() - seen).mean() < 15


def test_what_is_drawn_stays_together(scenes, cache):
    sightings, _ = sightings_in(parsed(scenes()), cache)
    drawn = sightings.draw(1000)
    rows = [
        [*map(tuple, torch.cat([s.pixels, s.distances[:, None], s.colors], -1).tolist())] for s in (sightings, drawn)
    ]
    assert len(drawn) == len(rows[1]) == 1000 and set(rows[1]) <= set(rows[0]) and len(set(rows[1])) > 900


def test_points_of_the_data_are_used_as_they_are(scenes, tmp_path):
    scene = scenes()
    points = np.random.default_rng(0).normal(size=(40, 3))
    colors = np.arange(120).reshape(40, 3)
    kinds = [(name, "f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.array([(*p, *c) for p, c in zip(points, colors, strict=True)], kinds)
    PlyData([PlyElement.describe(vertices, "vertex")]).write(str(tmp_path / "sparse.ply"))
    meta = json.loads((scene / "transforms.json").read_text())
    for frame in meta["frames"]:
        frame["file_path"] = str(scene / frame["file_path"])
        del frame["mask_path"]
    meta = {key: value for key, value in meta.items() if not key.endswith("_filenames")}
    (tmp_path / "transforms.json").write_text(json.dumps({**meta, "ply_file_path": "sparse.ply"}))
    outputs = parsed(tmp_path, points=True)
    seeds, printed = seeds_of(outputs, tmp_path / "cache")
    np.testing.assert_allclose(to_data(outputs, seeds.positions), points, atol=1e-5)
    assert (seeds.colors == colors).all()
    assert seeds.origin == "Gaussians begin at the 40 points that come with the data."
    assert not printed and not (tmp_path / "cache").exists()
    outputs.metadata["points3D_rgb"] = torch.zeros(0, 3, dtype=torch.uint8)
    assert "begin grey" in seeds_of(outputs, tmp_path / "cache")[0].origin
    outputs.metadata["points3D_xyz"][3, 1] = torch.nan
    with pytest.raises(SeedsError, match=r"not of three finite numbers each; write their PLY again"):
        seeds_of(outputs, tmp_path / "cache")


def test_masks_keep_points_away(scenes, cache):
    cat = [i for i, solid in enumerate(SOLIDS) if solid.name == "cat"]

    def on_the_cat(masks: bool) -> float:
        outputs = parsed(scenes(), masks)
        index, distance = hits(outputs, seeds_of(outputs, cache)[0].positions)
        return float((np.isin(index, cat) & (np.abs(distance - 1) < 0.01)).any(0).mean())

    assert on_the_cat(masks=False) > 0.03
    assert on_the_cat(masks=True) < 0.005


def test_plain_photos_begin_at_random_where_cameras_look_and_say_so(scenes, tmp_path):
    outputs = parsed(scenes())
    for i in range(len(outputs.image_filenames)):
        outputs.image_filenames[i] = tmp_path / f"{i}.png"
        Image.new("RGB", (WIDTH, WIDTH * 3 // 4), (200, 190, i)).save(outputs.image_filenames[i])
    seeds, _ = seeds_of(outputs, tmp_path)
    assert len(seeds.positions) == RANDOM and (seeds.colors[:, :2] == (200, 190)).all()
    assert "at 0 points found in the photos" in seeds.origin and f"{RANDOM:,} random ones" in seeds.origin
    views = [module.read_view(path, None, outputs.cameras, i) for i, path in enumerate(outputs.image_filenames)]
    seen = np.sum([view.inside(view.project(seeds.positions.astype(float))[0]) for view in views], 0)
    assert np.median(seen) >= 0.8 * len(views) and seen.min() >= 2


def test_nerfs_begin_without_points_where_few_are_found_and_say_so(scenes, tmp_path):
    outputs = parsed(scenes())
    outputs.image_filenames = outputs.image_filenames[:1] * 3
    outputs.cameras = outputs.cameras[torch.zeros(3, dtype=torch.long)]
    sightings, printed = sightings_in(outputs, tmp_path)
    assert sightings is None and "Only 0 points were found in the photos" in printed
    outputs.cameras.camera_type = torch.full_like(outputs.cameras.camera_type, CameraType.EQUIRECTANGULAR.value)
    sightings, printed = sightings_in(outputs, tmp_path)
    assert sightings is None and "no pinhole's or fisheye's" in printed


@pytest.mark.parametrize("count", [1, 3])
def test_photos_of_one_place_begin_at_random(scenes, tmp_path, count):
    outputs = parsed(scenes())
    outputs.image_filenames = outputs.image_filenames[:1] * count
    outputs.cameras = outputs.cameras[torch.zeros(count, dtype=torch.long)]
    seeds, _ = seeds_of(outputs, tmp_path)
    assert len(seeds.positions) == RANDOM and np.isfinite(seeds.positions).all() and "random" in seeds.origin


def test_few_points_are_kept_among_random_ones(scenes, tmp_path):
    """A small patch of each photo has texture."""
    outputs = parsed(scenes())
    for i, path in enumerate(outputs.image_filenames):
        photo = np.asarray(Image.open(path)).copy()
        rows, columns = np.mgrid[: photo.shape[0], : photo.shape[1]]
        photo[np.hypot(rows - 60, columns - 80) > 20] = 128
        outputs.image_filenames[i] = tmp_path / f"{i}.png"
        Image.fromarray(photo).save(outputs.image_filenames[i])
    seeds, _ = seeds_of(outputs, tmp_path)
    found = int(seeds.origin.split(" points found")[0].split()[-1].replace(",", ""))
    assert 0 < found < FEWEST and len(seeds.positions) == RANDOM


def test_a_second_call_reads_what_the_first_found(scenes, tmp_path):
    outputs = parsed(scenes())
    first, _ = seeds_of(outputs, tmp_path)
    second, printed = seeds_of(outputs, tmp_path)
    assert not printed
    same_seeds(first, second)
    again, printed = seeds_of(outputs, tmp_path / "elsewhere")
    assert "Stereo" in printed
    same_seeds(first, again)
    (file,) = tmp_path.glob("seeds-*/*.safetensors")
    whole = file.read_bytes()
    for torn in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(torn)
        mended, printed = seeds_of(outputs, tmp_path)
        assert "Stereo" in printed and file.read_bytes() == whole
        same_seeds(first, mended)


def same_seeds(one: Seeds, other: Seeds) -> None:
    assert one.positions.tobytes() == other.positions.tobytes() and one.colors.tobytes() == other.colors.tobytes()
    assert one.origin == other.origin


def test_other_photos_cameras_masks_and_settings_are_other_points(scenes, monkeypatch):
    outputs = parsed(scenes(), masks=True)
    photos, masks, cams = outputs.image_filenames, outputs.mask_filenames, outputs.cameras
    keys = {module.content_key(*given) for given in ((photos, masks, cams), (photos, [None] * len(photos), cams))}
    keys.add(module.content_key(photos[::-1], masks, cams))
    cams.fx[2] += 1
    keys.add(module.content_key(photos, masks, cams))
    cams.camera_to_worlds[3, 0, 3] += 1e-3
    keys.add(module.content_key(photos, masks, cams))
    assert len(keys) == 5
    before = module.settings()
    monkeypatch.setattr(module.stereo, "BLOCK", 7)
    assert module.settings() != before


def test_what_is_seen_through_is_no_point():
    """Three views agree on a wall at 4 m; two more see 5 m where its left half would be: that half is not there."""

    def seen(view: int, depth: np.ndarray) -> stereo.Rectified:
        centre, corner = np.array([0.1 * view, 0, 0]), np.array([-32.0, -24.0])
        return stereo.Rectified(view, np.eye(3), centre, 40.0, corner, depth, np.zeros((48, 64, 3), np.uint8))

    wall, beyond = np.full((48, 64), 4.0), np.full((48, 64), 5.0)
    beyond[:, 32:] = np.nan  # nothing is told there
    agreeing = [seen(view, wall) for view in range(3)]
    positions, _ = stereo.confirmed(agreeing, 0, 3072)
    assert len(positions) > 1000 and (positions[:, 0] < 0).any()
    left, _ = stereo.confirmed([*agreeing, seen(3, beyond), seen(4, beyond)], 0, 3072)
    # Views 3 and 4 are 0.3 and 0.4 m to the right: so far is what they tell nothing of, and what they do not see at all.
    assert 300 < len(left) < len(positions) and not ((left[:, 0] > -2.8) & (left[:, 0] < 0.2)).any()


def test_cameras_that_are_no_pinholes_end_with_a_sentence(scenes, tmp_path):
    outputs = parsed(scenes())
    outputs.cameras.camera_type = torch.full_like(outputs.cameras.camera_type, CameraType.EQUIRECTANGULAR.value)
    with pytest.raises(SeedsError, match=r"EQUIRECTANGULAR cameras.*ply_file_path"):
        seeds_of(outputs, tmp_path)
