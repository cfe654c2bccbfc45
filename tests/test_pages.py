"""What the pages say to type works: every command is one that its parser takes, what is cheap is run, and the tour from start to end."""

import re
from importlib.metadata import entry_points, metadata
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from typed import PAGES, ROOT, TOUR, blocks, command_options, is_command, options, refusal, spans, typed

from ovs3d_nerfstudio.cli import SUBCOMMANDS

METHODS = ("ovs3d", "ovs3d-paper", "ovs3d-lite", "ovs3d-splat", "ovs3d-splat-lite")
LESS = {
    "render interpolate": ["--interpolation-steps", 1, "--downscale-factor", 2],
    "render dataset": ["--downscale-factor", 2],
    "export pointcloud": ["--num-points", 20_000],
    "export mesh": ["--voxel", 0.2, "--downscale", 2],
}
"""What makes commands of the pages cheaper: their pictures and clouds are looked at by other tests."""
PAGE_NAMES = [page.name for page in PAGES]


@pytest.fixture(autouse=True)
def colmap(tmp_path, monkeypatch):
    """A COLMAP that is never run: nerfstudio asks for one while it reads options."""
    program = tmp_path / "bin" / "colmap"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_commands_of_a_page_are_taken_by_their_parsers(page):
    for words in filter(is_command, typed(page)):
        assert not refusal(words), words


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_commands_named_in_a_text_are_there(page):
    """What is named only to speak of it may lack options that it needs, in the words of tyro 1 or of tyro 0.9, and may have none
    that are not there."""
    lacking = "Missing (from|subcommand)|arguments are required"
    for words in filter(is_command, spans(page)):
        if len(words) == 1 or "SUBCOMMAND" in words:
            assert entry_points(group="console_scripts", name=words[0]), words
            continue
        told = refusal(words)
        assert not told or (re.search(lacking, told) and "Unrecognized" not in told), told


def test_other_programs_of_the_pages_are_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in (words for page in PAGES for words in typed(page) if not is_command(words)):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "python":
            assert options(" ".join(words)) <= options((ROOT / words[1]).read_text()), words
        elif words[0] != "cd":
            assert words[:2] in (["pip", "install"], ["git", "clone"], ["jupyter", "lab"]), words
            extras = [extra for word in words for extra in re.findall(r"^\.\[(.+)\]", word)]
            assert set(extras) <= set(metadata("ovs3d-nerfstudio").get_all("Provides-Extra")), words


def test_every_option_that_a_page_names_is_there():
    known = set().union(*(command_options("ovs3d", name) for name in SUBCOMMANDS))
    known |= set().union(*(command_options("ns-train", name) for name in METHODS))
    known |= set().union(*(options(script.read_text()) for script in (ROOT / "benchmarks").glob("*.py")))
    assert len(known) > 300
    for page in PAGES:
        named = {option for words in spans(page) if words[0].startswith("--") for option in options(" ".join(words))}
        assert named <= known, (page.name, named - known)


@pytest.fixture
def beside(trained, scene, tmp_path, monkeypatch) -> Path:
    """A folder to work in where the run is RUN and its scene SCENE, as the pages call them."""
    (tmp_path / "RUN").symlink_to(trained[0].parent)
    (tmp_path / "SCENE").symlink_to(scene)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ovs3d_nerfstudio.run.CLOUD_POINTS", 20_000)
    monkeypatch.setattr("ovs3d_nerfstudio.objects.thumbnails.LONGER_SIDE", 48)
    return tmp_path


@pytest.mark.slow
def test_commands_on_your_own_photos_run(beside, ovs3d):
    ran = []
    for words in typed(ROOT / "docs" / "own-photos.md"):
        if words[0] != "ovs3d" or "RUN/config.yml" not in words or "--splat" in words:
            continue
        name = " ".join(word for word in words[1:3] if not word.startswith("-"))
        status, printed = ovs3d(*words[1:], *LESS.get(name, []))
        assert status == 0, (words, printed[-2000:])
        (written,) = [words[place + 1] for place, word in enumerate(words) if word.startswith("--output-")]
        assert (beside / written).exists(), words
        ran.append(name)
    assert {*LESS, "eval", "objects"} == set(ran)


@pytest.mark.slow
def test_what_is_typed_into_python_runs(beside, capsys):
    names: dict = {}
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        exec(compile(block, "python.md", "exec"), names)
    assert names["mask"].shape == (160, 240) and names["alike"].shape == (len(names["xyz"]), 1)
    assert names["catalogue"].path.is_file() and len(names["catalogue"].entries) == len(names["run"].objects())


def test_the_tour_holds_its_pictures_and_nothing_of_the_machine_that_made_it():
    text = TOUR.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    kinds = [kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert kinds.count("image/jpeg") >= 6 and "text/markdown" in kinds and len(text) < 600_000
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and notebook.metadata.language_info == {
        "name": "python"
    }
    assert not any(cell.metadata for cell in notebook.cells)
    # In what is no picture: no path from the root of a file system, no colours of a terminal.
    assert not re.search(r'[\s"\'(=](/[a-z]+){2}|\\u001b', re.sub(r'"image/jpeg": "[^"]*"', "", text))


@pytest.mark.slow
def test_the_tour_can_be_walked_from_start_to_end(trained, scene, monkeypatch):
    run = trained[0].parent
    # Gaussians answer the same calls (test_splat.py); here a second run stands for them.
    for name, path in {"RUN": run, "SPLAT": run, "SCENE": scene}.items():
        monkeypatch.setenv(f"OVS3D_TOUR_{name}", str(path))
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": TOUR.parent}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 7
    assert not any(output.output_type == "error" for output in outputs)
