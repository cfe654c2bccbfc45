"""Nobody gets in: no file that we read runs code, no name leads out of a folder, nothing of ours listens."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import children
import numpy as np
import psutil
import pytest
import torch
import yaml
from children import checkpoint_folder, run_folder
from nerfstudio.utils.eval_utils import eval_load_checkpoint

from ovs3d_nerfstudio.cli.labels import LabelFolder
from ovs3d_nerfstudio.data.annotations import AnnotationError, Annotations
from ovs3d_nerfstudio.encoders.base import EncoderError, token_encoder
from ovs3d_nerfstudio.engine.checkpoints import CheckpointError, checkpoints, read_checkpoint
from ovs3d_nerfstudio.engine.run_config import RunLoader
from ovs3d_nerfstudio.features.cache import CacheError, FeatureCache
from ovs3d_nerfstudio.features.extraction import default_cache_dir
from ovs3d_nerfstudio.files import written_beside
from ovs3d_nerfstudio.prompts.prompts import PromptError, choose_prompts, parse_prompts
from ovs3d_nerfstudio.prompts.segmentation import Segmenter

HOSTILE = [
    "../../out",
    "/etc/out",
    "..",
    ".",
    "a/../../../out",
    r"C:\out",
    r"..\..\elsewhere",
    "~/out",
    "$(touch out)",
    "-rf",
    *("红色的苹果放在白色的桌子上面" * 21 + end for end in ("", "!")),  # no file bears as many bytes
    *("An RGB toy, " * 24 + end for end in ("1", "2")),
]


class Code:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """Is there when code was run."""
    path = tmp_path / "code was run"
    pickle.loads(pickle.dumps(Code(path)))  # it would work
    path.rmdir()
    return path


@pytest.fixture(scope="module")
def run(scene, weights, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    shutil.copytree(scene, out / "scene", ignore=shutil.ignore_patterns(".ovs3d-cache"))
    child = children.start(out / "log", children.train, out / "scene", out, 4, 10, **children.specs(weights))
    listening = []
    while child.process.exitcode is None:
        child.process.join(0.1)
        try:
            for process in [psutil.Process(child.process.pid), *psutil.Process(child.process.pid).children(True)]:
                listening += [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        except psutil.Error:
            continue
    assert child.end() == 0, child.text
    assert not listening
    return out


def test_code_in_a_cached_file_is_not_run(tmp_path, mark):
    cache = FeatureCache(tmp_path / "cache", "pyramid", {})
    cache.save("key", {"x": torch.ones(1)})
    for content in (pickle.dumps(Code(mark)), b""):
        cache.path("key").write_bytes(content)
        assert not cache.intact("key")
        with pytest.raises(CacheError):
            cache.load("key")
    torch.save(Code(mark), cache.path("key"))
    assert not cache.intact("key") and not mark.exists()


def test_code_in_a_checkpoint_is_not_run(run, weights, tmp_path, mark, ovs3d):
    """Not by us, by resuming, by our commands, nor by what nerfstudio's own commands call (with torch ≥ 2.6)."""
    folder = shutil.copytree(run_folder(run), tmp_path / "run")
    (path,) = checkpoints(folder / "nerfstudio_models")
    state = torch.load(path, weights_only=True)
    torch.save({**state, "more": Code(mark)}, path)
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_checkpoint(path)
    status, said = ovs3d("eval", "--load-config", folder / "config.yml", "--output-path", tmp_path / "out.json")
    assert status == 1 and "more than tensors" in said
    (tmp_path / "again").mkdir()
    settings = {"load_dir": path.parent, **children.specs(weights)}
    child = children.start(tmp_path / "log", children.train, run / "scene", tmp_path / "again", 8, 10, **settings)
    assert child.end() == 1 and "more than tensors" in child.text and "Traceback" not in child.text
    config = children.configured(tmp_path, tmp_path, 4)
    config.load_dir = path.parent
    with pytest.raises(pickle.UnpicklingError):
        eval_load_checkpoint(config, None)
    assert not mark.exists()


def test_code_in_a_config_is_not_run_by_our_commands(run, tmp_path, mark, ovs3d):
    folder = shutil.copytree(run_folder(run), tmp_path / "run")
    config = folder / "config.yml"
    good = config.read_text()
    assert yaml.load(good, Loader=RunLoader).method_name == "ovs3d-lite"
    for value in (
        f"!!python/object/apply:os.mkdir ['{mark}']",
        f"!!python/object/new:os.mkdir ['{mark}']",
        f"!!python/object/apply:nerfstudio.utils.scripts.run_command ['mkdir \"{mark}\"']",
        "!!python/name:os.system",
        "!!python/name:nerfstudio.utils.scripts.run_command",
        "!!python/module:antigravity",
        "!!python/object:subprocess.Popen {}",
        f"!!python/object/apply:nerfstudio.engine.trainer.TrainerConfig ['{mark}']",
    ):
        config.write_text(good.replace("project_name: nerfstudio-project", f"project_name: {value}"))
        assert config.read_text() != good
        status, said = ovs3d("eval", "--load-config", config, "--output-path", tmp_path / "out.json")
        assert status == 1 and "no part of a run's config" in said, value
    assert not mark.exists() and not (tmp_path / "out.json").exists()


def test_code_in_the_weights_of_an_encoder_is_not_run(weights, tmp_path, mark):
    folder = shutil.copytree(weights / "dino", tmp_path / "dino")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save({"weights": Code(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(EncoderError):
        token_encoder(f"dino:{folder}").embed_picture(torch.zeros(32, 32, 3, dtype=torch.uint8))
    assert not mark.exists()


def test_no_prompt_leads_out_of_a_folder(tmp_path):
    prompts = parse_prompts("\n".join(HOSTILE))
    assert len(prompts) == len(HOSTILE)
    folder = tmp_path / "a" / "b" / "out"
    written = LabelFolder(folder, prompts, np.zeros((len(prompts), 3)), masks=True)
    written.write(Path("view"), np.arange(len(prompts))[None])
    masks = {path.name for path in (folder / "segmentations" / "view").iterdir()}
    assert len(masks) == len(prompts)
    read = Annotations(folder)
    assert [read.classes[label] for label in read.labels("view", 1, len(prompts))[0]] == prompts
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
    assert not outside
    segmenter = Segmenter()
    segmenter.prompts = prompts
    for name in segmenter.output_names():  # a folder of `ns-render dataset`
        place = tmp_path / "renders" / name / "picture.png"
        assert place.resolve().parent.parent == (tmp_path / "renders").resolve()
        assert "rgb" not in name.lower() and len(name.encode()) < 240
    assert len(set(segmenter.output_names())) == len(prompts)


def test_links_in_a_data_set_do_not_make_us_write_elsewhere(tmp_path):
    scene, elsewhere = tmp_path / "scene", tmp_path / "elsewhere"
    scene.mkdir()
    elsewhere.mkdir()
    (scene / ".ovs3d-cache").symlink_to(elsewhere)
    with pytest.raises(CacheError, match="feature-cache-dir"):
        default_cache_dir(scene)
    (scene / ".ovs3d-cache").unlink()
    # The name of a recipe's folder can be foreseen.
    cache = FeatureCache(default_cache_dir(scene), "pyramid", {})
    cache.folder.parent.mkdir()
    cache.folder.symlink_to(elsewhere)
    with pytest.raises(CacheError, match="link"):
        cache.fill("key", lambda: {"x": torch.ones(1)}, wait=True)
    cache.folder.unlink()
    # And so can those of its files: the link is replaced, its target is not.
    cache.folder.mkdir()
    precious = elsewhere / "precious"
    precious.write_text("precious")
    for name in ("key.safetensors", ".key.safetensors.tmp", f".key.safetensors.{os.getpid()}.tmp"):
        (cache.folder / name).symlink_to(precious)
    assert cache.fill("key", lambda: {"x": torch.ones(1)}, wait=True) and cache.intact("key")
    (cache.folder / ".other.lock").symlink_to(precious)
    with pytest.raises(CacheError):
        cache.fill("other", lambda: {"x": torch.ones(1)}, wait=True)
    assert precious.read_text() == "precious" and os.listdir(elsewhere) == ["precious"]


def test_links_in_a_data_set_do_not_make_us_read_elsewhere(scene, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a secret\n")
    data = shutil.copytree(scene, tmp_path / "scene", ignore=shutil.ignore_patterns(".ovs3d-cache"))
    mask = next((data / "segmentations").glob("*/*.png"))
    picture = tmp_path / "elsewhere.png"
    shutil.copy(mask, picture)
    Annotations(data)
    mask.unlink()
    mask.symlink_to(picture)
    with pytest.raises(AnnotationError, match="out of the scene"):
        Annotations(data)
    classes = data / "segmentations" / "classes.txt"
    classes.unlink()
    classes.symlink_to(secret)
    with pytest.raises(PromptError, match="out of the scene"):
        choose_prompts("", None, data)
    # A scene that is itself reached through a link is a scene like any other.
    (tmp_path / "link").symlink_to(scene)
    assert choose_prompts("", None, tmp_path / "link")[0] and Annotations(tmp_path / "link").views


def test_names_beside_a_file_cannot_be_foreseen(tmp_path):
    names = set()
    for _ in range(3):
        with written_beside(tmp_path / "file") as beside:
            names.add(beside.name)
            beside.write_text("x")
    assert len(names) == 3


def test_training_listens_on_no_port(run):
    """The viewer does, as nerfstudio says; nothing of ours. What `run` asserts while it trains."""
    assert checkpoints(checkpoint_folder(run))
