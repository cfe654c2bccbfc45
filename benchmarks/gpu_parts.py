"""The parts of `gpu.py`: what is measured on a GPU, and how."""

from __future__ import annotations

import gc
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import query
import torch
import torch.multiprocessing as mp
from cost import alternate, grid_sides, picture_sides, resident
from gpu_report import Row
from gpu_runs import BEST, FULL, PROMPTS, QUICK, SPLAT, Encoders, as_rank, configured
from growth import make_views
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.field_components.encodings import HashEncoding
from rich.console import Console
from training_steps import Run, seconds

from ovs3d_nerfstudio.cli.label import STEPS
from ovs3d_nerfstudio.configs import semantics_alone
from ovs3d_nerfstudio.encoders.base import image_text_encoder, token_encoder
from ovs3d_nerfstudio.features.basis import fit_basis
from ovs3d_nerfstudio.features.extraction import ClipFeatures, extract
from ovs3d_nerfstudio.features.teachers import Teachers
from ovs3d_nerfstudio.fields.hash_grid import FastHashEncoding
from ovs3d_nerfstudio.models.nerf import tcnn_imports
from ovs3d_nerfstudio.models.splat import OVS3DSplatModel
from ovs3d_nerfstudio.objects.samples import gaussians
from ovs3d_nerfstudio.pictures import list_pictures
from ovs3d_nerfstudio.prompts.answers import Question
from ovs3d_nerfstudio.run_files import our_methods
from ovs3d_nerfstudio.viewer.live import LiveModel, LivePrompts

VIEWS = 40
"""Views of the training that is worked out from what was measured."""
PROCESSES_S = 150
"""How long two processes may take from their start to their end."""


@contextmanager
def peak(device: str) -> Iterator[dict[str, float]]:
    """The most memory that the block took, in GiB: `reserved` from the card by torch, and `allocated` to tensors. On a CPU, where
    only the rehearsal is, all of the process."""
    taken: dict[str, float] = {}
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield taken
    if device == "cuda":
        torch.cuda.synchronize()
        taken["reserved"] = torch.cuda.max_memory_reserved() / 2**30
        taken["allocated"] = torch.cuda.max_memory_allocated() / 2**30
    else:
        taken["reserved"] = taken["allocated"] = resident("VmHWM") / 2**10


class Bench:
    """The parts, each of which returns its rows; later ones use what earlier ones noted."""

    def __init__(self, device: str, quick: bool, work: Path, methods: Sequence[str] = ()):
        """`methods` are measured, by default all of ours; those that limits are of always are."""
        self.device, self.work = device, work
        # The best last, as pictures are made with its run.
        self.methods = [*sorted({*(methods or our_methods()), SPLAT} - {BEST}), BEST]
        self.sizes = QUICK if quick else FULL
        self.encoders = Encoders(work / "encoders", quick)
        self.photos = make_views(work / "photos", self.sizes.views, self.sizes.height)
        # Neither a step nor its memory depends on the number of views.
        self.scene = make_views(work / "scene", 2, self.sizes.height)
        self.noted: dict[str, float] = {}
        self._run: tuple[str, Run] | None = None

    def parts(self) -> dict[str, Callable[[], list[Row]]]:
        return {
            "encoders": self.write_encoders,
            "extraction": partial(self.extraction, "patches"),
            "extraction in one pass": partial(self.extraction, "dense"),
            "hash grids": self.hash_grids,
            **{name: partial(self.method, name) for name in self.methods},
            "training": partial(self.training, BEST, "training"),
            "training of Gaussians": partial(self.training, SPLAT, "splat_training"),
            "views of Gaussians": self.views,
            "labelling of Gaussians": self.labelling,
            "picture": self.picture,
            "prompt change": self.change,
            "two GPUs": self.two,
        }

    def write_encoders(self) -> list[Row]:
        self.encoders.write()
        return []

    def run(self, method: str) -> Run:
        """One run at a time is kept, so that memory is that of one."""
        if self._run is None or self._run[0] != method:
            self._run = None
            gc.collect()
            trainer = configured(method, self.scene, self.work / f"cache-{method}", self.encoders)
            self._run = method, Run(trainer.pipeline, trainer.optimizers, self.device, trainer.mixed_precision)
        return self._run[1]

    def extraction(self, features: ClipFeatures) -> list[Row]:
        """Views a second from file to cache, CLIP and DINO; and what follows on the CPU."""
        config = configured(BEST, self.photos, self.work / f"photos-{features}", self.encoders).pipeline
        clip, dino = (
            image_text_encoder(config.image_text_encoder, self.device),
            token_encoder(config.token_encoder, self.device),
        )
        scales, cache, quiet = config.datamanager.scales, config.datamanager.feature_cache_dir, Console(quiet=True)
        # The last one is held out.
        pictures = list_pictures(self.photos / "images")[:-1]

        def taken(some: list[Path]) -> float:
            return seconds(lambda: extract(some, clip, dino, scales, cache, quiet, features), self.device)

        with peak(self.device) as memory:
            first, one = taken(pictures[:1]), taken(pictures[1:2])  # the first loads the weights
            more = pictures[2:][: max(1, int(self.sizes.seconds / one))]
            rate = len(more) / taken(more)
        views = extract(pictures[: 2 + len(more)], clip, dino, scales, cache, quiet, features)
        text = clip.embed_text(PROMPTS)
        start = time.perf_counter()
        basis, _ = fit_basis(views, text, config.model.basis_dim, config.model.basis_energy)
        Teachers(views, basis, self.device)
        self.noted |= {
            f"{features}_first_s": first,
            f"{features}_view_s": 1 / rate,
            f"{features}_teaching_s": (time.perf_counter() - start) / len(views.keys),
        }
        how = f"CLIP features `{features}` of {len(scales)} scales, DINO tokens"
        size = "×".join(map(str, reversed(views.sizes[0])))
        allocated = f"{memory['allocated']:.3g} of them allocated"
        return [
            Row(f"extraction_{features}", f"extraction at {size}: {how}", rate, "views/s", f"{len(more)} views"),
            Row(f"extraction_{features}_gib", "its peak memory", memory["reserved"], "GiB", allocated),
        ]

    def hash_grids(self) -> list[Row]:
        """nerfacto's own sizes, forward and backward to the table and to the points."""
        encodings: dict[str, Callable] = {
            "ours": FastHashEncoding,
            "torch": partial(HashEncoding, implementation="torch"),
        }
        if tcnn_imports():
            encodings["tcnn"] = partial(HashEncoding, implementation="tcnn")
        sides = grid_sides(self.device, self.sizes.points, positions=True, **encodings)
        taken = alternate(self.sizes.repeats, **sides)
        rows = []
        for name, what in {"ours": "ours", "torch": "nerfstudio's torch code", "tcnn": "tiny-cuda-nn"}.items():
            row = Row(f"grid_{name}_ms", f"hash grid, {self.sizes.points} points, forward and backward: {what}")
            if name in taken:
                row.value, row.unit, row.note = 1e3 * taken[name], "ms", f"median of {self.sizes.repeats}"
            else:
                row.note = "tiny-cuda-nn is not installed"
            rows.append(row)
        return rows

    def method(self, name: str) -> list[Row]:
        """A training step in which every loss takes part, one without semantics, and the memory of the set-up and of both."""
        with peak(self.device) as setting_up:
            run = self.run(name)
        with peak(self.device) as stepping:
            for _ in range(self.sizes.warm_up):
                run.steps()
            block = seconds(run.steps, self.device)
            repeats = max(self.sizes.repeats, min(100, int(self.sizes.seconds / block / 2)))
            taken = alternate(repeats, full=run.steps, colour=partial(run.steps, semantics=False))
        config = run.model.config
        full, colour = (1e3 * taken[side] / run.block for side in ("full", "colour"))
        rays = getattr(run.pipeline.datamanager.config, "train_num_rays_per_batch", None)
        step = f"`{name}`: a step of " + (f"{rays} rays" if rays else "a photo")
        networks = getattr(config, "implementation", "")
        most = max(setting_up, stepping, key=lambda memory: memory["reserved"])
        self.noted |= {f"{name}_step_s": full / 1e3, f"{name}_colour_step_s": colour / 1e3}
        self.noted[f"{name}_gib"] = most["reserved"]
        return [
            Row(f"{name}_step_ms", step, full, "ms", f"networks: {networks}" if networks else ""),
            Row(f"{name}_colour_step_ms", f"`{name}`: a step before semantics start", colour, "ms"),
            Row(
                f"{name}_step_gib",
                f"`{name}`: peak memory of steps",
                stepping["reserved"],
                "GiB",
                f"{stepping['allocated']:.3g} of them allocated",
            ),
            Row(
                f"{name}_gib",
                f"`{name}`: peak memory, extraction included",
                most["reserved"],
                "GiB",
                f"{most['allocated']:.3g} of them allocated",
            ),
        ]

    def training(self, method: str, row: str) -> list[Row]:
        """What training from photos would take, worked out from what was measured."""
        noted, config = self.noted, all_methods[method]
        lacking = [name for name in ("patches_view_s", f"{method}_step_s") if name not in noted]
        if lacking:
            raise RuntimeError(f"it is worked out from parts that failed ({', '.join(lacking)})")
        features = (
            noted["patches_first_s"] + (VIEWS - 1) * noted["patches_view_s"] + VIEWS * noted["patches_teaching_s"]
        )
        before = config.pipeline.model.semantics_start
        steps = before * noted[f"{method}_colour_step_s"]
        steps += (config.max_num_iterations - before) * noted[f"{method}_step_s"]
        what = f"`{method}` on {VIEWS} views, {config.max_num_iterations} steps"
        how = f"worked out: features {features / 60:.2g}, steps {steps / 60:.3g}; evaluations and saving come on top"
        return [
            Row(f"{row}_minutes", what, (features + steps) / 60, "minutes", how),
            Row(f"{row}_gib", f"{what}: peak memory that torch takes of the card", noted[f"{method}_gib"], "GiB"),
        ]

    def views(self) -> list[Row]:
        """The class map as the viewer shows it while the camera moves: no view is kept from one to the next."""
        run = self.run(SPLAT)
        width, height = self.sizes.view
        camera = query.resized(run.pipeline.datamanager.train_dataset.cameras[:1], width, height).to(run.model.device)
        scatter(run.model, self.sizes.gaussians, camera)
        run.model.eval()
        live = LivePrompts(run.model)

        def moved() -> None:
            LiveModel(live, threading.Lock()).get_outputs_for_camera(camera)["segmentation"]

        moved()
        one = seconds(moved, self.device)
        count = max(1, int(self.sizes.seconds / one))
        taken = seconds(lambda: [moved() for _ in range(count)], self.device)
        self._run = None  # its Gaussians are no training's
        what = f"a moving camera: class maps of {len(PROMPTS)} prompts at {width}×{height}"
        return [Row("splat_views", what, count / taken, "views/s", f"{self.sizes.gaussians} Gaussians, {count} views")]

    def labelling(self) -> list[Row]:
        """What `ovs3d label` does once features are there, all Gaussians before one camera: steps of semantics, worked out from
        some of them, and the class of each Gaussian."""
        self._run = None
        trainer, steps = configured(SPLAT, self.scene, self.work / f"cache-{SPLAT}", self.encoders), STEPS[SPLAT]
        semantics_alone(trainer, steps)
        with peak(self.device) as memory:
            run = Run(trainer.pipeline, trainer.optimizers, self.device, trainer.mixed_precision)
            scatter(run.model, self.sizes.labelled, run.pipeline.datamanager.train_dataset.cameras[:1])
            for _ in range(self.sizes.warm_up):
                run.steps()
            count = max(1, min(steps, int(self.sizes.seconds / seconds(run.steps, self.device))))
            stepping = steps * seconds(lambda: [run.steps() for _ in range(count)], self.device) / count
            run.model.eval()
            naming = seconds(lambda: gaussians(run.model).labelled(Question(run.model.segmenter)), self.device)
        what = f"labelling {self.sizes.labelled} Gaussians, features cached, {steps} steps"
        how = f"worked out: steps {stepping:.3g}, the class of each {naming:.3g}; files and the photos' teachers come on top"
        allocated = f"{memory['allocated']:.3g} of them allocated"
        return [
            Row("label_seconds", what, stepping + naming, "s", how),
            Row("label_gib", f"{what}: peak memory", memory["reserved"], "GiB", allocated),
        ]

    def picture(self) -> list[Row]:
        """A picture with everything that prompts bring, against colour, depth and accumulation alone."""
        run = self.run(BEST)
        width, height = self.sizes.picture
        camera = query.resized(run.pipeline.datamanager.train_dataset.cameras[:1], width, height).to(run.model.device)
        run.model.eval()
        repeats = min(self.sizes.repeats, 3)
        taken = alternate(repeats, **picture_sides(run.model, camera))
        run.model.train()
        size = f"a picture at {width}×{height}"
        return [
            Row("picture_s", f"{size} with its segmentation", taken["segmentation"], "s", f"median of {repeats}"),
            Row("picture_rgb_s", f"{size}, RGB alone", taken["rgb"], "s", f"median of {repeats}"),
            Row("picture_ratio", f"{size}: with its segmentation / RGB alone", taken["segmentation"] / taken["rgb"]),
        ]

    def change(self) -> list[Row]:
        """From new prompts to the new segmentation of a view that stays; see `query.py`."""
        run = self.run(BEST)
        settings = query.Settings((self.sizes.picture,), (len(PROMPTS),), turns=self.sizes.repeats, renders=1)
        cameras = run.pipeline.datamanager.train_dataset.cameras
        row = query.measure(run.model.eval(), cameras[:1], settings)[0]
        run.model.train()
        what = f"{row.prompts} other prompts at {row.width}×{row.height}"
        return [
            Row("change_ms", f"{what}: change", row.change_ms, "ms", f"median of {row.turns}"),
            Row(
                "enter_ms", f"{what}: from Enter to the picture", row.enter_ms, "ms", f"embedding {row.embed_ms:.3g} ms"
            ),
        ]

    def two(self) -> list[Row]:
        """Steps and extraction with two processes, each with half of the rays and of the views."""
        what = f"`{BEST}` on two GPUs"
        here = torch.cuda.device_count() if self.device == "cuda" else 2
        if here < 2:
            return [Row("two_step_ms", what, note="there is one GPU here")]
        self._run = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        context = mp.spawn(
            as_rank, (self.device, self.sizes, self.work, self.photos, self.encoders), nprocs=2, join=False
        )
        end = time.monotonic() + PROCESSES_S
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"two processes did not end within {PROCESSES_S} s")
        row = json.loads((self.work / "two.json").read_text())
        return [
            Row("two_step_ms", f"{what}: a step of {row['rays']} rays each", row["step_ms"], "ms"),
            Row("two_extraction", f"{what}: extraction", row["views_per_s"], "views/s", f"{row['views']} views"),
        ]


def scatter(model: OVS3DSplatModel, count: int, camera: Cameras) -> None:
    """So many Gaussians before a camera, as large as leaves its picture without holes."""
    depth = 1 + torch.rand(count, 1)
    across = (torch.rand(count, 2) - 0.5) * torch.cat([camera.width / camera.fx, camera.height / camera.fy], -1).cpu()
    pose = camera.camera_to_worlds[0].cpu()
    means = torch.cat([across * depth, -depth], -1) @ pose[:, :3].T + pose[:, 3]
    shapes = {name: parameter.shape[1:] for name, parameter in model.gauss_params.items()}
    values = {name: torch.zeros(count, *shape) for name, shape in shapes.items()}
    values["quats"][:, 0] = 1
    values |= {"means": means, "scales": torch.full_like(means, math.log(2 / count**0.5))}
    for name, parameter in model.gauss_params.items():
        parameter.data = values[name].to(model.device)
