"""What is asked of a GPU, and how the figures of `gpu.py` are judged and shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Limit(NamedTuple):
    sign: Literal["≤", "≥"]
    value: float

    def met_by(self, value: float) -> bool:
        return value <= self.value if self.sign == "≤" else value >= self.value


LIMITS = {
    "training_minutes": Limit("≤", 5.0),
    "training_gib": Limit("≤", 8.0),
    "picture_ratio": Limit("≤", 1.25),
    "change_ms": Limit("≤", 5.0),
    "splat_training_minutes": Limit("≤", 5.0),
    "splat_training_gib": Limit("≤", 8.0),
    "splat_views": Limit("≥", 60.0),
    "label_seconds": Limit("≤", 60.0),
    "label_gib": Limit("≤", 8.0),
}
"""What the row of a name must reach. A further limit is a line here, and a row of that name from a part of `gpu_parts.py`."""


@dataclass
class Row:
    """One line of the table: a figure, or why there is none."""

    name: str
    what: str
    value: float | None = None
    unit: str = ""
    note: str = ""
    """What the figure is of; without a figure, why there is none."""
    failed: bool = False
    """There should be a figure: the part ended with an error, or was not begun in time."""

    @property
    def met(self) -> bool | None:
        """Whether the figure is within its limit; None where there is no limit, or no figure."""
        limit = LIMITS.get(self.name)
        return None if limit is None or self.value is None else limit.met_by(self.value)


def status(rows: list[Row]) -> int:
    """0 when every part was measured and every limit met, else 1: what was not measured is not met."""
    met = {row.name for row in rows if row.met}
    return int(any(row.failed for row in rows) or not LIMITS.keys() <= met)


def missed(rows: list[Row]) -> list[str]:
    """A sentence for everything that makes `status` 1."""
    said = [f"{row.what} failed: {row.note}" for row in rows if row.failed]
    by_name = {row.name: row for row in rows}
    for name, limit in LIMITS.items():
        row = by_name.get(name)
        if row is None or row.value is None:
            said.append(f"{name} was not measured (asked: {limit.sign} {limit.value:g}).")
        elif not row.met:
            said.append(f"{row.what}: {shown(row.value)} {row.unit} (asked: {limit.sign} {limit.value:g}).")
    return said


def shown(value: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(machine: str, rows: list[Row]) -> str:
    """The Markdown table of one card under its name."""
    lines = [f"**{machine}**", "", "| what | measured | asked | |", "|---|---|---|---|"]
    for row in rows:
        limit = LIMITS.get(row.name)
        asked = f"{limit.sign} {limit.value:g} {row.unit}".rstrip() if limit else ""
        if row.value is None:
            measured = f"{'failed' if row.failed else 'not measured'}: {row.note}"
        else:
            measured = f"{shown(row.value)} {row.unit}".rstrip() + (f" ({row.note})" if row.note else "")
        mark = {True: "✓", False: "✗", None: "✗" if limit or row.failed else ""}[row.met]
        cells = (row.what, measured, asked, mark)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)
