"""`ovs3d doctor`: what is here, in a scene and in a run, and what to do about it."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ovs3d_nerfstudio.cli.scenes import SceneOptions, split_words

if TYPE_CHECKING:
    from ovs3d_nerfstudio.doctor.findings import Finding

__all__ = ["Command", "split_words"]

MARKS = {
    "good": "[green]✓[/green]",
    "note": "[cyan]i[/cyan]",
    "warning": "[yellow]![/yellow]",
    "error": "[bold red]✗[/bold red]",
}


@dataclass
class Command:
    """Look at this machine, and at a scene (`--data`) or a run (`--load-config`): what works, what will go wrong, and what to do
    about it, in under 20 seconds. Exit status 1 where it will not work. Name a dataparser last, as in training."""

    data: Path | None = None
    """A scene: a folder, or a file in it such as transforms.json."""
    load_config: Path | None = None
    """A run: its config.yml, or the folder it lies in."""
    json: bool = False
    """Print JSON: the findings, and whether it will work."""
    dataparser: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Name and options of the dataparser, as `split_words` left them; default: nerfstudio-data."""

    def main(self) -> None:
        """Ends with status 1 when there is an error among the findings."""
        with redirect_stdout(StringIO()):  # nerfstudio says how it reads
            parts = self.findings()
        found = [finding for part in parts.values() for finding in part]
        works = all(finding.level != "error" for finding in found)
        if self.json:
            from json import dumps

            print(
                dumps(
                    {"works": works, **{name: [*map(asdict, part)] for name, part in parts.items()}},
                    indent=2,
                    ensure_ascii=False,
                )
            )
        else:
            self.show(parts, works)
        if not works:
            raise SystemExit(1)

    def findings(self) -> dict[str, list[Finding]]:
        """Of the machine, the scene and the run, as asked."""
        from ovs3d_nerfstudio.doctor import machine
        from ovs3d_nerfstudio.errors import UserError

        parts = {"machine": machine.machine_findings(self.data or Path())}
        if self.data is not None:
            from ovs3d_nerfstudio.doctor.scene import scene_findings

            parser = SceneOptions(self.data, dataparser=self.dataparser).parser()
            parts["scene"] = scene_findings(parser, self.data)
        if self.load_config is not None:
            # All methods with it, which whoever asks about a scene does not wait for.
            from ovs3d_nerfstudio.doctor.findings import refused
            from ovs3d_nerfstudio.doctor.trained import run_findings
            from ovs3d_nerfstudio.run import load_run

            try:
                parts["run"] = run_findings(load_run(self.load_config, data=self.data))
            except UserError as error:
                parts["run"] = [refused("run", error)]
        return parts

    def show(self, parts: dict[str, list[Finding]], works: bool) -> None:
        """The findings, a line each, and what to do below those that ask for something."""
        from nerfstudio.utils.rich_utils import CONSOLE
        from rich.markup import escape

        for name, part in parts.items():
            CONSOLE.print(f"\n[bold]{name.capitalize()}[/bold]")
            for finding in part:
                CONSOLE.print(f" {MARKS[finding.level]} {escape(f'{finding.about}: {finding.what}')}", soft_wrap=True)
                if finding.remedy:
                    CONSOLE.print(f"     → {escape(finding.remedy)}", soft_wrap=True)
        said = "Nothing stands in the way." if works else "It will not work before what is marked ✗ is mended."
        CONSOLE.print(f"\n{said}")
