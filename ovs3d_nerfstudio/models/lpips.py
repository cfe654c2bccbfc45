"""LPIPS where its weights are on disk already: nerfstudio's models build it whether it is used or not, and that downloads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor, nn


class OptionalLpips(nn.Module):
    """LPIPS where its weights are on disk already; never a download, never needed for training."""

    def __init__(self, normalize: bool):
        super().__init__()
        self.normalize = normalize

    def forward(self, prediction: Float[Tensor, "1 3 H W"], truth: Float[Tensor, "1 3 H W"]) -> Float[Tensor, ""]:
        """LPIPS, or NaN without its weights."""
        if not (Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth").exists():
            return torch.tensor(torch.nan)
        from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

        return learned_perceptual_image_patch_similarity(prediction, truth, normalize=self.normalize)


@contextmanager
def lpips_optional() -> Iterator[None]:
    """Nerfacto builds LPIPS whether it is used or not, and its constructor downloads AlexNet: offline it dies."""
    with mock.patch("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", OptionalLpips):
        yield
