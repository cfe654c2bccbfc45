"""A scene that no run has opened yet: its pictures by a dataparser, and the encoders that a method would use on it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from ovs3d_nerfstudio.data.scene_checks import check_cameras, readable_scene
from ovs3d_nerfstudio.engine.option_checks import check_scales
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.features.extraction import ClipFeatures, default_cache_dir
from ovs3d_nerfstudio.pipeline import OVS3DPipelineConfig
from ovs3d_nerfstudio.run_files import our_methods


@dataclass
class SceneOptions:
    """What `extract` and `preview` ask alike; the defaults are those of training, so that the cache is the same."""

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
    clip_features: ClipFeatures | None = None
    """Whether patches are embedded one by one, or pooled from dense features, as in training; default: the method's."""
    feature_cache_dir: Path | None = None
    """Folder of the feature cache; default: .ovs3d-cache in the data folder."""
    dataparser: AnnotatedDataParserUnion = field(default_factory=NerfstudioDataParserConfig)
    """How the scene is read, as in training: name it last, with its options."""

    def resolved(self) -> OVS3DPipelineConfig:
        """The method's pipeline config with these options in it.

        Raises CommandError for a method that is not one of ours, OptionError for scales that cannot be.
        """
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
        parser: DataParserConfig = self.dataparser
        parser.data = self.data
        with readable_scene(parser, self.data):
            parsed = parser.setup().get_dataparser_outputs("train")
        check_cameras(parsed.cameras, str(self.data))
        return parsed.image_filenames
