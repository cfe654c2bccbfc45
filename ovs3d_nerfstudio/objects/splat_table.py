"""The Gaussians of a run in the columns of a splat's PLY, as the INRIA trainer named them and every viewer reads them."""

from __future__ import annotations

import numpy as np
import torch
from nerfstudio.models.splatfacto import RGB2SH

from ovs3d_nerfstudio.models.splat import OVS3DSplatModel


@torch.no_grad()
def splat_table(model: OVS3DSplatModel) -> np.ndarray:
    """A structured array, one Gaussian a row in their order, in the model's frame: with it turn shapes and colours."""
    base = model.features_dc if model.config.sh_degree > 0 else RGB2SH(model.features_dc.sigmoid())
    columns = {
        ("x", "y", "z"): model.means,
        ("nx", "ny", "nz"): torch.zeros_like(model.means),
        tuple(f"f_dc_{i}" for i in range(3)): base,
    }
    # Channel by channel, as the INRIA trainer has them.
    rest = model.features_rest.transpose(1, 2).flatten(1)
    columns[tuple(f"f_rest_{i}" for i in range(rest.shape[1]))] = rest
    columns["opacity",] = model.opacities
    columns[tuple(f"scale_{i}" for i in range(3))] = model.scales
    columns[tuple(f"rot_{i}" for i in range(4))] = torch.nn.functional.normalize(model.quats, dim=-1)
    table = np.empty(len(model.means), [(name, "f4") for names in columns for name in names])
    for names, values in columns.items():
        for name, column in zip(names, values.cpu().numpy().T, strict=True):
            table[name] = column
    return table
