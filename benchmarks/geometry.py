"""Geometry alone: how well held-out photos are rendered, and how far off the depth is, over several seeds.

    python benchmarks/geometry.py --scene SCENE --scene OTHER --seeds 0 1 2 3 4 --json geometry.json

Trains without features, as semantic losses do not reach the geometry, with all that the method does about it. Prints one
Markdown table: a line a scene and row, the median over the seeds and the worst of them. Depth is compared where the scene has
a folder `depth` (pictures of 16 bits in steps of 0.1 mm along the viewing axis, named as the photos): the median error, as a
share of the true depth, and the share of pixels that are more than 5 % off; of the nearest third of a picture too. The
JSON is written after every run; started again with the same `--json`, the benchmark goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.utils import writer
from quality_rows import restrict_views
from seeds import read_depth

from ovs3d_nerfstudio.files import written_beside
from ovs3d_nerfstudio.pipeline import OVS3DPipeline

STRIDE = 3
"""Every third pixel of every third row is compared: thousands of a picture."""
WRONG = 0.05
"""Share of its depth by which a pixel may be off."""
NEAR = 1 / 3
"""Share of a picture's pixels that are its nearest."""
ROWS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-depth": {"datamanager.depth_rays": 0},
    "no-opacity": {"model.opacity_loss_mult": 0.0},
}
"""What each row changes of the method's config; `views-N` takes N training views, evenly chosen, and A+B is both."""
COLUMNS = {
    "psnr": ("PSNR (dB)", min, "{:.1f}"),
    "error": ("depth error", max, "{:.2%}"),
    "wrong": ("> 5 % off", max, "{:.1%}"),
    "near_wrong": ("of the nearest third", max, "{:.1%}"),
    "minutes": ("minutes", max, "{:.1f}"),
}
"""Title, which value is the worst, and format."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", type=Path, action="append", required=True, help="scene to train on; repeatable")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=["full"], help=f"of {' '.join(ROWS)}; views-N; A+B")
    parser.add_argument("--method", default="ovs3d-lite", help="method whose geometry is trained")
    parser.add_argument("--steps", type=int, help="end after so many, only to see that it runs (default: the method's)")
    parser.add_argument("--json", type=Path, default=Path("geometry.json"), help="results; taken up when it exists")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs", "geometry"), help="found points, runs, pictures"
    )
    arguments = parser.parse_args()
    for row in arguments.rows:
        if not all(part in ROWS or re.fullmatch(r"views-\d+", part) for part in row.split("+")):
            raise SystemExit(f"There is no row '{row}'; choose of {', '.join(ROWS)}, views-N, or several joined by +.")
    results = json.loads(arguments.json.read_text()) if arguments.json.is_file() else []
    for seed in arguments.seeds:
        for scene in arguments.scene:
            for row in arguments.rows:
                key = {"method": arguments.method, "scene": scene.resolve().name, "row": row, "seed": seed}
                if any(key.items() <= result.items() for result in results):
                    continue
                job = arguments.method, scene, row, seed, arguments.steps, arguments.output_dir.resolve()
                results.append(key | measure(*job))
                print({name: round(x, 4) if isinstance(x, float) else x for name, x in results[-1].items()}, flush=True)
                with written_beside(arguments.json) as beside:
                    beside.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results)}\n")


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line a scene and row; the median over the seeds, and in brackets the worst of several."""
    titles = ["scene", "row", "seeds", *(title for title, _, _ in COLUMNS.values())]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "--:|" * (len(titles) - 2)]
    for scene, row in dict.fromkeys((result["scene"], result["row"]) for result in results):
        group = [result for result in results if (result["scene"], result["row"]) == (scene, row)]
        cells = []
        for name, (_, worst, form) in COLUMNS.items():
            values = [result[name] for result in group if result.get(name) is not None]
            cell = form.format(median(values)) if values else "–"
            cells.append(f"{cell} ({form.format(worst(values))})" if len(values) > 1 else cell)
        lines.append("| " + " | ".join([scene, row, str(len(group)), *cells]) + " |")
    return "\n".join(lines)


def measure(method: str, scene: Path, row: str, seed: int, steps: int | None, folder: Path) -> dict[str, Any]:
    """Trains one row and looks at its held-out views."""
    config = copy.deepcopy(all_methods[method])
    data = scene
    for part in row.split("+"):
        if part.startswith("views-"):
            data = restrict_views(scene, int(part[6:]), folder / "scenes" / f"{scene.resolve().name}-{part}")
        for path, value in ROWS.get(part, {}).items():
            where, name = path.split(".")
            setattr(getattr(config.pipeline, where), name, value)
    config.max_num_iterations = steps or config.max_num_iterations
    config.output_dir, config.experiment_name, config.timestamp = folder / "runs", scene.resolve().name, f"{row}-{seed}"
    config.vis, config.machine.seed, config.logging.local_writer.enable = "tensorboard", seed, False
    config.steps_per_eval_batch = config.steps_per_eval_image = config.steps_per_eval_all_images = 0
    config.pipeline.model.semantics_start = config.pipeline.model.fda_start = config.max_num_iterations
    config.pipeline.datamanager.feature_cache_dir = folder / "cache"
    config.data = config.pipeline.datamanager.data = data
    for start in (random.seed, np.random.seed, torch.manual_seed):
        start(seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    pipeline = trainer.pipeline
    # Nothing is taught, so nothing need be extracted; and what is found in the photos is found once for all rows.
    pipeline.datamanager.teachers = ()
    _ = pipeline.datamanager.config.depth_rays and pipeline.datamanager.sightings
    began = time.time()
    trainer.train()
    minutes = (time.time() - began) / 60
    # nerfstudio's writers are global: the next run would write its events into this one's files too.
    writer.EVENT_WRITERS.clear()
    writer.GLOBAL_BUFFER.clear()
    shutil.rmtree(trainer.base_dir, ignore_errors=True)
    views = [judged(pipeline, scene, view) for view in range(len(pipeline.datamanager.eval_dataset))]
    means = {name: float(np.mean([view[name] for view in views])) for name in views[0]}
    return means | {"minutes": minutes}


@torch.no_grad()
def judged(pipeline: OVS3DPipeline, scene: Path, view: int) -> dict[str, float]:
    """PSNR of a held-out view, and the errors of its depth where the true one is known."""
    dataset, model = pipeline.datamanager.eval_dataset, pipeline.model.eval()
    camera = dataset.cameras[view : view + 1].to(model.device)
    rays = camera.generate_rays(camera_indices=0, keep_shape=True)[::STRIDE, ::STRIDE]
    outputs = model.get_outputs_for_camera_ray_bundle(rays)
    photo = model.photo_of(dataset.get_image_float32(view).to(model.device))[::STRIDE, ::STRIDE]
    found = {"psnr": -10 * float((outputs["rgb"].clamp(0, 1) - photo).square().mean().log10())}
    true = read_depth(scene, dataset.image_filenames[view].stem)
    if not np.isfinite(true).any():
        return found
    true = torch.from_numpy(true)[::STRIDE, ::STRIDE] * pipeline.datamanager.train_dataparser_outputs.dataparser_scale
    along = rays.directions @ -camera.camera_to_worlds[0, :, 2]
    off = ((outputs["depth"][..., 0] * along).cpu() / true - 1).abs()
    known = true.isfinite()
    near = known & (true <= true[known].quantile(NEAR))
    shares = {"wrong": off[known] > WRONG, "near_wrong": off[near] > WRONG}
    return found | {"error": float(off[known].median())} | {name: float(x.float().mean()) for name, x in shares.items()}


if __name__ == "__main__":
    main()
