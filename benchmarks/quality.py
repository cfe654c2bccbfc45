"""Quality benchmark: trains the method and its ablations on scenes with masks, and lays them side by side.

    python benchmarks/quality.py --scene SCENE --encoder mixture --encoder tabletop --seeds 0 1 2 --json quality.json

Prints one Markdown table a protocol, medians over the seeds, and leaves a JSON and a picture sheet (photo | truth |
prediction) for each scene and encoder. The JSON is written after every run; started again with the same `--json`, the
benchmark goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
# The benchmark's own encoders: the folder holds their entry points, as an installed package's would lie in site-packages.
sys.path.insert(0, str(ROOT / "benchmarks" / "encoders"))

from quality_rows import ROWS, SPLITS, Job, Outcome, QualityError, check_row, check_scene, measure  # noqa: E402

from ovs3d_nerfstudio.data.annotations import AnnotationError  # noqa: E402
from ovs3d_nerfstudio.encoders.base import EncoderError  # noqa: E402
from ovs3d_nerfstudio.evaluation.splits import SegmentedView, stills  # noqa: E402
from ovs3d_nerfstudio.features.cache import written_beside  # noqa: E402
from ovs3d_nerfstudio.prompts.palette import palette  # noqa: E402

RESULTS = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- quality benchmark: begin -->", "<!-- quality benchmark: end -->"
TITLES = {"test": "Held-out protocol", "train": "Paper protocol"}
EXPLAINED = {
    "test": "The annotated views were kept out of training.",
    "train": "The annotated views are training views too; their labels are never used.",
}
COLUMNS = {
    "miou": ("mIoU", 3),
    "pixel_accuracy": ("pixel accuracy", 3),
    "boundary_iou": ("boundary IoU", 3),
    "psnr": ("PSNR (dB)", 1),
    "minutes": ("minutes", 1),
    "peak_memory_gb": ("memory (GB)", 1),
}
SHEET_WIDTH = 240
"""Width of a picture on the sheet, at most twice this."""


class Results:
    """The JSON file: a list `rows`, one entry a run and split."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Takes up what `path` holds. Raises QualityError when that was made with other settings."""
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            content = json.loads(path.read_text())
            if content["settings"] != settings:
                raise QualityError(
                    f"{path} was made with {content['settings']}, not {settings}; name another file with --json."
                )
            self.rows = content["rows"]

    def has(self, job: Job, row: str) -> bool:
        key = (job.name, job.encoder, row, job.seed)
        return any((r["scene"], r["encoder"], r["row"], r["seed"]) == key for r in self.rows)

    def add(self, job: Job, row: str, outcome: Outcome) -> None:
        """Appends both splits of a run and writes the file beside its place, so that it is always whole."""
        for split, (summary, _) in outcome.splits.items():
            figures = {name: value for name, value in summary.items() if name != "views"}
            entry = {"scene": job.name, "encoder": job.encoder, "row": row, "split": split, "seed": job.seed}
            self.rows.append(entry | {"commit": commit()} | figures | outcome.costs)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(self.path) as beside:
            beside.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1) + "\n")


def commit() -> str:
    """The commit of the code, with a + when something was changed since; "unknown" outside a git checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        watched = ["ovs3d_nerfstudio", "benchmarks"]
        changed = subprocess.run([*git, "status", "--porcelain", "--", *watched], capture_output=True, text=True)
        return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def markdown(rows: Sequence[dict[str, Any]], split: str) -> str:
    """The table of one split: a line for each scene, encoder and row, medians over the seeds, Δ to the full method by the same seeds."""
    mine = [row for row in rows if row["split"] == split]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in mine:
        groups.setdefault((row["scene"], row["encoder"], row["row"]), []).append(row)
    order = {name: i for i, name in enumerate(ROWS)}
    titles = ["scene", "encoder", "row", "seeds", *(title for title, _ in COLUMNS.values())]
    titles.insert(5, "Δ mIoU")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * 3 + "--:|" * (len(titles) - 3)]
    for key in sorted(groups, key=lambda key: (key[0], key[1], order.get(key[2], len(order)), key[2])):
        group = groups[key]
        cells = [_median(group, name, digits) for name, (_, digits) in COLUMNS.items()]
        full = {r["seed"]: r["miou"] for r in groups.get((*key[:2], "full"), [])}
        paired = [r["miou"] - full[r["seed"]] for r in group if r["seed"] in full]
        difference = median(paired) if paired else None
        cells.insert(1, "" if difference is None or key[2] == "full" else f"{difference:+.3f}")
        name = f"**{key[2]}**" if key[2] == "full" else key[2]
        lines.append("| " + " | ".join([key[0], key[1], name, str(len(group)), *cells]) + " |")
    return "\n".join(lines)


def _median(group: Sequence[dict[str, Any]], name: str, digits: int) -> str:
    values = [row[name] for row in group if row[name] is not None]
    if not values:
        return "–"
    spread = f" ({min(values):.3f}–{max(values):.3f})" if name == "miou" and len(values) > 1 else ""
    return f"{median(values):.{digits}f}{spread}"


def report(results: Results) -> str:
    """Both protocols, each under its own heading."""
    parts = []
    for split in SPLITS:
        if any(row["split"] == split for row in results.rows):
            parts += [f"### {TITLES[split]}", EXPLAINED[split], markdown(results.rows, split)]
    return "\n\n".join(parts)


def save_view(job: Job, row: str, view: SegmentedView) -> None:
    """Keeps one view of a row for the sheet."""
    path = _pictures(job) / f"{row}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    step = max(1, view.photo.shape[1] // SHEET_WIDTH)
    arrays = {"photo": view.photo, "prediction": view.prediction, "truth": view.truth}
    np.savez_compressed(path, **{name: array[::step, ::step] for name, array in arrays.items()})


def save_sheet(job: Job, rows: Sequence[str]) -> None:
    """Photo | truth | prediction of the rows that are finished, one below the other."""
    files = [(row, _pictures(job) / f"{row}.npz") for row in rows]
    views = []
    for row, path in files:
        if path.is_file():
            with np.load(path) as arrays:
                photo = Image.fromarray(arrays["photo"])
                draw = ImageDraw.Draw(photo)
                draw.text((6, 4), row, "white", ImageFont.load_default(16), stroke_width=2, stroke_fill="black")
                views.append(SegmentedView(row, np.asarray(photo), arrays["prediction"], arrays["truth"]))
    if views:
        prompts = check_scene(job.scene)
        sheet = stills({"segmentation": views}, prompts, palette(len(prompts)), rows=len(views))
        Image.fromarray(sheet).save(_pictures(job).with_suffix(".png"))


def _pictures(job: Job) -> Path:
    return job.output_dir / "pictures" / f"{job.name}-{job.encoder.replace(':', '-')}"


def write_results(results: Results, arguments: argparse.Namespace) -> None:
    """Puts the tables, the commit and the command between the two markers of docs/results.md."""
    text = RESULTS.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise QualityError(f"{RESULTS} lacks the lines {BEGIN} and {END}, between which the table goes.")
    words = ["python", "benchmarks/quality.py"]
    for scene in arguments.scene:
        words += ["--scene", os.path.relpath(scene, ROOT)]
    for encoder in arguments.encoder:
        words += ["--encoder", encoder]
    words += ["--seeds", *map(str, arguments.seeds), "--json", os.path.relpath(arguments.json, ROOT)]
    if tuple(arguments.rows) != ROWS:
        words += ["--rows", *arguments.rows]
    if arguments.steps is not None:
        words += ["--steps", str(arguments.steps)]
    commits = ", ".join(sorted({f"`{row['commit']}`" for row in results.rows}))
    if arguments.method != "ovs3d-lite":
        words += ["--method", arguments.method]
    made = f"Made at {commits} (+: with changes since) by\n\n```bash\n{shlex.join(words)} --write\n```"
    with written_beside(RESULTS) as beside:
        beside.write_text(f"{before}{BEGIN}\n\n{made}\n\n{report(results)}\n\n{END}{after}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", type=Path, action="append", required=True, help="scene with masks; repeatable")
    parser.add_argument("--encoder", action="append", help="image-text encoder; repeatable (default: offline)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), help=f"of {' '.join(ROWS)}; scale-N, views-N, fda-xN, finer-N, A+B"
    )
    parser.add_argument("--json", type=Path, default=Path("quality.json"), help="results; taken up when it exists")
    parser.add_argument("--method", default="ovs3d-lite", help="method or variant whose config the rows change")
    parser.add_argument("--steps", type=int, help="training steps (default: the method's)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs", "quality"), help="features, runs, pictures")
    parser.add_argument("--keep-runs", action="store_true", help="keep checkpoints and logs of every run")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/results.md")
    arguments = parser.parse_args(words)
    arguments.encoder = arguments.encoder or ["offline"]
    return arguments


def run(arguments: argparse.Namespace) -> Results:
    """All rows that the JSON lacks, seed by seed, so that an interrupted benchmark has whole tables of fewer seeds."""
    rows = [check_row(row) for row in dict.fromkeys(arguments.rows)]
    for scene in arguments.scene:
        check_scene(scene)
    if "full" in rows and "average-3d" in rows:
        # Right behind the run whose geometry it takes, so that no other run's memory holds two.
        rows.remove("average-3d")
        rows.insert(rows.index("full") + 1, "average-3d")
    results = Results(arguments.json, {"method": arguments.method, "steps": arguments.steps})
    for seed in arguments.seeds:
        for scene in arguments.scene:
            for encoder in arguments.encoder:
                job = Job(
                    arguments.method,
                    scene,
                    encoder,
                    seed,
                    arguments.steps,
                    arguments.output_dir.resolve(),
                    arguments.keep_runs,
                )
                run_job(job, rows, results)
    return results


def run_job(job: Job, rows: Sequence[str], results: Results) -> None:
    missing = [row for row in rows if not results.has(job, row)]
    held: dict = {"full": None} if {"average-3d", "lift"} & set(missing) else {}
    for row in missing:
        print(f"=== {job.name}, {job.encoder}, {row}, seed {job.seed}", flush=True)
        try:
            outcome = measure(job, row, held)
        except QualityError as error:
            print(f"Left out: {error}", file=sys.stderr, flush=True)
            continue
        results.add(job, row, outcome)
        shown = outcome.splits.get("test") or next(iter(outcome.splits.values()))
        if job.seed == min(r["seed"] for r in results.rows) or not (_pictures(job) / f"{row}.npz").is_file():
            save_view(job, row, shown[1][len(shown[1]) // 2])
        save_sheet(job, rows)
        scores = ", ".join(f"{split} {summary['miou']:.3f}" for split, (summary, _) in outcome.splits.items())
        print(f"=== {job.name}, {job.encoder}, {row}, seed {job.seed}: mIoU {scores}", flush=True)
        del outcome, shown
        gc.collect()


def main() -> None:
    arguments = parse()
    try:
        results = run(arguments)
        print(f"\n{report(results)}\n")
        print(f"Results: {arguments.json}. Pictures: {arguments.output_dir / 'pictures'}.")
        if arguments.write:
            write_results(results, arguments)
    except (QualityError, AnnotationError, EncoderError) as error:
        raise SystemExit(f"{error}") from None


if __name__ == "__main__":
    main()
