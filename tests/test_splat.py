"""Gaussians carry the same semantics as the NeRF, on any device: training, commands, viewer, resuming."""

import copy
import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import answers_are_those_of_its_pictures, the_catalogue_is_whole
from conftest import camera_path, command, frames, ns_viewer, read_labels
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.model_components.renderers import background_color_override_context
from nerfstudio.scripts.exporter import ExportGaussianSplat
from nerfstudio.scripts.render import RenderCameraPath, RenderInterpolated
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from plyfile import PlyData, PlyElement
from training import Trained, train_steps

from ovs3d_nerfstudio.data.frames import frame_of
from ovs3d_nerfstudio.demo import run as demo
from ovs3d_nerfstudio.demo.raycast import cast
from ovs3d_nerfstudio.demo.scene import demo_solids, train_cameras
from ovs3d_nerfstudio.engine.checkpoints import read_checkpoint
from ovs3d_nerfstudio.evaluation.splits import evaluate_split
from ovs3d_nerfstudio.features.teachers import Windows
from ovs3d_nerfstudio.fields.compositing import SOMETHING
from ovs3d_nerfstudio.gaussians.rasterization import rasterization
from ovs3d_nerfstudio.gaussians.shown import view_matrix
from ovs3d_nerfstudio.gaussians.splat_files import splat_table
from ovs3d_nerfstudio.run import load_run
from ovs3d_nerfstudio.viewer.live import LiveModel, LivePrompts
from ovs3d_nerfstudio.viewer.things import Things

pytestmark = pytest.mark.slow
GEOMETRY, SEMANTICS = 100, 250


@pytest.fixture(scope="module")
def pointed(scene, tmp_path_factory) -> Path:
    """The scene with sparse points: every fifth pixel of its training views, where it truly lies, give or take 1 %."""
    folder = Path(shutil.copytree(scene, tmp_path_factory.mktemp("pointed") / "scene"))
    solids, found, rng = demo_solids(), [], np.random.default_rng(0)
    meta = json.loads((folder / "transforms.json").read_text())
    train = [frame for frame in meta["frames"] if frame["file_path"] in meta["train_filenames"]]
    for frame, camera in zip(train, train_cameras(len(train), meta["w"]), strict=True):
        assert np.allclose(frame["transform_matrix"], camera.pose)
        depth = cast(solids, camera)[1].ravel()[::5]
        origin, directions = camera.rays(1)
        way = depth * rng.normal(1, 0.01, len(depth))
        points = (origin + way * directions[:, ::5]).T
        colors = np.asarray(Image.open(folder / frame["file_path"]).convert("RGB")).reshape(-1, 3)[::5]
        found.append(np.concatenate([points, colors], 1)[np.isfinite(depth)])
    rows = np.concatenate(found)
    kinds = [*((name, "f4") for name in "xyz"), *((name, "u1") for name in ("red", "green", "blue"))]
    table = np.array([tuple(row) for row in rows], kinds)
    PlyData([PlyElement.describe(table, "vertex")]).write(folder / "sparse_pc.ply")
    (folder / "transforms.json").write_text(json.dumps(meta | {"ply_file_path": "sparse_pc.ply"}))
    return folder


def config_of(scene: Path, **model):
    config = copy.deepcopy(all_methods["ovs3d-splat-lite"])
    config.pipeline.datamanager.data = scene
    settings = {"semantics_start": GEOMETRY, "fda_start": GEOMETRY + 100, **model}
    for name, value in settings.items():
        setattr(config.pipeline.model, name, value)
    return config


@pytest.fixture(scope="module")
def run(pointed, tmp_path_factory) -> Path:
    """The config of a run of `ns-train`."""
    out = tmp_path_factory.mktemp("splat")
    words = ["ns-train", "ovs3d-splat-lite", "--data", pointed, "--output-dir", out, "--experiment-name", "run"]
    words += ["--timestamp", "t", "--vis", "tensorboard", "--max-num-iterations", GEOMETRY + SEMANTICS]
    words += ["--pipeline.model.semantics-start", GEOMETRY, "--pipeline.model.fda-start", GEOMETRY + 100]
    command(*words, cwd=out)
    return out / "run" / "ovs3d-splat-lite" / "t" / "config.yml"


@pytest.fixture(scope="module")
def opened(run):
    return eval_setup(run, test_mode="test")[1]


def test_it_sees_and_tells_apart_what_it_was_not_trained_on(opened):
    """One class alone would have 0.03; the encoder and 96 pixels allow 0.3."""
    summary, views = evaluate_split(opened, "test")
    assert summary["psnr"] > 20 and summary["miou"] > 0.15 and len(views) == 3


def test_nerfstudios_commands_take_it_as_a_splat(run, tmp_path):
    command("ns-eval", "--load-config", run, "--output-path", tmp_path / "metrics.json", cwd=tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert figures["psnr"] > 20 and figures["miou"] > 0.15
    words = ["--load-config", run, "--output-path", tmp_path / "renders", "--rendered-output-names"]
    command("ns-render", "dataset", *words, "rgb", "segmentation", "depth", "features_pca", cwd=tmp_path)
    assert {len(list((tmp_path / "renders" / "test" / name).iterdir())) for name in ("rgb", "segmentation")} == {3}
    command("ns-export", "gaussian-splat", "--load-config", run, "--output-dir", tmp_path, cwd=tmp_path)
    saved = read_checkpoint(next((run.parent / "nerfstudio_models").iterdir()))["pipeline"]
    count = len(saved["_model.gauss_params.means"])
    assert (
        0.98 * count < len(PlyData.read(tmp_path / "splat.ply")["vertex"]) <= count
    )  # nerfstudio drops what is hardly there


def test_ns_viewer_opens_it(run, tmp_path):
    with ns_viewer(run, tmp_path / "log"):
        time.sleep(3)


def test_ns_render_makes_videos_of_it(run, tmp_path):
    """By nerfstudio's own code in this process, which spares the seconds of importing. Its spiral refuses every splat."""
    wanted = {"load_config": run, "rendered_output_names": ["rgb", "segmentation"]}
    path = camera_path(tmp_path / "path.json")
    modes = {
        "interpolate": RenderInterpolated(**wanted, interpolation_steps=1),
        "camera-path": RenderCameraPath(**wanted, camera_path_filename=path),
    }
    for name, mode in modes.items():
        mode.output_path = tmp_path / f"{name}.mp4"
        mode.main()
        video = frames(mode.output_path)
        height, width = (36, 48) if name == "camera-path" else (72, 96)
        assert len(video) >= 2 and video[0].shape == (height, 2 * width, 3), name


def test_our_commands_take_it_too(run, tmp_path, ovs3d):
    figures = tmp_path / "m.json"
    assert ovs3d("eval", "--load-config", run, "--output-path", figures, "--no-pictures")[0] == 0
    assert json.loads(figures.read_text())["miou"] > 0.15
    words = ["--load-config", run, "--output-path", tmp_path / "r", "--prompts", "a cat; a rocket", "--split", "test"]
    assert ovs3d("render", "dataset", *words, "--without", "a cat")[0] == 0
    labels = [read_labels(path) for path in (tmp_path / "r").rglob("labels/*.png")]
    assert len(labels) == 3 and set(np.unique(labels)) == {-1, 1}
    words = ["--load-config", run, "--output-path", tmp_path / "s.mp4", "--rendered-output-names", "segmentation"]
    words += ["--render-nearest-camera", "True", "--check-occlusions", "True"]
    assert ovs3d("render", "spiral", *words, "--seconds", 1, "--frame-rate", 2)[0] == 0
    assert [frame.shape for frame in frames(tmp_path / "s.mp4")] == 2 * [(72, 2 * 96, 3)]
    words = ["--load-config", run, "--output-dir", tmp_path / "c", "--num-points", 4000]
    assert ovs3d("export", "pointcloud", *words)[0] == 0
    assert len(PlyData.read(tmp_path / "c" / "point_cloud.ply")["vertex"]) > 3000
    prompts = {thing["prompt"] for thing in json.loads((tmp_path / "c" / "objects.json").read_text())["objects"]}
    assert len(prompts) > 3


def test_it_answers_from_python_as_its_pictures_show(run, pointed):
    answers_are_those_of_its_pictures(load_run(run), pointed, depth_error=0.05)


def test_its_catalogue_is_whole_and_its_gaussians_are_those_of_ns_export(run, tmp_path, ovs3d):
    status, printed = ovs3d("objects", "--load-config", run, "--output-dir", tmp_path)
    assert status == 0 and "Gaussians" in printed
    the_catalogue_is_whole(tmp_path, "Gaussians", "data")
    ExportGaussianSplat(run, tmp_path).main()
    theirs = PlyData.read(tmp_path / "splat.ply")["vertex"].data
    model = load_run(run).pipeline.model
    ours = splat_table(model.splat)
    ours = ours[ours["opacity"] >= np.float32(-5.5373)]  # nerfstudio drops what is hardly there
    assert set(ours.dtype.names) == set(theirs.dtype.names) and len(ours) == len(theirs)
    for name in theirs.dtype.names:
        if not name.startswith("rot"):
            assert np.allclose(ours[name], theirs[name], atol=1e-5), name


def test_its_mesh_lies_on_what_is_there(run, pointed, tmp_path, ovs3d):
    words = ["--load-config", run, "--output-dir", tmp_path, "--no-object-meshes"]
    assert ovs3d("export", "mesh", *words)[0] == 0
    element = PlyData.read(tmp_path / "mesh.ply")
    vertices = element["vertex"].data
    points = torch.from_numpy(np.stack([vertices[name] for name in "xyz"], -1))
    true = PlyData.read(pointed / "sparse_pc.ply")["vertex"].data
    true = torch.from_numpy(np.stack([true[name] for name in "xyz"], -1)).to(points)
    nearest = torch.cat([torch.cdist(part, true).amin(1) for part in points.split(4096)])
    assert len(element["face"]) > 1000 and nearest.median() < 0.2 and (vertices["class_id"] > 0).all()


def test_a_cloud_lies_on_what_is_there(run, pointed, tmp_path, ovs3d):
    words = ["--load-config", run, "--output-dir", tmp_path, "--num-points", 2000, "--std-ratio", 0]
    assert ovs3d("export", "pointcloud", *words)[0] == 0
    table = PlyData.read(tmp_path / "point_cloud.ply")["vertex"].data
    cloud = np.stack([table[name] for name in "xyz"], -1)
    true = PlyData.read(pointed / "sparse_pc.ply")["vertex"].data
    true = np.stack([true[name] for name in "xyz"], -1)
    nearest = torch.cdist(torch.from_numpy(cloud), torch.from_numpy(true)).amin(1)
    diagonal = np.linalg.norm(np.ptp(true, axis=0))
    assert (nearest < 0.02 * diagonal).float().mean() > 0.9


def test_the_demo_shows_what_both_geometries_say(run, trained, tmp_path, monkeypatch):
    """With these runs in place of those that it would train."""
    folder, typed, runs = tmp_path / "demo", [], {"ovs3d-lite": trained[0], "ovs3d-splat-lite": run}

    def nerfstudio(name, method, *words):
        typed.append((name, method))
        assert words[words.index("--output-dir") + 1] == folder and words[-2:] == ("--max-num-iterations", 9)
        shutil.copytree(runs[method].parent, folder / "run" / method)
        assert not (folder / "stills.png").exists() or method == "ovs3d-splat-lite"

    monkeypatch.setattr(demo, "make_scene", lambda folder: folder)
    monkeypatch.setattr(demo, "nerfstudio", nerfstudio)
    assert demo.run_demo(folder, 9, video=False) == folder / "run" / "ovs3d-lite" / "config.yml"
    assert typed == [("ns-train", "ovs3d-lite"), ("ns-train", "ovs3d-splat-lite")]
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["splat"].keys() == {"test", "train"} == figures.keys() - {"splat"}
    assert figures["splat"]["test"]["psnr"] > 20 and figures["splat"]["test"]["miou"] != figures["test"]["miou"]
    page = np.asarray(Image.open(folder / "stills.png").convert("L")).astype(int)
    assert page.shape[1] > 4 * 96 and page.shape[0] >= 3 * 72 + 20 and (folder / "legend.png").exists()
    titles = [page[:20, 100 * i : 100 * (i + 1)] for i in range(4)]
    assert all(title.min() < 64 and title.max() == 255 for title in titles), "each column says what it is"


def test_prompts_of_the_moment_and_a_click_in_the_viewer(opened):
    from nerfstudio.models.splatfacto import SplatfactoModel

    live = LivePrompts(opened.model)
    live.follow_training()
    view = LiveModel(live, nullcontext())
    assert isinstance(view, SplatfactoModel), "the viewer asks"
    camera = opened.datamanager.eval_dataset.cameras[0:1]
    opened.eval()
    outputs = view.get_outputs_for_camera(camera)
    trained = outputs["segmentation"]
    live.ask(["a cat", "a space rocket"])
    assert outputs["segmentation"].shape == trained.shape and not torch.equal(outputs["segmentation"], trained)
    there = outputs["accumulation"] >= SOMETHING
    assert there.float().mean() > 0.99 and sum(outputs.shares()) == pytest.approx(float(there.float().mean()))
    row, col = 30, 48
    ray = camera.generate_rays(0, coords=torch.tensor([[row + 0.5, col + 0.5]]))
    point = view.point(ray.origins[0].tolist(), ray.directions[0].tolist())
    away = torch.tensor(point.position) - ray.origins[0]
    along = -camera.camera_to_worlds[0, :, 2]
    assert float(away @ along) == pytest.approx(float(outputs["depth"][row, col]), rel=0.05)


def test_gaussians_of_a_hidden_class_are_gone_and_a_click_finds_their_object(opened):
    model, datamanager = opened.model.eval(), opened.datamanager
    live, camera = LivePrompts(model), datamanager.eval_dataset.cameras[0:1]
    live.follow_training()
    view = LiveModel(live, nullcontext())
    whole = view.get_outputs_for_camera(camera)
    shares = whole.shares()
    most = live.asked[int(np.argmax(shares))]
    live.show("only", most)
    alone = view.get_outputs_for_camera(camera)
    assert alone.shares()[int(np.argmax(shares))] > 0
    live.show("hide", most)
    assert view.get_outputs_for_camera(camera).shares()[int(np.argmax(shares))] == 0
    directions = model.directions_of_gaussians().float() / 32767
    belongs = live.question.segmenter.class_scores(directions @ live.question.text).argmax(-1) == int(np.argmax(shares))
    assert belongs.any() and not belongs.all()
    lone = copy.copy(model)
    lone.gauss_params = torch.nn.ParameterDict(
        {n: torch.nn.Parameter(p[belongs]) for n, p in model.gauss_params.items()}
    )
    assert torch.allclose(lone.get_outputs_for_camera(camera)["rgb"], alone["rgb"], atol=1e-5)
    live.show("all")
    row, col = (whole.answers().labels == int(np.argmax(shares))).nonzero()[0].tolist()
    ray = camera.generate_rays(0, coords=torch.tensor([[row + 0.5, col + 0.5]]))
    point = view.point(ray.origins[0].tolist(), ray.directions[0].tolist())
    things = Things(model, datamanager.train_dataset.cameras, frame_of(datamanager), nullcontext())
    thing = things.at(point)
    assert thing is not None and thing.object.prompt == point.prompts[point.winner] and (thing.size > 0).all()


def test_a_view_of_nothing_is_background(opened):
    model, camera = opened.model.eval(), copy.deepcopy(opened.datamanager.eval_dataset.cameras[0:1])
    camera.camera_to_worlds[..., 3] += 1000 * camera.camera_to_worlds[..., 2]
    camera.camera_to_worlds[..., :3] = camera.camera_to_worlds[..., :3] * torch.tensor([1.0, -1, -1])  # looking away
    outputs = model.get_outputs_for_camera(camera)
    assert all(torch.isfinite(output).all() for output in outputs.values()) and not outputs["accumulation"].any()
    assert torch.equal(outputs["rgb"], outputs["background"])
    assert (model.get_rgba_image(outputs) == 0).all()
    with background_color_override_context(torch.tensor([1.0, 0, 0])):
        assert (model.get_outputs_for_camera(camera)["rgb"] == torch.tensor([1.0, 0, 0])).all()
    assert (model.labels_in(outputs) == -1).all() and torch.equal(outputs["segmentation"], outputs["background"])
    away = torch.zeros(1, 3)
    found = model.features_along(away + 1000, torch.nn.functional.normalize(away + 1, dim=-1))
    assert torch.isfinite(found["depth"]).all() and found["directions"].shape == (1, model.semantic_field.dim)


def test_a_transparent_picture_is_what_is_there_without_the_background(opened):
    model, camera = opened.model.eval(), copy.deepcopy(opened.datamanager.eval_dataset.cameras[0:1])
    camera.camera_to_worlds[..., 3] += 2 * camera.camera_to_worlds[..., 2]
    outputs = model.get_outputs_for_camera(camera)
    color, alpha = model.get_rgba_image(outputs).split([3, 1], -1)
    assert torch.equal(alpha, outputs["accumulation"]) and 0 < alpha.min() + 0.1 < alpha.max()
    assert torch.allclose(color * alpha + (1 - alpha) * outputs["background"], outputs["rgb"], atol=1e-2)


def test_what_a_pixel_knows_is_the_sum_over_its_gaussians(opened):
    """Against gsplat's formula with one channel for each Gaussian: its weight in each pixel."""
    model, camera = opened.model.eval(), opened.datamanager.eval_dataset.cameras[0:1]
    with torch.no_grad():
        outputs = model.get_features_for_camera(camera)
        chosen = torch.arange(0, model.num_points, 20)
        parts = [part[chosen] for part in (model.means, model.quats, model.scales.exp())]
        solid = torch.full((len(chosen), 1), 4.0)  # or so few would add up to nothing
        opacities = solid.sigmoid().squeeze(-1)
        size = int(camera.width), int(camera.height)
        view = (view_matrix(camera.camera_to_worlds), camera.get_intrinsics_matrices(), *size)
        weights, _, _ = rasterization(*parts, opacities, torch.eye(len(chosen)), *view)
        coefficients = weights[0] @ model.semantic_field(parts[0])[0]
        lone = copy.copy(model)
        lone.gauss_params = torch.nn.ParameterDict(
            {n: torch.nn.Parameter(solid if n == "opacities" else p[chosen]) for n, p in model.gauss_params.items()}
        )
        directions = lone.get_features_for_camera(camera)["directions"].float() / 32767
    expected = torch.nn.functional.normalize(coefficients, dim=-1)
    there = weights[0].sum(-1) > 0.55
    assert there.float().mean() > 0.1
    assert torch.allclose(directions[there], expected[there], atol=2e-3)
    assert outputs["directions"].shape == directions.shape


def test_windows_of_photos_of_several_sizes_are_those_of_each_alone(opened):
    """Windows of one size of photo are composited together, whatever stands between them."""
    model, cameras = (
        opened.model.eval(),
        copy.deepcopy(opened.datamanager.eval_dataset.cameras[torch.tensor([0, 1, 2, 0])]),
    )
    for size in (cameras.width, cameras.height):
        size[1] += 16  # as if there were more of the same picture
    side, corners = 6, torch.tensor([[3, 5], [40, 60], [20, 17], [31, 44]])
    rays = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).reshape(-1, 2)
    numbers = torch.arange(4)[:, None, None].expand(-1, side**2, 1)
    pixels = torch.cat([numbers, corners[:, None] + rays], -1)

    def told(which: list[int]) -> torch.Tensor:
        drawn = Windows(pixels[which].flatten(0, 1), torch.zeros(0), None, side, pixels=pixels[which].flatten(0, 1))
        return model._outputs_of(drawn, cameras[torch.tensor(which)])["window_semantics"].coefficients

    with torch.no_grad():
        together, apart = told([0, 1, 2, 3]), [told([i]) for i in range(4)]
    # Whole tiles are cut off at a window's corner, so a faint Gaussian may count in one and not in the other.
    assert (together - torch.cat(apart)).abs().mean() < 1e-3 * together.abs().mean()
    assert (apart[0] - apart[3]).abs().mean() > 0.01 * together.abs().mean()


@pytest.fixture(scope="module")
def alone(pointed) -> Trained:
    """A training in this process, on one thread."""
    return train_steps(config_of(pointed, semantics_start=12, fda_start=14), 20)


def test_every_loss_takes_part_and_geometry_stands_still_once_semantics_begin(alone):
    assert set(alone.losses[11]) == {"main_loss", "scale_reg"}
    begun = {"feature_loss", "rda_loss", "patch_loss"}
    assert set(alone.losses[12]) == begun
    assert set(alone.losses[14]) == begun | {"unmixing_loss", "color_loss", "fda_positive_loss", "fda_negative_loss"}
    assert all(np.isfinite(list(losses.values())).all() for losses in alone.losses)
    before, after = alone.snapshots[12], alone.snapshots[20]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("semantic_field", "mixture")) for name in moved)
    first = alone.snapshots[0]
    assert all(not torch.equal(first[name], before[name]) for name in ("gauss_params.means", "gauss_params.opacities"))


def test_the_same_seed_on_one_thread_gives_the_same_run(alone, pointed):
    again = train_steps(config_of(pointed, semantics_start=12, fda_start=14), 20)
    assert again.losses == alone.losses
    assert all(torch.equal(value, alone.snapshots[20][name]) for name, value in again.snapshots[20].items())


def test_gaussians_come_and_go_and_a_checkpoint_brings_them_back(pointed):
    model = {"stop_split_at": 100, "warmup_length": 4, "refine_every": 5, "densify_grad_thresh": 1e-4}
    config = config_of(pointed, **model, reset_alpha_every=100, semantics_start=30, fda_start=31)
    config.pipeline.model.cull_alpha_thresh = 0.05
    trained = train_steps(config, 32)
    count = trained.pipeline.model.num_points
    assert count != len(trained.snapshots[0]["gauss_params.means"])
    fresh = config_of(pointed, **model, semantics_start=30).pipeline.setup(device="cpu", test_mode="test")
    parameters = [id(parameter) for parameter in fresh.model.gauss_params.values()]
    fresh.load_pipeline(trained.pipeline.state_dict(), 31)
    assert fresh.model.num_points == count
    assert [id(p) for p in fresh.model.gauss_params.values()] == parameters, "optimizers know them"


def test_masks_keep_pixels_from_teaching(pointed, tmp_path):
    scene = Path(shutil.copytree(pointed, tmp_path / "scene"))
    meta = json.loads((scene / "transforms.json").read_text())
    (scene / "masks").mkdir()
    for n, frame in enumerate(meta["frames"]):
        frame["mask_path"] = f"masks/{n}.png"
        mask = np.full((meta["h"], meta["w"]), 255, np.uint8)
        mask[:, : meta["w"] // 2] = 0
        Image.fromarray(mask).save(scene / frame["mask_path"])
    (scene / "transforms.json").write_text(json.dumps(meta))
    trained = train_steps(config_of(scene, semantics_start=2, fda_start=2), 4)
    windows = trained.pipeline.datamanager.draw_windows()
    assert not windows.seen.all() and all(np.isfinite(list(losses.values())).all() for losses in trained.losses)


def test_several_processes_are_refused(pointed, tmp_path):
    words = ["ns-train", "ovs3d-splat-lite", "--output-dir", tmp_path, "--vis", "tensorboard", "--data", pointed]
    words += ["--machine.num-devices", 2, "--machine.device-type", "cpu"]
    said = " ".join(command(*words, cwd=tmp_path, ok=False).stdout.split())
    assert "trains in one process" in said and "Traceback" not in said
