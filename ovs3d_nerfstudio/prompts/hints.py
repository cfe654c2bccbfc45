"""What is wrong with a list of prompts, told before any training: by their text alone, and by a few views against everyday words.

An encoder has a cosine for anything, nonsense too, and the winner of an argmax need not be there. So each prompt is compared with
`VOCABULARY`, of which most things are not in a scene either. The thresholds were chosen on seven scenes with their own lists and
with bad ones, with the encoder `offline`; what they find and what they find wrongly is in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ovs3d_nerfstudio.prompts.segmentation import ALIKE

_WORDS = (
    "table; chair; sofa; bed; desk; shelf; cupboard; door; window; curtain; lamp; mirror; picture frame; clock; vase; pillow; "
    "blanket; carpet; wooden floor; tiled floor; ceiling; white wall; brick wall; concrete wall; wallpaper; stairs; bottle; cup; "
    "bowl; plate; knife; fork; spoon; pan; kettle; cardboard box; basket; bag; book; newspaper; pen; scissors; hammer; "
    "screwdriver; drill; rope; wire; keyboard; computer screen; telephone; camera; radio; car; truck; bicycle; motorcycle; train; "
    "airplane; boat; road; bridge; building; roof; fence; tree; leaves; flower; grass; bush; soil; sand; stone; rock; water; sea; "
    "sky; cloud; mountain; snow; person; face; hand; dog; cat; bird; horse; cow; fish; insect; bread; fruit; vegetable; meat; cake; "
    "shirt; trousers; shoe; hat; glasses; ball; toy; doll; apple; musical instrument; plastic; metal; paper; cloth; leather; glass"
)
VOCABULARY = tuple(word.strip() for word in _WORDS.split(";"))
"""Everyday things and surfaces."""
NEAREST = 10
"""Words of the vocabulary whose likeness to a prompt says whether the encoder knows it."""
BEST = 100
"""Of so many cells of the views, the one that a prompt fits best counts."""
NEVER, SELDOM = 0.005, 0.025
"""A prompt that wins less than this share of the pictures wins almost nowhere; or hardly, where it also fits no better than most words."""
MIDDLING, LOW = 0.6, 0.2
"""Shares of the vocabulary that fit worse at their best: most words that are not there have less."""
STRANGE = 0.05
"""Share of the vocabulary that is less like all other words: nonsense is beyond that."""
SAME_WORDS, SAME_ALL_IN_ALL = 0.4, 1.15
"""Two prompts are near-synonyms from this likeness of their text on, where with their correlation over the scene it comes to the second:
"tennis ball" and "soccer ball" have 0.64 + 0.95, "red mug" and "red apple" 0.48 + 0.50."""


@dataclass(frozen=True)
class Standing:
    """How prompts stand among everyday words."""

    likeness: Float[Tensor, "C C"]
    """Cosines of their texts, without what all words have in common."""
    strange: Float[Tensor, " C"]
    """Share of the vocabulary that is less like other words than the prompt is like the vocabulary, in [0, 1]."""
    fits: Float[Tensor, " C"]
    """Share of the vocabulary that fits its best cells worse than the prompt its own, in [0, 1]."""


def standing(
    text: Float[Tensor, "C D"],
    words: Float[Tensor, "V D"],
    prompt_cells: Float[Tensor, "n C"],
    word_cells: Float[Tensor, "n V"],
) -> Standing:
    """Of unit embeddings of the prompts and of the vocabulary, and their cosines with the cells of some views."""
    common = words.mean(0)
    text, words = (F.normalize(part - common, dim=-1) for part in (text, words))
    among = words @ words.T
    among.fill_diagonal_(-1)
    # A prompt that is a word of the vocabulary is as much like it as other words are.
    to_words = text @ words.T
    to_words = torch.where(to_words > 0.999, -1.0, to_words)
    usual = among.topk(NEAREST, 1).values.mean(1)
    known = to_words.topk(NEAREST, 1).values.mean(1)
    best = max(1, len(prompt_cells) // BEST)
    of_prompts, of_words = (cells.topk(best, 0).values.mean(0) for cells in (prompt_cells, word_cells))
    return Standing(
        text @ text.T,
        (usual < known[:, None]).double().mean(1),
        (of_words < of_prompts[:, None]).double().mean(1),
    )


def hints(
    prompts: Sequence[str], similarities: Float[Tensor, "n C"], shares: Float[Tensor, " C"], known: Standing
) -> list[str]:
    """Sentences about what is wrong with a list.

    Args:
        similarities: of the cells of all views and scales.
        shares: what each prompt wins of them.
    """
    if len(prompts) == 1:
        return [
            f"'{prompts[0]}' alone takes everything, for there is nothing else to take. Name the rest too; or ask with a threshold: "
            "in the viewer by 'threshold per prompt', from Python by threshold=0.5, or `ovs3d objects --threshold 0.5`."
        ]
    said = []
    for i, prompt in enumerate(prompts):
        share = f"{shares[i]:.1%}"
        if known.strange[i] < STRANGE and known.fits[i] < MIDDLING:
            said.append(
                f"'{prompt}' is like no word that the encoder knows, and wins {share} all the same. Check the spelling, or say it "
                "in everyday words."
            )
        elif shares[i] < NEVER or (shares[i] < SELDOM and known.fits[i] < MIDDLING):
            rival = _rival(i, similarities)
            place = f"; where it fits best, '{prompts[rival]}' fits better" if rival != i else ""
            where = "wins almost nowhere" if shares[i] < NEVER else "hardly wins anywhere"
            said.append(
                f"'{prompt}' {where} ({share}){place}. Say what is seen (colour, material), show a view of it, or drop it."
            )
        elif known.fits[i] < LOW:
            said.append(
                f"'{prompt}' wins {share}, but fits nothing in these views better than most words for other things do. If it is "
                "there, say what is seen (colour, material); else drop it."
            )
    return [*said, *alike_hints(prompts, similarities, known)]


def alike_hints(prompts: Sequence[str], similarities: Float[Tensor, "n C"], known: Standing) -> list[str]:
    """Sentences about pairs that would share their object between them."""
    standard = F.normalize(similarities - similarities.mean(0), dim=0)
    correlation = standard.T @ standard
    said = []
    for i in range(len(prompts)):
        for j in range(i + 1, len(prompts)):
            like, together = float(known.likeness[i, j]), float(correlation[i, j])
            near = like > SAME_WORDS and like + together > SAME_ALL_IN_ALL
            if together > ALIKE or near or says_less(prompts[i], prompts[j]) or says_less(prompts[j], prompts[i]):
                said.append(
                    f"'{prompts[i]}' and '{prompts[j]}' are nearly the same to the encoder (correlation {together:.2f}): they would "
                    "share their object between them. Keep one."
                )
    return said


def says_less(one: str, other: str) -> bool:
    """Whether `one` names the same thing as `other` with fewer words: "table", "wooden table"."""
    few, many = one.casefold().split(), other.casefold().split()
    return len(few) < len(many) and few[-1] == many[-1] and set(few) < set(many)


def _rival(i: int, similarities: Float[Tensor, "n C"]) -> int:
    """The prompt that wins most where prompt `i` fits best."""
    strongest = similarities[:, i].topk(max(1, len(similarities) // 50)).indices
    return int(torch.bincount(similarities[strongest].argmax(-1), minlength=similarities.shape[1]).argmax())
