"""A splat's semantics learned, with a bar for the steps, and pictures of what came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ovs3d_nerfstudio.engine.checkpoints import checkpoint_path
from ovs3d_nerfstudio.engine.trainer import OVS3DTrainerConfig
from ovs3d_nerfstudio.pipeline import OVS3DPipeline


def learned(config: OVS3DTrainerConfig) -> tuple[OVS3DPipeline, Path, int]:
    """A training gone through, with a bar for its steps: its pipeline, its last checkpoint and the step of that."""
    # As ns-train does.
    torch.manual_seed(config.machine.seed)
    np.random.seed(config.machine.seed)
    trainer = config.setup(local_rank=0, world_size=1)
    try:
        trainer.setup()
        with torch.random.fork_rng():
            trainer.pipeline.prepare_features()
        with steps_shown(trainer):
            trainer.train()
    finally:
        # nerfstudio's writers are global: the next training of this process would write into this one's files too.
        writer.EVENT_WRITERS.clear()
        writer.GLOBAL_BUFFER.clear()
    trainer.pipeline.eval()
    step = config.max_num_iterations - 1
    return trainer.pipeline, checkpoint_path(trainer.checkpoint_dir, step), step


@contextmanager
def steps_shown(trainer: Trainer) -> Iterator[None]:
    """A bar of the steps and the time that is left."""
    columns = (
        TextColumn("[cyan]Learning what is where"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task("", total=trainer.config.max_num_iterations)
        after = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
        trainer.callbacks.append(TrainingCallback(after, lambda step: progress.update(task, completed=step + 1)))
        yield


@torch.no_grad()
def pictures(pipeline: OVS3DPipeline) -> Iterator[Image.Image]:
    """Two views of the training: as the splat shows them, and what is where on them."""
    cameras = pipeline.datamanager.train_dataset.cameras
    for view in (len(cameras) // 4, 3 * len(cameras) // 4):
        outputs = pipeline.model.get_outputs_for_camera(cameras[view : view + 1].to(pipeline.device))
        sides = torch.cat([outputs["rgb"], outputs["segmentation_overlay"]], 1)
        yield Image.fromarray((sides.clamp(0, 1) * 255).round().byte().cpu().numpy())
