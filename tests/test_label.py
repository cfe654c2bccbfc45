"""A splat that somebody has: its frame is found, its Gaussians are labelled and otherwise stay, and runs begin with what there is."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.configs.method_configs import all_methods
from PIL import Image
from plyfile import PlyData
from test_splat_files import bad_files
from training import train_steps

from ovs3d_nerfstudio.data.ways import back, possible_ways
from ovs3d_nerfstudio.demo.raycast import cast
from ovs3d_nerfstudio.demo.scene import demo_solids, train_cameras
from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.gaussians.splat_files import read_splat, splat_table
from ovs3d_nerfstudio.gaussians.splats import SH_OF_COLOUR, Splat
from ovs3d_nerfstudio.gaussians.viewpoints import viewpoints
from ovs3d_nerfstudio.models.brought import find_way
from ovs3d_nerfstudio.ply import write_ply
from ovs3d_nerfstudio.prompts.likes import Like, write_likes

STEPS = 40


def test_what_is_no_splat_ends_with_its_sentence_and_leaves_nothing(tmp_path, pristine, ovs3d):
    out = tmp_path / "out"
    for path, sentence in bad_files(tmp_path).items():
        words = ["label", path, "--data", pristine, "--prompts", "a; b", "--output-dir", out]
        status, printed = ovs3d(*words, "--method", "ovs3d-splat-lite")
        assert status == 1 and sentence in printed and "Traceback" not in printed
    assert not out.exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--prompts", ""], "say what to look for with --prompts"),
        (["--prompts", "a", "--up", 0, 0, 0], "is no direction"),
        (["--prompts", "a", "--views", 1], "--views 1"),
        (["--prompts", "a", "--steps", 0], "--steps 0"),
        (["--prompts", "a", "--least-probability", 2], "--least-probability 2"),
        (["--prompts", "a", "--data", "nowhere", "--method", "ovs3d-lite"], "has no Gaussians"),
        (["--prompts", "a", "--data", "nowhere", "--method", "ovs3d-splat-lite"], "nowhere does not exist"),
    ],
)
def test_a_word_of_label_is_refused(surface, tmp_path, monkeypatch, ovs3d, words, said):
    monkeypatch.chdir(tmp_path)
    status, printed = ovs3d("label", surface, *words)
    assert status == 1 and said in printed and not list(tmp_path.iterdir())


def surface_splat(scene: Path, every: int = 3) -> Splat:
    """Small round Gaussians on what the training cameras of the demo scene see, in its colours and the data's coordinates."""
    meta, solids = json.loads((scene / "transforms.json").read_text()), demo_solids()
    train = [frame for frame in meta["frames"] if frame["file_path"] in meta["train_filenames"]]
    means, colors, widths = [], [], []
    for frame, camera in zip(train, train_cameras(len(train), meta["w"]), strict=True):
        depth = cast(solids, camera)[1].ravel()
        origins, directions = camera.rays(1)
        there = np.isfinite(depth) & (np.arange(len(depth)) % every == 0)
        means.append((origins + directions * depth).T[there])
        colors.append(np.asarray(Image.open(scene / frame["file_path"]).convert("RGB")).reshape(-1, 3)[there] / 255)
        widths.append(0.2 * depth[there] / meta["fl_x"])
    means, colors, widths = (torch.from_numpy(np.concatenate(part)).float() for part in (means, colors, widths))
    count = len(means)
    quats = torch.nn.functional.normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    base = (colors - 0.5) / SH_OF_COLOUR
    scales = widths.log()[:, None].expand(-1, 3)
    return Splat(means, scales, quats, torch.full((count, 1), 3.0), base, torch.zeros(count, 3, 3))


@pytest.fixture(scope="module")
def surface(scene, tmp_path_factory) -> Path:
    """Its PLY, with a column that nobody knows."""
    table = splat_table(surface_splat(scene))
    wider = np.empty(len(table), [*table.dtype.descr, ("segment", "<i4")])
    for name in table.dtype.names:
        wider[name] = table[name]
    wider["segment"] = np.arange(len(table))
    path = tmp_path_factory.mktemp("surface") / "surface.ply"
    write_ply(path, wider)
    return path


def config_of(scene: Path, **model):
    config = copy.deepcopy(all_methods["ovs3d-splat-lite"])
    config.pipeline.datamanager.data = scene
    for name, value in model.items():
        setattr(config.pipeline.model, name, value)
    return config


@pytest.mark.slow
def test_the_frame_of_a_splat_is_found(scene, surface, tmp_path):
    applied = np.array([[0.0, 1, 0, 0.5], [1, 0, 0, -1], [0, 0, -1, 0]])
    other = Path(shutil.copytree(scene, tmp_path / "scene"))
    meta = json.loads((other / "transforms.json").read_text())
    (other / "transforms.json").write_text(json.dumps(meta | {"applied_transform": applied.tolist()}))
    manager = config_of(other, init_from=surface).pipeline.setup(device="cpu", test_mode="val").datamanager
    _, splat = read_splat(surface)
    ways = possible_ways(manager)
    assert len(ways) == 3
    in_model = splat.moved(ways["the data's coordinates"])
    before = splat.moved(back(applied))
    kinds = {"the data's coordinates": splat, "that nerfstudio trains in": in_model, "applied_transform": before}
    for name, moved in kinds.items():
        way, said = find_way(moved, manager)
        assert name in said.partition(":")[0] and said.count("dB") == 4
        assert torch.allclose(moved.moved(way).means, in_model.means, atol=1e-4)
    with pytest.raises(UserError, match="does not look like the photos") as caught:
        find_way(Splat(*(part[torch.randperm(len(part))] for part in vars(splat).values())), manager)
    assert str(caught.value).count("dB") == 4


@pytest.mark.slow
def test_a_splat_of_another_scene_ends_with_the_figures_and_leaves_nothing(scene, surface, tmp_path, ovs3d):
    _, splat = read_splat(surface)
    write_ply(tmp_path / "other.ply", splat_table(replace(splat, means=splat.means.roll(1, 1))))
    words = ["label", tmp_path / "other.ply", "--data", scene, "--output-dir", tmp_path / "out"]
    status, printed = ovs3d(*words, "--method", "ovs3d-splat-lite")
    assert status == 1 and "does not look like the photos" in printed and printed.count("dB") == 3
    assert not (tmp_path / "out").exists()


def test_the_splat_itself_is_not_replaced(surface, tmp_path, ovs3d):
    shutil.copy(surface, tmp_path / "splat.ply")
    status, printed = ovs3d("label", tmp_path / "splat.ply", "--prompts", "a", "--output-dir", tmp_path)
    assert status == 1 and "would replace" in printed


def test_what_cannot_be_seen_or_said_in_words_is_refused_before_any_training(surface, tmp_path, ovs3d):
    """Where no photos are given; with them the same is told by others."""
    _, splat = read_splat(surface)
    faint = replace(splat, opacities=torch.full_like(splat.opacities, -20))
    write_ply(tmp_path / "faint.ply", splat_table(faint))
    write_likes(tmp_path / "likes.json", [Like("like 1", [0.6, 0.8], "tiny")])
    cases = (
        (tmp_path / "faint.ply", "mug; table", "opacity of 2.1e-09"),
        (surface, f"{tmp_path / 'likes.json'}; table", "'like 1' is a prompt without words"),
    )
    for path, prompts, said in cases:
        words = ["label", path, "--prompts", prompts, "--output-dir", tmp_path / "out"]
        status, printed = ovs3d(*words, "--method", "ovs3d-splat-lite")
        assert status == 1 and said in printed and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def labelled(scene, surface, tmp_path_factory) -> tuple[Path, str]:
    """What `ovs3d label` leaves, and what it printed."""
    from conftest import command

    out = tmp_path_factory.mktemp("labelled") / "out"
    words = ["ovs3d", "label", surface, "--data", scene, "--output-dir", out, "--method", "ovs3d-splat-lite"]
    return out, command(*words, "--steps", STEPS, cwd=out.parent).stdout


@pytest.mark.slow
def test_a_splat_is_labelled_and_otherwise_stays(labelled, surface):
    out, printed = labelled
    before, after = (PlyData.read(str(path))["vertex"].data for path in (surface, out / "splat.ply"))
    assert after.dtype.names == (*before.dtype.names, "class_id", "probability")
    assert all(np.array_equal(before[name], after[name]) for name in before.dtype.names)
    classes = json.loads((out / "classes.json").read_text())
    assert set(np.unique(after["class_id"])) <= {int(key) for key in classes} and len(np.unique(after["class_id"])) > 2
    assert ((after["probability"] > 0) & (after["probability"] <= 1)).all()
    assert "the data's coordinates" in printed and "Learning what is where" in printed and "cached" in printed
    assert {path.name for path in out.iterdir()} == {
        *("splat.ply", "classes.json", "legend.png", "view_1.jpg", "view_2.jpg", "run", "objects.json", "objects")
    }
    things = json.loads((out / "objects.json").read_text())["objects"]
    assert things and {thing["prompt"] for thing in things} <= set(
        classes[key]["prompt"] for key in classes if key != "0"
    )
    alone = PlyData.read(str(out / things[0]["file"]))["vertex"].data
    assert alone.dtype.names == after.dtype.names and (alone["class_id"] == things[0]["class_id"]).all()
    assert Image.open(out / "view_1.jpg").size == (192, 72)


@pytest.mark.slow
def test_its_run_opens_without_the_splat_and_gives_it_back(labelled, surface, scene, tmp_path, ovs3d):
    from ovs3d_nerfstudio.run_files import open_run

    moved = Path(shutil.copytree(labelled[0] / "run", tmp_path / "run"))
    text = (moved / "config.yml").read_text()
    assert "surface.ply" in text
    (moved / "config.yml").write_text(text.replace("surface.ply", "gone.ply"))
    assert ovs3d("export", "splat", "--load-config", moved, "--output-dir", tmp_path / "out")[0] == 0
    before, after = (read_splat(path)[1] for path in (surface, tmp_path / "out" / "splat.ply"))
    assert torch.allclose(after.means, before.means, atol=1e-5) and torch.equal(after.base, before.base)
    assert torch.allclose(after.scales, before.scales, atol=1e-5)
    first, second = (PlyData.read(str(path / "splat.ply"))["vertex"].data for path in (labelled[0], tmp_path / "out"))
    assert np.array_equal(first["class_id"], second["class_id"])
    # Goes on, too: nothing but the checkpoint is needed.
    config = config_of(scene, init_from=Path("gone.ply"), semantics_start=0, fda_start=1)
    config.load_dir, config.output_dir, config.vis = moved / "nerfstudio_models", tmp_path, "tensorboard"
    config.timestamp = "t"
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    _, pipeline, _, _ = open_run(moved)
    assert torch.equal(trainer.pipeline.model.means, pipeline.model.means)
    assert trainer.pipeline.chosen_prompts == pipeline.model.segmenter.prompts


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ["nerf", "splat"])
def test_a_run_of_either_geometry_goes_on_as_a_splat(trained, labelled, scene, geometry):
    from ovs3d_nerfstudio.run_files import open_run

    source = trained[0] if geometry == "nerf" else labelled[0] / "run"
    begun = train_steps(config_of(scene, init_from=source, semantics_start=2, fda_start=3), 4)
    _, run, _, _ = open_run(source)
    model, fields = begun.pipeline.model, run.model.semantic_field.state_dict()
    assert begun.pipeline.chosen_prompts == run.model.segmenter.prompts
    assert torch.equal(model.segmenter.basis, run.model.segmenter.basis)
    # Until its losses begin the field is the run's.
    before = begun.snapshots[2]
    assert all(torch.equal(before[f"semantic_field.{name}"], value) for name, value in fields.items() if name != "aabb")
    first = begun.snapshots[0]["gauss_params.means"]
    if geometry == "splat":
        assert torch.equal(first, run.model.means)
    else:
        assert len(first) > 1000 and torch.isfinite(first).all() and model.config.sh_degree == 0
    assert not torch.equal(first, begun.snapshots[4]["gauss_params.means"]), "geometry is refined"
    assert all(np.isfinite(list(losses.values())).all() for losses in begun.losses)


@pytest.mark.slow
def test_without_photos_cameras_look_at_what_there_is(surface, scene, tmp_path, ovs3d):
    _, splat = read_splat(surface)
    chosen = viewpoints(splat, torch.tensor([0.0, 0, 1]), 8)
    assert 4 <= len(chosen) <= 8
    words = ["label", surface, "--output-dir", tmp_path / "out", "--method", "ovs3d-splat-lite", "--steps", 5]
    status, printed = ovs3d(*words, "--views", 6, "--prompts-file", scene / "segmentations" / "classes.txt")
    assert status == 0 and "cameras see most of what there is" in printed
    meta = json.loads((tmp_path / "out" / "views" / "transforms.json").read_text())
    assert 4 <= len(meta["frames"]) <= 6
    after = PlyData.read(str(tmp_path / "out" / "splat.ply"))["vertex"].data
    assert len(after) == len(splat.means)
