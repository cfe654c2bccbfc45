"""What the subcommands share: a run opened from its config, prompts of the moment, JSON files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jaxtyping import Bool
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.eval_utils import eval_setup

from ovs3d_nerfstudio.cli.run_config import RunLoader
from ovs3d_nerfstudio.engine.checkpoints import checkpoints, read_checkpoint
from ovs3d_nerfstudio.errors import CommandError, reason
from ovs3d_nerfstudio.pipeline import OVS3DPipeline, OVS3DPipelineConfig
from ovs3d_nerfstudio.prompts.embedding import Embedder
from ovs3d_nerfstudio.prompts.prompts import given_prompts
from ovs3d_nerfstudio.prompts.shown import choose_shown


@dataclass(kw_only=True)
class ShownOptions:
    """What of the classes a command shows or writes."""

    only: str = ""
    """Prompts, separated by semicolons, that alone are there; all else, and what belongs to no prompt, is left out."""
    without: str = ""
    """Prompts, separated by semicolons, that are left out; what stood behind them is seen."""

    def flags(self, prompts: Sequence[str]) -> Bool[np.ndarray, " flags"]:
        """Whether each prompt stays, and last, where label −1 finds it, what belongs to none. Raises PromptError."""
        return np.array(choose_shown(self.only, self.without, prompts).flags(prompts))


def open_run(
    load_config: Path,
    test_mode: Literal["test", "val", "inference"] = "test",
    rays_per_chunk: int | None = None,
    data: Path | None = None,
    change: Callable[[TrainerConfig], TrainerConfig] = lambda config: config,
) -> tuple[TrainerConfig, OVS3DPipeline, Path, int]:
    """A trained run, ready to answer: its config, pipeline, checkpoint file and step.

    The checkpoint is looked for beside the config, so a run may be moved; `data` says where its data went, and `change`
    may change what else is in the config.

    Raises:
        CommandError: no such config, one of another method, no checkpoint, no data, or a run without features.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    if load_config.is_dir():
        load_config = load_config / "config.yml"
    if not load_config.is_file():
        raise CommandError(f"The config {load_config} does not exist; name the config.yml that ns-train wrote.")
    known = ", ".join(our_methods())

    def update(config: TrainerConfig) -> TrainerConfig:
        config = change(config)
        pipeline = config.pipeline
        if not isinstance(pipeline, OVS3DPipelineConfig):
            raise CommandError(f"{load_config} is a run of {config.method_name}; name one of {known}.")
        datamanager: Any = pipeline.datamanager
        datamanager.data = data or datamanager.data
        place = Path(datamanager.data or datamanager.dataparser.data)
        if not place.exists():
            raise CommandError(f"The run's data, {place}, is not there; put it back, or say with --data where it is.")
        config.relative_model_dir = (load_config.parent / config.relative_model_dir).resolve()
        saved = checkpoints(config.relative_model_dir)
        if not saved:
            raise CommandError(
                f"There is no checkpoint in {config.relative_model_dir}; train until the first one is saved."
            )
        # Whole, and without code: nerfstudio, which reads it next, would run it with torch < 2.6.
        read_checkpoint(saved[0], mmap=True)
        return config

    remedy = f"name the config.yml of a run that this version of {known} trained."
    try:
        written = yaml.load(load_config.read_text(), Loader=RunLoader)
    except (yaml.YAMLError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        raise CommandError(f"{load_config} cannot be opened ({reason(error, 2)}); {remedy}") from error
    if not isinstance(written, TrainerConfig) or written.method_name not in all_methods:
        what = f"a run of {written.method_name}" if isinstance(written, TrainerConfig) else "no config of a run"
        raise CommandError(f"{load_config} is {what}; {remedy}")
    config, pipeline, checkpoint, step = eval_setup(load_config, rays_per_chunk, test_mode, update)
    assert isinstance(pipeline, OVS3DPipeline)
    if not pipeline.model.segmenter.ready:
        raise CommandError(f"{checkpoint} holds no features yet; train beyond the start of the semantic losses.")
    return config, pipeline, checkpoint, step


def our_methods() -> dict[str, OVS3DPipelineConfig]:
    """The pipeline config of each method of ours by its name, plugins' variants included."""
    return {
        name: config.pipeline
        for name, config in sorted(all_methods.items())
        if isinstance(config, TrainerConfig) and isinstance(config.pipeline, OVS3DPipelineConfig)
    }


def ask(pipeline: OVS3DPipeline, prompts: str, prompts_file: Path | None) -> list[str]:
    """Has the run answer for the prompts of the moment, or for its own where none are given; returns them.

    Prompts of the training take their embeddings from the checkpoint; only others need the text encoder.

    Raises:
        CommandError: the run has no prompts and none were given.
        PromptError: both are given, or the chosen one is unusable.
        EncoderError: the run's encoder cannot be had here, or is another.
    """
    segmenter = pipeline.model.segmenter
    asked = given_prompts(prompts, prompts_file)
    if asked is None:
        if not segmenter.prompts:
            raise CommandError("The run was trained without prompts; say what to look for with --prompts.")
        return segmenter.prompts
    segmenter.ask(asked, Embedder(pipeline.device)(segmenter, asked))
    return asked
