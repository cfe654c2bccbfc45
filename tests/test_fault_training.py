"""Training survives: kills at any instant and while a checkpoint is written; full disks; checkpoints that cannot be read."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import children
import pytest
import torch
from children import checkpoint_folder

from ovs3d_nerfstudio.engine.checkpoints import checkpoints, read_checkpoint

pytestmark = pytest.mark.slow

STEPS, SAVE = 10, 2
SPLAT = {
    "method": "ovs3d-splat-lite",
    "steps": 24,
    "pipeline__datamanager__find_seeds": False,
    "pipeline__model__num_random": 500,
    "pipeline__model__random_scale": 1.0,
    "pipeline__model__warmup_length": 4,
    "pipeline__model__refine_every": 2,
    "pipeline__model__stop_split_at": 100,
    "pipeline__model__densify_grad_thresh": 1e-5,
    "pipeline__model__semantics_start": 18,
    "pipeline__model__fda_start": 20,
}
"""Gaussians at random, which come and go in steps 10 to 17 and stand still from then on."""
DISK_SIZE = "20m"


class Training:
    """Runs of one folder: what a user does who starts again after each fault."""

    def __init__(self, folder: Path, scene: Path, weights: Path, **settings):
        self.out, self.scene, self.weights, self.settings = folder / "out", scene, weights, {"steps": STEPS, **settings}
        self.models = checkpoint_folder(self.out, self.settings.get("method", "ovs3d-lite"))
        self.out.mkdir()
        self.runs = 0

    def start(self, **settings) -> children.Child:
        self.runs += 1
        load_dir = self.models if checkpoints(self.models) else None
        arguments = {"save": SAVE, "load_dir": load_dir, "relative_model_dir": self.models.absolute()}
        arguments = {**arguments, **children.specs(self.weights), **self.settings, **settings}
        return children.start(self.out / f"log {self.runs}", children.train, self.scene, self.out, **arguments)

    def steps(self) -> list[int]:
        """Every step that was trained, those of earlier runs first."""
        file = self.out / "steps.txt"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def check(self) -> int:
        """Asserts that what nerfstudio looks for is there and whole; returns the latest saved step, -1 for none."""
        for name in os.listdir(self.models) if self.models.exists() else []:
            assert int(name[name.find("-") + 1 : name.find(".")]) >= 0  # how nerfstudio reads a name
            read_checkpoint(self.models / name)
        saved = checkpoints(self.models)
        return read_checkpoint(saved[0])["step"] if saved else -1

    def result(self) -> dict:
        (path,) = checkpoints(self.models)
        return read_checkpoint(path)

    def reset(self) -> None:
        """As before the first run."""
        shutil.rmtree(self.out)
        self.out.mkdir()
        shutil.rmtree(self.scene / ".ovs3d-cache", ignore_errors=True)

    def litter(self) -> list[Path]:
        return [path for top in (self.out, self.models.parent, self.scene) for path in top.rglob("*.tmp")]


@pytest.fixture
def training(scene, weights, tmp_path) -> Training:
    data = shutil.copytree(scene, tmp_path / "scene", ignore=shutil.ignore_patterns(".ovs3d-cache"))
    return Training(tmp_path, data, weights)


@pytest.fixture(scope="module")
def reference(scene, weights, tmp_path_factory) -> dict:
    """The last checkpoint of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    undisturbed = Training(folder, shutil.copytree(scene, folder / "scene"), weights)
    child = undisturbed.start()
    assert child.end() == 0, child.text
    assert undisturbed.steps() == list(range(STEPS))
    return undisturbed.result()


def assert_same(result: dict, reference: dict) -> None:
    assert result["step"] == reference["step"] and result["schedulers"] == reference["schedulers"]
    for name, wanted in reference["pipeline"].items():
        if isinstance(wanted, torch.Tensor):
            assert torch.allclose(result["pipeline"][name], wanted, rtol=1e-4, atol=1e-6), name
        else:
            assert result["pipeline"][name] == wanted


def finish(training: Training, reference: dict, kills: int) -> None:
    """Starts once more and asserts that the run ends as if nothing had been."""
    child, steps = training.start(), training.settings["steps"]
    assert child.end() == 0, child.text
    assert training.check() == steps - 1 and not training.litter()
    trained = training.steps()
    assert sorted(set(trained)) == list(range(steps)) and len(trained) <= steps + (SAVE + 1) * kills
    assert_same(training.result(), reference)


def test_kills_at_random_instants_cost_the_steps_since_the_last_save(training, reference, soak, tally):
    rng = random.Random(11)
    for _ in range(soak):
        training.reset()
        kills, saved = 0, -1
        while kills < 3:
            child, begun = training.start(), len(training.steps())
            # Most of a run is start-up: it is mostly left behind.
            while rng.random() < 0.999 and len(training.steps()) == begun and child.process.exitcode is None:
                child.process.join(0.01)
            if not child.kill_after(rng.uniform(0, 0.5)):
                break
            kills += 1
            with tally.of("`kill -9` while training, extraction included", "steps") as row:
                before, saved = saved, training.check()
                lost = max([*training.steps(), saved]) - saved
                assert saved >= before and lost <= SAVE + 1
                row.lost += lost
        finish(training, reference, kills)


def test_kills_cost_a_splat_the_steps_since_the_last_save_while_gaussians_come_and_go_and_behind_that(
    scene, weights, tmp_path, tally
):
    data = shutil.copytree(scene, tmp_path / "scene", ignore=shutil.ignore_patterns(".ovs3d-cache"))
    trainings = []
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        trainings.append(Training(tmp_path / name, data, weights, **SPLAT))
    undisturbed, training = trainings
    child = undisturbed.start()
    assert child.end() == 0, child.text
    for step in (13, 21):
        with tally.of("`kill -9` while a splat is trained", "steps") as row:
            child = training.start(die_in_step=step)
            assert child.end() == -signal.SIGKILL, child.text
            saved = training.check()
            assert step - SAVE - 1 <= saved < step
            row.lost += step - saved
        count = len(read_checkpoint(checkpoints(training.models)[0])["pipeline"]["_model.gauss_params.means"])
        assert count != SPLAT["pipeline__model__num_random"]
    finish(training, undisturbed.result(), 2)


def test_a_kill_before_any_file_operation_of_a_save_leaves_a_whole_checkpoint(training, reference, soak, tally):
    """Of the second save: the folder, the new file, its renaming, the leftover, the deletion of the earlier one."""
    for operation in range(1, 6) if soak > 1 else (3, 5):
        training.reset()
        with tally.of("`kill -9` before each file operation of a save", "steps") as row:
            child = training.start(die_in_save=(2, operation))
            assert child.end() == -signal.SIGKILL, child.text
            assert training.check() == (SAVE if operation <= 3 else 2 * SAVE)
            row.lost += training.steps()[-1] - training.check()
            finish(training, reference, 1)


def test_a_full_disk_costs_no_checkpoint_and_ends_with_a_sentence(training, reference, disk, tally):
    """Only the checkpoints are on the full disk: nerfstudio's own logs are not what is tested here."""
    training.models = disk / "run" / "models"
    with tally.of("disk full while a checkpoint is written", "steps") as row:
        child = training.start(steps=3)  # the first save fits
        assert child.end() == 0, child.text
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - (1 << 16)))
        child = training.start()
        assert child.end() == 1
        assert "Training goes on." in child.text and "No space left" in child.text and "make room" in child.text
        assert "Traceback" not in child.text
        assert training.check() == 2 and not training.litter()
        filler.unlink()
        row.lost += training.steps()[-1] - training.check()
        finish(training, reference, STEPS)


def test_a_checkpoint_that_is_torn_is_passed_over_and_said(training, reference, tally):
    assert training.start(save_only_latest_checkpoint=False).end() == 0
    saved = checkpoints(training.models)
    assert len(saved) == 5
    with tally.of("latest checkpoint torn", "steps") as row:
        saved[0].write_bytes(saved[0].read_bytes()[: saved[0].stat().st_size // 2])
        child = training.start()
        assert child.end() == 0, child.text
        assert "cannot be read" in child.text and "An earlier one is tried" in child.text
        assert training.steps()[STEPS:] == [STEPS - 1]
        row.lost += 1
        assert_same(training.result(), reference)


def test_a_finished_run_that_is_started_again_trains_nothing_and_keeps_its_result(training, reference):
    assert training.start().end() == 0
    child = training.start()
    assert child.end() == 0 and "nothing left to train" in child.text
    assert len(training.steps()) == STEPS
    assert_same(training.result(), reference)


def test_ctrl_c_ends_a_training_in_one_line_with_status_130_and_says_how_to_go_on(tmp_path, scene, weights):
    training = Training(tmp_path, scene, weights)
    child = training.start(steps=1000, save=5)
    _interrupt(child, lambda: len(training.steps()) > 8)
    assert child.end() == 130 and "Traceback" not in child.text
    assert f"Stopped. To go on from the last checkpoint: --load-dir {training.models}" in child.text
    assert training.check() >= 5


def test_what_ends_before_its_first_step_leaves_no_folder(tmp_path, scene, weights):
    training = Training(tmp_path, scene, weights)
    child = training.start(
        pipeline__datamanager__feature_cache_dir=Path("/dev/null/cache"), relative_model_dir=Path("m")
    )
    assert child.end() == 1 and "Error" in child.text
    assert not (training.out / "run").exists() and training.out.exists()


def _interrupt(child: children.Child, when) -> None:
    """Ctrl-C when it has come so far."""
    deadline = time.monotonic() + 300
    while not when():
        assert child.process.exitcode is None and time.monotonic() < deadline, child.text[-2000:]
        time.sleep(0.05)
    os.kill(child.process.pid, signal.SIGINT)
