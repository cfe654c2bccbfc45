"""The object that a click is on: one of the connected pieces of its class, with its size and place in the data's frame."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor

from ovs3d_nerfstudio.data.capture import diagonal_of
from ovs3d_nerfstudio.data.frames import Frame
from ovs3d_nerfstudio.fields.compositing import SOMETHING
from ovs3d_nerfstudio.models.semantics import SemanticModel
from ovs3d_nerfstudio.models.splat import OVS3DSplatModel
from ovs3d_nerfstudio.objects import OBJECT_GAP, SMALLEST_OBJECT
from ovs3d_nerfstudio.objects.points import FAINT, LabelledPoints, SceneObject, find_objects
from ovs3d_nerfstudio.pictures import evenly
from ovs3d_nerfstudio.prompts.answers import Question, packed, unpacked
from ovs3d_nerfstudio.prompts.segmentation import in_parts
from ovs3d_nerfstudio.viewer.live import Point

STEPS = 3.0
"""Where points lie sparser than that, those of an object may be so many times as far apart as neighbours commonly are."""
VIEWS, PIXELS = 24, 4096
"""The training views whose pixels are the points of a NeRF, and about how many of each."""


@dataclass(frozen=True)
class Thing:
    """What was clicked, among the objects of its class."""

    number: int
    """Its place among them, the largest first, from 1."""
    count: int
    object: SceneObject
    """In the data's frame."""

    @property
    def size(self) -> Float[np.ndarray, " 3"]:
        """Sides of its box along the axes of the data."""
        return self.object.box_max - self.object.box_min


class Things:
    """Objects of what is asked, found when one is clicked and kept until the prompts or the weights change."""

    def __init__(self, model: SemanticModel, cameras: Any, frame: Frame, lock: AbstractContextManager):
        """`cameras` are the training's; `lock` is held by whoever trains or renders."""
        self._model, self._cameras, self._frame, self._lock = model, cameras, frame, lock
        self._one = threading.Lock()
        self._points: tuple[Hashable, np.ndarray, Tensor] | None = None
        self._found: tuple[Hashable, dict[int, tuple[cKDTree, np.ndarray, list[SceneObject]]]] = (None, {})
        self._gap = OBJECT_GAP * diagonal_of(cameras.camera_to_worlds) / abs(frame.scale)

    def at(self, point: Point) -> Thing | None:
        """The object that a clicked point is part of, or lies nearest to; None where its class has none.

        The first click on weights that are new takes a moment, which for a NeRF is as long as a picture takes.
        """
        if point.winner < 0:
            return None
        with self._one, torch.no_grad():
            positions, directions = self._known_points()
            asked = point.question, self._points and self._points[0]
            if self._found[0] != asked:
                self._found = asked, {}
            found = self._found[1]
            if point.winner not in found:
                found[point.winner] = self._objects(point, positions, directions)
            tree, owners, objects = found[point.winner]
            if not objects:
                return None
            place = self._frame.to_data(np.array([point.position]))
            number = int(owners[tree.query(place)[1][0]])
            return Thing(number + 1, len(objects), objects[number])

    def _objects(self, point: Point, positions: np.ndarray, directions: Tensor) -> tuple:
        """The objects of the clicked class, and which of them each of their points belongs to, in a tree of these points."""
        question: Question = point.question
        labels = in_parts(directions, lambda part: question.labels(unpacked(part)))
        chosen = positions[(labels == point.winner).numpy(force=True)]
        if len(chosen) < 2:
            return None, None, []
        spacing = float(np.median(cKDTree(chosen).query(chosen, k=2)[0][:, 1]))
        class_id, none = np.full(len(chosen), point.winner + 1), np.zeros(len(chosen))
        cloud = LabelledPoints(chosen, np.zeros_like(chosen), class_id, none, none, np.ones(len(chosen)))
        objects = find_objects(cloud, max(self._gap, STEPS * spacing), SMALLEST_OBJECT, point.prompts).objects
        if not objects:
            return None, None, []
        members = np.concatenate([one.members for one in objects])
        owners = np.repeat(np.arange(len(objects)), [one.count for one in objects])
        return cKDTree(chosen[members]), owners, objects

    def _known_points(self) -> tuple[Float[np.ndarray, "n 3"], Tensor]:
        """Points of what there is, in the data's frame, and what the field says there (`packed`)."""
        state = self._model.state_of_weights()
        if self._points is None or self._points[0] != state:
            model = self._model
            places, directions = self._gaussians(model) if isinstance(model, OVS3DSplatModel) else self._cloud()
            self._points = state, self._frame.to_data(places.double().numpy(force=True)), directions
        return self._points[1], self._points[2]

    def _gaussians(self, model: OVS3DSplatModel) -> tuple[Tensor, Tensor]:
        with self._lock:
            there = model.opacities.sigmoid().squeeze(-1) >= FAINT
            return model.means[there], model.directions_of_gaussians()[there]

    def _cloud(self) -> tuple[Tensor, Tensor]:
        """Where the pixels of some training views end."""
        places, directions = [], []
        for index in evenly(len(self._cameras), VIEWS):
            camera = copy.deepcopy(self._cameras[index : index + 1]).to(self._model.device)
            camera.rescale_output_resolution(min(1.0, (PIXELS / float(camera.height * camera.width)) ** 0.5))
            with self._lock:
                training = self._model.training
                try:
                    self._model.eval()
                    outputs = self._model.get_features_for_camera(camera)
                finally:
                    self._model.train(training)
            if "directions" not in outputs:
                continue
            rays = camera.generate_rays(0, keep_shape=True)
            ends = outputs["accumulation"][..., 0] >= SOMETHING
            places.append((rays.origins + rays.directions * outputs["depth"])[ends].cpu())
            found = outputs["directions"][ends]
            directions.append(found if found.dtype == torch.int16 else packed(found))
        return torch.cat(places), torch.cat(directions)
