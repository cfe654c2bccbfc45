"""`ovs3d eval`: how well a run agrees with the scene's masks. Its options; what it does is in `comparing`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class Command:
    """Compare a run's segmentation with the scene's masks (SCENE/segmentations): mIoU, mean and pixel accuracy and boundary
    IoU, over all views, per class and per view, with the confusion matrix. Beside the JSON it leaves, in a folder of the
    same name, `report.html` (one file, pictures inside), a picture photo | truth | prediction | errors of each view, and
    the predicted labels as PNG."""

    load_config: Path
    """The run's config.yml, or the folder it lies in."""
    output_path: Path = Path("metrics.json")
    """Where to write the figures; pictures, labels and the report go into a folder of this name without the suffix."""
    split: Literal["test", "train", "all"] = "test"
    """test: annotated views kept out of training (held-out protocol); train: annotated training views (the paper's
    protocol, masks never used in training); all: both, each view once."""
    prompts: str = ""
    """Prompts to ask for, separated by semicolons; default: those of the training."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, in place of `prompts`."""
    prompt_classes: str = ""
    """Which class a prompt stands for where the two differ, "PROMPT = CLASS; …": several prompts may share a class. A prompt
    that is neither mapped nor a class counts as wrong wherever it wins."""
    pictures: bool = True
    """Write the pictures and the report; without them, only the JSON and the label images."""
    data: Path | None = None
    """Where the scene is now, if it moved since the training."""

    def main(self) -> None:
        """Raises CommandError and the errors of prompts, annotations and encoders."""
        # Imported here, as in every subcommand: `--help` needs none of it.
        from ovs3d_nerfstudio.cli.comparing import evaluate

        evaluate(**vars(self))
