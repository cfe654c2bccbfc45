"""The fast hash encoding against nerfstudio's own torch implementation."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from nerfstudio.cameras.rays import Frustums, RaySamples
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.fields.density_fields import HashMLPDensityField
from nerfstudio.fields.nerfacto_field import NerfactoField
from torch import Tensor

from ovs3d_nerfstudio.fields import hash_grid
from ovs3d_nerfstudio.fields.hash_grid import FastHashEncoding, use_fast_hash_grids

TOLERANCE = {torch.float32: 1e-6, torch.float64: 2e-10}
ROOT = Path(hash_grid.__file__).resolve().parents[1]
SIZES = {"num_levels": 5, "max_res": 300, "log2_hashmap_size": 10}
# Grid planes and corners of the unit cube, just inside and outside of it, far outside.
EDGES = [
    [0.0, 0.0, 0.0],
    [1.0, 1.0, 1.0],
    [0.0, 0.5, 1.0],
    [0.5, 0.25, 0.125],
    [0.125, 0.3, 0.7],
    [-0.01, -1e-9, 1.01],
    [1e-9, 1.0 - 1e-7, 1.0 + 1e-6],
    [-3.0, 2.0, -0.5],
]


def pair(features: int = 2, dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[HashEncoding, FastHashEncoding]:
    """nerfstudio's encoding and ours with one table of values around 1."""
    arguments = {**SIZES, **sizes, "features_per_level": features, "hash_init_scale": 1.0}
    reference = HashEncoding(**arguments, implementation="torch").to(dtype)
    fast = FastHashEncoding(**arguments).to(dtype)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def points(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.tensor(EDGES, dtype=dtype), torch.rand(count, 3, dtype=dtype, generator=generator)])


def run(encoding: HashEncoding, positions: Tensor) -> dict[str, Tensor]:
    """Output and both gradients of a fixed random weighting of the output."""
    positions = positions.clone().requires_grad_()
    out = encoding(positions)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, [positions, encoding.hash_table], weights)
    return {"out": out.detach(), "positions": grads[0], "table": grads[1]}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == value.dtype, name
        worst = (actual[name] - value).abs().max() / value.abs().max()
        assert worst <= TOLERANCE[value.dtype], (name, worst)


# 5 levels leave one over for 2 threads and two for 3.
@pytest.mark.parametrize(
    ("features", "dtype", "count", "threads"),
    [(2, torch.float32, 2500, 2), (2, torch.float32, 2500, 3), (2, torch.float32, 40, 2), (3, torch.float64, 2500, 2)],
)
def test_numbers_match_nerfstudio(features: int, dtype: torch.dtype, count: int, threads: int) -> None:
    reference, fast = pair(features, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(run(fast, points(count, dtype)), run(reference, points(count, dtype)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("log2_size", [0, 1, 19])
def test_table_sizes(log2_size: int) -> None:
    reference, fast = pair(3, torch.float64, num_levels=1, log2_hashmap_size=log2_size)
    positions = points(50, torch.float64)
    actual, expected = run(fast, positions), run(reference, positions)
    for name in ("out", "table") if log2_size == 0 else expected:  # one row: the position gradient is 0 / 0
        assert_same({name: actual[name]}, {name: expected[name]})


def test_gradients_match_finite_differences() -> None:
    _, fast = pair(3, torch.float64, num_levels=2, max_res=24, log2_hashmap_size=3)
    positions = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    table = fast.hash_table.detach().clone().requires_grad_()

    def encode(positions: Tensor, table: Tensor) -> Tensor:
        return torch.func.functional_call(fast, {"hash_table": table}, (positions,))

    assert torch.autograd.gradcheck(encode, (positions, table))


def test_no_second_derivatives_in_silence() -> None:
    _, fast = pair()
    positions = points(3).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(fast(positions).sum(), positions, create_graph=True)


def test_only_wanted_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair()
    backend = hash_grid._backend(torch.device("cpu"))
    monkeypatch.setattr(backend, "position_gradient", None)
    fast(points(3)).sum().backward()
    assert fast.hash_table.grad is not None
    monkeypatch.undo()
    monkeypatch.setattr(backend, "table_gradient", None)
    fast.requires_grad_(False)
    fast(points(3).requires_grad_()).sum().backward()


def test_shapes_and_dtypes() -> None:
    reference, fast = pair()
    positions = torch.rand(4, 0, 3, requires_grad=True)
    out = fast(positions)
    assert out.shape == reference(positions).shape == (4, 0, 10)
    out.sum().backward()
    assert positions.grad is not None and fast.hash_table.grad is not None and not fast.hash_table.grad.any()

    strided = torch.rand(6, 5, 3).transpose(0, 1)
    torch.testing.assert_close(fast(strided), reference(strided))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.rand(7, 3).half().requires_grad_()
        torch.testing.assert_close(fast(half), reference(half))
        fast(half).sum().backward()
        assert half.grad is not None and half.grad.dtype == torch.float16
    assert fast(torch.full((1, 3), float("nan"))).isnan().all()
    with pytest.raises(ValueError, match="3 coordinates"):
        fast(torch.rand(5, 2))
    with pytest.raises(ValueError, match="implementation"):
        FastHashEncoding(implementation="tcnn")


def test_state_dicts_are_interchangeable() -> None:
    reference, fast = pair()
    assert {k: v.shape for k, v in fast.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}
    with torch.no_grad():
        fast.hash_table.normal_()
    assert reference.load_state_dict(fast.state_dict()).missing_keys == []
    assert_same(run(fast, points(50)), run(reference, points(50)))


def ray_samples(rays: int = 30, samples: int = 8) -> RaySamples:
    generator = torch.Generator().manual_seed(2)
    starts = torch.linspace(0.0, 1.0, samples + 1)[:, None].expand(rays, samples + 1, 1)
    directions = torch.nn.functional.normalize(torch.randn(rays, 1, 3, generator=generator), dim=-1)
    frustums = Frustums(
        origins=torch.rand(rays, 1, 3, generator=generator).expand(rays, samples, 3) - 0.5,
        directions=directions.expand(rays, samples, 3),
        starts=starts[:, :-1],
        ends=starts[:, 1:],
        pixel_area=torch.ones(rays, samples, 1),
    )
    return RaySamples(frustums=frustums, camera_indices=torch.zeros(rays, samples, 1, dtype=torch.long))


def test_swap_in_nerfacto(monkeypatch: pytest.MonkeyPatch) -> None:
    aabb = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    sizes = {"num_levels": 4, "max_res": 64, "log2_hashmap_size": 10, "implementation": "torch"}
    model = torch.nn.ModuleDict(
        {
            "field": NerfactoField(aabb, num_images=1, **sizes),
            "proposal": HashMLPDensityField(aabb, **sizes),
            "linear": HashMLPDensityField(aabb, use_linear=True, **sizes),
        }
    )

    def results() -> list[Tensor]:
        model.zero_grad()
        outputs = model["field"](ray_samples(), compute_normals=True)
        values = [*outputs.values(), model["proposal"].get_density(ray_samples())[0]]
        values.append(model["linear"].get_density(ray_samples())[0])
        sum(value.sum() for value in values).backward()
        return values + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = results()
    parameters = dict(model.named_parameters())
    tables = {name: p.detach().clone() for name, p in parameters.items() if name.endswith("hash_table")}
    assert len(tables) == 3
    assert use_fast_hash_grids(model) == 3
    assert use_fast_hash_grids(model) == 0
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    for name, table in tables.items():
        assert torch.equal(parameters[name], table)

    monkeypatch.setattr(HashEncoding, "pytorch_fwd", None)  # from here on only the fast path can answer
    for actual, expected in zip(results(), before, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


def test_other_encodings_are_left_alone() -> None:
    class Special(HashEncoding):
        pass

    module = torch.nn.ModuleList([Special(**SIZES, implementation="torch"), torch.nn.Linear(2, 2)])
    assert use_fast_hash_grids(module) == 0


def test_two_threads_at_once() -> None:
    _, fast = pair()
    positions = points(4000)
    expected = run(fast, positions)
    problems: list[object] = []

    def work() -> None:
        try:
            for _ in range(5):
                for name, value in run(fast, positions).items():
                    assert torch.equal(value, expected[name])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def run_python(code: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_import_is_light_and_fork_is_safe(tmp_path: Path) -> None:
    """Both need a process of their own; this one's cache directory cannot be made, either."""
    (tmp_path / "file").touch()
    run_python(
        """
import os, signal, sys, torch
from ovs3d_nerfstudio.fields.hash_grid import FastHashEncoding
assert "numba" not in sys.modules and "triton" not in sys.modules
torch.set_num_threads(2)
encoding = FastHashEncoding(num_levels=3, log2_hashmap_size=10)
positions = torch.rand(4000, 3)  # enough for two threads here, too few for torch's own (which do not survive a fork)
expected = encoding(positions).tolist()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if encoding(positions).tolist() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
""",
        NUMBA_CACHE_DIR=str(tmp_path / "file" / "cache"),
    )


def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(
        """
import torch
from ovs3d_nerfstudio.fields import hash_grid
from ovs3d_nerfstudio.fields import hash_grid_triton
from test_hash_grid import assert_same, pair, points, run
for features, dtype, levels in ((2, torch.float32, 3), (3, torch.float64, 1)):
    reference, fast = pair(features, dtype, num_levels=levels)
    hash_grid._backend = lambda device: hash_grid_triton
    assert_same(run(fast, points(150, dtype)), run(reference, points(150, dtype)))
""",
        TRITON_INTERPRET="1",
        PYTHONPATH=str(Path(__file__).parent),
    )
