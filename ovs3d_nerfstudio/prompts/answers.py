"""What a person looks at: pictures of a view by name, each made only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor

from ovs3d_nerfstudio.prompts.palette import colorize
from ovs3d_nerfstudio.prompts.segmentation import Segmenter, in_parts, spread_of, stretched
from ovs3d_nerfstudio.prompts.shown import EVERYTHING, Shown

STEPS = 32767
"""Steps from 0 to 1 of a packed direction's coefficients."""


def packed(directions: Float[Tensor, "*R K"]) -> Int16[Tensor, "*R K"]:
    """Unit vectors in half of their memory. A cosine changes by 1e-5 (rms), a quarter of what half precision would change it
    by or less, as its steps grow with a coefficient and these do not."""
    return (directions * STEPS).round_().to(torch.int16)


def unpacked(directions: Tensor) -> Float[Tensor, "*R K"]:
    """What `packed` was given, nearly; unit vectors that are not packed stay as they are."""
    return directions * (1 / STEPS) if directions.dtype == torch.int16 else directions


def something(directions: Float[Tensor, "*R K"] | Int16[Tensor, "*R K"]) -> Bool[Tensor, "*R"]:
    """Where a ray meets something: what meets nothing has no direction, but zeros (see `SemanticModel.shown`)."""
    return (directions != 0).any(-1)


@dataclass(frozen=True)
class Answering:
    """How a question is answered."""

    mode: Literal["argmax", "threshold"] = "argmax"
    """argmax: each ray belongs to the prompt that fits best. threshold: to the most probable of those prompts that beat
    every negative with the probability `threshold`, or to none."""
    threshold: float = 0.5
    """Least probability of a prompt against the negatives, in mode `threshold`."""
    temperature: float = 1.0
    """Temperature τ of probabilities, in units of the spread over the scene of what classes are compared by."""
    opacity: float = 0.6
    """Opacity of the segmentation over the photo in `segmentation_overlay`."""
    normalise: bool = True
    """Whether a relevancy map is the similarity stretched by its range over the scene, or the prompt's probability."""


@dataclass(frozen=True, eq=False)
class Question:
    """Prompts, how they are answered, and which of them are shown."""

    segmenter: Segmenter
    """Knows the prompts. Where others may ask it something else meanwhile, a copy."""
    answering: Answering = Answering()
    negatives: Float[Tensor, "N D"] | None = None
    """Embeddings of what everything else is called, needed in mode `threshold`."""
    shown: Shown = EVERYTHING

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the relevancy maps, one a prompt."""
        return tuple(self.segmenter.output_names())

    @cached_property
    def text(self) -> Float[Tensor, "K C"]:
        return self.segmenter.project(self.segmenter.text)

    @cached_property
    def others(self) -> Float[Tensor, "K N"]:
        return self.text[:, :0] if self.negatives is None else self.segmenter.project(self.negatives)

    @cached_property
    def kept(self) -> Bool[Tensor, " flags"] | None:
        """Whether what belongs to each prompt is shown, and last to none; None where everything is."""
        flags = self.shown.flags(self.segmenter.prompts)
        return None if all(flags) else torch.tensor(flags, device=self.text.device)

    @cached_property
    def hiding(self) -> Hashable:
        """Equal for questions that hide the same of a scene; None for those that hide nothing."""
        if self.kept is None:
            return None
        texts, answering = [self.text], self.answering
        how: tuple = (answering.mode,)
        if answering.mode == "threshold":
            texts, how = [self.text, self.others], (answering.mode, answering.threshold, answering.temperature)
        flags = tuple(self.shown.flags(self.segmenter.prompts))
        return flags, how, tuple(text.numpy(force=True).tobytes() for text in texts)

    @cached_property
    def temperature(self) -> float:
        """τ, by the spread of what it divides: the prompts' scores, or similarities with prompts and negatives together."""
        sample = self.segmenter.sample
        if self.answering.mode == "argmax":
            return self.answering.temperature * float(spread_of(self.scores(sample)))
        return self.answering.temperature * float(spread_of(sample @ torch.cat([self.text, self.others], 1)))

    def scores(self, directions: Float[Tensor, "n K"]) -> Float[Tensor, "n C"]:
        """What the argmax over prompts is taken of."""
        return self.segmenter.class_scores(directions @ self.text)

    def probabilities(self, directions: Float[Tensor, "n K"]) -> Float[Tensor, "n C"]:
        """Mode `argmax`: p = softmax(z / τ) over the prompts (3D-OVS §3.2). Mode `threshold`: each prompt against the
        negative that fits best, p_c = σ((z_c − max_n z_n) / τ), which is LERF's relevancy score (its eq. 1)."""
        if self.answering.mode == "argmax":
            return (self.scores(directions) / self.temperature).softmax(-1)
        similarities = directions @ self.text
        ahead = similarities - (directions @ self.others).amax(-1, keepdim=True)
        if self.segmenter.wordless:
            ahead = torch.where(self.segmenter.like, self.segmenter.likeness(similarities), ahead)
        return (ahead / self.temperature).sigmoid()

    def labels(
        self, directions: Float[Tensor, "n K"], among: Bool[Tensor, " flags"] | None = None
    ) -> Int[Tensor, " n"]:
        """The prompt each ray belongs to, −1 for none: also where there is `something` no more; only those of `among`, where it
        is given."""
        argmax = self.answering.mode == "argmax"
        scores = self.scores(directions) if argmax else self.probabilities(directions)
        if among is not None:
            scores = scores.masked_fill(~among[:-1], -torch.inf)
        best, labels = scores.max(-1)
        there = something(directions)
        return torch.where(there if argmax else there & (best >= self.answering.threshold), labels, -1)

    def winners(
        self, directions: Float[Tensor, "n K"] | Int16[Tensor, "n K"]
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The label of each of any number of rays or points, and the probability of the prompt that fits best, on the CPU;
        `directions` may be `packed`, and lie on any device."""
        found = in_parts(directions, self._winners)
        return found[:, 0].long(), found[:, 1]

    def _winners(self, part: Tensor) -> Float[Tensor, "n 2"]:
        there = unpacked(part.to(self.text.device))
        return torch.stack([self.labels(there).float(), self.probabilities(there).amax(-1)], -1).cpu()

    def keeps(self, directions: Float[Tensor, "n K"]) -> Bool[Tensor, " n"]:
        """Whether what is at some points is shown."""
        if self.kept is None:
            return torch.ones(len(directions), dtype=torch.bool, device=directions.device)
        return self.kept[self.labels(directions)]  # −1, none, finds the last

    def relevancy(self, directions: Float[Tensor, "n K"], index: int) -> Float[Tensor, "n 1"]:
        """The relevancy map of one prompt, in [0, 1], where there is something."""
        one = slice(index, index + 1)
        if not self.answering.normalise:
            return self.probabilities(directions)[:, one]
        return stretched(directions @ self.text[:, one], *self.segmenter.range[:, one]).clamp(0, 1)


class Answers(Mapping[str, Tensor]):
    """`segmentation`, `segmentation_overlay`, a relevancy map for each prompt, `scale` and `features_pca` of some rays:
    three channels in [0, 1], or one. Where there is nothing they show the background, or 0.

    Names hold no "rgb" and no picture has 2 or more than 3 channels: nerfstudio's viewer and renders would trip.
    """

    def __init__(
        self,
        question: Question,
        directions: Float[Tensor, "*R K"] | Int16[Tensor, "*R K"],
        scales: Float[Tensor, "*R S"],
        rgb: Float[Tensor, "*R 3"],
    ):
        """`directions` are the rays' coefficients, normalised, zeros where there is nothing; `packed` where many are kept."""
        self.question, self.scales, self.rgb = question, scales, rgb
        self._directions = directions

    @cached_property
    def there(self) -> Bool[Tensor, "*R 1"]:
        """Where there is something."""
        if self.question.answering.mode == "argmax" and "labels" in vars(self):  # known by them already
            return (self.labels >= 0)[..., None]
        return self._each(something).view(*self.rgb.shape[:-1], 1)

    @cached_property
    def labels(self) -> Int[Tensor, "*R"]:
        """The prompt each ray belongs to, −1 for none."""
        question = self.question
        return self._each(lambda directions: question.labels(directions, question.kept)).view(self.rgb.shape[:-1])

    def __iter__(self) -> Iterator[str]:
        if self.question.names:
            yield from ("segmentation", "segmentation_overlay", *self.question.names)
        yield from ("scale", "features_pca")

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(self)  # not Mapping's, which would make the picture

    def __getitem__(self, name: str) -> Tensor:
        question = self.question
        if name == "features_pca":
            colors = self._each(question.segmenter.pca_colors).view(*self.rgb.shape[:-1], 3)
            return torch.where(self.there, colors, self.rgb)
        if name == "scale":
            steps = torch.arange(self.scales.shape[-1], device=self.scales.device) / max(1, self.scales.shape[-1] - 1)
            return (self.scales * steps).sum(-1, keepdim=True)
        if name in question.names:
            index = question.names.index(name)
            relevancy = self._each(lambda directions: question.relevancy(directions, index))
            return relevancy.view(*self.rgb.shape[:-1], 1) * self.there
        if not question.names or name not in ("segmentation", "segmentation_overlay"):
            raise KeyError(name)
        colors = colorize(self.labels, question.segmenter.colors)
        if name == "segmentation":
            return torch.where(self.there, colors, self.rgb)
        opacity = question.answering.opacity * (self.labels >= 0)[..., None]
        return torch.lerp(self.rgb, colors, opacity)

    def _each(self, answer: Callable[[Tensor], Tensor]) -> Tensor:
        rays = self._directions.reshape(-1, self._directions.shape[-1])
        return in_parts(rays, lambda part: answer(unpacked(part)))
