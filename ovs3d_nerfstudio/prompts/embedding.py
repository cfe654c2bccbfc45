"""Prompts of the moment in the space of a run: embedded when they are first asked for, and remembered."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ovs3d_nerfstudio.encoders.base import EncoderError, ImageTextEncoder, image_text_encoder
from ovs3d_nerfstudio.errors import reason
from ovs3d_nerfstudio.precision import single_precision
from ovs3d_nerfstudio.prompts.likes import Like, LikesError
from ovs3d_nerfstudio.prompts.prompts import prompt_key
from ovs3d_nerfstudio.prompts.segmentation import Segmenter


class Embedder:
    """Embeds prompts as the features of a run were: its own prompts are taken from its checkpoint, only others need the
    text encoder, which is loaded once."""

    def __init__(self, device: torch.device | str):
        self.device = device
        self._encoder: ImageTextEncoder | None = None
        self._known: dict[str, Float[Tensor, "D"]] = {}  # noqa: F821
        self._fingerprint = ""
        self.seconds = 0.0
        """Time that embedding has taken so far, without the loading of the encoder."""

    @single_precision()
    def __call__(self, segmenter: Segmenter, prompts: Sequence[str]) -> Float[Tensor, "C D"]:
        """Embeddings of `prompts` on the CPU.

        Raises:
            EncoderError: the run's encoder cannot be had here or is another, or a prompt is too long for it.
            LikesError: a prompt without words is of another encoder.
        """
        if segmenter.fingerprint != self._fingerprint:
            self._encoder, self._known, self._fingerprint = None, {}, segmenter.fingerprint
        trained = zip(segmenter.prompts, segmenter.text.cpu(), strict=True)
        known = self._known | {prompt_key(prompt): row for prompt, row in trained}
        clicked = {prompt_key(prompt): _feature(prompt, segmenter) for prompt in prompts if isinstance(prompt, Like)}
        new = [prompt for prompt in prompts if prompt_key(prompt) not in known | clicked]
        if new:
            tower = self._tower(segmenter)
            start = time.perf_counter()
            known |= dict(zip(map(prompt_key, new), tower.embed_text(new).float().cpu(), strict=True))
            self.seconds += time.perf_counter() - start
        self._known = known
        return torch.stack([(known | clicked)[prompt_key(prompt)] for prompt in prompts])

    def _tower(self, segmenter: Segmenter) -> ImageTextEncoder:
        if self._encoder is not None:
            return self._encoder
        try:
            encoder = image_text_encoder(segmenter.encoder, self.device)
            fingerprint = encoder.fingerprint
        except (ImportError, EncoderError) as error:
            raise EncoderError(
                f"The text encoder '{segmenter.encoder}' cannot be had here ({reason(error)}); mend that, or use the run's "
                "own prompts."
            ) from error
        if fingerprint != segmenter.fingerprint:
            raise EncoderError(
                f"The run's features come from {segmenter.fingerprint}, but {segmenter.encoder} is "
                f"{fingerprint} here; install the same weights, or use the run's own prompts."
            )
        encoder.embed_text(["first"])  # which loads it
        self._encoder = encoder
        return encoder


def _feature(like: Like, segmenter: Segmenter) -> Float[Tensor, "D"]:  # noqa: F821
    """What a prompt without words stands for. Raises LikesError when it is not of the run's encoder."""
    if like.fingerprint != segmenter.fingerprint or len(like.feature) != len(segmenter.basis):
        raise LikesError(
            f"'{like}' was clicked in features of {like.fingerprint} ({len(like.feature)} numbers), but the run's come from "
            f"{segmenter.fingerprint} ({len(segmenter.basis)}); click it again in this run."
        )
    return torch.tensor(like.feature)
