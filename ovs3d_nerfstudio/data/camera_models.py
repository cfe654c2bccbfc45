"""The camera model of each frame, where nerfstudio's parser takes that of the top of transforms.json for all; and sparse points."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio
from torch import Tensor

from ovs3d_nerfstudio.data.sparse_points import read_points

MIXED = {CameraType.PERSPECTIVE, CameraType.FISHEYE}
"""Cameras that one scene may have beside each other."""


class EachFramesModel(Nerfstudio):
    """nerfstudio's parser of transforms.json, and the camera models that frames have of their own; sparse points that are named
    and cannot be read end it with a sentence."""

    def _generate_dataparser_outputs(self, split: str = "train") -> DataparserOutputs:
        parsed = super()._generate_dataparser_outputs(split)
        data = self.config.data
        path = data if data.suffix == ".json" else data / "transforms.json"
        meta = json.loads(path.read_text(encoding="utf-8"))
        kinds = {
            self._get_fname(Path(frame["file_path"]), path.parent): kind_of(meta, frame) for frame in meta["frames"]
        }
        own = torch.tensor([[kinds[photo].value] for photo in parsed.image_filenames])
        parsed.cameras.camera_type = own.to(parsed.cameras.camera_type)
        return parsed

    def _load_3D_points(self, ply_file_path: Path, transform_matrix: Tensor, scale_factor: float) -> dict[str, Tensor]:
        positions, colors = read_points(ply_file_path)
        points = torch.from_numpy(positions).float() @ transform_matrix[:, :3].T + transform_matrix[:, 3]
        return {"points3D_xyz": points * scale_factor, "points3D_rgb": torch.from_numpy(colors)}


def model_of(meta: Mapping[str, Any], frame: Mapping[str, Any]) -> Any:
    """What is named as the camera model of a frame of a transforms.json; its own goes before that of the top."""
    return frame.get("camera_model", meta.get("camera_model", "OPENCV"))


def kind_of(meta: Mapping[str, Any], frame: Mapping[str, Any]) -> CameraType:
    """The camera of a frame, whose model is a known one."""
    return CAMERA_MODEL_TO_TYPE[model_of(meta, frame)]
