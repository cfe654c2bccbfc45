"""`ovs3d objects`: what there is in a scene, thing by thing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovs3d_nerfstudio.objects import OBJECT_GAP, SMALLEST_OBJECT


@dataclass
class Command:
    """List the objects of a run: connected Gaussians of one class, or connected points of a NeRF. Leaves objects.json with
    centroid, box and mean probability of each, and in the folder `objects` a PLY and a thumbnail of each, and the scene without
    it."""

    load_config: Path
    """The run's config.yml, or the folder it lies in."""
    output_dir: Path = Path("objects")
    """Folder for what is written."""
    prompts: str = ""
    """Prompts to ask for, separated by semicolons; default: those of the training."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, in place of `prompts`."""
    frame: Literal["data", "model"] = "data"
    """Coordinates of centroids and boxes: data, those of its poses; model, the scaled and turned ones of nerfstudio."""
    object_gap: float = OBJECT_GAP
    """What is farther apart than this belongs to different objects; a share of the diagonal of the box around the cameras."""
    smallest_object: float = SMALLEST_OBJECT
    """Smallest share of a class's points or Gaussians that counts as an object; what is smaller is counted as a crumb."""
    threshold: float | None = None
    """Least probability of a prompt against whatever else there may be: for looking for a few things without naming the rest."""
    merge: bool = False
    """Take prompts that are nearly the same to the encoder as one class."""
    scenes_without: bool = True
    """Write the scene without each object too."""
    data: Path | None = None
    """Where the scene is now, if it moved since the training."""

    def main(self) -> None:
        """Raises CommandError, OptionError and the errors of prompts and encoders."""

        # Imported here, as in every subcommand: `--help` needs none of it.
        from ovs3d_nerfstudio.catalogue import write_catalogue
        from ovs3d_nerfstudio.cli.common import ask
        from ovs3d_nerfstudio.cli.listed import show_catalogue
        from ovs3d_nerfstudio.engine.option_checks import POSITIVE, SHARE, check_fields
        from ovs3d_nerfstudio.run import load_run

        check_fields("--", self, {"object_gap": POSITIVE, "smallest_object": SHARE, "threshold": SHARE})
        run = load_run(self.load_config, data=self.data)
        ask(run, self.prompts, self.prompts_file)
        catalogue = write_catalogue(
            run,
            self.output_dir,
            frame=self.frame,
            threshold=self.threshold,
            gap=self.object_gap,
            smallest=self.smallest_object,
            merge=self.merge,
            removed=self.scenes_without,
        )
        show_catalogue(catalogue, self.frame, "Gaussians" if run.is_splat else "points", self.merge)
