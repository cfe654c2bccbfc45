"""DINO and its successors, by way of the `transformers` package: the token encoder of the paper."""

from __future__ import annotations

import inspect
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ovs3d_nerfstudio.encoders import hub
from ovs3d_nerfstudio.encoders.base import EncoderError, TokenEncoder, file_digest
from ovs3d_nerfstudio.errors import reason
from ovs3d_nerfstudio.memory import is_out_of_memory, told_what_to_lower
from ovs3d_nerfstudio.precision import tower_precision

DEFAULT = "facebook/dino-vitb8"
"""The paper's model: DINO (Caron et al., 2021), ViT-B, patches of 8 pixels."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of which one holds the weights of a model of transformers."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoEncoder(TokenEncoder):
    """Patch tokens of a self-supervised vision transformer: DINO, DINOv2 (registers too) or DINOv3.

    Option: a model of the hub or a local folder, optionally followed by @ and the shorter edge in pixels to which a
    picture is shrunk, as in `facebook/dino-vitb8@605`. Without an option: facebook/dino-vitb8, as in the paper.
    """

    short_edge = 448
    """Shorter edge in pixels to which a larger picture is shrunk; a smaller one keeps its size. The original has 605
    (4032 × 3024 shrunk by 5) in windows of 256; here the whole picture goes in at once, which 448 keeps affordable
    (3,300 tokens at 4:3 and patches of 8 pixels) and twice the 224 that DINO was trained at."""

    def __init__(self, option: str, device: torch.device | str):
        super().__init__(option, device)
        name, at, edge = (option or DEFAULT).rpartition("@")
        if at and edge.isdecimal() and int(edge) > 0:
            self.short_edge = int(edge)
        else:
            name = option or DEFAULT
        folder = Path(name).expanduser().absolute()
        self.folder = folder if folder.is_dir() else None
        if self.folder is not None:
            self.option = f"{folder}{(option or DEFAULT).removeprefix(name)}"
        elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise EncoderError(
                f"There is no folder '{name}'; give a folder saved by transformers, or a model of the hub."
            )
        self.name = str(self.folder or name)
        self._model: Any = None

    def require(self) -> None:
        """The model is on this disk, or its hub answers."""
        if self.folder is None and not hub.cached(self.name, *WEIGHTS) and not hub.reachable():
            raise self._unreachable("it is not on this disk, and its hub does not answer")

    @cached_property
    def fingerprint(self) -> str:
        config = self._config  # first of all: it says what is wrong with a folder
        if self.folder is None:
            source = f"{self.name} {getattr(config, '_commit_hash', None) or 'unknown revision'}"
        else:
            files = (p for p in sorted(self.folder.iterdir()) if p.suffix in (".safetensors", ".bin"))
            source = "sha256 " + " ".join(file_digest(path) for path in [self.folder / "config.json", *files])
        return (
            f"dino-1 {source} short edge {self.short_edge} mean {list(self._prepared[0])} std {list(self._prepared[1])}"
        )

    @property
    def stride(self) -> int:
        return int(self._config.patch_size)

    def embed_picture(self, picture: UInt8[Tensor, "H W 3"]) -> Float[Tensor, "h w E"]:
        if self._model is None:
            self._model = self._load()
        height, width = picture.shape[:2]
        zoom = min(1.0, self.short_edge / min(height, width))
        cells = [max(1, round(edge * zoom / self.stride)) for edge in (height, width)]
        pixels = picture.to(self.device).permute(2, 0, 1)[None].float().div_(255)
        size = [n * self.stride for n in cells]
        pixels = interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in self._prepared)
        pixels = ((pixels - mean) / std).to(next(self._model.parameters()).dtype)
        with torch.inference_mode():
            tokens = self._model(pixels, **self._arguments).last_hidden_state[0]
        # In front of the patches stand the class token and, in DINOv3 and some DINOv2, register tokens.
        patches = tokens[1 + int(getattr(self._config, "num_register_tokens", 0) or 0) :]
        if len(patches) != cells[0] * cells[1]:
            raise EncoderError(
                f"'{self.name}' gives {len(patches)} tokens for {cells[0]} × {cells[1]} patches; "
                "choose a plain vision transformer such as facebook/dino-vitb8 or facebook/dinov2-base."
            )
        return patches.reshape(*cells, -1).float().cpu().clone()

    @cached_property
    def _config(self) -> Any:
        # Imported here: it takes seconds, and a run with another encoder needs none of it.
        from transformers import AutoConfig

        hub.reachable()
        try:
            config = AutoConfig.from_pretrained(self.name)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise self._unreachable(reason(error)) from error
        if not isinstance(getattr(config, "patch_size", None), int):
            raise EncoderError(
                f"'{self.name}' ({config.model_type}) is no plain vision transformer; "
                "choose one such as facebook/dino-vitb8 or facebook/dinov2-base."
            )
        return config

    @cached_property
    def _prepared(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the channels that the model was trained with."""
        from transformers.utils import cached_file

        path = cached_file(self.name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        given = json.loads(Path(path).read_text()) if path else {}
        return tuple(given.get("image_mean") or IMAGENET_MEAN), tuple(given.get("image_std") or IMAGENET_STD)

    @cached_property
    def _arguments(self) -> dict[str, bool]:
        """DINO's position codes are a table for one picture size; the later models compute theirs for any size."""
        asks = "interpolate_pos_encoding" in inspect.signature(type(self._model).forward).parameters
        return {"interpolate_pos_encoding": True} if asks else {}

    def _load(self) -> Any:
        from transformers import AutoModel

        config = self._config
        with told_what_to_lower("loading the encoder", f" {self.name}"):
            try:
                # transformers takes torch's fused attention where the model has it: nothing of tokens times tokens is held.
                model = AutoModel.from_pretrained(self.name)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise self._unreachable(reason(error)) from error
            if config.model_type == "vit":
                # The original reads DINO's last block before the final normalisation; FDA's 0.7 was chosen on that. The
                # authors of DINOv2 and DINOv3 publish their tokens after it.
                model.layernorm = nn.Identity()
            return model.to(self.device, tower_precision(self.device)).eval().requires_grad_(False)

    def _unreachable(self, why: str) -> EncoderError:
        return EncoderError(
            f"The token encoder '{self.name}' cannot be loaded ({why}); "
            "give a model of the hub while online, a folder saved by transformers as dino:FOLDER, "
            "or use the token encoder 'offline'."
        )
