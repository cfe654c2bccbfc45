"""The two benchmark encoders, joined from outside through the package's own entry points, as anybody's would be.

Their code and weights lie in a folder beside the checkout (`../shared/encoders`, or OVS3D_BENCHMARK_ENCODERS); this file
only fits them to the interface.
"""

import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ovs3d_nerfstudio.encoders.base import EncoderError, ImageTextEncoder, pool_boxes
from ovs3d_nerfstudio.encoders.offline import embed_text_minilm
from ovs3d_nerfstudio.prompts.prompts import read_classes_file

FOLDER = Path(os.environ.get("OVS3D_BENCHMARK_ENCODERS", Path(__file__).parents[2].parent / "shared" / "encoders"))
SURFACES = ("wooden table", "white brick wall")


@cache
def _module(path: Path):
    if not path.is_file():
        raise EncoderError(f"The benchmark encoder {path} is missing; set OVS3D_BENCHMARK_ENCODERS to its folder.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


class Mixture(ImageTextEncoder):
    """Simulated: mixes the text embeddings of what a box shows, read from the view's label map. Rendered scenes only."""

    dim = 384
    file = FOLDER / "mixture_encoder.py"

    @property
    def fingerprint(self) -> str:
        return f"mixture {_digest(self.file)}"

    def embed_text(self, prompts):
        return embed_text_minilm(prompts)

    def embed_boxes(self, picture, boxes, path):
        scene = path.parent.parent
        classes = read_classes_file(scene / "segmentations" / "classes.txt")
        listed = [
            line.strip() for line in (scene / "segmentations" / "classes.txt").read_text().splitlines() if line.strip()
        ]
        order = np.array([classes.index(name) for name in listed] + [-1])
        labels = Image.open(scene / "label_maps" / f"{path.stem}.png")
        labels = np.array(labels.resize((picture.shape[1], picture.shape[0]), Image.Resampling.NEAREST)).astype(int)
        labels = order[np.where(labels < len(listed), labels, -1)]
        things = np.array([name not in SURFACES for name in classes])
        encoder = _encoder(self.file, tuple(classes), tuple(things.tolist()))
        return torch.from_numpy(np.stack([encoder.encode(path.stem, labels, box) for box in boxes.tolist()])).float()


@cache
def _encoder(file: Path, classes: tuple[str, ...], things: tuple[bool, ...]):
    return _module(file).MixtureEncoder(embed_text_minilm(list(classes)).numpy(), np.array(things))


class Tabletop(ImageTextEncoder):
    """EfficientNet-Lite0 with an adapter trained on other tabletop scenes. Option: the side in pixels of the crops it is shown, or
    `pooled`."""

    dim = 384
    input_size = 128
    """A third of the time of 224, and what it costs is in docs/results.md, *At what size crops are shown*."""
    folder = FOLDER / "tabletop"
    box_pixels = 160

    def __init__(self, option, device):
        super().__init__(option, device)
        if option.isdecimal() and int(option):
            self.input_size = int(option)
        elif option not in ("", "pooled"):
            raise EncoderError(
                f"tabletop has no option '{option}'; give a crop's side in pixels (tabletop:160), or tabletop:pooled."
            )

    @property
    def fingerprint(self) -> str:
        way = self.option if self.option == "pooled" else ""  # a size is told by the next word
        return f"tabletop {way} {self.input_size} {_digest(self.folder / 'encoder.py', self.folder / 'adapter.safetensors')}"

    @property
    def _tower(self):
        return _tower(self.folder / "encoder.py")

    def embed_text(self, prompts):
        return self._tower.encode_text(list(prompts))

    def embed_crops(self, crops):
        return self._tower.encode_image((crops * 255 - 127) / 128)

    def embed_boxes(self, picture, boxes, path):
        if self.option != "pooled":
            return super().embed_boxes(picture, boxes, path)
        with torch.inference_mode():
            height, width = picture.shape[:2]
            zoom = self.box_pixels / float((boxes[:, 2:] - boxes[:, :2]).mean())
            cells = [max(1, round(side * zoom / 32)) for side in (height, width)]
            pixels = (picture.permute(2, 0, 1)[None].float() - 127) / 128
            size = [32 * n for n in cells]
            resized = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
            feature_map = self._tower.image(resized.contiguous(memory_format=torch.channels_last))[0]
            scale = torch.tensor([cells[1] / width, cells[0] / height]).repeat(2)
            return self._tower._head(pool_boxes(feature_map, boxes * scale)).float()


@cache
def _tower(file: Path):
    return _module(file).TabletopEncoder().to(memory_format=torch.channels_last)
