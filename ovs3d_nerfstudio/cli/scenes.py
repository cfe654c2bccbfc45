"""A scene that no run has opened yet: its pictures by a dataparser, and the encoders that a method would use on it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ovs3d_nerfstudio.errors import CommandError

if TYPE_CHECKING:
    from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig

    from ovs3d_nerfstudio.pipeline import OVS3DPipelineConfig

DATAPARSERS = (
    *(
        "nerfstudio-data",
        "minimal-parser",
        "arkit-data",
        "blender-data",
        "instant-ngp-data",
        "nuscenes-data",
        "dnerf-data",
    ),
    *("phototourism-data", "dycheck-data", "scannet-data", "sdfstudio-data", "nerfosr-data", "sitcoms3d-data"),
    *("scannetpp-data", "colmap"),
)
"""The names that nerfstudio's own have; it takes seconds to say them itself."""


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """The options of a command, and what follows them: the name of a dataparser, and its options."""
    plugins = {entry.name for entry in entry_points(group="nerfstudio.dataparser_configs")}
    for i, word in enumerate(words):
        if word in plugins.union(DATAPARSERS) and not (i and words[i - 1].startswith("-")):
            return words[:i], words[i:]
    return words, []


@dataclass
class SceneOptions:
    """What the commands about a scene ask alike; the defaults are those of training, so that the cache is the same. Name a
    dataparser last, with its options, as in training."""

    data: Path
    """The scene: a folder, or a file in it such as transforms.json."""
    method: str = "ovs3d"
    """The method whose encoders and scales are the defaults: ovs3d, ovs3d-paper, ovs3d-lite, or another variant of it."""
    image_text_encoder: str | None = None
    """What embeds patches and prompts, as in training; default: the method's."""
    token_encoder: str | None = None
    """What FDA compares pixels by, as in training; default: the method's."""
    scales: tuple[float, ...] | None = None
    """Patches along the shorter side of a picture, one number a scale; default: the method's."""
    clip_features: Literal["patches", "dense"] | None = None
    """Whether patches are embedded one by one, or pooled from dense features, as in training; default: the method's."""
    feature_cache_dir: Path | None = None
    """Folder of the feature cache; default: .ovs3d-cache in the data folder."""
    dataparser: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Name and options of the dataparser, as `split_words` left them; default: nerfstudio-data."""

    def resolved(self) -> OVS3DPipelineConfig:
        """The method's pipeline config with these options in it.

        Raises CommandError for a method that is not one of ours, OptionError for scales that cannot be.
        """
        from ovs3d_nerfstudio.engine.option_checks import check_scales
        from ovs3d_nerfstudio.features.extraction import default_cache_dir
        from ovs3d_nerfstudio.run_files import our_methods

        ours = our_methods()
        if self.method not in ours:
            raise CommandError(f"--method {self.method} is none of ours; choose one of: {', '.join(ours)}.")
        if self.scales:
            check_scales("--scales", self.scales)
        config = copy.deepcopy(ours[self.method])
        config.image_text_encoder = self.image_text_encoder or config.image_text_encoder
        config.token_encoder = self.token_encoder or config.token_encoder
        config.datamanager.scales = self.scales or config.datamanager.scales
        config.datamanager.clip_features = self.clip_features or config.datamanager.clip_features
        config.datamanager.feature_cache_dir = self.feature_cache_dir or default_cache_dir(self.data)
        return config

    def training_pictures(self) -> list[Path]:
        """The training pictures of the scene, in the parser's order.

        Raises SceneError when there is no such scene, or none that the parser can read or that can be trained from.
        """
        from ovs3d_nerfstudio.data.scene_checks import check_cameras, readable_scene

        parser = self.parser()
        with readable_scene(parser, self.data):
            parsed = parser.setup().get_dataparser_outputs("train")
        check_cameras(parsed.cameras, str(self.data))
        return parsed.image_filenames

    def parser(self) -> DataParserConfig:
        """How the scene is read."""
        from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
        from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

        parser: DataParserConfig = NerfstudioDataParserConfig()
        if self.dataparser:
            parser = tyro.cli(AnnotatedDataParserUnion, prog="ovs3d …", args=self.dataparser)
        parser.data = self.data
        return parser
