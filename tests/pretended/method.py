"""One method on the pretended GPU, from its first step to its last question: `python -m pretended.method METHOD SCENES FOLDER`.

SCENES holds two scenes, one with masks of what to ignore; `report.json` is left in FOLDER. nerfstudio and our
package are imported in functions: once torch believes in the GPU.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretended.cuda import pretend
from pretended.small import STEPS, losses_of, run_folder, small
from pretended.tensors import PretendedDevice
from pretended.waits import WAITS
from pretended.watch import Watch

PLAIN, MASKED = "scene", "masked"
"""The scenes' folders."""
TRAINED = "mixed precision"
"""The run that everything after training is asked of."""
ANSWERS = "rgb", "segmentation", "segmentation_overlay", "relevancy_cat", "depth", "features_pca", "scale"


@dataclass
class Method:
    """A method at work, and what is noticed meanwhile."""

    name: str
    scenes: Path
    folder: Path
    waits: list[list] = field(default_factory=list)
    """Of the last step: number, package, kind, lines."""
    watch: Watch = field(default_factory=Watch)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def config(self) -> Path:
        return run_folder(self.out, TRAINED, self.name) / "config.yml"

    def written(self, name: str) -> Path:
        """Where a command shall write."""
        return self.folder / "written" / name

    def train(self, variant: str, scene: str, mixed: bool, load_dir: Path | None = None) -> None:
        """What `ns-train` does, with an evaluation of a batch and a picture, and checkpoints."""
        config = small(self.name, self.scenes / scene, self.out, variant, mixed, load_dir)
        config.max_num_iterations += 2 * (load_dir is not None)
        torch.manual_seed(0)
        trainer = config.setup(local_rank=0, world_size=1)
        config.save_config()
        trainer.setup()
        if load_dir is not None:
            assert trainer._start_step == STEPS, "it begins where the checkpoint ended"
            self.watch.state(trainer.pipeline, trainer.optimizers.optimizers)
        seen: set[str] = set()
        evaluated: set[str] = set()

        def learnt(result: tuple) -> None:
            self.watch.learning(result)
            seen.update(result[1])

        def batch(result: tuple) -> None:
            self.watch.learning(result)
            evaluated.add("batch")

        def picture(result: tuple) -> None:
            self.watch.numbers("evaluated", result, on_device=False)
            evaluated.add("picture")

        self.watch.results_of(trainer.pipeline, "get_train_loss_dict", learnt)
        self.watch.results_of(trainer.pipeline, "get_eval_loss_dict", batch)
        self.watch.results_of(trainer.pipeline, "get_eval_image_metrics_and_images", picture)
        iterate = trainer.train_iteration

        def last_is_counted(step: int) -> Any:
            last = step == config.max_num_iterations - 1 + trainer._start_step
            with WAITS.counted() if last else contextlib.nullcontext():
                return iterate(step)

        trainer.train_iteration = last_is_counted
        trainer.train()
        before = {"main_loss"} if load_dir is not None else set()  # the geometry of Gaussians comes first, and is done
        before |= {"depth_loss"} if scene == MASKED else set()  # what is left of its small photos shows too few points
        missing = losses_of(config.pipeline.model) - seen - before
        assert not missing, f"these losses never took part: {sorted(missing)}"
        assert load_dir is not None or evaluated == {"batch", "picture"}, evaluated
        self.watch.state(trainer.pipeline, trainer.optimizers.optimizers)
        if variant == TRAINED:
            self.waits = [[number, *site] for site, number in WAITS.sites.most_common()]

    def resume(self, variant: str, scene: str, mixed: bool) -> None:
        checkpoints = run_folder(self.out, variant, self.name) / "nerfstudio_models"
        self.train(f"{variant}, resumed", scene, mixed, load_dir=checkpoints)

    def opened(self) -> Any:
        """The trained run's pipeline, watched."""
        from ovs3d_nerfstudio.run_files import open_run

        pipeline = open_run(self.config)[1]
        self.watch.state(pipeline)
        return pipeline

    def ns_eval(self) -> None:
        figures = self.opened().get_average_eval_image_metrics()
        assert {"psnr", "ssim"} <= set(figures), figures
        self.watch.numbers("ns-eval", figures, on_device=False)

    def command(self, *words: str | Path) -> None:
        """`ovs3d` with these words."""
        from ovs3d_nerfstudio.cli import main

        main([str(word) for word in words])

    def evaluate(self) -> None:
        file = self.written("metrics.json")
        self.command("eval", "--load-config", self.config, "--output-path", file)
        figures = json.loads(file.read_text())
        self.watch.numbers("eval", {name: figures[name] for name in ("miou", "pixel_accuracy")}, on_device=False)

    def render(self) -> None:
        words = ["--load-config", self.config, "--output-path", self.written("render"), "--split", "test"]
        self.command("render", "dataset", *words, "--rendered-output-names", *ANSWERS)
        folders = {path.parent.name for path in self.written("render").rglob("test_00*")}
        assert set(ANSWERS) <= folders, folders

    def export(self) -> None:
        words = ["--load-config", self.config, "--output-dir", self.written("export"), "--num-points", "500"]
        words += ["--num-rays-per-batch", "256", "--std-ratio", "0", "--farthest", "0"]
        self.command("export", "pointcloud", *words)
        assert (self.written("export") / "point_cloud.ply").stat().st_size > 500 * 12

    def preview(self) -> None:
        file = self.written("preview.png")
        words = ["--data", self.scenes / PLAIN, "--method", self.name, "--views", "2", "--output-path", file]
        words += ["--image-text-encoder", "offline", "--token-encoder", "offline"]
        self.command("preview", *words, "--feature-cache-dir", self.written("features"), "--device", "cuda")
        assert file.is_file() and file.with_suffix(".json").is_file()

    def live(self) -> None:
        """What a viewer does while somebody edits prompts, moves the threshold and clicks."""
        from ovs3d_nerfstudio.viewer.live import LiveModel, LivePrompts

        pipeline = self.opened()
        live = LivePrompts(pipeline.model)
        model = LiveModel(live, contextlib.nullcontext())
        pipeline.model.eval()
        camera = pipeline.datamanager.eval_dataset.cameras[0:1].to("cuda")
        outputs = model.get_outputs_for_camera(camera)

        def look(question: str) -> None:
            self.watch.numbers(question, dict(outputs))
            self.watch.numbers(question, outputs.shares(), on_device=False)

        look("the trained prompts")
        live.ask(["cat", "dog", "sky"])
        assert "relevancy_sky" in outputs
        look("other prompts")
        live.ask(mode="threshold", threshold=0.3)
        look("a threshold")
        live.ask(normalise=False, temperature=0.5)
        look("probabilities")
        clicked = model.point((0.0, 0.0, 1.0), (0.0, 0.0, -1.0))
        assert clicked is not None and clicked.prompts == ["cat", "dog", "sky"]
        self.watch.numbers("a click", [clicked.chances, clicked.position], on_device=False)
        live.reset()
        assert "relevancy_sky" not in outputs
        look("the trained prompts again")

    def asked_from_python(self) -> None:
        """What `docs/python.md` says can be asked of a run."""
        import ovs3d_nerfstudio as ovs3d

        run = ovs3d.load_run(self.config, device="cuda")
        camera = run.pipeline.datamanager.eval_dataset.cameras[0].to("cpu")
        pose = np.vstack([camera.camera_to_worlds.numpy(), [0, 0, 0, 1]])
        view = run.render_view(pose, camera.get_intrinsics_matrices().numpy(), (24, 16), ["cat", "sky"], frame="model")
        assert view.labels.shape == (16, 24) and view.labels.max() >= 0, "it is a view of something"
        there = view.depth[view.labels >= 0]
        labels = run.label_points(np.random.default_rng(0).normal(size=(50, 3)), ["cat", "sky"], threshold=0.1)
        features = run.features_at(np.zeros((3, 3)))
        self.watch.numbers("Python", [float(array.sum()) for array in (there, labels.probabilities, features)], False)
        assert not run.objects(["cat", "sky"], smallest=0.99) or run.find(["cat", "sky"], merge=True) is not None
        assert run.render_view(pose, camera.get_intrinsics_matrices().numpy(), (8, 8), frame="model").rgb.shape == (
            8,
            8,
            3,
        )

    def objects(self) -> None:
        self.command("objects", "--load-config", self.config, "--output-dir", self.written("objects"))
        assert (self.written("objects") / "objects.json").is_file()

    def mesh(self) -> None:
        words = ["--load-config", self.config, "--output-dir", self.written("mesh"), "--voxel", "0.1"]
        self.command("export", "mesh", *words)
        assert (self.written("mesh") / "mesh.ply").is_file()

    def only(self) -> None:
        """Pictures of one class alone: densities are masked, Gaussians are left out."""
        words = ["--load-config", self.config, "--output-path", self.written("only"), "--split", "test"]
        self.command("render", "dataset", *words, "--rendered-output-names", "rgb", "--only", "cat")

    def doctor(self) -> None:
        self.command("doctor", "--load-config", self.config, "--data", self.scenes / PLAIN)

    def begun_with(self) -> None:
        """Gaussians begin with what was trained, and learn on."""
        from ovs3d_nerfstudio.configs import semantics_alone

        splat = "ovs3d-splat-lite"
        config = small(splat, self.scenes / PLAIN, self.out, "begun with it", mixed=False)
        config.pipeline.model.init_from = self.config.parent
        config.pipeline.datamanager.scales = self.opened().datamanager.config.scales
        semantics_alone(config, STEPS)
        config.pipeline.model.fda_start, config.pipeline.model.fda_apart_start = 2, 3
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        self.watch.results_of(trainer.pipeline, "get_train_loss_dict", self.watch.learning)
        trainer.train()
        self.watch.state(trainer.pipeline, trainer.optimizers.optimizers)

    def labelled(self) -> None:
        """The splat that was trained, as if somebody else had made it."""
        from ovs3d_nerfstudio.run import load_run

        if not load_run(self.config).is_splat:
            return
        self.command("export", "splat", "--load-config", self.config, "--output-dir", self.written("splat"))
        # Without photos: after so few steps it does not look like them.
        words = ["--views", "4", "--method", self.name, "--steps", "3", "--prompts", "cat; sky"]
        words += ["--image-text-encoder", "offline", "--token-encoder", "offline"]
        words += ["--feature-cache-dir", self.written("features"), "--output-dir", self.written("labelled")]
        self.command("label", self.written("splat") / "splat.ply", *words)
        assert (self.written("labelled") / "splat.ply").is_file()


STAGES: dict[str, Callable[[Method], None]] = {
    "trains": lambda method: method.train(TRAINED, PLAIN, mixed=True),
    "resumes": lambda method: method.resume(TRAINED, PLAIN, mixed=True),
    "trains with masks": lambda method: method.train("masks", MASKED, mixed=True),
    "trains in single precision": lambda method: method.train("single", PLAIN, mixed=False),
    "trains in single precision with masks": lambda method: method.train("single, masks", MASKED, mixed=False),
    "resumes in single precision with masks": lambda method: method.resume("single, masks", MASKED, mixed=False),
    "ns-eval": Method.ns_eval,
    "eval": Method.evaluate,
    "render": Method.render,
    "export": Method.export,
    "preview": Method.preview,
    "live": Method.live,
}
"""In this order: what comes after the training needs it."""
ASKED: dict[str, Callable[[Method], None]] = {
    "Python": Method.asked_from_python,
    "objects": Method.objects,
    "mesh": Method.mesh,
    "only": Method.only,
    "doctor": Method.doctor,
    "begun with": Method.begun_with,
    "labelled": Method.labelled,
}
"""What differs between geometries alone: asked of one method of each."""
OF_EACH_GEOMETRY = "ovs3d-lite", "ovs3d-splat-lite"


def main(name: str, scenes: Path, folder: Path) -> None:
    pretend()
    from nerfstudio.models.base_model import Model

    method = Method(name, scenes, folder)
    method.watch.results_of(Model, "get_outputs_for_camera", lambda outputs: method.watch.numbers("picture", outputs))
    report: dict[str, Any] = {"stages": {}, "seconds": {}}
    for stage, work in {**STAGES, **(ASKED if name in OF_EACH_GEOMETRY else {})}.items():
        began = time.monotonic()
        try:
            with PretendedDevice():
                work(method)
            method.watch.end()
            fault = ""
        except (Exception, SystemExit):
            fault = traceback.format_exc()
        report["stages"][stage], report["seconds"][stage] = fault, round(time.monotonic() - began, 1)
    (folder / "report.json").write_text(json.dumps({**report, "waits": method.waits}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
