"""`ns-train --machine.num-devices 2` on a CPU: real processes, gradients averaged over gloo."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from conftest import train_words
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image

from ovs3d_nerfstudio.engine import ranks
from ovs3d_nerfstudio.engine.trainer import check_machine
from ovs3d_nerfstudio.errors import CommandError

pytestmark = pytest.mark.slow
RAYS, STEPS = 256, 45


def train_as(rank: int, count: int, folder: Path, scene: Path) -> None:
    """Trains on RAYS rays a step, divided among the ranks; saves what became of it."""
    if count > 1:
        ranks.join(ranks.meeting_in(folder), rank, count, "gloo")
    config = copy.deepcopy(all_methods["ovs3d-lite"])
    pipeline_config = config.pipeline
    pipeline_config.datamanager.data = scene
    pipeline_config.datamanager.train_num_rays_per_batch = RAYS // count
    pipeline_config.datamanager.window_size = 8
    pipeline_config.model.semantics_start, pipeline_config.model.fda_start = 10, 20
    torch.manual_seed(rank)  # as nerfstudio's training loop, so the ranks start from other weights and draw other rays
    pipeline = pipeline_config.setup(device="cpu", test_mode="val", world_size=count, local_rank=rank)
    optimizers = Optimizers(config.optimizers, pipeline.get_param_groups())
    pipeline.train()
    history, drawn = [], []
    for step in range(STEPS):
        optimizers.zero_grad_all()
        _, losses, _ = pipeline.get_train_loss_dict(step)
        sum(losses.values()).backward()
        optimizers.optimizer_step_all()
        history.append({name: float(value) for name, value in losses.items()})
    rays, batch = pipeline.datamanager.next_train(STEPS)
    drawn = batch["indices"]
    state = {name: value for name, value in pipeline.model.state_dict().items() if isinstance(value, torch.Tensor)}
    # The gradient of one more step, averaged by DDP, and the rank's own of the same rays.
    gradients = []
    for wrapped in (True, False) if count > 1 else ():
        optimizers.zero_grad_all()
        torch.manual_seed(rank)
        model = pipeline._model if wrapped else pipeline.model
        sum(model(rays, False, None, dict(batch))[1].values()).backward()
        gradients.append({n: p.grad.clone() for n, p in pipeline.model.named_parameters() if p.grad is not None})
    result = {"history": history, "drawn": drawn, "state": state, "gradients": gradients}
    torch.save(result, folder / f"rank {rank}.pt")
    if count > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def masked(scene, tmp_path_factory) -> Path:
    """The scene, with a mask of each photo that ignores another strip of it."""
    folder = Path(shutil.copytree(scene, tmp_path_factory.mktemp("masked") / "scene"))
    (folder / "masks").mkdir()
    meta = json.loads((folder / "transforms.json").read_text())
    for n, frame in enumerate(meta["frames"]):
        frame["mask_path"] = f"masks/{n}.png"
        mask = np.full((meta["h"], meta["w"]), 255, np.uint8)
        mask[:, 4 * n : 4 * n + 20] = 0
        Image.fromarray(mask).save(folder / frame["mask_path"])
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def results(masked, tmp_path_factory) -> dict[int, list[dict]]:
    """What one process and what two processes made of the same training."""
    made, scene = {}, masked
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{count}")
        if count == 1:
            train_as(0, 1, folder, scene)
        else:
            mp.spawn(train_as, args=(count, folder, scene), nprocs=count)
        made[count] = [torch.load(folder / f"rank {rank}.pt") for rank in range(count)]
    return made


def test_ranks_draw_other_rays_and_keep_the_same_weights(results):
    first, second = results[2]
    assert not torch.equal(first["drawn"], second["drawn"])
    assert first["state"].keys() == second["state"].keys()
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    assert first["history"] != second["history"]


def test_gradients_are_the_mean_over_the_ranks(results):
    (averaged, own), (also_averaged, others) = (result["gradients"] for result in results[2])
    assert averaged.keys() == own.keys() and not any(name.startswith(("semantic", "mixture")) for name in own)
    for name, value in averaged.items():
        mean = (own[name] + others[name]) / 2
        assert torch.allclose(value, mean, atol=1e-6 + 1e-3 * float(mean.abs().max())), name
        assert torch.equal(value, also_averaged[name]), name


def test_the_same_rays_in_all_give_the_same_losses_within_noise(results):
    one = results[1][0]["history"]
    two = [
        {name: sum(rank["history"][step][name] for rank in results[2]) / 2 for name in one[step]}
        for step in range(STEPS)
    ]
    assert [losses.keys() for losses in one] == [losses.keys() for losses in two]
    for name in ("rgb_loss", "feature_loss", "patch_loss"):
        begun = 0 if name == "rgb_loss" else 10
        for steps in (range(begun, begun + 5), range(STEPS - 15, STEPS)):
            alone, together = (sum(history[step][name] for step in steps) / len(steps) for history in (one, two))
            assert together == pytest.approx(alone, rel=0.2), (name, steps)
        assert sum(losses[name] for losses in two[-15:]) < 0.9 * 15 * two[begun][name], name


def watch_as(rank: int, folder: Path, dies: bool) -> None:
    """Two ranks as on two machines; rank 0 is where nothing but its own end stops it, as in an exchange of NCCL."""
    ranks.join(ranks.meeting_in(folder), rank, 2, "gloo")

    def told(other: int) -> None:
        (folder / f"rank {rank} was told").write_text(str(other))
        os._exit(3)

    ranks.watch(told)
    ranks.wait_for_all()
    if dies and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if dies:
        time.sleep(600)
    ranks.leave()


def test_a_rank_that_died_is_noticed_at_once_whatever_the_others_wait_for(tmp_path):
    context = mp.get_context("spawn")
    ranks_ = [context.Process(target=watch_as, args=(rank, tmp_path, True)) for rank in (0, 1)]
    for process in ranks_:
        process.start()
    for process in ranks_:
        process.join(200)
    assert [process.exitcode for process in ranks_] == [3, -signal.SIGKILL]
    assert (tmp_path / "rank 0 was told").read_text() == "1"


def test_ranks_that_end_well_tell_nobody_of_a_death(tmp_path):
    mp.spawn(watch_as, args=(tmp_path, False), nprocs=2)
    assert not list(tmp_path.glob("*told"))


@pytest.fixture(scope="module")
def killed(scene, tmp_path_factory) -> tuple[int, str, Path]:
    """Status, output and folder of a run of two processes, one of which is killed after the first checkpoint."""
    out = tmp_path_factory.mktemp("killed")
    words = list(map(str, train_words(scene, out, 100_000)))
    words += ["--machine.num-devices", "2", "--machine.device-type", "cpu", "--steps-per-save", "20"]
    program = Path(sys.executable).with_name(words[0])
    folder, log = out / "run" / "ovs3d-lite" / "t", out / "log"
    with log.open("w") as printed:
        run = subprocess.Popen(
            [program, *words[1:]],
            cwd=out,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COLUMNS": "200"},
        )
        try:
            deadline = time.monotonic() + 600
            while not any((folder / "nerfstudio_models").glob("*.ckpt")) and run.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            workers = [p for p in psutil.Process(run.pid).children() if "spawn_main" in " ".join(p.cmdline())]
            assert len(workers) == 2, log.read_text()[-4000:]
            workers[1].kill()
            status = run.wait(300)
            assert not any(worker.is_running() for worker in workers)
        finally:
            run.kill()
    return status, " ".join(log.read_text().split()), folder


def test_a_process_that_dies_ends_the_run_with_a_sentence(killed):
    status, printed, folder = killed
    assert status == 1
    assert (
        f"died ({signal.Signals.SIGKILL.name})" in printed and f"--load-dir {folder / 'nerfstudio_models'}" in printed
    )
    assert "Traceback" not in printed


def test_the_run_is_one_run_and_opens_in_one_process(killed):
    _, printed, folder = killed
    assert printed.count("Saving checkpoints to") == 1 and printed.count("to make. This process has") == 1
    config = yaml.load((folder / "config.yml").read_text(), Loader=yaml.Loader)
    assert config.machine.num_devices == 2 and "real_machine" not in vars(config)
    _, pipeline, _, step = eval_setup(folder / "config.yml", test_mode="inference")
    assert step >= 20 and pipeline.model.segmenter.ready


@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        (MachineConfig(num_devices=9999, device_type="cuda"), "--machine.num-devices 9999 asks for more"),
        (MachineConfig(num_machines=2, device_type="cpu"), "--machine.dist-url"),
        (MachineConfig(num_devices=2, machine_rank=3, device_type="cpu"), "--machine.machine-rank 3 is none of 1"),
    ],
)
def test_machines_that_cannot_be_had_are_refused_in_words(machine, sentence):
    with pytest.raises(CommandError, match=sentence):
        check_machine(machine)
