"""The rows of the quality benchmark: what each changes of a method's config, and how it is trained.

A row is either a training run with a few settings changed (`CHANGES` and the three patterns below it), or a reference
of `quality_references`.
"""

from __future__ import annotations

import copy
import gc
import json
import random
import re
import shutil
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import open3d
import torch
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils import writer
from PIL import Image
from quality_references import SPLITS, QualityError, Scores, TrueTeachers, average, lift, pyramid

from ovs3d_nerfstudio.data.annotations import Annotations
from ovs3d_nerfstudio.engine.checkpoints import checkpoints
from ovs3d_nerfstudio.evaluation.splits import evaluate_split
from ovs3d_nerfstudio.models.nerf import OVS3DModelConfig
from ovs3d_nerfstudio.pipeline import OVS3DPipeline
from ovs3d_nerfstudio.prompts.prompts import find_classes_file, read_classes_file

PROCESS = Path("/proc/self")
SPARSE, SPARSE_NOISE = 10_000, 0.01
"""Points of the row `init-sparse`, and how far they lie off the surface, as a share of their distance."""
NEVER = 10**9
"""A step that no run reaches."""
CHANGES: dict[str, dict[str, Any]] = {
    "full": {},
    "no-rda": {"model.rda_loss_mult": 0.0},
    "no-fda": {"model.fda_start": NEVER},
    "no-fda-negative": {"model.fda_negative_mult": 0.0},
    "no-apart": {"model.fda_apart_start": None},
    "no-rebalance": {"model.fda_rebalance": False},
    "no-unmixing": {"model.unmixing_loss_mult": 0.0},
    "no-patch": {"model.patch_loss_mult": 0.0},
    "no-color": {"model.color_loss_mult": 0.0},
    "no-opacity": {"model.opacity_loss_mult": 0.0},
    "uniform-scales": {"model.learned_scales": False},
    "undetached": {"model.detach_density": False},
    "relevancy": {"model.class_scores": "relevancy"},
    "cosine": {"model.class_scores": "cosine"},
    "centred": {"model.class_scores": "centred"},
    "dense": {"datamanager.clip_features": "dense"},
    "ovs3d-paper": {},  # filled from the method of that name by `row_config`, as is `paper`
    "paper": {
        "model.fda_temperature": 0.2,
        "model.fda_temperature_unit": "absolute",
        "model.fda_divergence": "kl",
    },
    "truth": {
        "model.class_scores": "cosine",  # the ranges are those of features that it is not taught
        "model.feature_loss_mult": 1.0,
        "model.patch_loss_mult": 0.0,
        "model.rda_loss_mult": 0.0,
        "model.fda_start": NEVER,
    },
    "init-random": {"model.random_init": True},
    "init-sparse": {},  # the scene is given points, the model a run: see `row_config` and `train`
    "init-nerf": {},
    "pyramid-2d": {},
    "average-3d": {},
    "lift": {},
}
AVERAGES = {"average-3d": average, "lift": lift}
"""Training-free averages over what geometry says: of rays, of Gaussians."""
REFERENCES = ("pyramid-2d", *AVERAGES, "truth")
"""What cannot be joined with another row; but an average may be of one of the pyramid's scales (`lift+scale-10`)."""
ROWS = (
    *("full", "no-rda", "no-fda", "no-fda-negative", "no-apart", "no-rebalance", "no-unmixing", "no-patch", "no-color"),
    *("scale-5", "scale-7", "scale-10", "finer-1.4"),
    *("uniform-scales", "undetached", "relevancy", "views-10", "views-20"),
    *("ovs3d-paper", "paper", "pyramid-2d", "average-3d", "truth"),
)
"""All rows that are run when none is named; `scale-N`, `views-N`, `finer-N` and `fda-xN` (both FDA weights times N) take any N; A+B is both."""


@dataclass(frozen=True)
class Job:
    """What the rows of one scene, encoder and seed have in common."""

    method: str
    scene: Path
    encoder: str
    seed: int
    steps: int | None
    """Training steps; None takes the method's."""
    output_dir: Path
    keep_runs: bool = False
    """Keep checkpoints and logs of the runs."""

    @property
    def name(self) -> str:
        return (self.scene.parent if self.scene.is_file() else self.scene).resolve().name


@dataclass
class Outcome:
    """What was measured of one row."""

    splits: Scores
    costs: dict[str, float | None]
    """Minutes of training and of preparing features (little when they were cached), and peak memory while training."""


NO_COSTS: dict[str, float | None] = {"minutes": None, "feature_minutes": None, "peak_memory_gb": None}
"""Of a reference, which trains nothing."""


def check_row(row: str) -> str:
    """`row` itself. Raises QualityError when there is no such row."""
    parts = row.split("+")
    known = all(p in CHANGES or re.fullmatch(r"(scale|views)-\d+|(fda-x|finer-)\d+(\.\d+)?", p) for p in parts)
    scale_of_an_average = len(parts) == 2 and parts[0] in AVERAGES and parts[1].startswith("scale-")
    if not known or (len(parts) > 1 and not scale_of_an_average and any(each in parts for each in REFERENCES)):
        raise QualityError(
            f"There is no row '{row}'; choose of {', '.join(ROWS)}, scale-N, views-N, fda-xN, finer-N, or several joined by +."
        )
    return row


def check_scene(scene: Path) -> list[str]:
    """The prompts of a scene. Raises QualityError when it has no masks."""
    classes = find_classes_file(scene)
    if classes is None:
        raise QualityError(f"{scene} has no segmentations/classes.txt, so there is nothing to measure.")
    return read_classes_file(classes)


def measure(job: Job, row: str, held: dict[str, OVS3DPipeline]) -> Outcome:
    """Trains and evaluates one row.

    Args:
        held: where `full` leaves its pipeline, if it has that key, for an average to take out.
    """
    if row == "pyramid-2d":
        return Outcome(pyramid(row_config(job, row, {}), job.scene, check_scene(job.scene)), NO_COSTS)
    reference, _, scale = row.partition("+scale-")
    if reference in AVERAGES:
        # Semantic losses do not reach the geometry, which alone is as good as that of the run of `full`.
        pipeline = held.pop("full", None) or train(job, "full", {"model.semantics_start": NEVER})[0]
        return Outcome(AVERAGES[reference](pipeline, chosen_scale(pipeline, scale)), NO_COSTS)
    changes = {path: value for part in row.split("+") for path, value in CHANGES.get(part, {}).items()}
    pipeline, costs = train(job, row, changes)
    manager, evaluator, splits = pipeline.datamanager, pipeline.evaluator, {}
    for split, dataset in zip(SPLITS, (manager.eval_dataset, manager.train_dataset), strict=True):
        if any(path.stem in evaluator.annotations.views for path in dataset.image_filenames):
            splits[split] = evaluate_split(pipeline, split)
    if row == "full" and row in held:
        held[row] = pipeline
    return Outcome(splits, costs)


def chosen_scale(pipeline: OVS3DPipeline, scale: str) -> slice:
    """Which of the pyramid's scales are averaged: one, or all where none is named. Raises QualityError when there is none of it."""
    if not scale:
        return slice(None)
    scales = list(pipeline.config.datamanager.scales)
    if int(scale) not in scales:
        raise QualityError(f"The pyramid has the scales {', '.join(f'{each:g}' for each in scales)}, not {scale}.")
    index = scales.index(int(scale))
    return slice(index, index + 1)


def row_config(job: Job, row: str, changes: dict[str, Any]) -> TrainerConfig:
    """The method's own config with what `job` and `row` say; everything else is as `ns-train` would have it."""
    config = copy.deepcopy(all_methods[job.method])
    config.output_dir, config.experiment_name = job.output_dir / "runs", f"{job.name}-{job.encoder.replace(':', '-')}"
    config.timestamp, config.vis, config.machine.seed = f"{row}-{job.seed}", "tensorboard", job.seed
    config.logging.local_writer.enable = False
    # Evaluation comes after the training, and is not part of its time.
    config.steps_per_eval_batch = config.steps_per_eval_image = config.steps_per_eval_all_images = 0
    pipeline = config.pipeline
    pipeline.image_text_encoder = job.encoder
    pipeline.datamanager.feature_cache_dir = job.output_dir / "cache"
    data = job.scene
    if job.steps is not None:
        _shorten(config, job.steps)
    for part in row.split("+"):
        if part.startswith("views-"):
            data = restrict_views(data, int(part[6:]), job.output_dir / "scenes" / f"{job.name}-{part}")
        if part == "init-sparse":
            data = with_points(data, job.output_dir / "scenes" / f"{job.name}-{part}")
        if part.startswith("scale-"):
            pipeline.datamanager.scales = (float(part[6:]),)
        if part.startswith("finer-"):
            pipeline.datamanager.finer = float(part[6:])
        if part in ("ovs3d-paper", "paper"):
            _take_losses(pipeline.model, all_methods["ovs3d-paper"].pipeline.model)
        if part.startswith("fda-x"):
            pipeline.model.fda_positive_mult *= float(part[5:])
            pipeline.model.fda_negative_mult *= float(part[5:])
    for path, value in changes.items():
        part, name = path.split(".")
        setattr(getattr(pipeline, part), name, value)
    config.data = pipeline.datamanager.data = data
    return config


def _take_losses(model: OVS3DModelConfig, other: OVS3DModelConfig) -> None:
    """Gives `model` the losses of `other`, but neither its sizes nor its schedule."""
    for name in (field.name for field in fields(other)):
        loss = name.endswith("_loss_mult") and name.split("_")[0] in ("feature", "patch", "color", "rda", "unmixing")
        if loss or name == "rda_range" or (name.startswith("fda_") and name not in ("fda_start", "fda_pairs")):
            setattr(model, name, getattr(other, name))


def _shorten(config: TrainerConfig, steps: int) -> None:
    """Another length of training: the schedule's parts keep their shares of it."""
    share = steps / config.max_num_iterations
    model = config.pipeline.model
    for name in ("semantics_start", "fda_start", "fda_apart_start"):
        start = getattr(model, name)
        if start is not None:
            setattr(model, name, round(start * share))
    config.max_num_iterations = steps
    for schedule in (group["scheduler"] for group in config.optimizers.values()):
        if schedule is not None:
            schedule.warmup_steps = round(schedule.warmup_steps * share)
            if schedule.max_steps is not None:  # else it is as long as the run
                schedule.max_steps = max(1, round(schedule.max_steps * share))


def train(job: Job, row: str, changes: dict[str, Any]) -> tuple[OVS3DPipeline, dict[str, float | None]]:
    """Trains with nerfstudio's own trainer, as `ns-train` does, without a viewer. Returns the pipeline and the costs."""
    if "init-nerf" in row.split("+"):
        changes = changes | {"model.init_from": nerf_run(job)}
    config = row_config(job, row, changes)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(job.seed)
    gc.collect()
    _reset_peak()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    pipeline = trainer.pipeline
    started = time.time()
    pipeline.prepare_features()
    if row == "truth":
        pipeline.datamanager.teachers = TrueTeachers(pipeline)
    prepared = time.time()
    trainer.train()
    minutes = {"minutes": (time.time() - prepared) / 60, "feature_minutes": (prepared - started) / 60}
    costs = {**minutes, "peak_memory_gb": _peak()}
    # nerfstudio's writers are global: the next run would write its events into this one's files too.
    writer.EVENT_WRITERS.clear()
    writer.GLOBAL_BUFFER.clear()
    if not job.keep_runs:
        shutil.rmtree(trainer.base_dir, ignore_errors=True)
    return pipeline, costs


def nerf_run(job: Job) -> Path:
    """The folder of the NeRF that `init-nerf` begins with, trained when it is first asked for."""
    nerf = replace(job, method="ovs3d-lite", steps=None, keep_runs=True)
    folder = row_config(nerf, "full", {}).get_base_dir()
    if not checkpoints(folder / "nerfstudio_models"):
        train(nerf, "full", {})
    return folder


def with_points(scene: Path, folder: Path) -> Path:
    """A transforms.json in `folder` with sparse points as from COLMAP: some pixels of the training views at their true depth, give
    or take a little."""
    root, meta = _rooted(scene)
    if not (root / "depth").is_dir():
        raise QualityError(f"The row init-sparse needs the folder {root / 'depth'}; leave the row out.")
    draw, points, colors = np.random.default_rng(0), [], []
    train = [frame for frame in meta["frames"] if frame["file_path"] in meta["train_filenames"]]
    for frame in train:
        photo = Path(frame["file_path"])
        steps = np.asarray(Image.open(root / "depth" / f"{photo.stem}.png")).astype(float)
        y, x = draw.integers(0, steps.shape, (SPARSE // len(train), 2)).T
        depth = 1e-4 * steps[y, x] * draw.normal(1, SPARSE_NOISE, len(x))
        rays = [(x + 0.5 - meta["cx"]) / meta["fl_x"], (meta["cy"] - y - 0.5) / meta["fl_y"], -np.ones(len(x))]
        pose = np.array(frame["transform_matrix"])
        there = (np.stack(rays, -1) * depth[:, None]) @ pose[:3, :3].T + pose[:3, 3]
        points.append(there[depth > 0])
        colors.append(np.asarray(Image.open(photo).convert("RGB"))[y, x][depth > 0] / 255)
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(np.concatenate(points)))
    cloud.colors = open3d.utility.Vector3dVector(np.concatenate(colors))
    shutil.copytree(root / "segmentations", folder / "segmentations", dirs_exist_ok=True)
    open3d.io.write_point_cloud(str(folder / "sparse_pc.ply"), cloud)
    (folder / "transforms.json").write_text(json.dumps(meta | {"ply_file_path": "sparse_pc.ply"}))
    return (folder / "transforms.json").resolve()


def _rooted(scene: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a scene and its transforms.json, which may lie elsewhere: its paths are absolute."""
    file = scene if scene.is_file() else scene / "transforms.json"
    root, meta = file.parent.resolve(), json.loads(file.read_text())
    for key in ("train_filenames", "val_filenames", "test_filenames"):
        meta[key] = [str(root / name) for name in meta.get(key, [])]
    for frame in meta["frames"]:
        frame |= {key: str(root / frame[key]) for key in ("file_path", "mask_path", "depth_file_path") if key in frame}
    return root, meta


def restrict_views(scene: Path, count: int, folder: Path) -> Path:
    """A transforms.json in `folder` with `count` training views, evenly chosen; held-out views and poses are the same.

    Annotated training views take the places of their nearest neighbours, so that every row is measured on the same views.
    """
    root, meta = _rooted(scene)
    if not meta["train_filenames"]:
        raise QualityError(f"{scene} does not list its train_filenames, so no view can be left out; leave views-N out.")
    names = sorted(meta["train_filenames"])
    chosen = set(np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int).tolist())
    photos = [Path(frame["file_path"]) for frame in meta["frames"]]
    stems = Annotations(root, photos).views if (root / "segmentations").is_dir() else {}
    annotated = [i for i, name in enumerate(names) if Path(name).stem in stems]
    for i in annotated:
        if i not in chosen:
            chosen.remove(min(chosen.difference(annotated), key=lambda j: abs(j - i)))
            chosen.add(i)
    meta["train_filenames"] = [names[i] for i in sorted(chosen)]
    folder.mkdir(parents=True, exist_ok=True)
    if (root / "segmentations").is_dir():
        # A copy: links that lead out of a scene are not followed.
        shutil.copytree(root / "segmentations", folder / "segmentations", dirs_exist_ok=True)
    (folder / "transforms.json").write_text(json.dumps(meta))
    return (folder / "transforms.json").resolve()


def _reset_peak() -> None:
    """Start to watch memory: the GPU's, or this process's own (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")


def _peak() -> float | None:
    """Most memory in GB since `_reset_peak`; None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text()) if PROCESS.exists() else None
    return int(found[1]) * 1024 / 1e9 if found else None
