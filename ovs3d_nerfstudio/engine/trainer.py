"""The trainer: nerfstudio's own, started once for every device, on CPUs too.

nerfstudio 1.1.5 spawns one process a device, but asserts CUDA in each. `ns-train` therefore spawns none for our methods:
it trains "one process" as ever, and that one is `Processes`, which starts the others with nerfstudio's own training loop.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, suppress
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils import comms, writer
from nerfstudio.utils.misc import step_check
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.utils.writer import EventName
from rich.markup import escape

from ovs3d_nerfstudio.encoders.base import EncoderError, image_text_encoder, token_encoder
from ovs3d_nerfstudio.engine import ranks
from ovs3d_nerfstudio.engine.anomaly import check_weights
from ovs3d_nerfstudio.engine.checkpoints import checkpoints
from ovs3d_nerfstudio.engine.cooling import check_schedules, over_steps
from ovs3d_nerfstudio.engine.endings import ending
from ovs3d_nerfstudio.engine.option_checks import SIZE, check_value
from ovs3d_nerfstudio.engine.saving import SavingTrainer, random_state, set_random_state
from ovs3d_nerfstudio.engine.threads import busy_hint, let_sleep
from ovs3d_nerfstudio.errors import INTERRUPTED, CommandError, user_errors
from ovs3d_nerfstudio.files import written_beside
from ovs3d_nerfstudio.memory import told_what_to_lower

RENAMED = {"ovs3d-plus": "ovs3d"}
"""Names that methods had in version 0.1."""
MIOU = "Test mIoU"
"""Its name in nerfstudio's log."""
AWAY = 10.0
"""Seconds in which a page that is loaded again comes back to the viewer."""
GRACE = 5.0
"""Seconds that a process whose partner died waits for the launcher, which knows how it died."""


@dataclass
class OVS3DTrainerConfig(TrainerConfig):
    """nerfstudio's, for one device or several."""

    _target: type = field(default_factory=lambda: OVS3DTrainer)
    run_folder: Path | None = None
    """The run's folder itself, in place of one that is made of output-dir, names and time."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes up what a config.yml holds; a method that had another name once keeps its folder."""
        self.__dict__.update(state)
        if self.method_name in RENAMED:
            self.folder_name, self.method_name = self.method_name, RENAMED[self.method_name]
        opened = _opened_by_nerfstudio()
        if opened is not None:
            self.opened_in = opened

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "opened_in"}

    def get_base_dir(self) -> Path:
        """The run's folder: that of the config.yml which is open, wherever it was when it was written."""
        if "opened_in" in vars(self):
            return self.opened_in
        if self.run_folder is not None:
            return self.run_folder
        folder = super().get_base_dir()
        return folder.parents[1] / self.__dict__.get("folder_name", folder.parent.name) / folder.name

    def save_config(self) -> None:
        """Saves the config, whole or not at all, with paths that lead there from any folder; then hides from nerfstudio's launcher, which reads it next, that there are several devices."""
        sampler = getattr(self.pipeline.datamanager, "pixel_sampler", None)
        if sampler is not None:  # nerfstudio leaves a tensor here, which YAML could only hold as a call
            sampler.is_equirectangular = bool(sampler.is_equirectangular)
        folder = self.get_base_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(folder / "config.yml") as beside:
            beside.write_text(yaml.dump(_from_anywhere(self)), encoding="utf-8")
        machine = self.machine
        if machine.num_devices * machine.num_machines > 1 and ranks.count() == 1:  # not in the processes themselves
            self.machine, self.real_machine = replace(machine, num_devices=1, num_machines=1), machine

    def setup(self, **kwargs: Any) -> Any:
        """A trainer, or what starts several of them."""
        machine = self.__dict__.get("real_machine")
        if machine is None:
            return super().setup(**kwargs)
        config = copy(self)
        config.machine = machine
        del config.real_machine
        return Processes(config)


class OVS3DTrainer(SavingTrainer):
    """Only rank 0 evaluates, and weights that are not finite are not saved."""

    _begun = False
    """Whether a step has been made."""

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """As nerfstudio's; what ends here leaves no folder."""
        with self._ending():
            self._set_up(test_mode)

    def _ending(self) -> AbstractContextManager[None]:
        top, first = self.config.output_dir, ranks.rank() == 0
        return ending(self.base_dir, top, lambda: self._begun, self.checkpoint_dir, first)

    def _set_up(self, test_mode: Literal["test", "val", "inference"]) -> None:
        """Says first what would make training on a CPU slow, and leaves the frame of the data in the run."""
        hint = busy_hint(torch.get_num_threads()) if self.config.machine.device_type == "cpu" else None
        if hint:
            CONSOLE.print(hint, style="yellow")
        with user_errors():
            check_value("--max-num-iterations", self.config.max_num_iterations, int, SIZE)
            check_schedules(self.config.optimizers)
            if self.config.mixed_precision and not getattr(self.config.pipeline.model, "MIXED_PRECISION", True):
                raise CommandError(
                    f"--mixed-precision True is not possible: {self.config.method_name} trains in single precision, as the "
                    "gradients that decide where Gaussians come and go must not be scaled; leave the option out."
                )
        super().setup(test_mode)
        if ranks.rank() == 0:
            datamanager: Any = self.pipeline.datamanager
            datamanager.frame.write(self.base_dir)
        for shown in writer.EVENT_WRITERS:
            if isinstance(shown, writer.LocalWriter) and shown.config.max_log_size:
                shown.stats_to_track.append(MIOU)

    def setup_optimizers(self) -> Optimizers:
        """As nerfstudio's, with rates that fall over the steps of this run."""
        groups = over_steps(self.config.optimizers, self.config.max_num_iterations)
        return Optimizers(groups, self.pipeline.get_param_groups())

    def train(self) -> None:
        """As nerfstudio's; features are made before the clock of the first step runs."""
        with self._ending():
            if self._start_step < self.config.max_num_iterations:
                pipeline: Any = self.pipeline
                with self.train_lock:
                    pipeline.ready_to_train()
            super().train()

    def train_iteration(self, step: int) -> Any:
        """As nerfstudio's; where memory runs out the command ends with what to lower."""
        with user_errors(), told_what_to_lower("training"):
            trained = super().train_iteration(step)
        self._begun = True
        return trained

    def _update_viewer_state(self, step: int) -> None:
        """As nerfstudio's, and what its log shall show: the mIoU of the last evaluation, and no time of the first step, which
        compiles and would be taken for that of all."""
        if step == self._start_step:
            untrue = (EventName.ITER_TRAIN_TIME.value, EventName.ETA.value)
            writer.EVENT_STORAGE[:] = [event for event in writer.EVENT_STORAGE if event["name"] not in untrue]
            writer.GLOBAL_BUFFER["events"].pop(untrue[0], None)
        miou = self.pipeline.last_miou
        if miou is not None and step_check(step, self.config.logging.steps_per_log):
            writer.put_scalar(MIOU, miou, step)
        super()._update_viewer_state(step)

    def eval_iteration(self, step: int) -> None:
        """As nerfstudio's, which evaluates nothing where only the viewer is on; with masks, a view is compared all the same."""
        if ranks.rank() > 0:
            return
        with user_errors(), told_what_to_lower("rendering"):
            super().eval_iteration(step)
            config = self.config
            logged = config.is_wandb_enabled() or config.is_tensorboard_enabled() or config.is_comet_enabled()
            if not logged and self.pipeline.has_masks and step_check(step, config.steps_per_eval_image):
                drawn = random_state()  # the run shall not depend on who looks
                self.pipeline.get_eval_image_metrics_and_images(step)
                set_random_state(drawn)
        miou, all_lines = self.pipeline.last_miou, not config.logging.local_writer.max_log_size
        if miou is not None and all_lines and step_check(step, config.steps_per_eval_image):
            # Such a log has its header once, at the beginning, when there is no mIoU.
            CONSOLE.print(f"A held-out view at step {step}: mIoU {miou:.3f}.")

    def _train_complete_viewer(self) -> None:
        """Ends, unless somebody looks at the viewer; then when nobody does any more, or at Ctrl-C."""
        viewer: Any = self.viewer_state
        clients = getattr(getattr(viewer, "viser_server", None), "get_clients", None)
        if clients is None:
            return
        viewer.training_complete()
        again = f"To look again: ns-viewer --load-config {self.base_dir / 'config.yml'}"
        if clients():
            CONSOLE.print("Training is done. The viewer stays as long as somebody looks at it; Ctrl-C ends it.")
            try:
                last_seen = time.monotonic()
                while time.monotonic() - last_seen < AWAY:
                    if clients():
                        last_seen = time.monotonic()
                    time.sleep(0.2)
            except KeyboardInterrupt:
                pass
        CONSOLE.print(escape(again), soft_wrap=True)

    def save_checkpoint(self, step: int) -> None:
        """Writes a checkpoint, on rank 0."""
        with user_errors():
            check_weights(self.pipeline.model, step)
        super().save_checkpoint(step)


class Processes:
    """Stands where the trainer would, and trains in one process a device of this machine."""

    def __init__(self, config: OVS3DTrainerConfig):
        self.config = config

    def setup(self) -> None:
        config = self.config
        with (
            ending(config.get_base_dir(), config.output_dir, lambda: False, config.get_checkpoint_dir(), True),
            user_errors(),
        ):
            check_machine(self.config.machine)
            if not getattr(self.config.pipeline.model, "SEVERAL_PROCESSES", True):
                raise CommandError(
                    f"{self.config.method_name} trains in one process, as its Gaussians come and go; leave "
                    "--machine.num-devices and --machine.num-machines at 1, or train ovs3d on several."
                )

    def train(self) -> None:
        """Returns when every process has trained; when one of them dies the others are stopped, with status 1."""
        config, machine = self.config, self.config.machine
        # The cores are divided, or the processes would take them from each other.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // machine.num_devices)))
        let_sleep()
        with TemporaryDirectory(prefix="ovs3d-") as folder, user_errors():
            url = ranks.meeting_in(Path(folder)) if machine.dist_url == "auto" else machine.dist_url
            processes = mp.spawn(_work, nprocs=machine.num_devices, join=False, args=(config, url))
            assert processes is not None
            try:
                while not processes.join():
                    pass
            except KeyboardInterrupt:  # which the processes have seen too, and the first of them says so
                for process in processes.processes:
                    process.join(GRACE)
                raise SystemExit(INTERRUPTED) from None
            except mp.ProcessExitedException as error:
                if error.signal_name is None:  # it has said itself why it stops
                    raise SystemExit(error.exit_code or 1) from None
                raise CommandError(
                    f"Process {error.error_index} of {machine.num_devices} died ({error.signal_name}), so the others were "
                    f"stopped; {_remedy(config.get_checkpoint_dir())}"
                ) from None


def _from_anywhere(config: OVS3DTrainerConfig) -> OVS3DTrainerConfig:
    """A copy whose paths, those of weights among them, are absolute, but for those within the data and within the run."""
    config = deepcopy(config)
    pipeline: Any = config.pipeline
    datamanager = pipeline.datamanager
    places = (
        (config, ("data", "output_dir", "load_dir", "load_checkpoint", "load_config")),
        (pipeline, ("prompts_file",)),
        (pipeline.model, ("init_from",)),
        (datamanager, ("data", "feature_cache_dir")),
        (datamanager.dataparser, ("data",)),
    )
    for part, names in places:
        for name in names:
            path = getattr(part, name, None)
            if isinstance(path, Path) and path != Path():  # which is none
                setattr(part, name, path.absolute())
    choices = (("image_text_encoder", image_text_encoder), ("token_encoder", token_encoder))
    for name, choose in choices:
        with suppress(EncoderError):  # which the pipeline says
            setattr(pipeline, name, choose(getattr(pipeline, name)).spec)
    return config


def _opened_by_nerfstudio() -> Path | None:
    """The folder of the config.yml that nerfstudio's `eval_setup` is reading now, if it is.

    It hands on the file's text, not its place, and looks for checkpoints where the run was once; a run that was moved or copied
    lies where its config does.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # By name, for that module imports this one before it has its function.
        if frame.f_code.co_name == "eval_setup" and frame.f_globals["__name__"] == "nerfstudio.utils.eval_utils":
            return Path(frame.f_locals["config_path"]).parent.absolute()
        frame = frame.f_back
    return None


def _remedy(folder: Path) -> str:
    if checkpoints(folder):
        return f"train with --load-dir {folder} to go on from the last checkpoint."
    return "start again: extracted features are kept."


def check_machine(machine: MachineConfig) -> None:
    """Raises CommandError when processes cannot be had as asked."""
    devices = {"cuda": torch.cuda.device_count(), "mps": 1}.get(machine.device_type, machine.num_devices)
    if machine.num_devices > devices:
        raise CommandError(
            f"--machine.num-devices {machine.num_devices} asks for more than the {devices} {machine.device_type} devices "
            "here; ask for fewer, or give --machine.device-type cpu."
        )
    if machine.num_machines > 1 and machine.dist_url == "auto":
        raise CommandError(
            f"--machine.num-machines {machine.num_machines} needs a place to meet; give --machine.dist-url "
            "tcp://HOST:PORT, the same on every machine, with HOST the one of --machine.machine-rank 0."
        )
    if machine.machine_rank >= machine.num_machines:
        raise CommandError(
            f"--machine.machine-rank {machine.machine_rank} is none of {machine.num_machines} machines; "
            "they count from 0."
        )


def _work(local_rank: int, config: OVS3DTrainerConfig, url: str) -> None:
    """One process: joins the others and trains as nerfstudio does."""
    from nerfstudio.scripts.train import train_loop  # reads all methods, ours too

    machine = config.machine
    rank, count = machine.machine_rank * machine.num_devices + local_rank, machine.num_machines * machine.num_devices
    if machine.device_type == "cuda":
        torch.cuda.set_device(local_rank)
    CONSOLE.quiet = rank > 0
    ranks.join(url, rank, count, "nccl" if machine.device_type == "cuda" else "gloo")
    for other in range(machine.num_machines):
        on_it = list(range(other * machine.num_devices, (other + 1) * machine.num_devices))
        group = dist.new_group(on_it)
        if other == machine.machine_rank:
            comms.LOCAL_PROCESS_GROUP = group  # type: ignore[assignment]
    ranks.watch(_end_with)
    try:
        train_loop(local_rank, count, config, rank)
    except RuntimeError:
        # When a rank dies the others fail in their next exchange with it. They wait for the launcher to stop them, so that
        # what it says of the one that died is the only message.
        time.sleep(GRACE)
        raise
    ranks.leave()


def _end_with(other: int) -> None:
    """Ends this process, as rank `other` died: it may wait for it on the GPU, which nothing but its end interrupts."""
    time.sleep(GRACE)  # on one machine the launcher stops us, and says more
    CONSOLE.quiet = False
    CONSOLE.print(
        f"[bold red]Error:[/bold red] The process of rank {other} died or cannot be reached, so this one (rank "
        f"{ranks.rank()}) stops; start all of them again with --load-dir to go on from the last checkpoint."
    )
    sys.stdout.flush()
    os._exit(1)
