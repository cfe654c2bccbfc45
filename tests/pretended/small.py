"""A method's config, small enough to train in seconds, and the losses that it must show."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

STEPS = 7
"""Enough for all losses to begin, with some steps of each stage."""

DATA = {"train_num_rays_per_batch": 64, "eval_num_rays_per_batch": 64, "num_windows": 2, "window_size": 6}
MODEL = {
    "num_levels": 4,
    "max_res": 256,
    "log2_hashmap_size": 12,
    "num_proposal_samples_per_ray": (24, 16),
    "num_nerf_samples_per_ray": 12,
    "eval_num_rays_per_chunk": 2048,
    "semantic_levels": 4,
    "semantic_log2_hashmap_size": 12,
    "semantics_start": 2,
    "fda_start": 4,
    "fda_apart_start": 5,
    "fda_pairs": 500,
}
PROPOSAL_TABLE = 10


def small(method: str, data: Path, out: Path, name: str, mixed: bool, load_dir: Path | None = None) -> Any:
    """The trainer's config of a method: all of it as the method has it, but small and with the encoders that need no download."""
    from nerfstudio.configs.method_configs import all_methods

    config: Any = copy.deepcopy(all_methods[method])
    pipeline = config.pipeline
    config.machine.device_type = "cuda"
    config.data = pipeline.datamanager.data = data
    config.output_dir, config.experiment_name, config.timestamp, config.vis = out, name, "t", "tensorboard"
    config.mixed_precision = mixed and getattr(pipeline.model, "MIXED_PRECISION", True)
    config.load_dir = load_dir
    config.max_num_iterations, config.steps_per_save = STEPS, 4
    config.steps_per_eval_batch, config.steps_per_eval_image = STEPS - 2, STEPS - 1
    pipeline.image_text_encoder = pipeline.token_encoder = "offline"
    # The extraction of one variant serves all; the masks are none of its business.
    pipeline.datamanager.feature_cache_dir = out / "features"
    _at_most(pipeline.datamanager, DATA)
    _at_most(pipeline.model, MODEL)
    if hasattr(pipeline.model, "implementation"):
        pipeline.model.implementation = "torch"  # tiny-cuda-nn, where it is installed, wants a GPU
    for network in getattr(pipeline.model, "proposal_net_args_list", ()):
        network["log2_hashmap_size"] = min(PROPOSAL_TABLE, network["log2_hashmap_size"])
    return config


def _at_most(part: Any, limits: dict[str, Any]) -> None:
    """Lowers the settings that this part of a config has and that are greater."""
    for name, limit in limits.items():
        value = getattr(part, name, None)
        if value is not None:
            setattr(part, name, min(value, limit))


def run_folder(out: Path, name: str, method: str) -> Path:
    return out / name / method / "t"


def losses_of(model: Any) -> set[str]:
    """The losses that a model's config gives a weight."""
    weighted = {name.removesuffix("_mult") for name, weight in vars(model).items() if name.endswith("_mult") and weight}
    if not getattr(model, "predict_normals", False):
        weighted -= {"orientation_loss", "pred_normal_loss"}
    return {f"{name.removesuffix('_loss')}_loss" for name in weighted} | {
        "main_loss" if hasattr(model, "ssim_lambda") else "rgb_loss"
    }
