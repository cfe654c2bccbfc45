"""What `gpu.py` runs: our methods as they are by default, but for encoders that need no network; and two processes of one."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import TrainerConfig
from rich.console import Console
from training_steps import Run, seconds

from ovs3d_nerfstudio.encoders.base import image_text_encoder, token_encoder
from ovs3d_nerfstudio.engine import ranks
from ovs3d_nerfstudio.features.extraction import extract
from ovs3d_nerfstudio.pictures import list_pictures

BEST = "ovs3d"
"""The method that limits, pictures and prompt changes are of."""
SPLAT = "ovs3d-splat"
"""The method that the limits of Gaussians are of."""
PROMPTS = ("cup", "plate", "chair", "window", "book", "lamp", "plant", "bottle", "towel", "keyboard")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    height: int = 1080
    """Of the photos in pixels; 16:9."""
    views: int = 12
    """Most views that are extracted in each way."""
    picture: tuple[int, int] = (1440, 1080)
    """Width and height of rendered pictures."""
    view: tuple[int, int] = (1920, 1080)
    """Width and height of views of Gaussians."""
    gaussians: int = 300_000
    """Gaussians of a view: what a room or a table has."""
    labelled: int = 1_000_000
    """Gaussians of a splat that is labelled."""
    points: int = 1 << 18
    """Points of a hash grid: what 4 096 rays of 48 samples have, and a little more."""
    seconds: float = 12.0
    """About how long each rate is measured."""
    repeats: int = 9
    """Least number of turns of what takes turns with something else."""
    warm_up: int = 3
    """Blocks of steps before steps are timed: kernels are compiled, and the gradient scaler comes down to a scale that fits."""


FULL = Sizes()
QUICK = Sizes(
    height=90,
    views=4,
    picture=(40, 30),
    view=(40, 30),
    gaussians=200,
    labelled=200,
    points=256,
    seconds=0.1,
    repeats=1,
    warm_up=1,
)

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TINY_DATA = {
    "train_num_rays_per_batch": 32,
    "eval_num_rays_per_batch": 32,
    "scales": (2.0, 3.0),
    "num_windows": 2,
    "window_size": 4,
}
TINY_MODEL = {
    "num_levels": 2,
    "semantic_levels": 2,
    "log2_hashmap_size": 8,
    "semantic_log2_hashmap_size": 8,
    "num_proposal_samples_per_ray": (8, 6),
    "num_nerf_samples_per_ray": 4,
    "num_random": 200,
    "fda_pairs": 100,
}
TINY_DINO = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@dataclass(frozen=True)
class Encoders:
    """CLIP and DINO with random weights in a folder: as ViT-B/16 and ViT-B/8, or tiny."""

    folder: Path
    quick: bool

    @property
    def clip(self) -> str:
        return f"open_clip:{'tiny-clip' if self.quick else 'ViT-B-16'}@{self.folder / 'clip.pt'}"

    @property
    def dino(self) -> str:
        return f"dino:{self.folder / 'dino'}"

    def write(self) -> None:
        import open_clip
        from transformers import ViTConfig, ViTModel

        self.folder.mkdir()
        if self.quick:
            (self.folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
            self.make_known()
        clip = open_clip.create_model("tiny-clip" if self.quick else "ViT-B-16", pretrained=None)
        torch.save(clip.state_dict(), self.folder / "clip.pt")
        # transformers' own defaults are those of ViT-B at 224 pixels.
        ViTModel(ViTConfig(patch_size=8, **(TINY_DINO if self.quick else {}))).save_pretrained(self.folder / "dino")

    def make_known(self) -> None:
        """Each process must learn of the tiny model."""
        import open_clip

        if self.quick:
            open_clip.add_model_config(self.folder / "tiny-clip.json")


def configured(method: str, scene: Path, cache: Path, encoders: Encoders) -> TrainerConfig:
    """A method as it is by default, but that weights to be downloaded are random ones; tiny with tiny encoders."""
    trainer = deepcopy(all_methods[method])
    pipeline = trainer.pipeline
    pipeline.datamanager.data, pipeline.datamanager.feature_cache_dir = scene, cache
    pipeline.prompts = "; ".join(PROMPTS)
    if pipeline.image_text_encoder.startswith("open_clip"):
        pipeline.image_text_encoder = encoders.clip
    if pipeline.token_encoder.startswith("dino"):
        pipeline.token_encoder = encoders.dino
    if encoders.quick:
        _lower(pipeline.datamanager, TINY_DATA)
        _lower(pipeline.model, TINY_MODEL)
        for grid in getattr(pipeline.model, "proposal_net_args_list", ()):
            grid["log2_hashmap_size"] = 8
    return trainer


def _lower(part: Any, values: dict[str, Any]) -> None:
    """Gives the settings that this part of a config has these values."""
    for name in values.keys() & vars(part).keys():
        setattr(part, name, values[name])


def as_rank(rank: int, device: str, sizes: Sizes, work: Path, photos: Path, encoders: Encoders) -> None:
    """One of two processes that extract and train together; rank 0 writes how long it took."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)  # a core for each
    mine = f"{device}:{rank}" if device == "cuda" else device
    ranks.join(ranks.meeting_in(work), rank, 2, "nccl" if device == "cuda" else "gloo")
    encoders.make_known()
    trainer = configured(BEST, photos, work / "cache-two", encoders)
    data = trainer.pipeline.datamanager
    data.train_num_rays_per_batch //= 2
    data.num_windows = max(1, data.num_windows // 2)
    clip = image_text_encoder(trainer.pipeline.image_text_encoder, mine)
    dino = token_encoder(trainer.pipeline.token_encoder, mine)
    pictures = list_pictures(photos / "images")[:-1]

    def extracted(some: list[Path], cache: Path) -> None:
        extract(some, clip, dino, data.scales, cache, Console(quiet=True))

    extracted(pictures[rank : rank + 1] * 2, work / f"warm-{rank}")  # weights are loaded
    some = pictures[:4]
    extraction = seconds(partial(extracted, some, work / "two"), mine)
    run = Run(trainer.pipeline, trainer.optimizers, mine, trainer.mixed_precision, world_size=2, local_rank=rank)
    for _ in range(sizes.warm_up):
        run.steps()
    taken = []
    for _ in range(sizes.repeats):
        ranks.wait_for_all()
        taken.append(seconds(run.steps, mine))
    if rank == 0:
        row = {"rays": data.train_num_rays_per_batch, "step_ms": 1e3 * sorted(taken)[len(taken) // 2] / run.block}
        row |= {"views": len(some), "views_per_s": len(some) / extraction}
        (work / "two.json").write_text(json.dumps(row))
    ranks.wait_for_all()
    dist.destroy_process_group()
