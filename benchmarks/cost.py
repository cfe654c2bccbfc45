"""What our features, training and rendering cost, each as a ratio of two things measured side by side in this run.

    python benchmarks/cost.py --scene SCENE [--json FILE] [--profile] [--write] [--quick]

Prints one Markdown table; `--write` puts it into docs/performance.md and draws docs/images/cost.png. The two sides of a
ratio take turns (A B A B …) and each is represented by its median, so that what else the machine does hits both alike.
Steps are timed in blocks as long as the period in which nerfacto trains its proposal networks: every block holds one.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.models.nerfacto import NerfactoModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from pages import ROOT, fill
from quality_rows import Job, measure
from rich.console import Console
from training_steps import Run, profile

sys.path.insert(0, str(ROOT / "benchmarks" / "encoders"))  # its entry points make `mixture` and `tabletop` known

from ovs3d_nerfstudio.configs import ovs3d_lite
from ovs3d_nerfstudio.encoders.base import TokenEncoder, image_text_encoder
from ovs3d_nerfstudio.encoders.open_clip import PRECISIONS, OpenClipEncoder
from ovs3d_nerfstudio.features.extraction import extract
from ovs3d_nerfstudio.features.pyramid import ScaleGrid
from ovs3d_nerfstudio.fields.hash_grid import FastHashEncoding, use_fast_hash_grids
from ovs3d_nerfstudio.models.nerf import OVS3DModel
from ovs3d_nerfstudio.pictures import list_pictures, read_picture
from ovs3d_nerfstudio.prompts.prompts import find_classes_file, read_classes_file

PROMPTS = 10
FILLERS = ("cup", "plate", "chair", "window", "book", "lamp", "plant", "bottle", "towel", "keyboard")
"""What a scene's classes are filled up with to make ten prompts: only their number matters here."""
LIMITS = {
    "cache": ("cache of a view (patches and tokens) / per-pixel layout S×D×H×W, half precision", "≤", 1 / 150),
    "extraction": ("crops/s: extraction / bare image tower over ready crops", "≥", 0.85),
    "dense": ("CLIP ViT-B/16 features of a view: time of dense / of patches, three scales", "≤", 1 / 100),
    "step": ("time a ray: full step, window rays counted / the same step without semantics", "≤", 1.5),
    "hash_grid": ("hash grid, forward and backward: nerfstudio's torch time / ours", "≥", 10.0),
    "lite_step": ("`ovs3d-lite` step: time on nerfstudio's torch grids / ours", "≥", 3.0),
    "render": ("rendering: time of `segmentation` / `rgb` alone", "≤", 1.25),
    "basis_step": ("step: time with K coefficients / all D dimensions", "≤", 0.7),
}
"""What each ratio compares, and what it may be at most or must be at least."""
WHOLE_LIMITS = {
    "minutes": ("`ovs3d-lite` from pictures to an evaluated segmentation, minutes", "≤", 10.0),
    "miou": ("its held-out mIoU, trained and with features made in `trained_minutes`", "≥", 0.7),
    "peak_gb": ("its peak memory beyond what the imports take, GB", "≤", 2.0),
}
"""What a whole run may take and must reach; no ratios, but limits that people feel."""


# Measuring ------------------------------------------------------------------------------------------------------------
def alternate(repeats: int, **sides: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each side, which take turns; one turn of each goes before and is not counted."""
    times = defaultdict(list)
    for turn in range(repeats + 1):
        for name, run in sides.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def resident(kind: str) -> float:
    """MB of this process that are in memory now (VmRSS) or were at most (VmHWM)."""
    try:
        return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def peak_of(details: dict, imported: float) -> Iterator[None]:
    """Notes the peak memory of a part beyond what the imports took, with what earlier parts left given back."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    except OSError:
        details["peak_note"] = "highest of this part and those before it"
    yield
    details["peak_mb"] = round(resident("VmHWM") - imported)
    if torch.cuda.is_available():
        details["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
        torch.cuda.reset_peak_memory_stats()


def grid_sides(
    device: str, points: int, positions: bool = False, **encodings: Callable[..., HashEncoding]
) -> dict[str, Callable[[], None]]:
    """For each encoding: forward and backward to the table of nerfacto's own sizes, and to the `positions` too if wanted."""
    config = NerfactoModelConfig()
    sizes = (config.num_levels, config.base_res, config.max_res, config.log2_hashmap_size, config.features_per_level)
    where = torch.rand(points, 3, device=device, requires_grad=positions)
    incoming = torch.randn(points, config.num_levels * config.features_per_level, device=device)

    def both_ways(grid: HashEncoding) -> None:
        where.grad = None
        grid.zero_grad()
        out = grid(where)
        out.backward(incoming.to(out.dtype))

    return {name: partial(both_ways, encoding(*sizes).to(device)) for name, encoding in encodings.items()}


def picture_sides(model: OVS3DModel, camera: Cameras) -> dict[str, Callable[[], None]]:
    """A picture with every output that the prompts bring, and the same call with semantics off."""
    alone = partial(model.forward, semantics=False)

    def rgb() -> None:
        with mock.patch.object(model, "forward", alone):
            assert "segmentation" not in model.get_outputs_for_camera(camera)

    def segmentation() -> None:
        assert "segmentation" in model.get_outputs_for_camera(camera)

    return {"segmentation": segmentation, "rgb": rgb}


# What is measured -----------------------------------------------------------------------------------------------------
class Benchmark:
    """The parts, one method each. A method fills `details` of its part and returns its ratios."""

    def __init__(self, options: argparse.Namespace, scene: Path, work: Path, imported: float):
        self.options, self.scene, self.work, self.imported = options, scene, work, imported
        self.repeats = options.repeats or (1 if options.quick else 9)
        classes = find_classes_file(scene)
        named = read_classes_file(classes) if classes else []
        self.prompts = [*named, *(word for word in FILLERS if word not in named)][: max(PROMPTS, len(named))]
        self._runs: dict[str, Run] = {}

    def run(self, name: str) -> Run:
        """`ours` (ovs3d-lite), `full` (the same with all D dimensions), or `nerfacto` (its class, sizes as ours)."""
        if name not in self._runs:
            trainer = deepcopy(ovs3d_lite.config)
            pipeline, model = trainer.pipeline, trainer.pipeline.model
            pipeline.datamanager.data = self.scene
            model.implementation = "torch"
            if name == "nerfacto":
                names = {field.name for field in dataclasses.fields(NerfactoModelConfig)} - {"_target"}
                data, rays = pipeline.datamanager.dataparser, pipeline.datamanager.train_num_rays_per_batch
                model = self.run("ours").model.config  # near plane and start as chosen by the capture
                pipeline = VanillaPipelineConfig(
                    datamanager=VanillaDataManagerConfig(
                        data=self.scene, dataparser=data, train_num_rays_per_batch=rays, eval_num_rays_per_batch=rays
                    ),
                    model=NerfactoModelConfig(**{name: getattr(model, name) for name in names}),
                )
            else:
                pipeline.prompts = "; ".join(self.prompts)
                pipeline.image_text_encoder, pipeline.token_encoder = self.options.encoder, self.options.token_encoder
                pipeline.datamanager.feature_cache_dir = self.options.cache_dir or self.work / "cache"
                model.basis_dim = 0 if name == "full" else model.basis_dim
            self._runs[name] = Run(pipeline, trainer.optimizers, self.options.device)
            if name == "nerfacto":
                use_fast_hash_grids(self._runs[name].model)
        return self._runs[name]

    def cache(self, details: dict) -> dict[str, float]:
        """Bytes on disk a view; nothing is timed."""
        datamanager = self.run("ours").pipeline.datamanager
        views = datamanager.teachers.views
        height, width = views.sizes[0]
        dim = views.patches(0)[0].shape[1]
        layout = len(views.scales) * dim * height * width * 2
        patches, tokens = (store.size(views.keys) / len(views.keys) for store in (views.pyramid, views.tokens))
        details |= {"views": len(views.keys), "D": dim, "layout_mb": layout / 1e6}
        details |= {"patches_mb": patches / 1e6, "tokens_mb": tokens / 1e6}
        details |= {"patches_ratio": patches / layout, "tokens_ratio": tokens / layout}
        return {"cache": (patches + tokens) / layout}

    def extraction(self, details: dict) -> dict[str, float]:
        """`extract()` from file to cache with EfficientNet-Lite0 crop by crop, at one scale so that it ends soon."""
        scales = [2.0] if self.options.quick else [5.0]
        pictures = list_pictures(self.scene / "images")[:1]
        crops, pooled = (image_text_encoder(f"offline:{mode}", self.options.device) for mode in ("crops", "pooled"))
        quiet = Console(quiet=True)

        def extracted(encoder):
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                return extract(pictures, encoder, _NoTokens("", "cpu"), scales, Path(folder), quiet).boxes(0)[0]

        boxes = extracted(pooled)
        ready = []
        with mock.patch.object(crops, "embed_crops", lambda batch: ready.append(batch) or batch.mean((2, 3))):
            crops.embed_boxes(read_picture(pictures[0]), boxes, pictures[0])
        taken = alternate(
            min(self.repeats, 5),
            ours=lambda: extracted(crops),
            bare=lambda: [crops.embed_crops(batch) for batch in ready],
            pooled=lambda: extracted(pooled),
        )
        details |= {"crops": len(boxes), "scales": scales, "n": min(self.repeats, 5)}
        details |= {f"{side}_crops_per_s": len(boxes) / seconds for side, seconds in taken.items()}
        details["pooled_speed_up"] = taken["ours"] / taken["pooled"]
        return {"extraction": taken["bare"] / taken["ours"]}

    def dense(self, details: dict) -> dict[str, float]:
        """One dense pass against every crop of the three scales, of which one batch is timed and multiplied; in single precision too."""
        picture = read_picture(list_pictures(self.scene / "images")[0])
        encoder, single = (_RandomClip("", self.options.device) for _ in range(2))
        height, width = picture.shape[:2]
        boxes = [ScaleGrid.of(height, width, scale).boxes() for scale in ovs3d_lite.config.pipeline.datamanager.scales]
        some = boxes[0][: encoder.batch_size]

        def in_single_precision() -> None:
            with mock.patch(f"{OpenClipEncoder.__module__}.tower_precision", lambda device: torch.float32):
                single.embed_boxes(picture, some, Path())

        taken = alternate(
            min(self.repeats, 3),
            dense=lambda: encoder.embed_dense(picture, Path()),
            batch=lambda: encoder.embed_boxes(picture, some, Path()),
            single=in_single_precision,
        )
        crops = sum(map(len, boxes))
        patches = taken["batch"] / len(some) * crops
        details |= {"size": f"{width}×{height}", "crops": crops, "crops_timed": len(some), "n": min(self.repeats, 3)}
        details |= {"dense_s": taken["dense"], "patches_s": patches}
        details |= {
            "crops_per_s": len(some) / taken["batch"],
            "single_precision_crops_per_s": len(some) / taken["single"],
        }
        return {"dense": taken["dense"] / patches}

    def step(self, details: dict) -> dict[str, float]:
        """Full step against the same without semantics, and against nerfacto's own class with our grids swapped in."""
        ours, nerfacto = self.run("ours"), self.run("nerfacto")
        taken = alternate(
            self.repeats, full=ours.steps, photometric=lambda: ours.steps(semantics=False), nerfacto=nerfacto.steps
        )
        datamanager = ours.pipeline.datamanager
        rays = datamanager.config.train_num_rays_per_batch
        both = rays + len(datamanager.next_windows()[1].indices)
        details |= {"n": self.repeats, "steps_a_turn": ours.block, "rays": rays, "window_rays": both - rays}
        details |= {f"{side}_step_ms": 1e3 * seconds / ours.block for side, seconds in taken.items()}
        details["per_step_ratio"] = taken["full"] / taken["photometric"]
        details["per_ray_ratio_to_nerfacto_class"] = taken["full"] / both / (taken["nerfacto"] / rays)
        return {"step": taken["full"] / both / (taken["photometric"] / rays)}

    def lite_step(self, details: dict) -> dict[str, float]:
        ours = self.run("ours")
        repeats = min(self.repeats, 3)  # a block on the plain grids takes many seconds
        taken = alternate(repeats, ours=ours.steps, plain=lambda: ours.steps(fast_grids=False))
        details |= {"n": repeats, **{f"{side}_step_ms": 1e3 * s / ours.block for side, s in taken.items()}}
        return {"lite_step": taken["plain"] / taken["ours"]}

    def basis_step(self, details: dict) -> dict[str, float]:
        ours, full = self.run("ours"), self.run("full")
        taken = alternate(self.repeats, ours=ours.steps, full=full.steps)
        details |= {"n": self.repeats, "K": ours.model.semantic_field.dim, "D": full.model.semantic_field.dim}
        details |= {f"{side}_step_ms": 1e3 * s / ours.block for side, s in taken.items()}
        return {"basis_step": taken["ours"] / taken["full"]}

    def hash_grid(self, details: dict) -> dict[str, float]:
        """Forward and backward to the table, nerfacto's own sizes."""
        points = 4096 if self.options.quick else 65536
        sides = grid_sides(
            self.options.device, points, ours=FastHashEncoding, plain=partial(HashEncoding, implementation="torch")
        )
        taken = alternate(self.repeats, **sides)
        details |= {"n": self.repeats, "points": points, **{f"{side}_ms": 1e3 * s for side, s in taken.items()}}
        return {"hash_grid": taken["plain"] / taken["ours"]}

    def render(self, details: dict) -> dict[str, float]:
        """A whole picture with every output that the prompts bring, against the same call with semantics off."""
        run = self.run("ours")
        model, camera = run.model, deepcopy(run.pipeline.datamanager.train_dataset.cameras[0:1])
        camera.rescale_output_resolution((120 if self.options.quick else 480) / int(camera.width.max()))
        camera = camera.to(self.options.device)
        model.eval()
        repeats = min(self.repeats, 5)
        taken = alternate(repeats, **picture_sides(model, camera))
        model.train()
        details |= {"n": repeats, "size": f"{int(camera.width)}×{int(camera.height)}", "prompts": len(self.prompts)}
        details |= {f"{side}_s": seconds for side, seconds in taken.items()}
        return {"render": taken["segmentation"] / taken["rgb"]}

    def whole(self) -> dict[str, float]:
        """One run of `ovs3d-lite` from nothing: features made, trained, every annotated view segmented and compared."""
        details: dict = {}
        job = Job(
            "ovs3d-lite", self.scene, self.options.encoder, 0, 20 if self.options.quick else None, self.work / "whole"
        )
        start = time.perf_counter()
        with peak_of(details, self.imported):
            outcome = measure(job, "full", {})
        minutes, costs = (time.perf_counter() - start) / 60, outcome.costs
        test = outcome.splits["test"][0]
        return {
            "minutes": minutes,
            "miou": test["miou"],
            "peak_gb": details["peak_mb"] / 1024,
            "trained_minutes": costs["minutes"] + costs["feature_minutes"],
            "psnr": test["psnr"],
        }


class _RandomClip(OpenClipEncoder):
    """CLIP ViT-B/16 without its weights: what it costs does not depend on them."""

    def _load(self, dtype):
        import open_clip

        made = open_clip.create_model(self.model_name, precision=PRECISIONS[dtype], device=self.device)
        return made.eval().requires_grad_(False)


class _NoTokens(TokenEncoder):
    """Extraction is compared with the image tower alone, so nothing else may take time."""

    fingerprint, stride = "none", 1

    def embed_picture(self, picture):
        return torch.zeros(1, 1, 1)


# Results --------------------------------------------------------------------------------------------------------------
def table(results: dict) -> str:
    """The Markdown table, and under it what it was measured on and what lies behind the ratios."""
    lines = ["| what | asked | measured | |", "|---|---|---|---|"]
    whole = results.get("whole", {})
    asked = [(LIMITS[name], ratio) for name, ratio in results["ratios"].items()]
    asked += [(limits, whole[name]) for name, limits in WHOLE_LIMITS.items() if whole]
    for (what, sign, limit), value in asked:
        number = (lambda value: f"1/{1 / value:.0f}") if limit < 0.1 else (lambda value: f"{value:.2f}")
        met = value <= limit if sign == "≤" else value >= limit
        lines.append(f"| {what} | {sign} {number(limit)} | {number(value)} | {'✓' if met else '✗'} |")
    lines += ["", f"Measured on {results['machine']}.", ""]
    for name, details in (results["details"] | ({"whole": whole} if whole else {})).items():
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in details.items())
        lines.append(f"* `{name}`: {shown}")
    return "\n".join(lines)


def plot(ratios: dict[str, float], path: Path) -> None:
    """Each ratio as a share of what it may cost, so that shorter is better and 1 is the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    spent = {n: r / LIMITS[n][2] if LIMITS[n][1] == "≤" else LIMITS[n][2] / r for n, r in ratios.items()}
    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(spent) + 1), layout="constrained")
    bars = axes.barh(
        list(spent), list(spent.values()), color=["#4477aa" if s <= 1 else "#cc6677" for s in spent.values()]
    )
    axes.bar_label(bars, [f"{share:.2f}" for share in spent.values()], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("cost as a share of what it may be (line: the limit)")
    axes.set_xlim(0, max(1.2, 1.15 * max(spent.values())))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def few_views(scene: Path, folder: Path, train: int = 3, test: int = 1) -> Path:
    """`scene` with its first views only, for --quick: copies beside a shortened transforms.json."""
    transforms = json.loads((scene / "transforms.json").read_text())
    counts = {"train_filenames": train, "val_filenames": test, "test_filenames": test}
    for name in counts.keys() & transforms.keys():
        transforms[name] = transforms[name][: counts[name]]
    kept = {file for name in counts for file in transforms.get(name, [])}
    frames = transforms["frames"]
    transforms["frames"] = [f for f in frames if f["file_path"] in kept] if kept else frames[: train + test]
    stems = {Path(frame["file_path"]).stem for frame in transforms["frames"]}

    def left_out(parent: str, names: list[str]) -> list[str]:
        if Path(parent) == scene:
            return [name for name in names if name.startswith(".") or name == "transforms.json"]
        if Path(parent) == scene / "segmentations":  # masks must belong to views
            return [name for name in names if name not in stems and Path(parent, name).is_dir()]
        return []

    shutil.copytree(scene, folder, ignore=left_out)
    (folder / "transforms.json").write_text(json.dumps(transforms))
    return folder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scene", type=Path, required=True, help="a scene in nerfstudio's format")
    parser.add_argument("--encoder", default="mixture", help="image-text encoder of the steps and the cache")
    parser.add_argument("--token-encoder", default="offline")
    parser.add_argument("--json", type=Path, help="write ratios and details to this file")
    parser.add_argument("--write", action="store_true", help="fill docs/performance.md and draw docs/images/cost.png")
    parser.add_argument("--whole", action="store_true", help="also a whole run, from pictures to mIoU (--write has it)")
    parser.add_argument("--quick", action="store_true", help="few views, small sizes, one turn: only to see it run")
    parser.add_argument("--profile", action="store_true", help="also print who takes what share of a step")
    parser.add_argument("--only", nargs="*", choices=list(LIMITS), default=list(LIMITS), help="parts to measure")
    parser.add_argument("--repeats", type=int, help="turns of each side (default 9; slow parts take fewer)")
    parser.add_argument("--threads", type=int, help="threads of torch and the hash grids (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--cache-dir", type=Path, help="keep the features here between runs (default: a temporary folder)"
    )
    options = parser.parse_args()
    if options.write and (options.quick or options.only != list(LIMITS)):
        parser.error("--write needs every part at full size: leave out --quick and --only.")
    return options


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    imported = resident("VmRSS")
    where = f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"
    results: dict = {"ratios": {}, "details": {}, "machine": where}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scene = few_views(options.scene, work / "scene") if options.quick else options.scene
        benchmark = Benchmark(options, scene, work, imported)
        if options.whole or options.write:
            results["whole"] = benchmark.whole()  # first, while the memory is its own
        for name in options.only:
            details = results["details"].setdefault(name, {})
            with peak_of(details, imported):
                results["ratios"] |= getattr(benchmark, name)(details)
            print(f"{name}: {results['ratios'][name]:.4g}  {details}", file=sys.stderr, flush=True)
        if options.profile:
            results["profile"] = profile(benchmark.run("ours"), 1 if options.quick else 5)
    text = table(results)
    print(f"\n{text}\n\n{results.get('profile', '')}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    if options.write:
        fill(ROOT / "docs" / "performance.md", "cost", text)
        if options.profile:
            fill(ROOT / "docs" / "performance.md", "profile", f"```text\n{results['profile']}\n```")
        plot(results["ratios"], ROOT / "docs" / "images" / "cost.png")


if __name__ == "__main__":
    main()
