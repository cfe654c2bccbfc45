"""Runs that cannot be opened or gone on with: each ends with a sentence and status 1, and leaves the run as it was."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bad_input import HEIGHT, VIEWS, WIDTH, make_small_scene, opened, refused, small_config
from conftest import CLIP
from nerfstudio.scripts import train
from PIL import Image

from ovs3d_nerfstudio.cli import main
from ovs3d_nerfstudio.errors import user_errors

NS = "nerfstudio_models"
CHECKPOINT = f"{NS}/step-000000002.ckpt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoints) -> Path:
    """A folder with the scene and a run of three steps on it, as ns-train leaves them; both are found by relative paths."""
    folder = tmp_path_factory.mktemp("finished")
    make_small_scene(folder / "scene")
    config = small_config(folder / "scene")
    for name, spec in checkpoints.items():
        setattr(config.pipeline, name, spec)
    config.output_dir, config.experiment_name, config.timestamp = folder / "outputs", "small", "t"
    config.max_num_iterations, config.vis = 3, "tensorboard"
    train.main(config)
    shutil.move(folder / "outputs" / "small" / "ovs3d-lite" / "t", folder / "run")
    shutil.rmtree(folder / "outputs")
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the run, moved, with its scene beside it, to be spoilt."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / "run", str(finished), str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def rewrite(run: Path, old: str, new: str, count: int = -1) -> None:
    """The run's config edited by hand."""
    path = run / "config.yml"
    content = path.read_text()
    parts = lambda text: "".join(f"- {part}\n" for part in Path(text).parts)  # noqa: E731
    if Path(old).is_absolute():
        # YAML has a path as a list of its parts, indented as deep as it lies.
        for indent in ("", *(" " * n for n in range(2, 12, 2))):
            old_list, new_list = (
                "".join(indent + line for line in parts(text).splitlines(True)) for text in (old, new)
            )
            content = content.replace(old_list, new_list)
    else:
        assert old in content, old
        content = content.replace(old, new, count)
    path.write_text(content)


def edited(old: str, new: str):
    return lambda run: rewrite(run, old, new)


def write(name: str, content: bytes | str):
    return lambda run: (run / name).write_bytes(content.encode() if isinstance(content, str) else content)


def state(change):
    """The checkpoint changed."""

    def spoil(run: Path) -> None:
        saved = torch.load(run / CHECKPOINT, weights_only=False)
        change(saved)
        torch.save(saved, run / CHECKPOINT)

    return spoil


def drop(key: str):
    return state(lambda saved: saved["pipeline"].pop(key))


def replaced(key: str, value):
    return state(lambda saved: saved["pipeline"].update({key: value}))


def without(name: str):
    def spoil(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


RUNS = {
    "no config": (without("config.yml"), "config.yml does not exist"),
    "an empty config": (write("config.yml", ""), "is no config of a run"),
    "a config of text": (write("config.yml", "hello"), "is no config of a run"),
    "a config that is no YAML": (write("config.yml", "a: [1, 2"), "config.yml cannot be opened"),
    "a config that is not UTF-8": (write("config.yml", b"\xff\xfe\x00"), "config.yml cannot be opened"),
    "a config of a class that is gone": (edited("OVS3DPipelineConfig", "OVS4DConfig"), "OVS4DConfig"),
    "a config of another method": (edited("method_name: ovs3d-lite", "method_name: ovs4d"), "a run of ovs4d"),
    "a temperature edited to nothing": (
        edited("fda_temperature: 0.5", "fda_temperature: 0"),
        "--pipeline.model.fda-temperature 0",
    ),
    "a number edited into text": (edited("semantic_samples: 6", "semantic_samples: six"), "semantic-samples six"),
    "a width edited": (
        edited("semantic_hidden_dim: 64", "semantic_hidden_dim: 32"),
        ["does not fit its config", "size mismatch"],
    ),
    "levels edited": (edited("semantic_levels: 2", "semantic_levels: 3"), "does not fit its config"),
    "a scale taken out": (edited("    - 3.0\n", ""), "does not fit its config"),
    "no checkpoints": (without(NS), "There is no checkpoint"),
    "no checkpoint": (without(CHECKPOINT), "There is no checkpoint"),
    "a checkpoint of text": (write(CHECKPOINT, "weights? no"), "step-000000002.ckpt"),
    "a checkpoint of zero bytes": (write(CHECKPOINT, ""), "step-000000002.ckpt"),
    "a checkpoint that is something else": (lambda run: torch.save([1, 2], run / CHECKPOINT), "step-000000002.ckpt"),
    "a checkpoint of an older version": (
        drop("_model.semantic_field.last.weight"),
        ["does not fit its config", "Missing key"],
    ),
    "a checkpoint that says no prompts": (replaced("_model.segmenter._extra_state", {}), "does not fit its config"),
    "a checkpoint of a newer version": (replaced("_model.semantic_field.gate", torch.ones(1)), "Unexpected key"),
    "a checkpoint before any features": (
        replaced("_model.segmenter.basis", torch.zeros(0, 0)),
        "holds no features yet",
    ),
    "no data": (lambda run: shutil.rmtree(run.parent / "scene"), ["scene, is not there", "--data"]),
    "data without poses": (lambda run: (run.parent / "scene" / "transforms.json").unlink(), "has no transforms.json"),
    "data without pictures": (lambda run: shutil.rmtree(run.parent / "scene" / "images"), ".png"),
    "data with a broken mask": (
        lambda run: (run.parent / "scene" / "segmentations" / f"{VIEWS - 1:02d}" / "grass.png").write_text("x"),
        "grass.png cannot be read",
    ),
    "data without masks": (
        lambda run: shutil.rmtree(run.parent / "scene" / "segmentations"),
        "segmentations/classes.txt",
    ),
}


@pytest.mark.parametrize("spoil, said", [pytest.param(*case, id=name) for name, case in RUNS.items()])
def test_a_run_is_not_evaluated(run, tmp_path, capsys, spoil, said):
    spoil(run)
    refused(capsys, tmp_path, lambda: main(["eval", "--load-config", str(run)]), said)


def test_a_moved_run_is_evaluated_without_its_cache(run, tmp_path, ovs3d):
    shutil.rmtree(tmp_path / "scene" / ".ovs3d-cache")
    shutil.move(tmp_path / "scene", tmp_path / "elsewhere")
    status, printed = ovs3d("eval", "--load-config", run, "--data", tmp_path / "elsewhere")
    assert status == 0 and "mIoU" in printed
    assert json.loads((tmp_path / "metrics.json").read_text())["views"]
    assert not (tmp_path / "elsewhere" / ".ovs3d-cache").exists()


def test_a_lone_photo_is_rendered_under_its_name_beside_the_photo_itself_and_the_nearest_one(run, tmp_path, ovs3d):
    """Shrunk, without a folder of smaller photos."""
    words = ["--load-config", run, "--output-path", tmp_path / "r", "--image-format", "png", "--downscale-factor", 2]
    words += ["--render-nearest-camera", "True", "--check-occlusions", "True", "--rendered-output-names"]
    assert ovs3d("render", "dataset", *words, "rgb", "gt-rgb")[0] == 0
    assert Image.open(tmp_path / "r" / "test" / "rgb" / "06.png").size == (WIDTH // 2, HEIGHT // 2)
    for name, photo in (("gt-rgb", "06"), ("nearest_photo", "04")):
        written = np.asarray(Image.open(tmp_path / "r" / "test" / name / "06.png")).astype(int)
        original = Image.open(tmp_path / "scene" / "images" / f"{photo}.png")
        expected = np.asarray(original.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.BILINEAR))
        assert np.abs(written - expected).max() <= 2, name


WORDS = [
    (["eval", "--split", "train"], "No view of the split 'train' has masks"),
    (["eval", "--prompt-classes", "wolf = sheep"], ["wolf", "grass; sheep"]),
    (["eval", "--prompt-classes", "sheep = wolf"], ["wolf", "no class"]),
    (["eval", "--prompts", "a", "--prompts-file", "b"], "only one of them"),
    (["eval", "--prompts", " ; "], "no prompt"),
    (["eval", "--prompts-file", "nowhere.txt"], "nowhere.txt does not exist"),
    (["eval", "--output-path", "run/config.yml/metrics.json"], "config.yml"),
    (["render", "dataset", "--rendered-output-names", "relevancy_wolf"], ["relevancy_wolf", "relevancy_sheep"]),
    (["render", "dataset", "--prompts", "x" * 301], "301 characters"),
    (
        ["render", "dataset", "--downscale-factor", "40"],
        "--downscale-factor 40 leaves nothing of pictures with a side of 36",
    ),
    (["render", "spiral", "--downscale-factor", "36"], "--downscale-factor 36 leaves nothing"),
    (["render", "spiral", "--camera-idx", "6"], ["--camera-idx 6 is none of the 6 training photos", "from 0 to 5"]),
    (["render", "interpolate", "--pose-source", "eval"], ["--pose-source eval has one photo", "around"]),
    (["render", "dataset", "--prompts", "a/b; a:b"], "both have the mask a_b.png"),
    (["export", "pointcloud", "--prompts", ";"], "no prompt"),
    (["export", "pointcloud", "--output-dir", "run/config.yml"], "config.yml"),
]


@pytest.mark.parametrize("words, said", WORDS)
def test_a_word_about_a_run_is_refused(run, tmp_path, capsys, words, said):
    line = [*words[:2], "--load-config", str(run), *words[2:]] if words[0] != "eval" else [
        "eval", "--load-config", str(run), *words[1:]
    ]  # fmt: skip
    refused(capsys, tmp_path, lambda: main(line), said)


def test_prompts_of_the_moment_by_another_encoder_are_refused(run, tmp_path, capsys, checkpoints):
    spec = checkpoints["image_text_encoder"]
    state(lambda saved: saved["pipeline"]["_model.segmenter._extra_state"].update(fingerprint="older"))(run)
    act = lambda: main(["eval", "--load-config", str(run), "--prompts", "wolf"])  # noqa: E731
    refused(capsys, tmp_path, act, ["older", spec, "install the same weights"])


def resumed(run: Path):
    """The run's pipeline, with the state of its checkpoint, as `ns-train --load-dir` has it."""
    config = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)

    def go_on():
        pipeline = opened(config)
        saved = torch.load(run / CHECKPOINT, weights_only=False)
        pipeline.load_pipeline(saved["pipeline"], saved["step"])
        pipeline.get_train_loss_dict(3)

    return config, go_on


@pytest.mark.parametrize("width", [CLIP["embed_dim"], 8])
def test_training_does_not_go_on_with_another_encoder(run, tmp_path, capsys, width):
    """Of the same width it would fit, and mean nothing."""
    import open_clip

    open_clip.factory._MODEL_CONFIGS["other-ovs3d"] = CLIP | {"embed_dim": width}
    try:
        torch.save(open_clip.create_model("other-ovs3d", pretrained=None).state_dict(), tmp_path / "other.pt")
        config, go_on = resumed(run)
        config.pipeline.image_text_encoder = f"open_clip:other-ovs3d@{tmp_path / 'other.pt'}"
        refused(capsys, tmp_path, go_on, ["was trained with open_clip:tiny-ovs3d", "open_clip:other-ovs3d@"])
    finally:
        del open_clip.factory._MODEL_CONFIGS["other-ovs3d"]


def test_training_does_not_go_on_from_a_checkpoint_that_does_not_fit(run, tmp_path, capsys):
    drop("_model.segmenter._extra_state")(run)
    refused(capsys, tmp_path, resumed(run)[1], "does not fit its config")


def test_training_goes_on_where_it_fits(run):
    resumed(run)[1]()


ENCODERS = [
    ("image_text_encoder", "", "no encoder ''"),
    ("image_text_encoder", "clip", ["no encoder 'clip'", "offline, open_clip"]),
    ("image_text_encoder", "dino", "no encoder 'dino'"),
    ("image_text_encoder", "open_clip:tiny-ovs3d@nowhere.pt", "nowhere.pt"),
    ("image_text_encoder", "open_clip:tiny-ovs3d@scene", "'scene' is neither a file"),
    ("image_text_encoder", "open_clip:tiny-ovs3d@text.pt", "cannot be loaded as weights of tiny-ovs3d"),
    ("image_text_encoder", "open_clip:tiny-ovs3d@empty.safetensors", "cannot be loaded as weights of tiny-ovs3d"),
    ("image_text_encoder", "open_clip:tiny-ovs3d@list.pt", "cannot be loaded as weights of tiny-ovs3d"),
    ("image_text_encoder", "open_clip:ViT-B-16@clip.pt", "cannot be loaded as weights of ViT-B-16"),
    ("token_encoder", "dina", ["no encoder 'dina'", "dino, offline"]),
    ("token_encoder", "dino:/nowhere/at/all", "/nowhere/at/all"),
    ("token_encoder", "dino:./scene", "cannot be loaded"),
    ("token_encoder", "dino:folder", ["folder' cannot be loaded"]),
    ("token_encoder", "dino:bert", "no plain vision transformer"),
    ("token_encoder", "offline:x", "64 or more"),
]


@pytest.mark.parametrize("option, spec, said", ENCODERS)
def test_an_encoder_that_cannot_be_had_is_refused(run, tmp_path, capsys, checkpoints, option, spec, said):
    shutil.rmtree(tmp_path / "scene" / ".ovs3d-cache")
    (tmp_path / "text.pt").write_text("weights? no")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    shutil.copy(checkpoints["image_text_encoder"].partition("@")[2], tmp_path / "clip.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    config = small_config(tmp_path / "scene")
    for name, good in {**checkpoints, option: spec}.items():
        setattr(config.pipeline, name, good)
    refused(capsys, tmp_path, lambda: opened(config).get_train_loss_dict(0), said)


def test_an_encoder_whose_package_is_broken_is_refused_by_name(tmp_path, monkeypatch, capsys):
    from ovs3d_nerfstudio.encoders.base import image_text_encoder

    place = tmp_path / "broken-1.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Name: broken\nVersion: 1\n")
    (place / "entry_points.txt").write_text("[ovs3d.image_text_encoders]\nbroken = no_such_module:Encoder\n")
    monkeypatch.syspath_prepend(tmp_path)

    def act():
        with user_errors():
            image_text_encoder("broken")

    refused(capsys, tmp_path, act, ["'broken' cannot be imported", "no_such_module"])


def test_without_held_out_photos_evaluation_says_so(run, tmp_path, capsys):
    path = tmp_path / "scene" / "transforms.json"
    content = json.loads(path.read_text())
    content |= {"val_filenames": [], "test_filenames": []}
    path.write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "scene" / "segmentations")
    config, _ = resumed(run)
    pipeline = opened(config, "test")
    refused(capsys, tmp_path, pipeline.get_average_eval_image_metrics, ["No photo", "is held out"])
    for mode in ("dataset", "spiral"):
        refused(capsys, tmp_path, lambda: main(["render", mode, "--load-config", str(run)]), "is held out")  # noqa: B023
    pipeline = opened(config)
    pipeline.get_train_loss_dict(0)


def test_no_room_ends_with_a_sentence(capsys, tmp_path):
    """The device that is always full; a failed write names no file."""

    def act():
        with user_errors():
            Path("/dev/full").write_text("x" * 10_000)

    refused(capsys, tmp_path, act, "no room to write")


def test_a_cache_folder_that_cannot_be_written_is_refused(run, tmp_path, capsys, checkpoints):
    (tmp_path / "file").write_text("in the way")
    config = small_config(tmp_path / "scene")
    config.pipeline.datamanager.feature_cache_dir = tmp_path / "file"
    for name, spec in checkpoints.items():
        setattr(config.pipeline, name, spec)
    pipeline = opened(config)
    refused(capsys, tmp_path, lambda: pipeline.get_train_loss_dict(0), "--pipeline.datamanager.feature-cache-dir")


def test_other_failures_of_the_system_are_not_hidden():
    with pytest.raises(OSError, match="interrupted"), user_errors():
        raise OSError(errno.EINTR, "interrupted")
