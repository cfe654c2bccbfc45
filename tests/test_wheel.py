"""The wheel: it holds the whole package, and where nothing else is installed it says what there is and what is missing."""

import subprocess
import sys
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from zipfile import ZipFile

import pytest

import ovs3d_nerfstudio
from ovs3d_nerfstudio.cli import SUBCOMMANDS

ROOT = Path(ovs3d_nerfstudio.__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """What lies in the wheel. It is built of a copy, for building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, folder)
    copytree(ROOT / "ovs3d_nerfstudio", folder / "ovs3d_nerfstudio", ignore=ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*pip, "-w", folder / "built", folder], check=True, timeout=300)
    (wheel,) = (folder / "built").iterdir()
    with ZipFile(wheel) as content:
        content.extractall(folder / "unpacked")
    return folder / "unpacked"


def alone(unpacked: Path, *words: str) -> tuple[int, str]:
    """Exit status and output of `ovs3d` of the wheel, where Python finds no package but those that come with it."""
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); from ovs3d_nerfstudio.cli import main; main({words!r})"
    run = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_every_module_and_entry_point_is_in_the_wheel(unpacked):
    modules = {path.relative_to(ROOT) for path in (ROOT / "ovs3d_nerfstudio").rglob("*.py")}
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.py")} == modules
    (entries,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "ovs3d = ovs3d_nerfstudio.cli:main" in entries.read_text()


def test_alone_it_answers_for_help_and_says_what_is_missing(unpacked):
    status, printed = alone(unpacked, "--help")
    assert status == 0 and all(name in printed for name in SUBCOMMANDS)
    status, printed = alone(unpacked, "train")
    assert status == 1 and "no subcommand 'train'" in printed
    for words in (["--version"], *([name, "--help"] for name in SUBCOMMANDS)):
        status, printed = alone(unpacked, *words)
        assert status == 1 and "is not installed here; run: pip install" in printed and "Traceback" not in printed
