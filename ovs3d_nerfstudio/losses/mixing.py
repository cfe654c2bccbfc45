"""How the encoder mixes what a patch shows into one embedding, learned from the scene itself.

An image-level encoder given a patch of several things answers with something between them. Three properties of that
mixture are the encoder's, not the scene's, and are learned here with the field: pixels at a patch's centre count more
than those at its border (the *aperture*); some classes outweigh others (their *weights*); and images lie off the text by
a common *offset*, the modality gap. With them the embedding of a patch is explained by which class each of its pixels
is (`losses.unmixing_loss`), as spectral unmixing explains a pixel by the materials in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

OFFSET_GAIN, DIRECTION_GAIN, APERTURE_GAIN = 2.0, 0.1, 5.0
"""Speeds of learning against that of the weights. A class keeps near to its prompt: what all share goes into the offset."""


class PatchMixture(nn.Module):
    """The parameters of the mixture; `configure` fits their sizes to the prompts and the basis, a checkpoint does too."""

    def __init__(self) -> None:
        super().__init__()
        self.aperture_logit = nn.Parameter(torch.zeros(1))
        self.offset = nn.Parameter(torch.zeros(0))
        self.directions = nn.Parameter(torch.zeros(0, 0))
        self.log_weights = nn.Parameter(torch.zeros(0))

    def configure(self, prompts: Float[Tensor, "K C"]) -> None:
        """Start where nothing is known but the prompts, in the basis. The parameters stay the same objects, so that
        optimizers keep them."""
        self.offset.data = prompts.new_zeros(len(prompts))
        self.directions.data = prompts.T / DIRECTION_GAIN
        self.log_weights.data = torch.zeros_like(self.directions[:, 0])

    @property
    def aperture(self) -> Float[Tensor, ""]:
        """`a` of the weight exp(−a u²) of a pixel at u ∈ [−1, 1] of a patch's half side; 0 weighs all alike."""
        return F.softplus(APERTURE_GAIN * self.aperture_logit - 1)[0]

    def rays(self, probabilities: Float[Tensor, "n C"]) -> Float[Tensor, "n K"]:
        """What rays of these classes give to the embedding of a patch: Σ_c p_c w_c (d_c + offset)."""
        classes = DIRECTION_GAIN * self.directions + OFFSET_GAIN * self.offset
        return (probabilities * self.log_weights.exp()) @ classes

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # The numbers of prompts and coefficients are the run's, not the config's: take them from the checkpoint.
        for name, parameter in self.named_parameters(recurse=False):
            if prefix + name in state_dict:
                parameter.data = torch.empty_like(state_dict[prefix + name], device=parameter.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
