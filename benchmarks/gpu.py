"""What our methods take on this machine's GPU: extraction, steps, memory, pictures, prompts, hash grids, a second GPU.

    python benchmarks/gpu.py                                                                # `make gpu` runs the tests first
    python benchmarks/gpu.py --device cpu --quick --results FOLDER --page FILE              # only to see that it runs

Takes a few minutes and no network: encoders have their real sizes and random weights, on which time does not depend, and
pictures are generated. Writes benchmarks/results/gpu-NAME_OF_THE_CARD.json, and the tables of all such files into
docs/performance.md. A part that fails is a row that says so. The exit status is 1 when one did, or a limit is not met.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_report import Row, missed, status, table
from pages import ROOT, fill

SECONDS = 420
"""No part begins later than this: with the tests before them, all shall end within ten minutes."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU to measure")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see it run, on a CPU too")
    parser.add_argument(
        "--methods", nargs="*", default=[], help="methods to measure beside ovs3d (default: all of ours)"
    )
    parser.add_argument("--results", type=Path, help="folder of the JSON files (default: benchmarks/results)")
    parser.add_argument("--page", type=Path, help="page that gets the tables (default: docs/performance.md)")
    parser.add_argument("--work", type=Path, help="where weights, pictures and features lie meanwhile (2 GB)")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("a CPU would take hours for this; see that it runs with --quick, or measure with cost.py.")
    if options.quick and not (options.results and options.page):
        parser.error("--quick measures nothing that is worth keeping: say with --results and --page where it may go.")
    options.results = options.results or ROOT / "benchmarks" / "results"
    options.page = options.page or ROOT / "docs" / "performance.md"
    return options


def machine(device: str) -> dict[str, str | float]:
    """The card and the versions that its figures depend on."""
    import triton

    import ovs3d_nerfstudio

    about: dict[str, str | float] = {"card": "CPU", "torch": torch.__version__, "triton": triton.__version__}
    about["ovs3d_nerfstudio"] = ovs3d_nerfstudio.__version__
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        about |= {"card": torch.cuda.get_device_name(0), "capability": f"{card.major}.{card.minor}"}
        about |= {"memory_gib": card.total_memory / 2**30, "cuda": str(torch.version.cuda)}
    return about


def measured(parts: dict[str, Callable[[], list[Row]]]) -> list[Row]:
    """The rows of all parts, said as they come; of one that fails, or would begin too late, a row that says so."""
    rows, start = [], time.monotonic()
    for number, (name, part) in enumerate(parts.items(), 1):
        taken = time.monotonic() - start
        print(f"[{taken:4.0f} s] {number} of {len(parts)}: {name}", flush=True)
        if taken > SECONDS:
            found = [Row(name, name, note=f"not begun after {taken:.0f} s", failed=True)]
        else:
            try:
                found = part()
            except (Exception, SystemExit) as error:  # whatever it is, the other parts may be well
                traceback.print_exc()
                # What a user can mend has been said, and stands behind the exit.
                cause = error.__context__ if isinstance(error, SystemExit) and error.__context__ else error
                said = " ".join(str(cause).split())[:200]
                found = [Row(name, name, note=f"{type(cause).__name__}: {said}", failed=True)]
        for row in found:
            value = row.note if row.value is None else f"{row.value:.4g} {row.unit}  {row.note}"
            print(f"         {row.what}: {value}", flush=True)
        rows += found
        gc.collect()
    return rows


def report(folder: Path, page: Path) -> None:
    """Puts the tables of all cards in `folder` into a page."""
    tables = []
    for file in sorted(folder.glob("gpu-*.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        about = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else value if key == "card" else f"{key} {value}"
            for key, value in results["machine"].items()
        )
        tables.append(table(about, [Row(**row) for row in results["rows"]]))
    fill(page, "gpu", "\n\n".join(tables))


def main() -> int:
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "`make gpu` measures a GPU, and PyTorch finds none here (torch.cuda.is_available() is False); run it where there "
            "is an NVIDIA card with its driver, and a PyTorch that was built for it.",
            file=sys.stderr,
        )
        return 1
    if options.check:
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Takes seconds to import, which nobody should wait for to read that there is no GPU.
    from gpu_parts import Bench

    from ovs3d_nerfstudio.files import write_json

    with tempfile.TemporaryDirectory(dir=options.work) as work:
        rows = measured(Bench(options.device, options.quick, Path(work), options.methods).parts())
    about = machine(options.device)
    name = re.sub(r"[^a-z0-9]+", "-", str(about["card"]).lower()).strip("-")
    write_json(options.results / f"gpu-{name}.json", {"machine": about, "rows": [asdict(row) for row in rows]})
    report(options.results, options.page)
    print(f"\n{table(str(about['card']), rows)}\n")
    print("\n".join(missed(rows)) or "Every limit is met.")
    return status(rows)


if __name__ == "__main__":
    sys.exit(main())
