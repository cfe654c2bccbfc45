"""How a training ends before its time, and what its log shows, without training."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from nerfstudio.utils import writer
from nerfstudio.utils.writer import EventName

from ovs3d_nerfstudio.engine import trainer as trainer_module
from ovs3d_nerfstudio.engine.endings import ending, remove_new
from ovs3d_nerfstudio.engine.trainer import MIOU, OVS3DTrainer
from ovs3d_nerfstudio.pipeline import told_figures


def run_in(folder: Path) -> Path:
    run = folder / "outputs" / "scene" / "ovs3d" / "now"
    (run / "nerfstudio_models").mkdir(parents=True)
    (run / "config.yml").touch()
    return run


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(tmp_path):
    run = run_in(tmp_path)
    with pytest.raises(SystemExit) as end, ending(run, tmp_path / "outputs", lambda: False, run / "m", True):
        raise SystemExit(1)
    assert end.value.code == 1 and (tmp_path / "outputs").exists() and not (tmp_path / "outputs" / "scene").exists()


def test_a_run_that_has_begun_or_was_there_before_stays(tmp_path):
    run = run_in(tmp_path)
    with pytest.raises(ValueError, match="x"), ending(run, tmp_path, lambda: True, run / "m", True):
        raise ValueError("x")
    assert run.exists()
    os.utime(run / "config.yml", (time.time() - 1e6,) * 2)
    remove_new(run, tmp_path)
    assert run.exists()


def test_ctrl_c_is_one_line_and_status_130(tmp_path, capsys):
    run = run_in(tmp_path)
    (run / "nerfstudio_models" / "step-000000005.ckpt").touch()
    with pytest.raises(SystemExit) as end, ending(run, tmp_path, lambda: True, run / "nerfstudio_models", True):
        raise KeyboardInterrupt
    said = capsys.readouterr().out.strip().replace("\n", "")
    assert end.value.code == 130 and said.startswith("Stopped.") and "--load-dir" in said


def test_the_log_shows_no_time_of_the_first_step_and_the_miou_from_then_on(monkeypatch):
    monkeypatch.setattr(writer, "EVENT_STORAGE", [])
    monkeypatch.setitem(writer.GLOBAL_BUFFER, "events", {})
    monkeypatch.setitem(writer.GLOBAL_BUFFER, "max_iter", 1000)
    monkeypatch.setitem(writer.GLOBAL_BUFFER, "max_buffer_size", 20)
    trainer = OVS3DTrainer.__new__(OVS3DTrainer)
    trainer._start_step, trainer.pipeline = 0, SimpleNamespace(last_miou=None)
    trainer.config = SimpleNamespace(
        logging=SimpleNamespace(steps_per_log=10),
        is_viewer_enabled=lambda: False,
        is_viewer_legacy_enabled=lambda: False,
    )
    trainer.local_rank = 0
    for step, seconds in ((0, 50.0), (10, 0.1)):
        writer.put_time(EventName.ITER_TRAIN_TIME, seconds, step, update_eta=True)
        trainer._update_viewer_state(step)
        trainer.pipeline.last_miou = 0.5
    shown = [(str(getattr(event["name"], "value", event["name"])), event["event"]) for event in writer.EVENT_STORAGE]
    assert shown == [("Train Iter (time)", 0.1), ("ETA (time)", pytest.approx(99.0)), (MIOU, 0.5)]


@pytest.mark.parametrize("looks", [0, 3], ids=["nobody looks", "somebody looks for a while"])
def test_training_ends_when_nobody_looks_at_its_viewer(monkeypatch, capsys, tmp_path, looks):
    monkeypatch.setattr(trainer_module, "AWAY", 0.3)
    seen = iter(range(10_000))
    server = SimpleNamespace(get_clients=lambda: {0: "page"} if next(seen) < looks else {})
    done = []
    trainer = OVS3DTrainer.__new__(OVS3DTrainer)
    trainer.viewer_state = SimpleNamespace(viser_server=server, training_complete=lambda: done.append(True))
    trainer.base_dir = tmp_path
    trainer._train_complete_viewer()
    said = capsys.readouterr().out
    assert done and f"ns-viewer --load-config {tmp_path / 'config.yml'}" in said.replace("\n", "")
    assert ("as long as somebody looks" in said) == bool(looks) and next(seen) >= looks


def test_what_an_evaluation_found_is_said():
    said = told_figures({"psnr": 22.34, "psnr_std": 1.0, "miou": 0.5, "iou_red apple": 0.25, "iou_red apple_std": 0.1})
    assert said == "PSNR 22.34 dB, mIoU 0.500\nIoU: red apple 0.250"
