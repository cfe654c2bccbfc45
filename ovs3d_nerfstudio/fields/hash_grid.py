"""Fast multiresolution hash encoding with nerfstudio's own table layout and numbers.

nerfstudio's pip-only ("torch") hash encoding materialises every corner of every level as a tensor. The
encoding here computes the same function (Müller et al. 2022, "Instant Neural Graphics Primitives with a
Multiresolution Hash Encoding", section 3) in fused kernels: numba on the CPU, Triton on CUDA (see
`hash_grid_triton`), and torch's own operations in bounded memory where neither can run (see `hash_grid_torch`). The
parameter keeps its name, shape and row order, so checkpoints are interchangeable in both directions.
"""

from __future__ import annotations

import functools
import sys
import warnings
from subprocess import SubprocessError
from typing import Any, Literal

import torch
from jaxtyping import Float
from nerfstudio.field_components.encodings import HashEncoding
from torch import Tensor, nn

from ovs3d_nerfstudio.compiled import untraced
from ovs3d_nerfstudio.fields import hash_grid_torch
from ovs3d_nerfstudio.fields.hash_grid_numba import NumbaBackend, huge_page_copy
from ovs3d_nerfstudio.memory import is_out_of_memory

__all__ = ["FastHashEncoding", "use_fast_hash_grids"]


@functools.cache
def _backend(device: torch.device) -> Any:
    """What computes hash encodings on a device: an object with the three functions above.

    Kept for the life of the process, so that only what a missing or broken backend raises may decide it: whatever else
    comes by (an interrupt, a shortage of memory) goes through, and the next call tries again.
    """
    try:
        if device.type == "cpu":
            return NumbaBackend()
        if device.type == "cuda":
            from ovs3d_nerfstudio.fields import hash_grid_triton

            # Triton compiles at the first launch, for which it needs a C compiler: find out on one point.
            hash_grid_triton.forward(*(torch.zeros(size, device=device) for size in ((1, 3), (2, 1), (1,))))
            return hash_grid_triton
    except (ImportError, AttributeError, OSError, RuntimeError, SubprocessError, *_compiler_errors()) as error:
        if is_out_of_memory(error):
            raise
        warnings.warn(f"Fast hash grids cannot run on {device}, using torch code: {error}", stacklevel=3)
    return hash_grid_torch


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What numba and Triton raise where they cannot compile; of those only that have been imported."""
    homes = (
        ("numba.core.errors", "NumbaError"),
        ("triton.errors", "TritonError"),
        ("triton.compiler", "CompilationError"),
    )
    found = (getattr(sys.modules.get(module), name, None) for module, name in homes)
    return tuple(kind for kind in found if kind is not None)


class _HashGrid(torch.autograd.Function):
    """positions [N, 3], table [L*T, F], scalings [L], all contiguous and of one dtype, to [N, L*F]."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, table: Tensor, scalings: Tensor, backend: Any) -> Tensor:
        ctx.save_for_backward(positions, table, scalings)
        ctx.backend = backend
        if len(positions) == 0:
            return positions.new_empty(0, len(scalings) * table.shape[1])
        with untraced():  # the first call compiles
            return backend.forward(positions, table, scalings)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # once_differentiable would stay silent: it only looks at grad_out
            raise RuntimeError("hash grids have no second derivatives: create_graph=True is not supported")
        positions, table, scalings = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_positions, grad_table = None, None
        if len(positions) == 0:
            return torch.zeros_like(positions), torch.zeros_like(table), None, None
        if ctx.needs_input_grad[0]:
            grad_positions = ctx.backend.position_gradient(positions, table, scalings, grad_out)
        if ctx.needs_input_grad[1]:
            grad_table = ctx.backend.table_gradient(positions, table, scalings, grad_out)
        return grad_positions, grad_table, None, None


class FastHashEncoding(HashEncoding):
    """nerfstudio's `HashEncoding(implementation="torch")`, computed by fused kernels.

    Same table (`hash_table` [num_levels * 2**log2_hashmap_size, features_per_level], one level after the
    other), same hash, same trilinear interpolation, hence the same state dict and, up to rounding, the same
    values and gradients (Müller et al. 2022, section 3, except that coarse levels are hashed too). The first
    call on a CPU compiles for a few seconds; the result is cached on disk where that is possible.

    The gradients cannot be differentiated again: a backward pass with create_graph=True raises RuntimeError.

    Args:
        num_levels: Number of grids L.
        min_res: Cells along one axis of the coarsest grid.
        max_res: Cells along one axis of the finest grid.
        log2_hashmap_size: Every level has 2**log2_hashmap_size rows.
        features_per_level: Features F of a row.
        hash_init_scale: Rows start uniform in [-hash_init_scale, hash_init_scale].
        implementation: Only "torch": tiny-cuda-nn lays its table out differently.
        interpolation: None or "Linear".

    Raises:
        ValueError: implementation is not "torch".
    """

    position_gradients: bool = True
    """Whether gradients may flow to the positions. nerfacto's field asks for them at every step, needed or not: set this
    to False where nothing (camera optimiser, normals) uses them."""

    def __init__(
        self,
        num_levels: int = 16,
        min_res: int = 16,
        max_res: int = 1024,
        log2_hashmap_size: int = 19,
        features_per_level: int = 2,
        hash_init_scale: float = 0.001,
        implementation: Literal["torch"] = "torch",
        interpolation: Literal["Linear"] | None = None,
    ) -> None:
        if implementation != "torch":
            raise ValueError(f'implementation must be "torch", not {implementation!r}')
        grid = (num_levels, min_res, max_res, log2_hashmap_size, features_per_level)
        super().__init__(*grid, hash_init_scale, implementation=implementation, interpolation=interpolation)
        self.hash_table.data = huge_page_copy(self.hash_table)

    def forward(self, in_tensor: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch features"]:
        """Encodes positions.

        Args:
            in_tensor: Positions, normally in [0, 1]; outside of it the grid simply goes on (and is hashed).

        Returns:
            L*F features, level by level: float32, or float64 if the positions or the table are.

        Raises:
            ValueError: the last dimension is not 3.
        """
        if in_tensor.shape[-1] != 3:
            raise ValueError(f"positions must have 3 coordinates, got shape {tuple(in_tensor.shape)}")
        table = self.hash_table
        if in_tensor.device != table.device:
            return super().forward(in_tensor)
        with untraced():
            backend = _backend(table.device)
        # Half-precision positions are scaled in float32 by the reference too (its scalings are float32).
        dtype = torch.promote_types(torch.promote_types(in_tensor.dtype, table.dtype), torch.float32)
        positions = in_tensor.reshape(-1, 3).to(dtype).contiguous()
        if not self.position_gradients:
            positions = positions.detach()
        if self.scalings.device != table.device:  # once: every copy has the device waited for
            self.scalings = self.scalings.to(table.device)
        scalings = self.scalings.to(dtype)
        out = _HashGrid.apply(positions, table.to(dtype).contiguous(), scalings, backend)
        return out.view(*in_tensor.shape[:-1], self.get_out_dim())


def use_fast_hash_grids(module: nn.Module) -> int:
    """Makes every torch-implemented `HashEncoding` inside a module (itself included) a `FastHashEncoding`.

    The objects stay the same and only change class, which is safe because the subclass has no state of its
    own: parameters, their names, hooks, and whatever else refers to the encodings (nerfstudio's density field
    holds its encoding twice) stay valid. Encodings of tiny-cuda-nn, and of other subclasses, are left alone.

    Args:
        module: Any module tree, for example a nerfacto model.

    Returns:
        The number of encodings changed.
    """
    changed = 0
    for part in module.modules():
        if type(part) is HashEncoding and part.tcnn_encoding is None:
            part.__class__ = FastHashEncoding
            if part.hash_table.device.type == "cpu":
                part.hash_table.data = huge_page_copy(part.hash_table)
            changed += 1
    return changed
