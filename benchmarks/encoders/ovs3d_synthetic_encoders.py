"""Encoders that cost next to nothing, for benchmarks of all else: `synthetic:D` of any width D.

Embeddings are waves over colour and place, so that they span as many dimensions as those of a real encoder do.
"""

import hashlib

import torch
import torch.nn.functional as F

from ovs3d_nerfstudio.encoders.base import ImageTextEncoder, TokenEncoder


def waves(inputs: torch.Tensor, dim: int) -> torch.Tensor:
    """Unit vectors that change smoothly with their inputs, n×i → n×dim."""
    generator = torch.Generator().manual_seed(dim)
    directions = torch.randn(inputs.shape[-1], dim, generator=generator)
    return F.normalize(torch.cos(3 * inputs @ directions + 6 * torch.rand(dim, generator=generator)), dim=-1)


class SyntheticEncoder(ImageTextEncoder):
    @property
    def dim(self):
        return int(self.option)

    @property
    def fingerprint(self):
        return f"synthetic {self.dim}"

    def embed_text(self, prompts):
        seeds = [int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) for prompt in prompts]
        inputs = [torch.rand(5, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return waves(torch.stack(inputs), self.dim)

    def embed_boxes(self, picture, boxes, path):
        size = torch.tensor([picture.shape[1], picture.shape[0]])
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        column, row = centre.long().minimum(size - 1).unbind(-1)
        return waves(torch.cat([picture[row, column] / 255, centre / size], 1), self.dim)


class SyntheticTokens(TokenEncoder):
    fingerprint, stride = "synthetic", 16

    def embed_picture(self, picture):
        picture = picture[: picture.shape[0] // 16 * 16, : picture.shape[1] // 16 * 16]
        return waves(F.avg_pool2d(picture.permute(2, 0, 1).float() / 255, 16).permute(1, 2, 0), self.kept_dims)
