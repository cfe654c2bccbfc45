"""Splats of any trainer are read with all that they hold, turned without a pixel changing, and what is no splat is said."""

import numpy as np
import pytest
import torch
from numpy.lib.recfunctions import repack_fields
from plyfile import PlyData, PlyElement
from scipy.spatial.transform import Rotation

from ovs3d_nerfstudio.data.ways import STAY, back, composed
from ovs3d_nerfstudio.gaussians.rasterization import harmonics, rasterization
from ovs3d_nerfstudio.gaussians.splat_files import SplatError, read_splat, splat_table
from ovs3d_nerfstudio.gaussians.splats import SH_OF_COLOUR, Splat
from ovs3d_nerfstudio.ply import with_labels, write_ply

COLUMNS = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2"]
COLUMNS += ["rot_0", "rot_1", "rot_2", "rot_3"]


def table_of(count: int = 5, rest: int = 0, extra: tuple = ()) -> np.ndarray:
    names = [*COLUMNS[:6], *(f"f_rest_{i}" for i in range(rest)), *COLUMNS[6:]]
    rng = np.random.default_rng(0)
    table = np.empty(count, [*((name, "f4") for name in names), *extra])
    for name in table.dtype.names:
        table[name] = rng.normal(size=count) if table.dtype[name].kind == "f" else rng.integers(0, 255, count)
    return table


def written(path, table, **form):
    PlyData([PlyElement.describe(table, "vertex")], **form).write(str(path))
    return path


@pytest.mark.parametrize("rest", [0, 9, 24, 45, 72])
@pytest.mark.parametrize("form", [{"byte_order": "<"}, {"byte_order": ">"}, {"text": True}])
def test_the_columns_of_any_trainer_stay_to_the_bit(tmp_path, rest, form):
    extra = (("nx", "f4"), ("filter_3D", "f8"), ("red", "u1"), ("segment", "i4"))
    original = table_of(rest=rest, extra=extra)
    table, splat = read_splat(written(tmp_path / "a.ply", original, **form))
    write_ply(tmp_path / "b.ply", with_labels(table, np.arange(5), np.full(5, 0.5)))
    after = PlyData.read(str(tmp_path / "b.ply"))["vertex"].data
    assert after.dtype.names == (*original.dtype.names, "class_id", "probability")
    for name in original.dtype.names:
        assert np.array_equal(after[name], original[name]) and after.dtype[name] == original.dtype[name], name
    assert after["class_id"].tolist() == [0, 1, 2, 3, 4]
    # Channel by channel, as Kerbl et al.'s trainer writes them.
    assert (splat.degree + 1) ** 2 == rest // 3 + 1 and splat.quats[2, 0] == original["rot_0"][2]
    if rest:
        assert splat.rest[1, 2, 1] == original[f"f_rest_{rest // 3 + 2}"][1]
    again = read_splat(written(tmp_path / "c.ply", splat_table(splat)))[1]
    assert all(torch.equal(one, other) for one, other in zip(vars(again).values(), vars(splat).values(), strict=True))


def test_plain_colours_are_taken_for_harmonics_of_degree_0(tmp_path):
    table = table_of(extra=tuple((name, "u1") for name in ("red", "green", "blue")))
    table = table[[name for name in table.dtype.names if not name.startswith("f_dc")]]
    _, splat = read_splat(written(tmp_path / "a.ply", repack_fields(table)))
    colours = torch.tensor(np.stack([table[name] for name in ("red", "green", "blue")], -1) / 255)
    assert torch.allclose(0.5 + SH_OF_COLOUR * splat.base.double(), colours, atol=1e-6)


def bad_files(folder) -> dict:
    """Files that are no splats, and what is said of each."""
    whole = table_of(50)
    strange = whole.copy()
    strange["scale_1"][7] = np.nan
    points = np.zeros(4, [(name, "f4") for name in "xyz"])
    files = {
        "points.ply": (points, "without opacity"),
        "nan.ply": (strange, "1 of the 50 Gaussians"),
        "none.ply": (whole[:0], "holds no Gaussians"),
        "one.ply": (whole[:1], "holds one Gaussian"),
        "flat.ply": (whole[[name for name in whole.dtype.names if name != "scale_2"]], "lacks the columns scale_2"),
        "odd.ply": (table_of(5, rest=10), "10 columns f_rest_"),
        "packed.ply": (np.zeros(4, [("packed_position", "u4"), ("packed_scale", "u4")]), "SuperSplat"),
    }
    said = {}
    for name, (table, sentence) in files.items():
        written(folder / name, repack_fields(table))
        said[folder / name] = sentence
    content = written(folder / "whole.ply", whole).read_bytes()
    raw = {
        "many.ply": (content.replace(b"vertex 50\n", b"vertex 10000000\n"), "is cut off"),
        "too-many.ply": (content.replace(b"vertex 50\n", b"vertex 90000000000000\n"), "is cut off"),
        "torn.ply": (content[:-20], "is cut off"),
        "header.ply": (content[:100], "is cut off"),
        "text.ply": (b"Dear diary,\nno splat today.\n", "cannot be read"),
        "noise.ply": (bytes(range(256)) * 20, "cannot be read"),
        "empty.ply": (b"", "cannot be read"),
        "faces.ply": (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "without vertices"),
        "a.spz": (b"\x1f\x8b", ".spz"),
        "a.splat": (b"", ".splat"),
        "a.ksplat": (b"", ".ksplat"),
        "a.sog": (b"", ".sog"),
    }
    for name, (data, sentence) in raw.items():
        (folder / name).write_bytes(data)
        said[folder / name] = sentence
    return said | {folder / "nowhere.ply": "does not exist"}


def test_what_is_no_splat_is_said_in_a_sentence(tmp_path):
    for path, sentence in bad_files(tmp_path).items():
        with pytest.raises(SplatError) as caught:
            read_splat(path)
        assert sentence in str(caught.value) and str(path) in str(caught.value) and str(caught.value).endswith(".")


def random_splat(degree: int, count: int = 40) -> Splat:
    draw = torch.Generator().manual_seed(degree)
    widths = (3, 3, 4, 1, 3)
    means, scales, quats, opacities, base = (torch.randn(count, width, generator=draw) for width in widths)
    rest = 0.2 * torch.randn(count, (degree + 1) ** 2 - 1, 3, generator=draw)
    return Splat(0.5 * means, 0.3 * scales - 1.5, quats, opacities, base, rest)


def similarity(mirror: bool = False) -> np.ndarray:
    linear = 0.4 * Rotation.from_euler("xyz", [0.3, -1.2, 2.0]).as_matrix() * ([-1, 1, 1] if mirror else 1)
    return np.c_[linear, [0.3, -0.2, 0.1]]


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_a_splat_and_a_camera_that_are_moved_alike_show_the_same(degree):
    splat, way = random_splat(degree), similarity()
    view = torch.eye(4)
    view[2, 3] = 4
    intrinsics = torch.tensor([[100.0, 0, 32], [0, 100, 32], [0, 0, 1]])

    def picture(splat, view):
        colours = torch.cat([splat.base[:, None], splat.rest], 1)
        shape = (splat.means, splat.quats, splat.scales.exp(), splat.opacities.sigmoid()[:, 0])
        return rasterization(*shape, colours, view[None], intrinsics[None], 64, 64, sh_degree=splat.degree)[0]

    moved_view = view @ torch.linalg.inv(torch.from_numpy(np.vstack([way, [0, 0, 0, 1]])).float())
    moved_view[:3] *= 0.4  # a camera is as large as the scene it is in
    assert torch.allclose(picture(splat.moved(way), moved_view), picture(splat, view), atol=1e-5)
    assert splat.moved(STAY) is splat


@pytest.mark.parametrize("degree", [1, 3])
def test_a_mirrored_splat_shows_mirrored_colours_and_goes_back(degree):
    splat, way = random_splat(degree), similarity(mirror=True)
    directions = torch.randn(40, 3, generator=torch.Generator().manual_seed(9))
    mirrored = splat.moved(way)
    seen, seen_there = (
        harmonics(degree, towards, torch.cat([one.base[:, None], one.rest], 1))
        for one, towards in ((splat, directions), (mirrored, directions @ torch.from_numpy(way[:, :3].T).float()))
    )
    assert torch.allclose(seen, seen_there, atol=1e-5)
    again = mirrored.moved(back(way))
    for name in ("means", "scales", "base", "rest"):
        assert torch.allclose(getattr(again, name), getattr(splat, name), atol=1e-5), name
    assert np.allclose(composed(back(way), way), STAY)
