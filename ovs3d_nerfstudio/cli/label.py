"""`ovs3d label`: the Gaussians of a splat that exists, labelled by photos of the same scene and prompts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro

from ovs3d_nerfstudio.cli.scenes import SceneOptions, split_words
from ovs3d_nerfstudio.engine.option_checks import SHARE, SIZE, OptionError, Range, check_fields
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.prompts.prompts import choose_prompts

if TYPE_CHECKING:
    from ovs3d_nerfstudio.engine.trainer import OVS3DTrainerConfig
    from ovs3d_nerfstudio.run import Run

__all__ = ["Command", "split_words"]

STEPS = {"ovs3d-splat": 3000, "ovs3d-splat-lite": 800}
"""Steps of semantics by the method; a plugin's has as many as on a GPU."""


@dataclass(kw_only=True)
class Command(SceneOptions):
    """Label the Gaussians of a splat by any trainer: which prompt each one shows, learned from photos of the same scene. Geometry
    and colours stay as they are. Leaves splat.ply (all columns of the original, and class_id, counted from 1 in the order of
    classes.json, and probability), legend.png, two pictures, and run, the folder of a run for ns-viewer and every other command."""

    splat: tyro.conf.Positional[Path]
    """The PLY of the splat."""
    data: Path | None = None  # type: ignore[assignment]
    """The scene: photos and poses of what the splat shows. Default: none; pictures of the splat itself stand for photos."""
    output_dir: Path = Path("labelled")
    """Folder for what is written."""
    prompts: str = ""
    """What to look for, separated by semicolons; name the background too. Default: the scene's segmentations/classes.txt."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, in place of `prompts`."""
    method: str = ""
    """Whose recipe for semantics is taken; default: ovs3d-splat on a GPU, else ovs3d-splat-lite. Variants of them will do."""
    steps: int | None = None
    """Training steps; default: 3 000 of ovs3d-splat, 800 of ovs3d-splat-lite."""
    least_probability: float = 0.0
    """Gaussians whose class is less probable than this become 0, none."""
    seed: int = 42
    """Of what training draws at random."""
    views: int = 40
    """Without `data`: how many pictures of the splat are taken at most."""
    up: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """Without `data`: which way is up in the splat's coordinates; 0 -1 0 where they are COLMAP's."""

    def main(self) -> None:
        """Raises CommandError, SplatError, BroughtError, OptionError, and the errors of scenes, prompts and encoders."""
        check_fields("--", self, {"least_probability": SHARE, "steps": SIZE, "views": Range(2)})
        if not any(self.up) or not np.isfinite(self.up).all():
            raise OptionError(f"--up {self.up} is no direction; give three numbers, such as 0 0 1.")
        if (self.output_dir / "splat.ply").resolve() == self.splat.resolve():
            raise CommandError(
                f"--output-dir {self.output_dir} would replace {self.splat} itself; name another folder."
            )
        # Imported here, as in every subcommand: `--help` needs none of it.
        import torch

        from ovs3d_nerfstudio.cli.labelling import learned
        from ovs3d_nerfstudio.cli.own_views import write_own_views
        from ovs3d_nerfstudio.gaussians.splat_files import read_splat
        from ovs3d_nerfstudio.run import Run

        self.method = self.method or ("ovs3d-splat" if torch.cuda.is_available() else "ovs3d-splat-lite")
        table, splat = read_splat(self.splat)
        if not choose_prompts(self.prompts, self.prompts_file, self.data)[0]:
            raise CommandError("There is nothing to label the splat with; say what to look for with --prompts.")
        if self.data is None:
            self.data = (self.output_dir / "views").resolve()
            write_own_views(splat, self.up, self.views, self.data)
        config = self.config()
        run = Run(config, *learned(config))
        self.write(run, table)

    def config(self) -> OVS3DTrainerConfig:
        """The training. Raises CommandError for a method that has no Gaussians."""
        from nerfstudio.configs.method_configs import all_methods

        from ovs3d_nerfstudio.configs import semantics_alone
        from ovs3d_nerfstudio.engine.trainer import OVS3DTrainerConfig
        from ovs3d_nerfstudio.models.splat import OVS3DSplatModelConfig

        pipeline = self.resolved()
        if not isinstance(pipeline.model, OVS3DSplatModelConfig):
            raise CommandError(
                f"--method {self.method} has no Gaussians; take ovs3d-splat, or ovs3d-splat-lite on a laptop."
            )
        config = copy.deepcopy(all_methods[self.method])
        assert isinstance(config, OVS3DTrainerConfig)
        config.pipeline, config.data, config.vis = pipeline, self.data, "tensorboard"
        config.run_folder, config.machine.seed = (self.output_dir / "run").resolve(), self.seed
        config.output_dir, config.experiment_name = self.output_dir.resolve(), "run"
        config.logging.local_writer.enable = False
        config.steps_per_eval_batch = config.steps_per_eval_image = config.steps_per_eval_all_images = 0
        pipeline.prompts, pipeline.prompts_file = self.prompts, self.prompts_file
        pipeline.datamanager.data, pipeline.datamanager.dataparser = self.data, self.parser()  # type: ignore[attr-defined]
        pipeline.model.init_from = self.splat.resolve()
        semantics_alone(config, self.steps or STEPS.get(self.method, STEPS["ovs3d-splat"]))
        return config

    def write(self, run: Run, table: np.ndarray) -> None:
        """The labelled splat, what its numbers mean, two pictures of it, and the catalogue of its objects."""
        from nerfstudio.utils.rich_utils import CONSOLE
        from rich.markup import escape

        from ovs3d_nerfstudio.catalogue import write_catalogue
        from ovs3d_nerfstudio.cli.labelling import pictures
        from ovs3d_nerfstudio.cli.labels import ids
        from ovs3d_nerfstudio.cli.listed import show_catalogue
        from ovs3d_nerfstudio.files import write_json, written_beside
        from ovs3d_nerfstudio.ply import with_labels, write_ply
        from ovs3d_nerfstudio.prompts.palette import save_legend

        out, found = self.output_dir, run.samples().labelled(run.question())
        class_id = np.where(found.probability >= self.least_probability, found.class_id, 0)
        table = with_labels(table, class_id, found.probability)
        write_ply(out / "splat.ply", table)
        write_json(out / "classes.json", ids(run.prompts, run.colors))
        save_legend(out / "legend.png", run.prompts, run.colors)
        for number, picture in enumerate(pictures(run.pipeline), start=1):
            with written_beside(out / f"view_{number}.jpg") as beside:
                picture.save(beside, "jpeg", quality=92)
        for label, prompt in enumerate(run.prompts, start=1):
            CONSOLE.print(escape(f"{prompt}: {np.count_nonzero(class_id == label):,} Gaussians"))
        CONSOLE.print(
            escape(f"{len(table):,} labelled Gaussians: {out / 'splat.ply'}; what they look like: {out / 'view_1.jpg'}")
        )
        show_catalogue(write_catalogue(run, out, table=table, table_frame="splat"), "data", "Gaussians")
        CONSOLE.print(escape(f"Look around: ns-viewer --load-config {out / 'run' / 'config.yml'}"), soft_wrap=True)
