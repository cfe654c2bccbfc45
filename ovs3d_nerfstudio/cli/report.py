"""The HTML report of `ovs3d eval`: one file that needs no other, to be opened, mailed or kept with a run."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ovs3d_nerfstudio.evaluation.metrics import FIGURES
from ovs3d_nerfstudio.files import written_beside

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .2em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
img { max-width: 100%; image-rendering: pixelated; } .swatch { display: inline-block; width: 1em; height: 1em;
border: 1px solid #555; vertical-align: -.15em; margin-right: .5em; } .remark { background: #fff3cd; padding: .5em 1em; }
"""


def write_report(
    path: Path,
    figures: Mapping[str, Any],
    colors: Float[np.ndarray, "C 3"],
    sheets: Mapping[str, UInt8[np.ndarray, "H W 3"]],
    remarks: Sequence[str],
) -> None:
    """Writes the report of what `ovs3d eval` found.

    Args:
        figures: the content of its JSON.
        colors: of the classes, in [0, 1].
        sheets: one picture a view: photo | truth | prediction | errors.
        remarks: sentences for the reader of the figures.
    """
    split = figures["split"]
    parts = [
        f"<h1>Segmentation of the split “{escape(split)}”</h1>",
        f"<p>{escape(figures['method'])}, step {figures['step']}, {len(sheets)} views, PSNR {figures['psnr']:.2f} dB.</p>",
        f"<p>Scene {escape(figures['scene'])}; run {escape(figures['run'])}; ovs3d_nerfstudio {escape(figures['version'])}; "
        f"prompts: {escape('; '.join(figures['prompts']))}.</p>",
        *(f'<p class="remark">{escape(remark)}</p>' for remark in remarks),
        _table([*FIGURES.values()], {"mean over views": [figures[name] for name in FIGURES]}),
        "<h2>Classes</h2>",
        _classes(figures, colors),
        "<h2>Confusion</h2><p>Share of the pixels of a class (row) that were given to a class (column); what is missing to "
        "1 went to prompts that are no class, or shows nothing.</p>",
        _confusion(figures["confusion"]),
        "<h2>Views</h2><p>Photo, truth, prediction, errors (red; black where nothing is annotated).</p>",
        *(_view(name, figures["views"][name], sheet) for name, sheet in sheets.items()),
    ]
    title = escape(f"{Path(figures['scene']).name}, {figures['method']}: ovs3d eval")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        beside.write_text(page, encoding="utf-8")


def _classes(figures: Mapping[str, Any], colors: Float[np.ndarray, "C 3"]) -> str:
    prompts: dict[str, list[str]] = {}
    for prompt, name in figures["prompts"].items():
        prompts.setdefault(name, []).append(prompt)
    rows = []
    for (name, iou), color in zip(figures["classes"].items(), colors, strict=True):
        rgb = ",".join(str(round(255 * float(channel))) for channel in color)
        swatch = f'<span class="swatch" style="background:rgb({rgb})"></span>'
        asked = escape("; ".join(prompts.get(name, ["–"])))
        rows.append(f"<tr><td>{swatch}{escape(name)}</td><td>{_number(iou)}</td><td>{asked}</td></tr>")
    return f"<table><tr><th>class</th><th>IoU</th><th>prompts</th></tr>{''.join(rows)}</table>"


def _confusion(confusion: Mapping[str, Any]) -> str:
    counts = np.array(confusion["truth_by_prediction"], float)
    # A prediction of no class is in no column, so a row's sum may be less than the pixels of its class.
    totals = np.array(confusion["truth_pixels"], float)
    shares = np.divide(counts, totals[:, None], out=np.full_like(counts, np.nan), where=totals[:, None] > 0)
    rows = {
        name: [None if np.isnan(x) else float(x) for x in row]
        for name, row in zip(confusion["classes"], shares, strict=True)
    }
    return _table(confusion["classes"], rows)


def _view(name: str, figures: Mapping[str, Any], sheet: UInt8[np.ndarray, "H W 3"]) -> str:
    scores = ", ".join(f"{FIGURES[key]} {_number(figures[key])}" for key in FIGURES)
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, format="PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode()
    return (
        f"<h3>{escape(name)} ({escape(figures['split'])})</h3><p>{scores}, PSNR {figures['psnr']:.2f} dB.</p>"
        f'<img alt="{escape(name, quote=True)}" src="data:image/png;base64,{data}">'
    )


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_number(value)}</td>' for value in values)}</tr>"
        for name, values in rows.items()
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
