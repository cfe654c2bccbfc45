"""From coefficients to answers: similarities, probabilities, labels, relevancies, and a fixed PCA for pictures."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ovs3d_nerfstudio.fields.compositing import LEAST_LENGTH
from ovs3d_nerfstudio.files import mask_stem
from ovs3d_nerfstudio.prompts.likes import Like
from ovs3d_nerfstudio.prompts.palette import colors_for
from ovs3d_nerfstudio.prompts.prompts import prompt_key

RAYS_AT_ONCE = 1 << 16
"""Rays whose numbers for all prompts are held at a time: 26 MB for 100 prompts, whatever the picture's size."""
ON_GPUS = 4
"""Times as many rays at once where a GPU answers: a part takes the host as long as it takes the GPU then."""

LEAST_RANGE = 1e-3
"""Cosines that differ by less are taken as equal: cells lie in half precision, whose rounding is half of that."""

ALIKE = 0.9
"""Correlation over a scene from which two prompts are said to be the same to the encoder. On a kitchen table, "mustard
bottle" and "yellow bottle of mustard" have 0.97, "blue pitcher" and "jug" 0.81, with the offline encoder."""

ClassScores = Literal["auto", "cosine", "centred", "relevancy"]
"""What classes are compared by: cosines, cosines less the middle of each prompt's range over the scene, relevancies over the scene,
or whichever of the first two the prompts call for."""
AT_HOME, HOME = 0.75, 0.01
"""Share of its home, the hundredth of a scene that is most like it, that each prompt must win for cosines to be fair to all. Of nine
pairs of scene and encoder three are above (0.93 and more), and one of them loses 0.012 mIoU where its cosines are centred; the others
have a prompt with 0.70 or less, and gain by it, or lose nothing."""
LIKE, GATHERINGS = 0.5, 3
"""How far from what is common in the scene to the middle of what is like a click a point must be to belong to it, and how many
times that middle is sought. Clicks anywhere into the demo's things find them so with a mean IoU of 0.70 (its words: 0.86); with
0.4, 0.67; without a middle, by the feature of the clicked point alone, 0.57."""


class Segmenter(nn.Module):
    """What a run knows of text: its basis, its prompts with their embeddings, and its scene's range of similarities.

    All of it lies in the checkpoint, so that a render needs no encoder. Built empty; filled by `configure` or by a
    checkpoint.
    """

    basis: Tensor
    text: Tensor
    sample: Tensor
    pca: Tensor
    pca_range: Tensor
    range: Tensor
    colors: Tensor
    spread: Tensor
    like: Tensor
    halfway: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[str] = []
        """The classes, in the order of their labels."""
        self.trained_prompts: list[str] = []
        """The prompts of the training, which keep their colours when others are asked for."""
        self.encoder = ""
        """Spec of the image-text encoder that the features and the prompts were embedded with."""
        self.fingerprint = ""
        self.scores: ClassScores = "cosine"
        """What classes are compared by; never `auto`, which `configure` decides."""
        self._usual: Tensor | float = 0.0  # width of a range of similarities with one of the training's prompts
        self.register_buffer("basis", torch.zeros(0, 0))
        self.register_buffer("text", torch.zeros(0, 0))
        self.register_buffer("sample", torch.zeros(0, 0))
        self.register_buffer("pca", torch.zeros(0, 3))
        self.register_buffer("pca_range", torch.zeros(2, 3))
        self.register_buffer("range", torch.zeros(2, 0))
        self.register_buffer("colors", torch.zeros(0, 3))
        self.register_buffer("spread", torch.ones(()))
        # Which prompts are without words, and the similarity from which on a point belongs to one; no run is trained on them.
        self.register_buffer("like", torch.zeros(0, dtype=torch.bool), persistent=False)
        self.register_buffer("halfway", torch.zeros(0), persistent=False)

    def configure(
        self,
        prompts: Sequence[str],
        text: Float[Tensor, "C D"],
        basis: Float[Tensor, "D K"],
        sample: Float[Tensor, "n K"],
        encoder: str,
        fingerprint: str,
        scores: ClassScores = "cosine",
    ) -> None:
        """Set everything. `sample` are coefficients of cells drawn from the whole scene; `scores` says what to compare by."""
        device = self.basis.device
        self.prompts, self.encoder, self.fingerprint = list(prompts), encoder, fingerprint
        self.trained_prompts = self.prompts
        self.basis, self.text = basis.to(device), text.to(device).float()
        self.sample = F.normalize(sample.to(device).float(), dim=-1)
        centred = self.sample - self.sample.mean(0)
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        # The sign of an eigenvector is arbitrary: fix it, so that the same scene has the same colours in every run.
        leading = vectors[:, -3:].flip(1)
        self.pca = leading * leading.sum(0).sign()
        self.pca_range = percentiles(self.sample @ self.pca, 0.02, 0.98)
        similarities = self.sample @ self.project(self.text)
        self.range = percentiles(similarities)
        self.colors = torch.from_numpy(colors_for(self.prompts, self.prompts)).to(device)
        self.scores = chosen_scores(scores, similarities)
        self.spread = spread_of(self.class_scores(similarities))

    def ask(self, prompts: Sequence[str], text: Float[Tensor, "C D"]) -> None:
        """Answer for other prompts from now on; basis, scene and the colours of the training's prompts stay.

        `text` are their embeddings by the encoder of the run. What the run was trained on is in the scene; another prompt may
        not be, and to stretch the little that it varies would find it all the same: its range is at least as wide as those
        of the training's prompts commonly are (their median). What a prompt without words was clicked on is there.
        """
        if self.prompts == self.trained_prompts and self.prompts:
            self._usual = self.range.diff(dim=0).quantile(0.5)
        self.prompts, self.text = list(prompts), text.to(self.basis)
        similarities = self.sample @ self.project(self.text)
        low, high = percentiles(similarities)
        trained = {prompt_key(prompt) for prompt in self.trained_prompts}
        self.like = torch.tensor([isinstance(prompt, Like) for prompt in self.prompts], device=low.device)
        new = (
            torch.tensor([prompt_key(prompt) not in trained for prompt in self.prompts], device=low.device) & ~self.like
        )
        self.range = torch.stack([low, torch.where(new, torch.maximum(high, low + self._usual), high)])
        if self.wordless:
            self.halfway = halfway(similarities)
        self.colors = torch.from_numpy(colors_for(self.prompts, self.trained_prompts)).to(self.basis)

    def asking(self, prompts: Sequence[str], text: Float[Tensor, "C D"]) -> Segmenter:
        """Another one that answers for other prompts, see `ask`; what is known of the scene is shared with it."""
        other = copy.copy(self)
        other._buffers = dict(self._buffers)  # of which `ask` replaces some
        other.ask(prompts, text)
        return other

    @property
    def ready(self) -> bool:
        """Whether features have been seen: before that there is nothing to answer with."""
        return self.basis.numel() > 0

    def project(self, text: Float[Tensor, "C D"]) -> Float[Tensor, "K C"]:
        """Text embeddings in the basis, ready to be multiplied by normalised coefficients."""
        return self.basis.T @ text.to(self.basis).T

    def similarities(self, coefficients: Float[Tensor, "*n K"]) -> Float[Tensor, "*n C"]:
        """z_c = cos(f, t_c) with every training prompt (3D-OVS §3.2)."""
        return F.normalize(coefficients, dim=-1, eps=LEAST_LENGTH) @ self.project(self.text)

    def relevancies(self, similarities: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        """Similarities stretched by their range over the scene: 0 where a prompt is as absent as anywhere, 1 where it
        is as present as anywhere."""
        return stretched(similarities, *self.range)

    def class_scores(self, similarities: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        """What the argmax over classes is taken of, see `compared`.

        Features are far more like each other than like any words, so a prompt without words is not compared by either: it
        goes before all words where a point is like what was clicked, and behind the best of them elsewhere.
        """
        scores = compared(similarities, self.range, self.scores)
        if not self.wordless:
            return scores
        best = scores.masked_fill(self.like, -torch.inf).amax(-1, keepdim=True)
        best = torch.where(self.like.all(), torch.zeros_like(best), best)
        return torch.where(self.like, best + self.likeness(similarities, self.scores), scores)

    @property
    def wordless(self) -> bool:
        """Whether there are prompts without words."""
        return any(isinstance(prompt, Like) for prompt in self.prompts)

    def gathered(self, feature: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """The middle of what is like a point in the scene: its own feature may be that of one side of a thing."""
        for _ in range(GATHERINGS):
            similarities = self.sample @ feature[:, None]
            near = similarities > halfway(similarities)
            if near.any():
                feature = F.normalize((self.sample * near).mean(0), dim=0)
        return feature

    def likeness(self, similarities: Float[Tensor, "*n C"], unit: ClassScores = "cosine") -> Float[Tensor, "*n C"]:
        """How far beyond `halfway` similarities are, as far apart as cosines or relevancies of words commonly are."""
        ahead = stretched(similarities, *self.range) - stretched(self.halfway, *self.range)
        return ahead if unit == "relevancy" or not isinstance(self._usual, Tensor) else ahead * self._usual

    def output_names(self) -> list[str]:
        """One name a prompt for its relevancy map. nerfstudio reads "rgb" in a name as colour, so it must not occur, and
        makes folders of names, so they must not lead out of one."""
        names: list[str] = []
        for prompt in self.prompts:
            stem = mask_stem(re.sub("rgb", "r-g-b", prompt, flags=re.IGNORECASE))
            base = "relevancy_" + "_".join(stem.split())
            name, n = base, 2
            while name in names:
                name, n = f"{base}_{n}", n + 1
            names.append(name)
        return names

    def labels_of(self, colors: Float[Tensor, "*n 3"]) -> Int[Tensor, "*n"]:
        """The labels that were painted as `colors`."""
        known = self.colors.to(colors)
        labels = in_parts(colors.reshape(-1, 3), lambda part: torch.cdist(part, known).argmin(-1))
        return labels.view(colors.shape[:-1])

    def pca_colors(self, coefficients: Float[Tensor, "*n K"]) -> Float[Tensor, "*n 3"]:
        """Coefficients as colours in [0, 1] by the run's own three principal directions: the same in every frame."""
        return stretched(F.normalize(coefficients, dim=-1) @ self.pca, *self.pca_range).clamp(0, 1)

    def get_extra_state(self) -> dict:
        return {
            "prompts": self.prompts,
            "encoder": self.encoder,
            "fingerprint": self.fingerprint,
            "class_scores": self.scores,
        }

    def set_extra_state(self, state: dict) -> None:
        self.prompts = self.trained_prompts = [str(prompt) for prompt in state["prompts"]]
        self.encoder, self.fingerprint = str(state["encoder"]), str(state["fingerprint"])
        scores = state.get("class_scores", self.scores)  # checkpoints of older versions leave it to the config
        if scores not in ("cosine", "centred", "relevancy"):
            raise ValueError(f"it compares classes by '{scores}', which this version does not know")
        self.scores = scores

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # A run's buffers have sizes that its config does not tell: take them from the checkpoint.
        for name, buffer in list(self.named_buffers(recurse=False)):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def chosen_scores(asked: ClassScores, similarities: Float[Tensor, "n C"]) -> ClassScores:
    """What classes are compared by, given similarities all over the scene: `auto` takes centred cosines where a prompt is not
    `AT_HOME` by cosines, else cosines."""
    if asked != "auto":
        return asked
    return "cosine" if (at_home(similarities) >= AT_HOME).all() else "centred"


def at_home(similarities: Float[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """The share of its home, where it is most similar, that each prompt wins by cosines."""
    if not similarities.numel():
        return similarities.new_ones(similarities.shape[1])
    homes = similarities.topk(max(1, int(HOME * len(similarities))), 0).indices
    prompts = torch.arange(similarities.shape[1], device=similarities.device)
    return (similarities.argmax(1)[homes] == prompts).float().mean(0)


def compared(similarities: Float[Tensor, "*n C"], ranges: Float[Tensor, "2 C"], by: ClassScores) -> Tensor:
    """What the argmax over classes is taken of: cosines (3D-OVS); cosines less the middle of each prompt's range over the scene, as an
    encoder is nearer to some prompts than to others whatever it sees; or relevancies, which all have the same range.

    Args:
        by: never `auto`, see `chosen_scores`.
    """
    if by == "relevancy":
        return stretched(similarities, *ranges)
    return similarities - ranges.mean(0) if by == "centred" else similarities


def alike(similarities: Float[Tensor, "n C"]) -> list[tuple[int, int, float]]:
    """Pairs of prompts that are nearly the same to the encoder, with the correlation of their similarities over a scene."""
    standard = F.normalize(similarities - similarities.mean(0), dim=0)
    correlation = standard.T @ standard
    return [(i, j, float(correlation[i, j])) for i, j in (correlation.triu(1) > ALIKE).nonzero().tolist()]


def halfway(similarities: Float[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """From which similarity on a point belongs to a prompt without words, given those with it in the scene."""
    common = percentiles(similarities, 0.5, 0.5)[0]
    return torch.lerp(common, torch.ones_like(common), LIKE)


def in_parts(rays: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
    """What `answer` makes of the rows of `rays`, `RAYS_AT_ONCE` at a time."""
    at_once = RAYS_AT_ONCE if rays.device.type == "cpu" else ON_GPUS * RAYS_AT_ONCE
    return torch.cat([answer(part) for part in rays.split(at_once)])


def spread_of(scores: Float[Tensor, "n C"]) -> Float[Tensor, ""]:
    """Standard deviation of scores over classes, its mean over the scene; 1 for a single class."""
    if scores.shape[1] < 2:
        return scores.new_ones(())
    return scores.std(-1).mean().clamp(min=LEAST_RANGE)  # an encoder may embed two prompts alike


def stretched(values: Float[Tensor, "*n C"], low: Float[Tensor, "*n C"], high: Float[Tensor, "*n C"]) -> Tensor:
    """Values with `low` … `high` moved to 0 … 1; where the two are equal nothing is blown up."""
    return (values - low) / (high - low).clamp(min=LEAST_RANGE)


def percentiles(values: Float[Tensor, "n C"], low: float = 0.01, high: float = 0.99) -> Float[Tensor, "2 C"]:
    """The shares `low` and `high` of each column lie below these."""
    if not values.shape[1]:  # no prompts, and torch refuses to take quantiles of nothing
        return values.new_zeros(2, 0)
    return torch.quantile(values, torch.tensor([low, high]).to(values), dim=0)
