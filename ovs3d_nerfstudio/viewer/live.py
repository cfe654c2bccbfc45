"""Prompts that are edited while a viewer looks: a question beside the trained one, and rendered features that outlive it.

Nothing here touches the model's own segmenter, so training, checkpoints and evaluation know nothing of it.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components import renderers
from torch import Tensor

from ovs3d_nerfstudio.memory import REMEDIES, MemoryShortage, free_memory, is_out_of_memory, let_go, told_what_to_lower
from ovs3d_nerfstudio.models.semantics import SemanticModel
from ovs3d_nerfstudio.prompts.answers import Answering, Answers, Question
from ovs3d_nerfstudio.prompts.embedding import Embedder
from ovs3d_nerfstudio.prompts.likes import Like
from ovs3d_nerfstudio.prompts.prompts import MAX_PROMPTS, PromptError, parse_prompts, prompt_key
from ovs3d_nerfstudio.prompts.segmentation import Segmenter
from ovs3d_nerfstudio.prompts.shown import Shown

T = TypeVar("T")

NEGATIVES = "object; things; stuff; texture"
"""What everything else is called by default: LERF's canonical phrases (Kerr et al., 2023, §4.4)."""
KEPT_BYTES = 1 << 30
"""Most that is kept of rendered features beside the newest; less where less than twice as much is free."""
ZOOMS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""How much smaller a view is rendered while memory is short."""
SECONDS_SMALLER = 30.0
"""How long what did not fit is not tried again."""


class LivePrompts:
    """What the viewer asks: prompts, negatives and how they are answered, edited by any thread, one edit at a time.

    A `Question` is replaced as a whole, so whoever reads `question` sees one moment, and nobody waits for an edit.
    """

    def __init__(self, model: SemanticModel):
        self.model = model
        self.prompts: list[str] | None = None
        """The prompts asked for; None for the trained ones, whatever they are by then."""
        self.negatives: list[str] = parse_prompts(NEGATIVES)
        self.answering = Answering(opacity=model.config.overlay_opacity)
        self.shown = Shown()
        self.likes: dict[str, Like] = {}
        """Prompts without words by `prompt_key`: wherever their names are asked, it is for what was clicked."""
        self.question: Question | None = None
        """None while the run has seen no features."""
        self.trained = Segmenter()
        """What the run knew when it was last looked at; a copy."""
        self._seen: Tensor | None = None
        self._embed = Embedder(model.device)
        self._edit = threading.Lock()
        self._swap = threading.Lock()

    @property
    def asked(self) -> list[str]:
        """The prompts that are answered now."""
        return self.question.segmenter.prompts if self.question is not None else []

    def follow_training(self) -> bool:
        """Ask what was asked of what the run knows by now; returns whether that has changed.

        Called where the model stands still: before a view is rendered.
        """
        segmenter = self.model.segmenter
        if not segmenter.ready or segmenter.colors is self._seen:
            return False
        trained = copy.deepcopy(segmenter)
        with self._swap:
            self.trained = trained
            asking, negatives = trained, None
            if self.question is not None:
                negatives = self.question.negatives
                if self.prompts is not None:
                    asking = trained.asking(self.prompts, self.question.segmenter.text)
            self.question = Question(asking, self.answering, negatives, self.shown.among(asking.prompts))
        self._seen = segmenter.colors  # last: nerfstudio may interrupt a render at any line
        return True

    def ask(
        self, prompts: Sequence[str] | None = None, negatives: Sequence[str] | None = None, **answering: Any
    ) -> float:
        """Swap the question for one with other prompts, negatives or fields of `Answering`; what is not given stays.

        Returns the seconds that embedding took, once the encoder was loaded. Training and renders go on meanwhile.

        Raises:
            PromptError: the run has no features yet.
            EncoderError: a prompt cannot be embedded; everything stays as it was.
        """
        with self._edit:
            return self._change(self.prompts if prompts is None else list(prompts), negatives, answering)

    def reset(self) -> None:
        """Ask for the trained prompts again."""
        with self._edit:
            self._change(None, None, {})

    def add(self, text: str) -> float:
        """As `ask`, with the prompts in `text` behind those asked now. Raises PromptError too when there are none."""
        with self._edit:
            return self._change(parse_prompts("; ".join([*self.asked, *parse_prompts(text)])), None, {})

    def remove(self, text: str) -> None:
        """As `ask`, without the prompts in `text`. Raises PromptError when one is not asked for, or none would stay."""
        with self._edit:
            asked = {prompt_key(prompt): prompt for prompt in self.asked}
            for prompt in parse_prompts(text):
                if asked.pop(prompt_key(prompt), None) is None:
                    raise PromptError(f"'{prompt}' is not among the prompts; nothing was removed.")
            if not asked:
                raise PromptError("The last prompt stays; ask for others, or go back to the trained ones.")
            self._change(list(asked.values()), None, {})

    def like(self, feature: Float[Tensor, " K"]) -> Like:
        """Ask, behind what is asked, for what is like a point whose normalised coefficients are `feature`.

        Raises PromptError as `add`.
        """
        with self._edit:
            trained, number = self.trained, 1
            while prompt_key(f"like {number}") in {*self.likes, *map(prompt_key, [*self.asked, *trained.prompts])}:
                number += 1
            if len(self.likes) >= MAX_PROMPTS:
                raise PromptError(f"There are {MAX_PROMPTS} prompts without words already; ask for one of them.")
            embedding = trained.basis @ trained.gathered(feature.to(trained.basis))
            like = Like(f"like {number}", torch.nn.functional.normalize(embedding, dim=0).tolist(), trained.fingerprint)
            prompts = parse_prompts("; ".join([*self.asked, like]))
            self.likes[prompt_key(like)] = like
            self._change(prompts, None, {})
            return like

    def show(self, how: Literal["all", "only", "hide"], prompt: str = "") -> None:
        """Show everything, only what belongs to one of the prompts asked, or all but that and what was hidden before.

        Raises PromptError when it is not asked for, or nothing would be left.
        """
        with self._edit:
            shown = Shown()
            if how != "all" and prompt_key(prompt) not in map(prompt_key, self.asked):
                raise PromptError(f"'{prompt}' is not among the prompts.")
            if how == "only":
                shown = Shown(only=(prompt,))
            elif how == "hide":
                shown = Shown(without=(*self.shown.without, prompt))
            if not any(shown.flags(self.asked)[:-1]) and how != "all":
                raise PromptError("Nothing would be left; show all first.")
            self._change(self.prompts, None, {}, shown)

    def _change(
        self, prompts: list[str] | None, negatives: Sequence[str] | None, changes: dict, shown: Shown | None = None
    ) -> float:
        answering = replace(self.answering, **changes)
        if prompts is not None:
            prompts = [self.likes.get(prompt_key(prompt), prompt) for prompt in prompts]
        others = self.negatives if negatives is None else list(negatives)
        before = self._embed.seconds
        while True:
            trained = self.trained
            if not trained.ready:
                raise PromptError("The run has seen no features yet; ask again once training has begun.")
            asking = trained if prompts is None else trained.asking(prompts, self._embed(trained, prompts))
            other = self._embed(trained, others) if answering.mode == "threshold" else None
            shows = (self.shown if shown is None else shown).among(asking.prompts)
            question = Question(asking, answering, other, shows)
            with self._swap:
                if trained is self.trained:  # else training has gone on to other features, and the question is stale
                    self.prompts, self.negatives, self.answering, self.question = prompts, others, answering, question
                    self.shown = shows
                    return self._embed.seconds - before


class LiveOutputs(MutableMapping[str, Tensor]):
    """Outputs of a view as nerfstudio's viewer takes them: nerfacto's, and pictures of whatever is asked when it looks.

    Where memory runs out for a picture, the colours that are there already stand in for it.
    """

    def __init__(
        self, rendered: dict[str, Tensor], live: LivePrompts, size: tuple[int, int] | None = None, note: str = ""
    ):
        """Pictures have `size` (height, width), however small they were rendered; `note` is for whoever looks."""
        self.note = note
        self._live, self._size = live, size
        self._own = {name: output for name, output in rendered.items() if name not in ("directions", "scales")}
        self._rendered = rendered
        self._answers: Answers | None = None
        self._last: tuple[str, Tensor] | None = None
        self._lock = threading.Lock()

    def answers(self) -> Answers | None:
        """The pictures of the question as it stands; None while there are no features."""
        question, rendered = self._live.question, self._rendered
        if question is None or "directions" not in rendered:
            return None
        if self._answers is None or self._answers.question is not question:
            parts = (rendered[name] for name in ("directions", "scales", "rgb"))
            self._answers, self._last = Answers(question, *parts), None
        return self._answers

    def shares(self) -> list[float]:
        """The share of the view that belongs to each prompt."""
        with self._lock:
            return self._while_memory_lasts(self._shares, [])

    def _shares(self) -> list[float]:
        answers = self.answers()
        if answers is None:
            return []
        counts = torch.bincount(answers.labels.flatten() + 1, minlength=len(answers.question.names) + 1)
        return (counts[1:] / counts.sum()).tolist()

    def __getitem__(self, name: str) -> Tensor:
        with self._lock:
            return self._while_memory_lasts(lambda: self._picture(name), self._own["rgb"])

    def _picture(self, name: str) -> Tensor:
        if name in self._own:
            return enlarged(self._own[name], self._size) if name in self._rendered else self._own[name]
        answers = self.answers()
        if answers is None:
            return enlarged(self._own["rgb"], self._size)
        if name not in answers:  # chosen a moment ago, and gone with its prompt
            name = still_there(name, list(answers))
        # nerfstudio looks three times at the picture it shows.
        if self._last is None or self._last[0] != name:
            self._last = name, enlarged(answers[name], self._size)
        return self._last[1]

    @staticmethod
    def _while_memory_lasts(make: Callable[[], T], otherwise: T) -> T:
        """What `make` returns; where it runs out of memory, `otherwise`: an error here would end nerfstudio's thread."""
        try:
            return make()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        let_go()
        return otherwise

    def __contains__(self, name: object) -> bool:
        return name in list(self)  # not Mapping's, which asks `__getitem__`, and that always has something to show

    def __setitem__(self, name: str, output: Tensor) -> None:
        self._own[name] = output

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter([*self._own, *(self.answers() or ())])

    def __len__(self) -> int:
        return len(list(iter(self)))


def still_there(chosen: str, names: Sequence[str]) -> str:
    """The output that stands in for `chosen` among `names`: itself if it can."""
    return next(name for name in (chosen, "segmentation", *names) if name in names)


def enlarged(output: Tensor, size: tuple[int, int] | None) -> Tensor:
    """A picture at the given height and width, its pixels repeated."""
    if size is None or output.shape[:2] == size:
        return output
    for axis, length in enumerate(size):
        known = output.shape[axis]
        output = output.index_select(axis, torch.arange(length, device=output.device) * known // length)
    return output


class FeatureCache:
    """Rendered features of the last views. Those of older weights are dropped."""

    def __init__(self, kept_bytes: int = KEPT_BYTES):
        self.kept_bytes = kept_bytes
        self._views: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()
        self._weights: Hashable = None
        self._lock = threading.Lock()

    def get(self, weights: Hashable, view: Hashable, render: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The features of `view`, rendered if they are not there."""
        with self._lock:
            if weights != self._weights:
                self._views.clear()
                self._weights = weights
            if view in self._views:
                self._views.move_to_end(view)
                return self._views[view]
        rendered = render()
        most = min(self.kept_bytes, free_memory(next(iter(rendered.values())).device) // 2)
        with self._lock:
            if weights == self._weights:
                self._views[view] = rendered
                while len(self._views) > 1 and sum(map(_bytes, self._views.values())) > most:
                    self._views.popitem(last=False)
        return rendered

    def clear(self) -> None:
        """Lets all features go."""
        with self._lock:
            self._views.clear()


def _bytes(rendered: dict[str, Tensor]) -> int:
    return sum(output.nbytes for output in rendered.values())


@dataclass(frozen=True)
class Point:
    """What a click found."""

    prompts: list[str]
    chances: list[float]
    """Probability of each prompt (see `Question.probabilities`)."""
    winner: int
    """Index of the prompt that the point belongs to, −1 for none."""
    position: tuple[float, float, float]
    """In the coordinates of the viewer's scene."""
    feature: Tensor
    """Normalised coefficients, K."""
    question: Question
    """What was asked."""


class LiveModel:
    """The model as a viewer sees it: its own in everything, but views are answered by the live prompts."""

    def __init__(
        self,
        live: LivePrompts,
        lock: AbstractContextManager,
        on_view: Callable[[LiveOutputs | None], None] = lambda _: None,
    ):
        """`lock` is held by whoever trains or renders; `on_view` is called with each view looked at, and must be quick. None
        tells it to let go of the last one, as memory is short."""
        self._model, self._live, self._lock, self._on_view = live.model, live, lock, on_view
        self._cache = FeatureCache()
        self._box: OrientedBox | None = None  # that the last view was cut to
        self._too_many, self._until = 0, 0.0  # rays that did not fit, and until when smaller views are rendered instead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """The model's: nerfstudio's viewer asks whether it is one of Gaussians."""
        return type(self._model)

    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> LiveOutputs:
        """The outputs of a view; rendered only if the view or the weights are not those of a moment ago.

        Where memory is short it is rendered smaller, and enlarged; `note` says so.
        """
        self._live.follow_training()
        self._box = obb_box
        size = int(camera.height.item()), int(camera.width.item())
        rendered = self._rendered(camera, obb_box, size)
        shown, note = rendered["rgb"].shape[:2], ""
        if shown != size:
            fewer = f"the view is rendered with {shown[1]} × {shown[0]} pixels, not {size[1]} × {size[0]}"
            note = f"Memory is short: {fewer if shown[0] > 1 else 'no view can be rendered'}; {REMEDIES['showing a view']}."
        outputs = LiveOutputs(rendered, self._live, size, note)
        self._on_view(outputs)
        return outputs

    def _rendered(self, camera: Cameras, box: OrientedBox | None, size: tuple[int, int]) -> dict[str, Tensor]:
        """The features of a view, in the greatest of `ZOOMS` that fits; a black pixel where none does."""
        for zoom in ZOOMS:
            rays = int(size[0] * zoom) * int(size[1] * zoom)
            if rays < 1 or (rays >= self._too_many > 0 and time.monotonic() < self._until):
                continue
            smaller = camera
            if zoom < 1:
                smaller = copy.deepcopy(camera)
                smaller.rescale_output_resolution(zoom)
            for _ in range(2):
                try:
                    return self._features(smaller, box)
                except (RuntimeError, MemoryError, MemoryShortage) as error:
                    if not isinstance(error, MemoryShortage) and not is_out_of_memory(error):
                        raise
                # The second time, without what was kept for speed alone.
                self._cache.clear()
                self._on_view(None)
                let_go()
            self._too_many, self._until = rays, time.monotonic() + SECONDS_SMALLER
        device = self._model.device
        return {"rgb": torch.zeros(1, 1, 3, device=device), "depth": torch.zeros(1, 1, 1, device=device)}

    def _features(self, camera: Cameras, box: OrientedBox | None) -> dict[str, Tensor]:
        model, question = self._model, self._live.question
        background = getattr(model, "background_color", None)  # of Gaussians, which the viewer sets
        shade = tuple(background.tolist()) if isinstance(background, Tensor) else None
        # What is asked changes no feature, unless it has something hidden.
        hiding = question.hiding if question is not None else None

        def render() -> dict[str, Tensor]:
            with model.hiding(question):
                return model.get_features_for_camera(camera, box)

        return self._cache.get(model.state_of_weights(), (_view_key(camera, box), shade, hiding), render)

    @torch.no_grad()
    def point(self, origin: Sequence[float], direction: Sequence[float]) -> Point | None:
        """What a ray (in the coordinates of the viewer's scene) hits of what the last view shows; None while there are no
        features.

        Raises MemoryShortage where not even that fits.
        """
        model, question = self._model, self._live.question
        start = torch.tensor([list(origin)], dtype=torch.float32)
        along = torch.nn.functional.normalize(torch.tensor([list(direction)], dtype=torch.float32), dim=-1)
        with self._lock, told_what_to_lower("showing a view"), model.hiding(question):
            training = model.training
            try:
                model.eval()
                outputs = model.features_along(start.to(model.device), along.to(model.device), self._box)
            finally:
                model.train(training)
        if question is None or "directions" not in outputs:
            return None
        directions = outputs["directions"]
        position = start[0] + outputs["depth"][0].cpu() * along[0]
        x, y, z = position.tolist()
        return Point(
            question.segmenter.prompts,
            question.probabilities(directions)[0].tolist(),
            int(question.labels(directions, question.kept)[0]),
            (x, y, z),
            directions[0],
            question,
        )


def _view_key(camera: Cameras, box: OrientedBox | None) -> Hashable:
    """Equal for views that look the same with equal weights."""
    values = [camera.camera_to_worlds, camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height]
    values += [camera.camera_type, *(v for v in (camera.distortion_params, camera.times) if v is not None)]
    if box is not None:
        values += [box.R, box.T, box.S]
        if isinstance(renderers.BACKGROUND_COLOR_OVERRIDE, Tensor):
            values.append(renderers.BACKGROUND_COLOR_OVERRIDE)
    return tuple(tuple(value.flatten().tolist()) for value in values)
