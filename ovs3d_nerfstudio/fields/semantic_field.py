"""The semantic field: a hash grid that gives every point K coefficients, S scale logits and a saliency, whatever the view.

The paper's feature field and its 3D selection volume (3D-OVS §3.1–3.2) share this one grid.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.field_components.spatial_distortions import SceneContraction, SpatialDistortion
from torch import Tensor, nn

from ovs3d_nerfstudio.fields.hash_grid import FastHashEncoding

SALIENCY_GAIN = 5.0
"""Factor on the head's output for the logarithm of the saliency, which makes it learn as fast as the features do."""
SALIENCY_LIMIT = 15.0
"""Least and greatest logarithm of the saliency: a factor of ten million between two points, and no infinity."""


class LInfContraction(SceneContraction):
    """nerfstudio's contraction with the L∞ norm, the same numbers: its `torch.linalg.norm` takes a fifth of a CPU step."""

    def __init__(self) -> None:
        super().__init__(order=float("inf"))

    def forward(self, positions: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
        """Points outside the unit cube are drawn into the cube of side 4 (Mip-NeRF 360, eq. 10, with L∞)."""
        magnitude = positions.abs().amax(-1, keepdim=True).clamp(min=1)
        return (2 - 1 / magnitude) * (positions / magnitude)


class SemanticField(nn.Module):
    """Hash grid → one hidden layer → K coefficients, S scale logits and the logarithm of a saliency."""

    aabb: Tensor

    def __init__(
        self,
        aabb: Float[Tensor, "2 3"],
        dim: int,
        num_scales: int,
        num_levels: int,
        base_res: int,
        max_res: int,
        log2_hashmap_size: int,
        features_per_level: int,
        hidden_dim: int,
        spatial_distortion: SpatialDistortion | None,
        implementation: str,
    ):
        """`aabb` bounds the scene in its own units; `hidden_dim` 0 makes features linear in the grid, as the paper's."""
        super().__init__()
        self.register_buffer("aabb", aabb)
        self.num_scales = num_scales
        self.spatial_distortion = spatial_distortion
        encoding = FastHashEncoding if implementation == "torch" else HashEncoding
        self.grid = encoding(
            num_levels=num_levels,
            min_res=base_res,
            max_res=max_res,
            log2_hashmap_size=log2_hashmap_size,
            features_per_level=features_per_level,
            hash_init_scale=0.01,
            implementation=implementation,  # type: ignore[arg-type]
        )
        width = self.grid.get_out_dim()
        hidden = [nn.Linear(width, hidden_dim), nn.ReLU()] if hidden_dim else []
        self.hidden = nn.Sequential(*hidden)
        self.last = nn.Linear(hidden_dim or width, dim + num_scales + 1)

    @property
    def dim(self) -> int:
        """Number `K` of coefficients."""
        return self.last.out_features - self.num_scales - 1

    def resize(self, dim: int) -> None:
        """Give the last layer `dim` coefficients. Its parameters stay the same objects, so optimizers keep them."""
        last = self.last
        if dim == self.dim:
            return
        fresh = nn.Linear(last.in_features, dim + self.num_scales + 1)
        last.out_features = fresh.out_features
        last.weight.data = fresh.weight.data.to(last.weight)
        last.bias.data = fresh.bias.data.to(last.bias)

    def forward(
        self, positions: Float[Tensor, "*n 3"]
    ) -> tuple[Float[Tensor, "*n K"], Float[Tensor, "*n S"], Float[Tensor, "*n 1"]]:
        """Coefficients, scale logits and saliency at `positions`, in world coordinates."""
        if self.spatial_distortion is not None:
            unit = (self.spatial_distortion(positions) + 2) / 4
        else:
            unit = SceneBox.get_normalized_positions(positions, self.aabb)
        h = self.last(self.hidden(self.grid(unit.clamp(0, 1).reshape(-1, 3)).to(torch.float32)))
        h = h.view(
            *positions.shape[:-1], self.last.out_features
        ).float()  # in half precision a great saliency would be infinite
        coefficients, scales, saliency = h.split([self.dim, self.num_scales, 1], dim=-1)
        return coefficients, scales, (SALIENCY_GAIN * saliency).clamp(-SALIENCY_LIMIT, SALIENCY_LIMIT).exp()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # The number of coefficients is chosen by the scene, not by the config: take it from the checkpoint.
        weight = state_dict.get(f"{prefix}last.weight")
        if weight is not None:
            self.resize(weight.shape[0] - self.num_scales - 1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
