"""`ovs3d extract`: the features of a scene, without training."""

from __future__ import annotations

from dataclasses import dataclass

from ovs3d_nerfstudio.cli.scenes import SceneOptions, split_words

__all__ = ["Command", "split_words"]


@dataclass
class Command(SceneOptions):
    """Extract the features of a scene's training pictures into the cache that training reads, and say how large they are.
    What is cached is not made again: stop it when you like, and start it again. Give the encoders, scales and dataparser
    that training will have; change one, and other files are made."""

    finer: float | None = None
    """How many times finer than the finest scale patches are cut where the pyramid disagrees, as in training; 0 cuts none;
    default: the method's."""
    device: str | None = None
    """Where to embed: cuda, cpu…; default: a GPU where there is one."""

    def main(self) -> None:
        """Raises CommandError, OptionError, SceneError, EncoderError, PictureError and CacheError."""
        import torch
        from nerfstudio.utils.rich_utils import CONSOLE

        from ovs3d_nerfstudio.encoders.base import encoders
        from ovs3d_nerfstudio.engine.option_checks import check_device, check_finer
        from ovs3d_nerfstudio.features.extraction import extract

        config = self.resolved()
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device("--device", device)
        finer = config.datamanager.finer if self.finer is None else self.finer
        check_finer("--finer", finer)
        cache = config.datamanager.feature_cache_dir
        assert cache is not None, "resolved() names one"
        pictures = self.training_pictures()
        extract(
            pictures,
            *encoders(config.image_text_encoder, config.token_encoder, device),
            config.datamanager.scales,
            cache,
            CONSOLE,
            config.datamanager.clip_features,
            finer,
        )
