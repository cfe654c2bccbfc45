"""What a training left on the disk, opened: config, pipeline and checkpoint of a run of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import TrainerConfig

from ovs3d_nerfstudio.engine.checkpoints import checkpoints, read_checkpoint
from ovs3d_nerfstudio.engine.option_checks import check_device
from ovs3d_nerfstudio.engine.run_config import read_config
from ovs3d_nerfstudio.errors import CommandError, errors_raised
from ovs3d_nerfstudio.pipeline import OVS3DPipeline, OVS3DPipelineConfig


def open_run(
    load_config: Path,
    test_mode: Literal["test", "val", "inference"] = "test",
    rays_per_chunk: int | None = None,
    data: Path | None = None,
    change: Callable[[TrainerConfig], TrainerConfig] = lambda config: config,
    device: str | None = None,
) -> tuple[TrainerConfig, OVS3DPipeline, Path, int]:
    """A trained run, ready to answer: its config, pipeline, checkpoint file and step. As nerfstudio's `eval_setup`, but errors
    are raised.

    The checkpoint is looked for beside the config, so a run may be moved; `data` says where its data went, and `change`
    may change what else is in the config. `device` is a GPU where there is one, unless it is given.

    Raises:
        ConfigError: the config cannot be read.
        CommandError: no such config, one of another method, no checkpoint, no data, or a run without features.
        CheckpointError: the checkpoint cannot be read or does not fit.
        OptionError: there is no such device, or the config was edited into one that cannot work.
        SceneError: the data cannot be read.
    """
    if load_config.is_dir():
        load_config = load_config / "config.yml"
    if not load_config.is_file():
        raise CommandError(f"The config {load_config} does not exist; name the config.yml that ns-train wrote.")
    known = ", ".join(our_methods())
    remedy = f"name the config.yml of a run that this version of {known} trained."
    written = read_config(load_config, remedy)
    if not isinstance(written, TrainerConfig) or written.method_name not in all_methods:
        what = f"a run of {written.method_name}" if isinstance(written, TrainerConfig) else "no config of a run"
        raise CommandError(f"{load_config} is {what}; {remedy}")
    config = change(written)
    if not isinstance(config.pipeline, OVS3DPipelineConfig):
        raise CommandError(f"{load_config} is a run of {config.method_name}; name one of {known}.")
    datamanager: Any = config.pipeline.datamanager
    method: Any = all_methods[written.method_name]
    datamanager._target = method.pipeline.datamanager._target  # which a file may not choose
    datamanager.data = data or datamanager.data
    place = Path(datamanager.data or datamanager.dataparser.data)
    if not place.exists():
        raise CommandError(
            f"The run's data, {place}, is not there; put it back, or say where it is: with --data, in Python with data=."
        )
    config.relative_model_dir = (load_config.parent / config.relative_model_dir).resolve()
    saved = checkpoints(config.relative_model_dir)
    if not saved:
        raise CommandError(
            f"There is no checkpoint in {config.relative_model_dir}; train until the first one is saved."
        )
    state = read_checkpoint(saved[0], mmap=True)
    config.load_dir = config.relative_model_dir
    if rays_per_chunk:
        config.pipeline.model.eval_num_rays_per_chunk = rays_per_chunk  # type: ignore[attr-defined]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with errors_raised():
        check_device("device", device)
        pipeline = config.pipeline.setup(device=device, test_mode=test_mode)
        pipeline.eval()
        pipeline.load_pipeline(state["pipeline"], state["step"])
    if not pipeline.model.segmenter.ready:
        raise CommandError(f"{saved[0]} holds no features yet; train beyond the start of the semantic losses.")
    return config, pipeline, saved[0], state["step"]


def our_methods() -> dict[str, OVS3DPipelineConfig]:
    """The pipeline config of each method of ours by its name, plugins' variants included."""
    return {
        name: config.pipeline
        for name, config in sorted(all_methods.items())
        if isinstance(config, TrainerConfig) and isinstance(config.pipeline, OVS3DPipelineConfig)
    }
