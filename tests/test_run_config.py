"""Every config.yml that we write is read again, whatever data and options made it, from any folder and after a move."""

import copy
import dataclasses
import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from bad_input import HEIGHT, WIDTH, make_small_scene, opened, small_config
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image

from ovs3d_nerfstudio.cli import SUBCOMMANDS
from ovs3d_nerfstudio.encoders.base import encoders
from ovs3d_nerfstudio.engine.checkpoints import checkpoint_path, write_checkpoint
from ovs3d_nerfstudio.engine.run_config import RunLoader
from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.prompts.embedding import Embedder
from ovs3d_nerfstudio.run_files import open_run, our_methods


def two_sizes(scene: Path, meta: dict) -> None:
    shared = {key: meta.pop(key) for key in ("w", "h", "fl_x", "fl_y", "cx", "cy")}
    for i, frame in enumerate(meta["frames"]):
        frame |= shared | ({"w": shared["w"] // 2, "h": shared["h"] // 2} if i % 2 else {})
        Image.new("RGB", (frame["w"], frame["h"])).save(scene / frame["file_path"])


def masks(scene: Path, meta: dict) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, np.uint8)).save(scene / "mask.png")
    for frame in meta["frames"]:
        frame["mask_path"] = "mask.png"


def camera_model(name: str):
    return lambda _scene, meta: meta.update(camera_model=name)


DATA = {
    "one size": lambda _scene, _meta: None,
    "two sizes": two_sizes,
    "masks": masks,
    "panoramas": camera_model("EQUIRECTANGULAR"),
    "fisheye": lambda _scene, meta: meta.update(camera_model="OPENCV_FISHEYE", fisheye_crop_radius=12.0),
}


@pytest.mark.parametrize("data", DATA)
def test_a_run_is_read_again_whatever_its_data_are(tmp_path, data):
    scene = make_small_scene(tmp_path / "scene")
    meta = json.loads((scene / "transforms.json").read_text())
    DATA[data](scene, meta)
    (scene / "transforms.json").write_text(json.dumps(meta))
    config = small_config(scene)
    config.output_dir, config.experiment_name, config.timestamp = tmp_path, "run", "t"
    opened(config)
    config.save_config()
    text = (config.get_base_dir() / "config.yml").read_text()
    assert yaml.load(text, Loader=RunLoader) == config
    assert ("variable_res_collate" in text) == (data == "two sizes")


@pytest.mark.parametrize("method", our_methods())
def test_a_config_of_each_method_is_read_again_with_each_dataparser_viewer_and_machine(method):
    for name, parser in all_dataparsers.items():
        config = copy.deepcopy(all_methods[method])
        config.pipeline.datamanager.dataparser = parser
        assert yaml.load(yaml.dump(config), Loader=RunLoader) == config, name
    config.machine.device_type, config.machine.num_devices, config.vis = "mps", 2, "viewer+tensorboard"
    config.machine.dist_url, config.viewer.quit_on_train_completion = "tcp://there:1234", True
    config.pipeline.prompts_file, config.load_checkpoint = Path("prompts.txt"), Path("/run/step-000000001.ckpt")
    config.pipeline.model.camera_optimizer.mode = "SO3xR3"
    assert yaml.load(yaml.dump(config), Loader=RunLoader) == config


def test_only_functions_that_put_photos_together_are_named():
    for name in ("nerfstudio.utils.scripts.run_command", "nerfstudio.utils.writer.put_scalar"):
        with pytest.raises(yaml.YAMLError, match="no part of a run's config"):
            yaml.load(f"!!python/name:{name}", Loader=RunLoader)
    name = "nerfstudio.data.datamanagers.base_datamanager.variable_res_collate"
    assert yaml.load(f"!!python/name:{name}", Loader=RunLoader).__name__ == "variable_res_collate"


@pytest.fixture
def moved(tmp_path, monkeypatch) -> Path:
    """A run that was started in one folder with relative paths, then moved, and is opened from another folder. It was never
    trained, but has a checkpoint."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    make_small_scene(Path("scene"))
    Path("prompts.txt").write_text("grass; sheep")
    config = small_config(Path("scene"))
    config.output_dir, config.experiment_name, config.timestamp = Path("outputs"), "run", "t"
    config.pipeline.prompts_file, config.pipeline.datamanager.feature_cache_dir = Path("prompts.txt"), Path("cache")
    pipeline = opened(config, "test")
    config.save_config()
    assert config.data == Path("scene") and config.get_base_dir() == Path("outputs/run/ovs3d-lite/t")
    state = {"step": 1, "pipeline": pipeline.state_dict()}
    write_checkpoint(checkpoint_path(config.get_checkpoint_dir(), 1), state)
    shutil.copytree(config.get_base_dir(), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "run"


def test_paths_lead_to_the_run_and_its_data_from_any_folder(moved):
    there = moved.parent / "there"
    config = yaml.load((moved / "config.yml").read_text(), Loader=RunLoader)
    assert config.get_checkpoint_dir() == there / "outputs/run/ovs3d-lite/t/nerfstudio_models"
    pipeline = config.pipeline
    paths = (config.data, pipeline.datamanager.data, pipeline.datamanager.feature_cache_dir, pipeline.prompts_file)
    assert paths == (there / "scene", there / "scene", there / "cache", there / "prompts.txt")
    # Those within the run and within the data lead there still.
    assert not config.relative_model_dir.is_absolute() and not config.logging.relative_log_dir.is_absolute()
    assert "opened_in" not in (moved / "config.yml").read_text()


def test_local_weights_are_found_from_any_folder(tmp_path, weights, checkpoints, monkeypatch):
    """Those of a training, which the config and what a checkpoint holds name, and the splat or the run that it began with."""
    monkeypatch.chdir(weights)
    config = small_config(make_small_scene(tmp_path / "scene"))
    config.output_dir, config.pipeline.prompts = tmp_path, "grass; sheep"
    config.pipeline.image_text_encoder, config.pipeline.token_encoder = "open_clip:tiny-ovs3d@clip.pt", "dino:dino@64"
    config.save_config()
    trained = opened(config)
    trained.prepare_features()
    splats = copy.deepcopy(all_methods["ovs3d-splat-lite"])
    splats.output_dir, splats.pipeline.model.init_from = tmp_path, Path("splat.ply")
    splats.save_config()
    monkeypatch.chdir(tmp_path)
    read, read_splats = (
        yaml.load((written.get_base_dir() / "config.yml").read_text(), Loader=RunLoader).pipeline
        for written in (config, splats)
    )
    image_text, tokens = encoders(read.image_text_encoder, read.token_encoder)
    assert tokens.short_edge == 64 and Path(tokens.name) == weights / "dino"
    assert Embedder("cpu")(trained.model.segmenter, ["goat"]).allclose(image_text.embed_text(["goat"]))
    assert read_splats.model.init_from == weights / "splat.ply"
    assert (read_splats.image_text_encoder, read_splats.token_encoder) == ("offline", "offline")


def test_nerfstudios_commands_open_a_run_where_its_config_lies(moved, monkeypatch):
    shutil.rmtree(moved.parent / "there" / "outputs")
    for place in (moved / "config.yml", Path("../run/config.yml")):
        config, _, checkpoint, step = eval_setup(place, test_mode="test")
        assert (checkpoint.resolve(), step) == (moved / "nerfstudio_models" / "step-000000001.ckpt", 1)
        assert config.get_base_dir().resolve() == moved
        assert "opened_in" not in yaml.dump(config)
    # Of a copy and what it was copied from, the one that is named.
    shutil.copytree(moved, moved.parent / "there/outputs/run/ovs3d-lite/t")
    assert moved in eval_setup(Path("../run/config.yml"), test_mode="inference")[2].resolve().parents


def test_data_that_are_gone_are_said_with_options_that_there_are(moved, capsys):
    (moved.parent / "there" / "scene").rename(moved.parent / "scene")
    with pytest.raises(SystemExit):
        eval_setup(moved / "config.yml", test_mode="test")
    printed = " ".join(capsys.readouterr().out.split())
    assert "there/scene, is not there; put it back, or a link" in printed
    assert "Every `ovs3d` command on a run takes --data." in printed
    with pytest.raises(UserError, match=r"with --data, in Python with data=\."):
        open_run(moved)
    with pytest.raises(UserError, match="no features yet"):  # found
        open_run(moved, data=moved.parent / "scene")


def test_every_subcommand_that_opens_a_run_takes_the_place_of_its_data():
    def parts(command: object) -> list[type]:
        """The dataclasses that a subcommand is one of."""
        if dataclasses.is_dataclass(command):
            return [command]
        return [part for argument in get_args(command) for part in parts(argument)]

    commands = [part for name in SUBCOMMANDS for part in parts(import_module(f"ovs3d_nerfstudio.cli.{name}").Command)]
    fields = [{field.name for field in dataclasses.fields(command)} for command in commands]
    openers = [names for names in fields if "load_config" in names]
    assert len(openers) == 10 and all("data" in names for names in openers)
