"""Method specifications: one recipe, and what each variant changes.

nerfstudio imports this module at every `ns-*` command, whatever the method: it must import nothing but nerfstudio and
our own modules that do the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.plugins.types import MethodSpecification

from ovs3d_nerfstudio.data import rays
from ovs3d_nerfstudio.data.images import OVS3DImagesConfig
from ovs3d_nerfstudio.data.rays import OVS3DDataManagerConfig
from ovs3d_nerfstudio.engine import trainer
from ovs3d_nerfstudio.engine.cooling import CoolingSchedulerConfig
from ovs3d_nerfstudio.engine.trainer import OVS3DTrainerConfig
from ovs3d_nerfstudio.models import nerf
from ovs3d_nerfstudio.models.nerf import OVS3DModelConfig
from ovs3d_nerfstudio.models.splat import OVS3DSplatModelConfig
from ovs3d_nerfstudio.pipeline import OVS3DPipelineConfig


@dataclass
class FusedAdamOptimizerConfig(AdamOptimizerConfig):
    """Adam as one kernel: about seven times faster on a large hash table, where a step of plain Adam costs more than the grid."""

    fused: bool = True
    """Whether to use torch's fused implementation."""


def _optimizers(first: int = 0, **schedule: Any) -> dict:
    """Adam, decayed to a tenth from step `first` to the run's last (3D-OVS): 0.01–0.02 for grids, less for networks."""

    def group(lr: float) -> dict:
        decay = CoolingSchedulerConfig(lr_final=lr / 10, warmup_steps=first, **schedule)
        return {"optimizer": FusedAdamOptimizerConfig(lr=lr, eps=1e-15), "scheduler": decay}

    return {
        "proposal_networks": group(1e-2),
        "fields": group(1e-2),
        "camera_opt": group(1e-3),
        "semantic_grid": group(2e-2),
        "semantic_head": group(1e-3),
        "patch_mixture": group(1e-2),
    }


def _device() -> Literal["cpu", "cuda", "mps"]:
    """nerfstudio's own default is CUDA, present or not."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _trainer(
    name: str, steps: int, datamanager: Any, model: Any, optimizers: dict, **pipeline: Any
) -> OVS3DTrainerConfig:
    """What all methods have in common."""
    return OVS3DTrainerConfig(
        method_name=name,
        machine=MachineConfig(device_type=_device()),
        max_num_iterations=steps,
        steps_per_save=2000,
        steps_per_eval_batch=500,
        steps_per_eval_image=min(2000, steps // 3),
        pipeline=OVS3DPipelineConfig(datamanager=datamanager, model=model, **pipeline),
        optimizers=optimizers,
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer",
    )


def _nerf(
    name: str, steps: int, rays_a_step: int, windows: dict[str, int], model: OVS3DModelConfig, **pipeline: Any
) -> OVS3DTrainerConfig:
    """The recipe for rays: `rays_a_step`, and what the variant changes of the first of them and of the windows beside them."""
    datamanager = OVS3DDataManagerConfig(
        dataparser=NerfstudioDataParserConfig(),
        train_num_rays_per_batch=rays_a_step,
        eval_num_rays_per_batch=rays_a_step,
        **windows,  # type: ignore[arg-type]
    )
    trainer = _trainer(name, steps, datamanager, model, _optimizers(), **pipeline)
    trainer.mixed_precision = True
    return trainer


def _begin(model: OVS3DSplatModelConfig, geometry: int, semantics: int) -> None:
    """When the losses begin in `semantics` steps behind those of `geometry`."""
    model.semantics_start = geometry
    model.fda_start = geometry + semantics // 12
    model.fda_apart_start = geometry + 2 * semantics // 5


def _splat(
    name: str,
    geometry: int,
    semantics: int,
    rates: dict[str, float],
    windows: dict[str, int],
    model: OVS3DSplatModelConfig,
    **pipeline: Any,
) -> OVS3DTrainerConfig:
    """The recipe for Gaussians: steps of geometry, and of semantics behind them. In single precision, as splatfacto."""
    datamanager = OVS3DImagesConfig(
        dataparser=NerfstudioDataParserConfig(load_3D_points=True),
        cache_images_type="uint8",
        **windows,  # type: ignore[arg-type]
    )
    _begin(model, geometry, semantics)
    optimizers = _splat_optimizers(geometry, rates)
    return _trainer(name, geometry + semantics, datamanager, model, optimizers, **pipeline)


_UNMIXING: dict[str, Any] = {
    # Weights of the losses when patches are unmixed; what each earns is in docs/results.md.
    "patch_loss_mult": 1.0,
    "unmixing_loss_mult": 1.0,
    "color_loss_mult": 2.0,
    "feature_loss_mult": 0.1,
    "rda_loss_mult": 0.1,
    "rda_range": "scene",
    "fda_positive_mult": 1.0,
    "fda_negative_mult": 0.05,
    "fda_temperature": 0.5,
    "fda_temperature_unit": "spread",
    "class_scores": "auto",
}

_SMALL_FIELD: dict[str, Any] = {
    **_UNMIXING,
    "semantic_levels": 12,
    "semantic_log2_hashmap_size": 17,
    "semantic_max_res": 512,
    "fda_pairs": 4096,
}
"""Semantics in the size of a laptop, whatever the geometry."""
_OFFLINE = {"image_text_encoder": "offline", "token_encoder": "offline"}

_paper = _nerf(
    "ovs3d-paper",
    30000,
    4096,
    {},
    OVS3DModelConfig(eval_num_rays_per_chunk=1 << 15),
)
_paper.optimizers = _optimizers(cooling=0.0)

_best = _nerf(
    "ovs3d",
    30000,
    4096,
    {"num_windows": 4, "window_size": 16, "rays_a_token": 2},
    OVS3DModelConfig(eval_num_rays_per_chunk=1 << 15, fda_apart_start=12600, **_UNMIXING),
)


def _splat_optimizers(geometry: int, rates: dict[str, float]) -> dict:
    """`rates` for Gaussians, which move for `geometry` steps; ours for the steps of semantics behind them."""
    groups: dict[str, Any] = {
        name: {"optimizer": FusedAdamOptimizerConfig(lr=rate, eps=1e-15), "scheduler": None}
        for name, rate in rates.items()
    }
    groups["means"]["scheduler"] = ExponentialDecaySchedulerConfig(lr_final=rates["means"] / 100, max_steps=geometry)
    ours = _optimizers(geometry)
    return groups | {name: ours[name] for name in ("camera_opt", "semantic_grid", "semantic_head", "patch_mixture")}


_SPLATFACTO = {
    "means": 1.6e-4,
    "features_dc": 2.5e-3,
    "features_rest": 2.5e-3 / 20,
    "opacities": 5e-2,
    "scales": 5e-3,
    "quats": 1e-3,
}
"""Learning rates of splatfacto, made for tens of thousands of steps."""
_HASTY = {
    "means": 1e-3,
    "features_dc": 2e-2,
    "features_rest": 1e-3,
    "opacities": 1e-1,
    "scales": 2e-2,
    "quats": 1e-2,
}
"""For a few hundred steps from points that lie where things are: 33.8 dB where splatfacto's reach 30 (`kitchen_table`)."""

_lite = _nerf(
    "ovs3d-lite",
    2000,
    1024,
    {"num_windows": 1, "window_size": 16, "rays_a_token": 2, "depth_rays": 256, "depth_steps": 500},
    OVS3DModelConfig(
        eval_num_rays_per_chunk=1 << 13,
        num_levels=12,
        max_res=1024,
        log2_hashmap_size=17,
        hidden_dim=32,
        hidden_dim_color=32,
        num_proposal_samples_per_ray=(64, 32),
        num_nerf_samples_per_ray=24,
        proposal_net_args_list=[
            {"hidden_dim": 16, "log2_hashmap_size": 15, "num_levels": 5, "max_res": 64, "use_linear": False},
            {"hidden_dim": 16, "log2_hashmap_size": 15, "num_levels": 5, "max_res": 128, "use_linear": False},
        ],
        proposal_warmup=500,
        proposal_weights_anneal_max_num_iters=200,
        camera_optimizer=CameraOptimizerConfig(mode="off"),
        appearance_embed_dim=0,
        use_appearance_embedding=False,
        semantic_samples=6,
        semantics_start=300,
        fda_start=400,
        fda_apart_start=1000,
        # The contraction leaves half of a grid's side to where the cameras are.
        **(_SMALL_FIELD | {"semantic_max_res": 1024}),
    ),
    **_OFFLINE,
)

_splat_best = _splat(
    "ovs3d-splat",
    7000,
    3000,
    _SPLATFACTO,
    {"num_windows": 4, "window_size": 16, "rays_a_token": 2},
    OVS3DSplatModelConfig(resolution_schedule=1000, stop_split_at=5000, **_UNMIXING),
)

_splat_lite = _splat(
    "ovs3d-splat-lite",
    500,
    1600,
    _HASTY,
    {"num_windows": 1, "window_size": 16, "rays_a_token": 2},
    OVS3DSplatModelConfig(
        num_downscales=0,
        sh_degree=0,
        ssim_lambda=0.0,
        stop_split_at=0,
        **_SMALL_FIELD,
    ),
    **_OFFLINE,
)


def semantics_alone(config: OVS3DTrainerConfig, steps: int) -> None:
    """Turns a method for Gaussians into `steps` steps of semantics on Gaussians that stand still from the first on."""
    model: Any = config.pipeline.model
    _begin(model, 0, steps)
    config.max_num_iterations = steps
    config.optimizers |= {name: group for name, group in _optimizers().items() if name in config.optimizers}


ovs3d = MethodSpecification(
    _best,
    "3D-OVS with patches unmixed: open-vocabulary 3D segmentation from photos and prompts; one GPU of 4 GB or more.",
)
ovs3d_paper = MethodSpecification(
    _paper, "3D-OVS with the paper's losses alone, to reproduce and to compare; one GPU of 4 GB or more."
)
ovs3d_splat = MethodSpecification(
    _splat_best, "3D-OVS on Gaussian splats: renders in real time; one GPU of 4 GB or more."
)
ovs3d_splat_lite = MethodSpecification(
    _splat_lite, "3D-OVS on Gaussian splats for a laptop: minutes on a CPU, no download."
)
ovs3d_lite = MethodSpecification(_lite, "3D-OVS for a laptop: minutes on a CPU or a small GPU, no download.")

# The config.yml of a run of version 0.1 names these modules.
sys.modules.setdefault("ovs3d_nerfstudio.model", nerf)
sys.modules.setdefault("ovs3d_nerfstudio.datamanager", rays)
sys.modules.setdefault("ovs3d_nerfstudio.trainer", trainer)
