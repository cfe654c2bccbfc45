"""A trained run from Python: the label of a point, the mask of a view, the objects of a scene. The subcommands stand on it.

Arrays are NumPy's, going in and coming out. Coordinates are the data's by default (`frame="data"`): those of the poses as they
stand in its file; `frame="model"` means the scaled and turned ones that nerfstudio trains in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.trainer import TrainerConfig
from torch import Tensor

from ovs3d_nerfstudio.data.capture import diagonal_of
from ovs3d_nerfstudio.data.frames import frame_of
from ovs3d_nerfstudio.engine.option_checks import POSITIVE, SHARE, check_value
from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.fields.compositing import SOMETHING
from ovs3d_nerfstudio.gaussians.lenses import tangents_of
from ovs3d_nerfstudio.memory import told_what_to_lower
from ovs3d_nerfstudio.models.splat import OVS3DSplatModel
from ovs3d_nerfstudio.objects import OBJECT_GAP, SMALLEST_OBJECT
from ovs3d_nerfstudio.objects.points import Found, SceneObject, find_objects
from ovs3d_nerfstudio.objects.samples import Neighbours, Samples, directions_at, gaussians, sample_cloud
from ovs3d_nerfstudio.pipeline import OVS3DPipeline
from ovs3d_nerfstudio.prompts.answers import Answering, Question, unpacked
from ovs3d_nerfstudio.prompts.embedding import Embedder
from ovs3d_nerfstudio.prompts.likes import Like
from ovs3d_nerfstudio.prompts.prompts import PromptError, parse_prompts
from ovs3d_nerfstudio.prompts.segmentation import alike, in_parts
from ovs3d_nerfstudio.run_files import open_run
from ovs3d_nerfstudio.viewer.live import NEGATIVES

FrameName = Literal["data", "model"]

QUESTIONS = 16
"""Lists of prompts that are kept embedded."""
CLOUD_POINTS = 200_000
"""Points of a NeRF among which objects are looked for."""
RAYS_AT_ONCE = 8192
"""Rays rendered at once for a cloud."""
STD_RATIO = 10.0
"""Points of a cloud are outliers from so many standard deviations of their distance to their neighbours on."""
FARTHEST = 10.0
"""Points seen from farther than this many diagonals of the box around the cameras may lie anywhere: they have no texture."""
ORTHONORMAL = 1e-3
"""How far the axes of a pose may be from perpendicular ones of length 1."""


class RunError(UserError):
    """What a run was asked cannot be answered."""


@dataclass(frozen=True)
class PointLabels:
    """What prompts points belong to."""

    prompts: list[str]
    labels: Int[np.ndarray, " N"]
    """Place of the winner in `prompts`; −1 for none, which only a `threshold` leaves."""
    probabilities: Float[np.ndarray, "N C"]
    """Of each prompt, in [0, 1]."""


@dataclass(frozen=True)
class View:
    """A picture of a run, and what each pixel of it belongs to."""

    prompts: list[str]
    rgb: Float[np.ndarray, "H W 3"]
    """In [0, 1]."""
    depth: Float[np.ndarray, "H W"]
    """Along the camera's axis, in units of the frame that was asked in; NaN where a ray meets nothing."""
    accumulation: Float[np.ndarray, "H W"]
    """How much of a ray ends in the scene, in [0, 1]."""
    labels: Int[np.ndarray, "H W"]
    """Place of the winner in `prompts`; −1 where a ray meets nothing, or for none."""
    probabilities: Float[np.ndarray, "H W C"]
    """Of each prompt, in [0, 1]."""


def load_run(path: str | Path, *, device: str | None = None, data: str | Path | None = None) -> Run:
    """Opens a trained run.

    Args:
        path: its config.yml, or the folder it lies in. The folder may have been moved.
        device: "cuda", "cpu", "mps"; default: a GPU where there is one.
        data: where the scene is now, if it moved since the training. Neither photos nor features are needed.

    Raises:
        UserError: the run cannot be opened; the message says why, and what to do.
    """
    return Run(*open_run(Path(path), data=None if data is None else Path(data), device=device))


class Run:
    """A trained run, ready to answer. Several threads may ask it at once, each for prompts of its own."""

    def __init__(self, config: TrainerConfig, pipeline: OVS3DPipeline, checkpoint: Path, step: int):
        """Of what `open_run` returns; see `load_run`."""
        self.config, self.pipeline, self.checkpoint, self.step = config, pipeline, checkpoint, step
        self.frame = frame_of(pipeline.datamanager)
        """The way from the data's coordinates to the model's."""
        self._trained = pipeline.model.segmenter
        self._embed = Embedder(pipeline.device)
        self._questions: OrderedDict[Any, Question] = OrderedDict()
        self._samples: Samples | None = None
        self._neighbours: Neighbours | None = None
        self._asking, self._sampling = threading.Lock(), threading.Lock()

    @property
    def prompts(self) -> list[str]:
        """What the run answers where a call names no prompts: those it was trained on, until `ask`."""
        return list(self.pipeline.model.segmenter.prompts)

    @property
    def colors(self) -> Float[np.ndarray, "C 3"]:
        """The colour of each of `prompts`, in [0, 1]."""
        return self.pipeline.model.segmenter.colors.cpu().numpy()

    @property
    def is_splat(self) -> bool:
        """Whether its geometry is Gaussians, not a NeRF."""
        return isinstance(self.pipeline.model, OVS3DSplatModel)

    def ask(self, prompts: Sequence[str] | None) -> list[str]:
        """Answers for other prompts from now on, in the pictures of its model too, which nerfstudio's own loops show; returns
        them. None leaves what it answers for. Not while other threads use the run.

        Raises:
            RunError: the run has no prompts and none are given.
            PromptError: a prompt cannot be used.
            EncoderError: a prompt is new, and the run's text encoder cannot be had here, or is another.
        """
        self.pipeline.model.segmenter = self.question(prompts).segmenter
        return self.prompts

    def question(self, prompts: Sequence[str] | None = None, threshold: float | None = None) -> Question:
        """Prompts in the space of the run, as its features are compared with them. Raises OptionError for what is no threshold,
        or as `ask` does."""
        check_value("threshold", threshold, float | None, SHARE)
        with self._asking:
            segmenter = self.pipeline.model.segmenter
            asked = list(segmenter.prompts) if prompts is None else _listed(prompts)
            if not asked:
                raise RunError(
                    "The run was trained without prompts; say what to look for, with prompts=[…] or --prompts."
                )
            key = tuple((prompt, getattr(prompt, "feature", None)) for prompt in asked), threshold
            if key not in self._questions:
                if asked != segmenter.prompts:
                    segmenter = self._trained.asking(asked, self._embed(self._trained, asked))
                others, answering = None, Answering()
                if threshold is not None:
                    others = self._embed(self._trained, parse_prompts(NEGATIVES))
                    answering = Answering("threshold", threshold)
                self._questions[key] = Question(segmenter, answering, others)
                while len(self._questions) > QUESTIONS:
                    self._questions.popitem(last=False)
            self._questions.move_to_end(key)
            return self._questions[key]

    def label_points(
        self,
        xyz: Float[np.ndarray, "N 3"],
        prompts: Sequence[str] | None = None,
        *,
        frame: FrameName = "data",
        threshold: float | None = None,
    ) -> PointLabels:
        """What each point belongs to: by the semantic field of a NeRF at the very point, by the nearest Gaussians of a splat. There
        is an answer in thin air too: ask for points that lie on something.

        Args:
            xyz: points in `frame`.
            prompts: what to look for; default: `Run.prompts`.
            threshold: least probability of a prompt against whatever else there may be, for looking for one thing without
                naming the rest; without it each point gets the prompt that fits best.

        Raises:
            RunError: points or frame are no such; or as `question`.
        """
        question = self.question(prompts, threshold)
        labels, probabilities = _answers(question, self._directions_at(self._points(xyz, frame)))
        return PointLabels(list(question.segmenter.prompts), labels, probabilities)

    def winners_at(
        self, xyz: Float[np.ndarray, "N 3"], prompts: Sequence[str] | None = None, *, frame: FrameName = "data"
    ) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """As `label_points`, with the probability of the winner alone: for millions of points and many prompts."""
        directions = self._directions_at(self._points(xyz, frame))
        labels, probability = self.question(prompts).winners(directions)
        return labels.numpy(), probability.numpy()

    def features_at(self, xyz: Float[np.ndarray, "N 3"], *, frame: FrameName = "data") -> Float[np.ndarray, "N D"]:
        """Unit vectors in the space of the run's image-text encoder, to compare with anything else that it embeds.

        Args:
            xyz: points in `frame` that lie on something.

        Raises:
            RunError: points or frame are no such.
        """
        basis = self._trained.basis
        directions = self._directions_at(self._points(xyz, frame))
        wide = in_parts(directions, lambda part: (unpacked(part.to(basis.device)) @ basis.T).cpu())
        return torch.nn.functional.normalize(wide, dim=-1).numpy()

    def render_view(
        self,
        camera_to_world: Float[np.ndarray, "3 4"] | Float[np.ndarray, "4 4"],
        intrinsics: Float[np.ndarray, "3 3"],
        size: tuple[int, int],
        prompts: Sequence[str] | None = None,
        *,
        frame: FrameName = "data",
        threshold: float | None = None,
    ) -> View:
        """What a pinhole camera sees.

        Args:
            camera_to_world: pose in `frame`, in the axes of OpenGL (x right, y up, looking along −z), as in transforms.json.
            intrinsics: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels.
            size: width and height in pixels.
            prompts, threshold: as in `label_points`.

        Raises:
            RunError: pose, intrinsics, size or frame are no such; or as `question`.
            MemoryShortage: the picture does not fit.
        """
        question = self.question(prompts, threshold)
        camera = self._camera(camera_to_world, intrinsics, size, frame)
        with told_what_to_lower("rendering"):
            outputs = self.pipeline.model.get_features_for_camera(camera)
            labels, probabilities = _answers(question, outputs["directions"].flatten(0, 1))
        depth = outputs["depth"][..., 0].cpu().numpy()
        if not self.is_splat:  # along the ray, whose length along the axis of the camera is 1
            depth = depth / (1 + tangents_of(camera).square().sum(-1)).sqrt().cpu().numpy()
        accumulation = outputs["accumulation"][..., 0].cpu().numpy()
        there = accumulation >= SOMETHING
        unit = self._unit(frame)
        return View(
            list(question.segmenter.prompts),
            outputs["rgb"].cpu().numpy(),
            np.where(there, depth / unit, np.nan).astype(np.float32),
            accumulation,
            labels.reshape(there.shape),
            probabilities.reshape(*there.shape, -1),
        )

    def objects(
        self,
        prompts: Sequence[str] | None = None,
        *,
        frame: FrameName = "data",
        threshold: float | None = None,
        gap: float = OBJECT_GAP,
        smallest: float = SMALLEST_OBJECT,
    ) -> list[SceneObject]:
        """The connected objects of each prompt, prompt by prompt, the largest of each first.

        They are looked for among the Gaussians of a splat, and among the places where pixels of a NeRF's training views end.

        Args:
            prompts, threshold: as in `label_points`.
            gap: what is farther apart than this belongs to different objects; a share of the diagonal of the box around the
                training cameras.
            smallest: least share of a prompt's points that counts as an object.

        Raises:
            RunError: the frame is no such; or as `question`.
            OptionError: gap or smallest cannot be.
        """
        return self.find(prompts, frame=frame, threshold=threshold, gap=gap, smallest=smallest).objects

    def find(
        self,
        prompts: Sequence[str] | None = None,
        *,
        frame: FrameName = "data",
        threshold: float | None = None,
        gap: float = OBJECT_GAP,
        smallest: float = SMALLEST_OBJECT,
        merge: bool = False,
    ) -> Found:
        """As `objects`, with what was left out, and prompts that are nearly the same to the encoder: where `merge` is set, they
        are one class, that of the first of them."""
        check_value("gap", gap, float, POSITIVE)
        check_value("smallest", smallest, float, SHARE)
        unit = self._unit(frame)
        question = self.question(prompts, threshold)
        asked = question.segmenter.prompts
        pairs = alike(question.segmenter.sample @ question.text)
        cloud = self.samples().labelled(question)
        if merge:
            for first, second, _ in reversed(pairs):  # from the last on, so that a chain ends at its first
                cloud.class_id[cloud.class_id == second + 1] = first + 1
        if frame == "data":
            cloud.positions = self.frame.to_data(cloud.positions)
        found = find_objects(cloud, gap * self.camera_diagonal / unit, smallest, asked)
        return replace(found, alike=[(asked[first], asked[second], r) for first, second, r in pairs])

    def samples(self) -> Samples:
        """Where objects are looked for, in the model's frame: Gaussians, or a cloud that is sampled once.

        Raises:
            CommandError: the pixels of the run end nowhere.
        """
        with self._sampling:
            if self._samples is None:
                self._samples = self._sampled()
            return self._samples

    def _directions_at(self, positions: Float[np.ndarray, "N 3"]) -> Tensor:
        """Normalised coefficients at points of the model's frame, `packed`, on the CPU."""
        if not self.is_splat:
            return directions_at(self.pipeline.model, positions)
        splat = self.samples()
        with self._sampling:
            if self._neighbours is None:
                self._neighbours = Neighbours(splat)
        return self._neighbours.directions_at(positions)

    def _sampled(self) -> Samples:
        model = self.pipeline.model
        if isinstance(model, OVS3DSplatModel):
            return gaussians(model)
        cloud = sample_cloud(self.pipeline, CLOUD_POINTS, RAYS_AT_ONCE, STD_RATIO)
        near = cloud.distance <= FARTHEST * self.camera_diagonal
        return cloud[near] if near.any() else cloud

    @property
    def camera_diagonal(self) -> float:
        """Diagonal of the box around the training cameras, in the model's units."""
        return diagonal_of(self.pipeline.datamanager.train_dataset.cameras.camera_to_worlds)

    def _unit(self, frame: str) -> float:
        """The model's units in one of `frame`. Raises RunError when there is no such frame."""
        if frame not in ("data", "model"):
            raise RunError(f"There is no frame '{frame}'; give data or model.")
        return abs(self.frame.scale) if frame == "data" else 1.0

    def _points(self, xyz: Any, frame: str) -> Float[np.ndarray, "N 3"]:
        """In the model's frame. Raises RunError when they are no points."""
        points = _numbers(xyz, "the points", "N×3")
        if points.ndim != 2 or points.shape[1] != 3:
            raise RunError(f"Points have the shape {_shape(points)}; give N×3 numbers, a point a row.")
        self._unit(frame)
        return self.frame.to_model(points) if frame == "data" else points

    def _camera(self, camera_to_world: Any, intrinsics: Any, size: Any, frame: str) -> Cameras:
        """In the model's frame, on its device. Raises RunError when one of them is no such."""
        pose = _numbers(camera_to_world, "the pose", "3×4 or 4×4")
        if pose.shape not in ((3, 4), (4, 4)):
            raise RunError(f"The pose has the shape {_shape(pose)}; give a camera-to-world matrix of 3×4 or 4×4.")
        if len(pose) == 4 and not np.allclose(pose[3], [0, 0, 0, 1]):
            raise RunError(f"The pose's last row is {pose[3].tolist()}; give camera-to-world, with 0, 0, 0, 1 there.")
        axes = pose[:3, :3]
        off = float(np.abs(axes.T @ axes - np.eye(3)).max())
        if off > ORTHONORMAL:
            raise RunError(
                f"The pose's axes are off perpendicular ones of length 1 by {off:.2g}; give a rotation without scale."
            )
        focal = _numbers(intrinsics, "the intrinsics", "3×3")
        if focal.shape != (3, 3):
            raise RunError(f"Intrinsics have the shape {_shape(focal)}; give 3×3, in pixels.")
        if focal[0, 0] <= 0 or focal[1, 1] <= 0 or abs(focal[0, 1]) > 1e-6 * focal[0, 0]:
            raise RunError(
                f"Intrinsics have the first rows {focal[0].tolist()} and {focal[1].tolist()}; give [fx, 0, cx] and "
                "[0, fy, cy], with fx and fy above 0."
            )
        try:
            width, height = (int(edge) for edge in size)
        except (TypeError, ValueError):
            width = height = 0
        if width < 1 or height < 1 or (width, height) != tuple(size):
            raise RunError(f"The size {size} is none; give width and height in whole pixels.")
        self._unit(frame)
        there = self.frame.poses_to_model(pose[None, :3]) if frame == "data" else pose[None, :3]
        if np.linalg.det(there[0, :, :3]) < 0:
            raise RunError(
                "The pose is mirrored (the determinant of its axes is below 0); negate the column of the axis that points the "
                "other way: x to the right, y up, z backwards."
            )
        fx, fy, cx, cy = (float(focal[at]) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))
        return Cameras(torch.from_numpy(there).float(), fx, fy, cx, cy, width, height).to(self.pipeline.device)


@torch.no_grad()
def _answers(question: Question, directions: Tensor) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n C"]]:
    device = question.text.device
    labels = in_parts(directions, lambda part: question.labels(unpacked(part.to(device))).cpu())
    probabilities = in_parts(directions, lambda part: question.probabilities(unpacked(part.to(device))).cpu())
    return labels.numpy(), probabilities.numpy()


def _listed(prompts: Sequence[str]) -> list[str]:
    """The prompts, cleaned. Raises PromptError where labels, which are places in the list, would mean other ones."""
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    listed = parse_prompts("\n".join(map(str, given)))
    if len(listed) != len(given):
        raise PromptError(f"{given} hold an empty prompt, a ';', or one twice; give a list of prompts, each once.")
    return [old if isinstance(old, Like) else new for old, new in zip(given, listed, strict=True)]  # with its feature


def _numbers(values: Any, what: str, shape: str) -> np.ndarray:
    """As float64. Raises RunError for what are no numbers, or no finite ones."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise RunError(f"What was given for {what} cannot be read as numbers; give an array of {shape}.") from None
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise RunError(f"{bad} of the numbers of {what} are NaN or infinite; take them out.")
    return array


def _shape(array: np.ndarray) -> str:
    return "×".join(map(str, array.shape)) or "of a single number"
