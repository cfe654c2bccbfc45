"""Checkpoints open where they should, and say why where they do not: devices, torch versions, tiny-cuda-nn, other runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import children
import numpy as np
import pytest
import torch
import yaml
from children import checkpoint_folder, run_folder
from nerfstudio.utils.eval_utils import eval_load_checkpoint, eval_setup

from ovs3d_nerfstudio.engine.checkpoints import (
    TINY_CUDA_NN,
    CheckpointError,
    check_implementation,
    checkpoint_path,
    checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from ovs3d_nerfstudio.run_files import open_run

STEPS = 6


@pytest.fixture(scope="module")
def run(scene, weights, tmp_path_factory) -> Path:
    """The output folder of a short run."""
    out = tmp_path_factory.mktemp("run")
    shutil.copytree(scene, out / "scene", ignore=shutil.ignore_patterns(".ovs3d-cache"))
    child = children.start(out / "log", children.train, out / "scene", out, STEPS, 2, **children.specs(weights))
    assert child.end() == 0, child.text
    return out


@pytest.fixture
def saved(run) -> Path:
    (path,) = checkpoints(checkpoint_folder(run))
    return path


@pytest.fixture
def pipeline(run, weights):
    config = children.configured(run / "scene", run, STEPS, **children.specs(weights))
    return config.pipeline.setup(device="cpu", test_mode="test")


def resumed(run: Path, weights: Path, folder: Path, **settings) -> children.Child:
    settings = {"load_dir": checkpoint_folder(run), **children.specs(weights), **settings}
    folder.mkdir(exist_ok=True)
    child = children.start(folder / "log", children.train, run / "scene", folder, STEPS + 3, 2, **settings)
    child.end()
    return child


def test_a_checkpoint_holds_nothing_but_tensors_and_plain_values(saved):
    """Then every torch that nerfstudio supports reads it with `weights_only=True`, whatever is on its list."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        assert not torch.serialization.get_unsafe_globals_in_checkpoint(saved)
        assert torch.load(saved, weights_only=True)["step"] == STEPS - 1
    finally:
        torch.serialization.add_safe_globals(allowed)


def test_ctrl_c_while_a_checkpoint_is_written_stays_ctrl_c(tmp_path, monkeypatch):
    """torch makes another error of it, which looks like a full disk."""
    save, writes = torch.save, []

    class Interrupted:
        def write(self, part: bytes) -> int:
            writes.append(part)
            if len(writes) == 3:
                raise KeyboardInterrupt
            return len(part)

    monkeypatch.setattr(torch, "save", lambda state, file: save(state, Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "models" / "step-000000001.ckpt", {"weights": torch.zeros(9)})
    assert len(writes) >= 3 and [path.name for path in tmp_path.rglob("*")] == ["models"]


def test_a_checkpoint_of_nerfstudios_own_trainer_is_read(tmp_path):
    """Its schedulers' state has NumPy scalars."""
    torch.save({"step": 1, "pipeline": {}, "optimizers": {}, "schedulers": {"lr": np.float64(0.5)}}, tmp_path / "old")
    assert read_checkpoint(tmp_path / "old")["schedulers"] == {"lr": 0.5}


def test_a_run_that_was_trained_on_cuda_opens_on_a_cpu(saved, pipeline, tmp_path, monkeypatch):
    """Its tensors say that they lie on a GPU; torch refuses them where there is none and no other place is named."""
    state = read_checkpoint(saved)
    state["scalers"] = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    state["scalers"]["_growth_tracker"] = 0
    config = children.configured(tmp_path, tmp_path, STEPS)
    config.load_dir = checkpoint_folder(tmp_path)
    path = checkpoint_path(config.load_dir, STEPS - 1)
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:0")
        write_checkpoint(path, state)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    eval_load_checkpoint(config, pipeline)
    for name, value in pipeline.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, state["pipeline"][name])
    trainer = config.setup()
    trainer.pipeline = pipeline
    trainer.optimizers = trainer.setup_optimizers()
    trainer._resume(read_checkpoint(path))  # it has a scaler's state, and there is no scaler here
    assert trainer._start_step == STEPS


def test_a_run_that_was_trained_on_a_cpu_goes_on_with_mixed_precision(saved, pipeline, tmp_path):
    """A CPU run has no scaler; an enabled one refuses an empty state."""
    state = read_checkpoint(saved)
    assert state["scalers"] == {}
    trainer = children.configured(tmp_path, tmp_path, STEPS).setup()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", enabled=True)
    with pytest.raises(RuntimeError):
        trainer.grad_scaler.load_state_dict(state["scalers"])
    trainer.pipeline = pipeline
    pipeline.load_pipeline(state["pipeline"], state["step"])
    trainer.optimizers = trainer.setup_optimizers()
    trainer._resume(state)
    assert trainer._start_step == STEPS and trainer.grad_scaler.get_scale() == 65536
    lr = trainer.optimizers.schedulers["fields"].get_last_lr()
    assert (
        lr == state["schedulers"]["fields"]["_last_lr"] and trainer.optimizers.schedulers["fields"].last_epoch == STEPS
    )


def fused(state: dict) -> dict:
    """Names of parameters as tiny-cuda-nn leaves them: one for each grid or network."""
    renamed = {}
    for name, value in state.items():
        for part in ("mlp_base.model", "mlp_head", "semantic_field.grid"):
            head, found, _ = name.partition(f"{part}.")
            name = f"{head}{part}.tcnn_encoding.params" if found else name
        renamed[name] = value
    return renamed


def test_a_run_with_tiny_cuda_nn_says_what_to_install(saved, pipeline, capsys):
    with pytest.raises(SystemExit) as stopped:
        pipeline.load_pipeline(fused(read_checkpoint(saved)["pipeline"]), STEPS)
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 1 and "tiny-cuda-nn" in said and TINY_CUDA_NN in said


def test_a_run_without_tiny_cuda_nn_says_so_where_it_is_opened_with_it(saved):
    names = [name.removeprefix("_model.") for name in read_checkpoint(saved)["pipeline"]]
    with pytest.raises(CheckpointError, match="implementation: torch"):
        check_implementation(names, fused(dict.fromkeys(names)))


def test_the_implementation_that_was_trained_with_is_in_the_config(run):
    assert "implementation: torch" in (run_folder(run) / "config.yml").read_text()


def test_a_checkpoint_of_another_method_or_size_is_refused(saved, pipeline, capsys):
    state = read_checkpoint(saved)["pipeline"]
    foreign = {name: value for name, value in state.items() if "semantic" not in name and "segmenter" not in name}
    smaller = {**state, "_model.field.mlp_base.model.0.hash_table": torch.zeros(3, 2)}
    for other, sentence in ((foreign, "does not fit its config"), (smaller, "hash_table")):
        with pytest.raises(SystemExit):
            pipeline.load_pipeline(other, STEPS)
        assert sentence in " ".join(capsys.readouterr().out.split())


def test_names_of_a_distributed_run_are_known(saved, pipeline):
    state = read_checkpoint(saved)["pipeline"]
    pipeline.load_pipeline(
        {name.replace("_model.", "_model.module.", 1): value for name, value in state.items()}, STEPS
    )
    assert pipeline.model.segmenter.ready


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"", "damaged"), (b"PK\x03\x04 and then nothing", "damaged"), (None, "no checkpoint")]
)
def test_what_is_no_checkpoint_is_refused_in_words(tmp_path, content, sentence):
    path = tmp_path / "step-000000001.ckpt"
    if content is None:
        torch.save({"weights": torch.ones(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


def test_a_run_goes_on_with_other_prompts(run, weights, tmp_path, saved):
    """The mixture has another size then, and its optimizer's state with it; everything else goes on."""
    child = resumed(run, weights, tmp_path, pipeline__prompts="a cat; a rocket")
    assert child.end() == 0, child.text
    assert child.text.count("learned anew") == 1
    assert [int(line) for line in (tmp_path / "steps.txt").read_text().split()] == list(range(STEPS, STEPS + 3))
    before, after = read_checkpoint(saved), read_checkpoint(checkpoints(checkpoint_folder(tmp_path))[0])
    assert after["pipeline"]["_model.mixture.log_weights"].shape == (2,)
    assert after["optimizers"]["patch_mixture"]["state"][3]["exp_avg"].shape == (2,)
    assert after["optimizers"]["fields"]["state"][0]["step"] == before["optimizers"]["fields"]["state"][0]["step"] + 3
    for group, schedule in after["schedulers"].items():
        assert schedule["last_epoch"] == before["schedulers"][group]["last_epoch"] + 3
        assert schedule["_last_lr"][0] < before["schedulers"][group]["_last_lr"][0]


def test_a_step_or_a_file_that_is_not_there_is_said(run, weights, tmp_path):
    child = resumed(run, weights, tmp_path, load_step=3)
    assert child.end() == 1 and "step-000000003.ckpt" in child.text and "Traceback" not in child.text
    child = resumed(run, weights, tmp_path / "other", load_dir=tmp_path)
    assert child.end() == 1 and "no checkpoint that can be read" in child.text and "Traceback" not in child.text


def test_a_run_of_version_0_1_opens_by_nerfstudio_and_by_us(run, tmp_path, monkeypatch):
    """Its config.yml names modules that have moved, and perhaps a method that has another name now."""
    monkeypatch.chdir(tmp_path)
    moved = {"models.nerf": "model", "data.rays": "datamanager", "engine.trainer": "trainer"}
    folder = Path(shutil.copytree(run_folder(run), tmp_path / "out" / "run" / "ovs3d-plus" / "t"))
    text = (folder / "config.yml").read_text()
    for new, old in moved.items():
        assert f"ovs3d_nerfstudio.{new}." in text
        text = text.replace(f"ovs3d_nerfstudio.{new}.", f"ovs3d_nerfstudio.{old}.")
    config = yaml.load(text.replace("method_name: ovs3d-lite", "method_name: ovs3d-plus"), Loader=yaml.Loader)
    config.output_dir = tmp_path / "out"
    assert (config.method_name, config.get_base_dir()) == ("ovs3d", folder)
    written = yaml.dump(config)
    for new, old in moved.items():
        written = written.replace(f"ovs3d_nerfstudio.{new}.", f"ovs3d_nerfstudio.{old}.")
    written = written.replace("method_name: ovs3d\n", "method_name: ovs3d-plus\n").replace(
        "folder_name: ovs3d-plus\n", ""
    )
    (folder / "config.yml").write_text(written)
    for opened in (eval_setup(folder / "config.yml", test_mode="test"), open_run(folder)):
        assert opened[1].model.segmenter.ready and opened[3] == STEPS - 1
