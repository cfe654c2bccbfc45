"""`ovs3d preview`: what an encoder makes of some prompts on a few views, before any training. Its options; what it does is in
`previewing`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ovs3d_nerfstudio.cli.scenes import SceneOptions, split_words

__all__ = ["Command", "split_words"]


@dataclass
class Command(SceneOptions):
    """Show where the prompts are relevant on a few views, before any training: one contact sheet with, for each view and
    scale, which prompt wins and the relevancy of each. Says which prompts never win and which are the same to the encoder,
    so that they can be mended before hours are spent. The features of these views go into the cache of training."""

    prompts: str = ""
    """Prompts, separated by semicolons; default: the scene's segmentations/classes.txt."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, in place of `prompts`."""
    views: int = 3
    """How many training views to show, spread evenly over the scene."""
    output_path: Path = Path("preview.png")
    """The contact sheet; a JSON of the same name has the shares that the prompts win and the hints."""
    device: str | None = None
    """Where to embed: cuda, cpu…; default: a GPU where there is one."""

    def main(self) -> None:
        """See `previewing.preview`."""
        from ovs3d_nerfstudio.cli.previewing import preview

        preview(self, self.prompts, self.prompts_file, self.views, self.output_path, self.device)
