"""Every Triton kernel compiles to machine code for the GPUs that people have, in the shapes that our methods launch it in.

That needs no GPU: launches are recorded instead of made, and compiled for one architecture after the other.
"""

import copy
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.scene_box import SceneBox
from torch import Tensor

import ovs3d_nerfstudio
from ovs3d_nerfstudio.fields.hash_grid import FastHashEncoding

triton = pytest.importorskip("triton", reason="Triton is not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from ovs3d_nerfstudio.fields import hash_grid_triton  # noqa: E402

pytestmark = pytest.mark.slow
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""Turing, Ampere, Ampere and Ada of consumers, Hopper, Blackwell, Blackwell of consumers."""
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64"}
DIVISIBLE = 16
"""Triton makes a kernel of its own for numbers and addresses that this divides, and one for the number 1."""


@dataclass(frozen=True)
class Launch:
    """A kernel and what Triton compiles it for, in the order of its arguments."""

    kernel: Any
    kinds: tuple[str, ...]
    """constexpr, i32, or a pointer's."""
    constants: tuple[tuple[int, Any], ...]
    """Arguments, by their place, that are known to the compiler."""
    divisible: tuple[int, ...]
    """Places of the arguments that `DIVISIBLE` divides."""
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Any, args: tuple, kwargs: dict[str, Any]) -> "Launch":
        kinds, constants, divisible = [], [], []
        for place, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
            if isinstance(value, Tensor):
                kinds.append(POINTERS[value.dtype])
                divisible.append(place)  # torch's CUDA memory begins at multiples of 512
            elif parameter.is_constexpr or value == 1:
                kinds.append("constexpr")
                constants.append((place, value))
            else:
                kinds.append("i32")
                divisible += [place] if value % DIVISIBLE == 0 else []
        return cls(kernel, tuple(kinds), tuple(constants), tuple(divisible), tuple(kwargs.items()))

    def compiled(self, architecture: int) -> dict[str, Any]:
        """The stages of its compilation, `ptx` and `cubin` among them."""
        source = ASTSource(
            self.kernel,
            dict(zip(self.kernel.arg_names, self.kinds, strict=True)),
            {(place,): value for place, value in self.constants},
            {(place,): [["tt.divisibility", DIVISIBLE]] for place in self.divisible},
        )
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(self.options)).asm


def hash_grids_of(method: str) -> set[tuple[int, ...]]:
    """Rows, features, levels of each hash grid of a method, and its rays or, of Gaussians, rays of windows a step."""
    pipeline = copy.deepcopy(all_methods[method].pipeline)
    pipeline.model.implementation = "torch"
    box = SceneBox(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    model = pipeline.model.setup(scene_box=box, num_train_data=1, metadata={})
    grids = (module for module in model.modules() if isinstance(module, FastHashEncoding))
    data = pipeline.datamanager
    rays = getattr(data, "train_num_rays_per_batch", data.num_windows * (data.window_size * data.rays_a_token) ** 2)
    return {(*grid.hash_table.shape, grid.num_levels, rays) for grid in grids}


@pytest.fixture(scope="module")
def launches() -> set[Launch]:
    """All that differ to Triton, from the hash grids of all methods and the point that is tried before the first."""
    methods = entry_points(group="nerfstudio.method_configs")
    ours = [method.name for method in methods if method.value.startswith("ovs3d_nerfstudio.")]
    grids = set().union(*map(hash_grids_of, ours))
    recorded: set[Launch] = set()

    def record(kernel, *args, grid, warmup, **kwargs):
        recorded.add(Launch.of(kernel, args, kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        launch(points=1, rows=2, features=1, levels=1)
        for rows, features, levels, rays in grids:
            for points in (rays, rays - 1):  # a step's, and those of what is left of a picture, of any number
                launch(points, rows, features, levels)
        launch(points, rows, features, levels, torch.float64)
    return recorded


def launch(points: int, rows: int, features: int, levels: int, dtype: torch.dtype = torch.float32) -> None:
    """Launches all kernels of a hash grid, on tensors that need no memory."""
    with torch.device("meta"):
        positions, scalings = torch.empty(points, 3, dtype=dtype), torch.empty(levels, dtype=dtype)
        table, gradient = torch.empty(rows, features, dtype=dtype), torch.empty(points, levels * features, dtype=dtype)
    hash_grid_triton.forward(positions, table, scalings)
    hash_grid_triton.table_gradient(positions, table, scalings, gradient)
    hash_grid_triton.position_gradient(positions, table, scalings, gradient)


def test_every_kernel_of_the_package_is_launched(launches):
    root = Path(ovs3d_nerfstudio.__file__).parent
    names = [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("*_triton.py")]
    members = [member for name in names for member in vars(import_module(name)).values()]
    kernels = {member for member in members if isinstance(member, JITFunction)}
    called = {name for kernel in kernels for name in kernel.fn.__code__.co_names}  # by other kernels
    assert {kernel for kernel in kernels if kernel.__name__ not in called} == {launch.kernel for launch in launches}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_to_machine_code(launches, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in launches:
        stages = launch.compiled(architecture)
        assert stages["cubin"].startswith(b"\x7fELF")
        # A product that is fused into a sum would round the offsets in a cell differently from the CPU's.
        assert f"sm_{architecture}" in stages["ptx"] and "fma." not in stages["ptx"]
    assert len(list(tmp_path.rglob("*.cubin"))) == len(launches), (
        "all of them were compiled, and none read from a cache"
    )
