"""The table of faults: how many were tried, how many survived, and what work was lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


@dataclass
class Row:
    tried: int = 0
    survived: int = 0
    lost: int = 0
    """Views or steps that had to be made again."""


@dataclass
class Tally:
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    @contextmanager
    def of(self, fault: str, unit: str = "") -> Iterator[Row]:
        """A fault that is tried in this block and survived when it ends well; `unit` is what may be lost by it."""
        row = self.rows.setdefault((fault, unit), Row())
        row.tried += 1
        yield row
        row.survived += 1

    def write(self, page: Path) -> None:
        """Puts the table between the marks of a page."""
        lines = ["| fault | tried | survived | made again |", "|---|---|---|---|"]
        for (fault, unit), row in self.rows.items():
            lost = f"{row.lost} {unit}" if unit else "–"
            lines.append(f"| {fault} | {row.tried} | {row.survived} | {lost} |")
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(before + "\n".join([BEGIN, *lines, END]) + after, encoding="utf-8")
