"""Where neither numba nor Triton runs: the same numbers in bounded memory; and an interrupt never decides that it is so."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException, SetTrace
from test_hash_grid import assert_same, pair, points, run
from torch.utils._python_dispatch import TorchDispatchMode

from ovs3d_nerfstudio.fields import hash_grid, hash_grid_torch

CPU = torch.device("cpu")


@pytest.fixture
def plain(monkeypatch):
    """Every hash grid computes in plain torch, a few points at a time."""
    monkeypatch.setattr(hash_grid, "_backend", lambda device: hash_grid_torch)
    monkeypatch.setattr(hash_grid_torch, "POINTS_AT_ONCE", 300)


@pytest.fixture
def undecided():
    """No backend has been looked for yet, and none is remembered afterwards."""
    hash_grid._backend.cache_clear()
    yield
    hash_grid._backend.cache_clear()


@pytest.mark.parametrize(
    ("features", "dtype", "count"), [(2, torch.float32, 1000), (3, torch.float64, 1000), (1, torch.float32, 5)]
)
def test_numbers_are_nerfstudios(plain, features, dtype, count):
    reference, fast = pair(features, dtype)
    assert_same(run(fast, points(count, dtype)), run(reference, points(count, dtype)))


@pytest.mark.parametrize("log2_size", [1, 19])
def test_numbers_are_nerfstudios_whatever_the_size_of_the_table(plain, log2_size):
    reference, fast = pair(3, torch.float64, num_levels=1, log2_hashmap_size=log2_size)
    assert_same(run(fast, points(50, torch.float64)), run(reference, points(50, torch.float64)))


def test_the_same_gradients_every_time_and_however_points_are_cut(plain, monkeypatch):
    _, fast = pair()
    first = run(fast, points(2000))
    for cut in (300, 1 << 20):
        monkeypatch.setattr(hash_grid_torch, "POINTS_AT_ONCE", cut)
        again = run(fast, points(2000))
        assert torch.equal(again["out"], first["out"]) and torch.equal(again["positions"], first["positions"])
        if cut == 300:
            assert torch.equal(again["table"], first["table"])


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make and that are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
                    weakref.finalize(storage, self.drop, key)
        return made

    def drop(self, key):
        self.now -= self.alive.pop(key, 0)


def peak_of_a_step(encoding: HashEncoding, positions: torch.Tensor) -> int:
    with Allocated() as allocated:
        encoding(positions).sum().backward()
    return allocated.peak


def test_memory_grows_with_the_output_alone(plain):
    sizes = {"num_levels": 16, "log2_hashmap_size": 12}
    reference, fast = pair(**sizes)
    few, many = points(5000), points(20000)
    output = 15000 * 16 * 2 * 4
    ours = peak_of_a_step(fast, many) - peak_of_a_step(fast, few)
    theirs = peak_of_a_step(reference, many) - peak_of_a_step(reference, few)
    assert ours < 3.5 * output < theirs / 5


class Interrupt:
    """Raises as nerfstudio's viewer does at the `line`-th line that is traced, once."""

    def __init__(self, line: int):
        self.left = line

    def __call__(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise IOChangeException
        return self


@pytest.mark.parametrize("trained", [False, True])
def test_an_interrupt_at_any_line_of_a_first_render_leaves_the_fast_grid_on(undecided, recwarn, trained):
    encoding = hash_grid.FastHashEncoding(num_levels=2, log2_hashmap_size=8)
    positions, interrupted = torch.rand(5, 3), 0
    for line in range(1, 500):
        hash_grid._backend.cache_clear()
        before = sys.gettrace()
        try:
            with torch.set_grad_enabled(trained), SetTrace(Interrupt(line)):
                encoding(positions)
        except IOChangeException:
            interrupted += 1
        else:
            break
        finally:
            sys.settrace(before)
        assert isinstance(hash_grid._backend(CPU), hash_grid._NumbaBackend)
    assert interrupted > 10 and not [each for each in recwarn if "hash grids" in str(each.message)]


def test_looking_for_a_backend_is_not_interrupted_and_the_tracing_goes_on_after_it(undecided):
    seen = set()

    def trace(frame, event, arg):
        seen.add(frame.f_code.co_name)
        return trace

    encoding, before = hash_grid.FastHashEncoding(num_levels=2, log2_hashmap_size=8), sys.gettrace()
    with SetTrace(trace):
        encoding(torch.rand(5, 3))
        assert sys.gettrace() is trace
    sys.settrace(before)
    assert "get_out_dim" in seen and not {"_backend", "compiled", "_plan"} & seen


def broken(error: Exception):
    class Broken:
        def __init__(self):
            raise error

    return Broken


def test_a_broken_backend_is_told_of_and_torch_computes(undecided, monkeypatch):
    reference, fast = pair()
    monkeypatch.setattr(hash_grid, "_NumbaBackend", broken(ImportError("No module named 'numba'")))
    with pytest.warns(UserWarning, match="cannot run on cpu, using torch code: No module named 'numba'"):
        assert_same(run(fast, points(20)), run(reference, points(20)))
    assert hash_grid._backend(CPU) is hash_grid_torch


@pytest.mark.parametrize("error", [IOChangeException(), torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_what_says_nothing_about_a_backend_goes_through_and_is_not_remembered(undecided, monkeypatch, error):
    _, fast = pair()
    with monkeypatch.context() as patched:
        patched.setattr(hash_grid, "_NumbaBackend", broken(error))
        with pytest.raises(type(error)):
            fast(points(5))
    assert fast(points(5)).isfinite().all()
    assert isinstance(hash_grid._backend(CPU), hash_grid._NumbaBackend)
