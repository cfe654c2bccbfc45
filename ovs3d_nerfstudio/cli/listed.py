"""The objects of a catalogue on the screen."""

from __future__ import annotations

from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from rich.table import Table

from ovs3d_nerfstudio.catalogue import Catalogue, alike_sentences


def show_catalogue(catalogue: Catalogue, frame: str, kind: str, merged: bool = False) -> None:
    """The objects on the screen; what was left out, prompts that share their objects, and where all of it lies."""
    found = catalogue.found
    CONSOLE.print(table(catalogue, frame, kind))
    if found.left_out:
        CONSOLE.print(f"Left out: {found.left_out} {kind}, in {found.crumbs} crumbs or alone.")
    for sentence in alike_sentences(found, merged):
        CONSOLE.print(f"[yellow]{escape(sentence)}")
    CONSOLE.print(f"Objects: {escape(str(catalogue.path))}")


def table(catalogue: Catalogue, frame: str, kind: str) -> Table:
    """The objects, one a line."""
    shown = Table(title=f"Objects, in the coordinates of the {frame}")
    for name in ("id", "prompt", kind, "probability", "centre", "size"):
        shown.add_column(name, justify="left" if name == "prompt" else "right")
    for number, thing in enumerate(catalogue.found.objects, start=1):
        centre, size = (
            " ".join(f"{value:.3g}" for value in values) for values in (thing.centroid, thing.box_max - thing.box_min)
        )
        shown.add_row(str(number), escape(thing.prompt), str(thing.count), f"{thing.probability:.2f}", centre, size)
    return shown
