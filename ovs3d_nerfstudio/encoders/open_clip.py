"""CLIP and its kin, by way of the `open_clip` package: the image-text encoder of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import MultiheadAttention
from torch.nn.functional import interpolate, linear, normalize

from ovs3d_nerfstudio.encoders import hub
from ovs3d_nerfstudio.encoders.base import EncoderError, ImageTextEncoder, check_lengths, file_digest
from ovs3d_nerfstudio.errors import reason
from ovs3d_nerfstudio.memory import in_batches, is_out_of_memory, told_what_to_lower
from ovs3d_nerfstudio.precision import tower_precision

DENSE_EDGE = 1.5
"""Shorter edge of a picture for dense features, as a multiple of the input size."""
DENSE_SPREAD = 5.0
"""Standard deviation in tokens of the Gaussian that draws attention to a token's neighbours."""
DEFAULT = "ViT-B-16@openai"
"""The paper's model and weights."""
DEFAULT_ON_HUB = "timm/vit_base_patch16_clip_224.openai"
"""Where open_clip's list says that these lie: known here, for open_clip takes seconds to say it."""

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Files of a hub's model of which one holds its weights, where open_clip's list names none."""
PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""open_clip's names of them; of the halves, normalisations keep single precision."""
AMPLE_TOKENS = 2048
"""More than any prompt of 300 characters has."""

# What CLIP was trained with (Radford et al., 2021); models trained otherwise say so in open_clip's list of weights.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class OpenClipEncoder(ImageTextEncoder):
    """A model of the open_clip package. Option: `MODEL@WEIGHTS`, or `MODEL` alone for its `openai` weights.

    WEIGHTS is a tag of open_clip's list, downloaded once, or a local file (.safetensors, or .pt and .bin that hold
    plain tensors). Without an option: ViT-B-16@openai, as in the paper. A local copy of OpenAI's weights needs the
    model whose name ends in -quickgelu; for a tag the activation is set as its weights need it.
    """

    def __init__(self, option: str, device: torch.device | str):
        super().__init__(option, device)
        # Imported here: it takes seconds, and a run with another encoder needs none of it.
        import open_clip

        name, _, weights = (option or DEFAULT).partition("@")
        self.model_name = name.replace("/", "-")  # OpenAI's own spelling, ViT-B/16, is known to open_clip no more
        config = open_clip.get_model_config(self.model_name)
        if config is None:
            raise EncoderError(
                f"open_clip has no model '{name}'; this lists them: "
                "python -c 'import open_clip; print(open_clip.list_models())'"
            )
        self.weights = weights or "openai"
        tags = open_clip.list_pretrained_tags_by_model(self.model_name)
        if self.weights in tags:
            self._file: Path | None = None  # known once it is downloaded
            trained = [open_clip.get_pretrained_cfg(self.model_name, self.weights)]
            wants_quick_gelu = bool(trained[0].get("quick_gelu", False))
        else:
            self._file = Path(self.weights).expanduser().absolute()
            self.option = f"{name}@{self._file}"
            if not self._file.is_file():
                raise EncoderError(
                    f"'{self.weights}' is neither a file nor a tag of weights for {name}; "
                    f"give a file, or one of these tags: {', '.join(tags) or 'none is published'}."
                )
            trained = [open_clip.get_pretrained_cfg(self.model_name, tag) for tag in tags]
            wants_quick_gelu = False
        # open_clip only warns when weights and model differ in this, and embeds with the wrong activation all the same.
        self.quick_gelu = bool(config.get("quick_gelu", False)) or wants_quick_gelu
        # A file does not say how its pictures were prepared: as for the model's published weights where those agree.
        prepared = {(tuple(t.get("mean") or CLIP_MEAN), tuple(t.get("std") or CLIP_STD)) for t in trained}
        self.mean, self.std = prepared.pop() if len(prepared) == 1 else (CLIP_MEAN, CLIP_STD)
        self._dim = int(config["embed_dim"])
        size = config["vision_cfg"].get("image_size", 224)
        if not isinstance(size, int):
            if len(set(size)) != 1:
                raise EncoderError(
                    f"{name} takes crops of {size[0]} × {size[1]} pixels; choose a model that takes squares."
                )
            size = size[0]
        self.input_size = int(size)
        if self.device.type == "cuda":
            self.batch_size = 256
        self._visual: Any = None
        self._text: Any = None
        self._tokenizer: Any = None

    @property
    def dim(self) -> int:
        return self._dim

    @cached_property
    def fingerprint(self) -> str:
        weights = self.weights
        if self._file is not None:
            weights = f"sha256 {file_digest(self._file)}"
        activation = " quickgelu" if self.quick_gelu else ""
        return (
            f"open_clip-1 {self.model_name}{activation} {weights} "
            f"{self.input_size} mean {list(self.mean)} std {list(self.std)}"
        )

    def require(self) -> None:
        """Weights of a tag are on this disk, or their hub answers."""
        import open_clip

        if self._file is not None:
            return
        published = open_clip.get_pretrained_cfg(self.model_name, self.weights).get("hf_hub", "")
        model, _, file = published.rpartition("/")
        if model and not hub.cached(model, *([file] if file else WEIGHTS)) and not hub.reachable():
            raise self._unreachable("they are not on this disk, and their hub does not answer")

    def embed_text(self, prompts: Sequence[str]) -> Float[Tensor, "C D"]:
        if not prompts:
            return torch.zeros(0, self.dim)
        import open_clip

        if self._text is None:
            # Prompts are few, and compared with all there is: a CPU embeds them in single precision.
            model = self._load(torch.float32 if self.device.type == "cpu" else tower_precision(self.device))
            model.visual = None
            self._text = model
        try:
            if self._tokenizer is None:
                self._tokenizer = open_clip.get_tokenizer(self.model_name)
            tokens = self._tokenizer(list(prompts))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise EncoderError(
                f"The tokenizer of {self.model_name} cannot be loaded ({reason(error)}); it comes from a hub: "
                "go online once, or choose a model such as ViT-B-16, whose tokenizer is part of open_clip."
            ) from error
        # With ample room nothing is cut off; an empty text shows what fills the rest.
        ample = self._tokenizer([*prompts, ""], context_length=AMPLE_TOKENS)
        lengths = (ample[:-1] != ample[-1, -1]).sum(-1).tolist()
        check_lengths(prompts, lengths, tokens.shape[1], self.model_name)
        with torch.inference_mode():
            embeddings = self._text.encode_text(tokens.to(self.device))
        # Worked out outside of inference mode: what becomes a buffer of the model is written to when several ranks train.
        return normalize(embeddings.float(), dim=-1).cpu()

    def embed_crops(self, crops: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        visual = self._image_tower()
        with torch.inference_mode():
            embeddings = visual(self._prepare(crops))
        # CoCa's image tower returns its tokens as well.
        return embeddings[0] if isinstance(embeddings, tuple) else embeddings

    @property
    def dense_fingerprint(self) -> str:
        return f"{self.fingerprint} dense-1 edge {DENSE_EDGE} spread {DENSE_SPREAD}"

    def embed_dense(self, picture: UInt8[Tensor, "H W 3"], path: Path) -> Float[Tensor, "h w D"]:
        """Tokens of a vision transformer, by way of the text space's own projection, with the last layer's attention made
        local: NACLIP (Hajimiri et al., *Pay Attention to Your Neighbours*, WACV 2025, §3). Windows of the input size,
        half of one apart and averaged where they overlap, keep the position codes those of the training.
        """
        visual = self._image_tower()
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        plain = blocks is not None and isinstance(getattr(blocks[-1], "attn", None), MultiheadAttention)
        if not plain or getattr(visual, "attn_pool", None) is not None:
            raise EncoderError(
                f"{self.model_name} is no plain vision transformer, and has no dense features here; choose one such as "
                "ViT-B-16, or --pipeline.datamanager.clip-features patches."
            )
        patch = visual.patch_size[0]
        side = self.input_size // patch
        height, width = picture.shape[:2]
        zoom = DENSE_EDGE * side / min(height, width)
        rows, cols = (max(side, round(edge * zoom)) for edge in (height, width))
        pixels = picture.to(self.device).permute(2, 0, 1)[None].float().div_(255)
        pixels = interpolate(pixels, (rows * patch, cols * patch), mode="bilinear", antialias=True, align_corners=False)
        total = torch.zeros(rows, cols, self.dim)
        corners = [(top, left) for top in _starts(rows, side) for left in _starts(cols, side)]

        def embed(start: int, stop: int) -> None:
            some = corners[start:stop]
            crops = torch.cat(
                [pixels[..., t * patch : (t + side) * patch, u * patch : (u + side) * patch] for t, u in some]
            )
            with torch.inference_mode():
                tokens = normalize(local_tokens(visual, self._prepare(crops), side).float(), dim=-1).cpu()
            for (top, left), token in zip(some, tokens, strict=True):
                total[top : top + side, left : left + side] += token.view(side, side, -1)

        self.batch_size = in_batches(len(corners), self.batch_size, embed)
        return normalize(total, dim=-1)

    def _image_tower(self) -> Any:
        if self._visual is None:
            self._visual = self._load(tower_precision(self.device)).visual.to(memory_format=torch.channels_last)
        return self._visual

    def _prepare(self, crops: Float[Tensor, "B 3 S S"]) -> Tensor:
        mean, std = (torch.tensor(values, device=crops.device)[:, None, None] for values in (self.mean, self.std))
        return ((crops - mean) / std).to(tower_precision(self.device), memory_format=torch.channels_last)

    def _load(self, dtype: torch.dtype) -> Any:
        """The model with both towers; the caller keeps the one it wants and lets the other go."""
        import open_clip

        file = self._file or self._download()
        # open_clip < 2.29 has no such argument; there torch's own default (2.6 and later) is what keeps code from running.
        known = signature(open_clip.create_model).parameters
        safely = {"load_weights_only": True} if "load_weights_only" in known else {}
        with told_what_to_lower("loading the encoder", f" {self.model_name}"):
            try:
                model = open_clip.create_model(
                    self.model_name,
                    pretrained=str(file),
                    precision=PRECISIONS[dtype],
                    device=self.device,
                    force_quick_gelu=self.quick_gelu,
                    **safely,
                )
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise EncoderError(
                    f"'{file}' cannot be loaded as weights of {self.model_name} ({reason(error)}); give a .safetensors "
                    "file, or a .pt or .bin file of plain tensors, that was saved from this model."
                ) from error
        return model.eval().requires_grad_(False)

    def _download(self) -> Path:
        import open_clip

        hub.reachable()
        try:
            return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(self.model_name, self.weights)))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise self._unreachable(reason(error)) from error

    def _unreachable(self, why: str) -> EncoderError:
        return EncoderError(
            f"The weights '{self.weights}' of {self.model_name} cannot be downloaded ({why}); "
            f"go online once, name a local copy as open_clip:{self.model_name}@FILE, or use the encoder 'offline'."
        )


def _starts(length: int, side: int) -> list[int]:
    """Where windows of `side` tokens start along an edge of `length`: half a window apart, the last one flush."""
    return [*range(0, length - side, max(1, side // 2)), length - side]


def local_tokens(visual: Any, pixels: Float[Tensor, "B 3 S S"], side: int) -> Float[Tensor, "B TT D"]:
    """Projected tokens of an open_clip vision transformer whose last block attends by key to key, nearby first, and has
    neither skip connection nor MLP (NACLIP §3.2 and §3.3); T = `side` tokens along an edge."""
    block, kept = visual.transformer.resblocks[-1], []
    hook = block.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    try:
        visual(pixels)
    finally:
        hook.remove()
    x = kept[0] if block.attn.batch_first else kept[0].transpose(0, 1)
    x = block.ln_1(x[:, -side * side :])  # the class token stands in front
    attention = block.attn
    _, key, value = linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    key, value = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (key, value))
    at = torch.arange(side, device=x.device, dtype=torch.float32)
    near = (-((at[:, None] - at) ** 2) / (2 * DENSE_SPREAD**2)).exp()
    nearness = torch.einsum("ik,jl->ijkl", near, near).reshape(side * side, side * side)
    weights = (key @ key.transpose(-1, -2) / key.shape[-1] ** 0.5 + nearness.to(key.dtype)).softmax(-1)
    out = attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
    return visual.ln_post(out) @ visual.proj
