"""open_clip and DINO with small random weights: `python -m pretended.encoders WEIGHTS FOLDER PICTURE…`.

Features are extracted, and prompts embedded, twice: as `ovs3d extract` does, and as training does, inside nerfstudio's autocast.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from children import TINY_CLIP, specs
from safetensors.torch import save_file

from pretended.cuda import pretend
from pretended.tensors import PretendedDevice

ALONE, TRAINING = "alone", "training"
"""The caches' folders."""
SCALES = (2.0, 3.0)
PROMPTS = ["a cat", "a rocket"]


def main(weights: Path, folder: Path, pictures: list[Path]) -> None:
    pretend()
    import open_clip
    from nerfstudio.utils.rich_utils import CONSOLE

    from ovs3d_nerfstudio.encoders.base import image_text_encoder, token_encoder
    from ovs3d_nerfstudio.features.extraction import extract
    from ovs3d_nerfstudio.prompts.embedding import Embedder
    from ovs3d_nerfstudio.prompts.segmentation import Segmenter

    open_clip.factory._MODEL_CONFIGS["tiny-ovs3d"] = TINY_CLIP
    clip, dino = specs(weights).values()
    for features in ("patches", "dense"):
        for name, autocast in ((ALONE, False), (TRAINING, True)):
            with PretendedDevice(), torch.autocast("cuda", enabled=autocast):
                # Anew each time: what an encoder loads when it is first asked must not depend on the caller either.
                encoders = image_text_encoder(clip, "cuda"), token_encoder(dino, "cuda")
                extract(pictures, *encoders, SCALES, folder / name, CONSOLE, features)
                asked = Segmenter().cuda()
                asked.encoder, asked.fingerprint = clip, encoders[0].fingerprint
                save_file({"text": Embedder("cuda")(asked, PROMPTS)}, folder / name / f"text-{features}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
