"""The rest of the pretence: what `torch.cuda` says of the device, and the kernels of ours that only a GPU can run."""

from __future__ import annotations

import ctypes
import importlib
from importlib.util import find_spec

import torch
from torch import Tensor

from pretended.tensors import DEVICE, PretendedTensor

LIBRARY = "libcuda.so.1"
"""The name by which `gpu.c` is loaded; NVIDIA's driver has it where there is one."""
DEVICES_COUNTED = 127
"""torch's autograd asks for more indices than there are devices, and ends the process at one that it does not know."""
MEMORY_FREE, MEMORY = 6 << 30, 8 << 30
"""Bytes; a small GPU's."""
HASH_GRID = "ovs3d_nerfstudio.fields.hash_grid"
SPLATS = "ovs3d_nerfstudio.gaussians.cuda_tiles"


def pretend() -> None:
    """Has torch believe in a GPU, for the life of this process, which `launch` has started."""
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._ensureCUDADeviceGuardSet()  # while no device is counted: it then leaves the driver alone
    ctypes.c_byte.in_dll(ctypes.CDLL(LIBRARY), "pretended_devices").value = DEVICES_COUNTED
    _answer_for_the_device()
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    if find_spec("triton"):
        _replace_hash_grid_kernels()
    # gsplat's kernels need a GPU: the CPU engine stands in, as it does for devices that gsplat does not know.
    importlib.import_module(SPLATS).kernels_on = lambda _device: False


def _answer_for_the_device() -> None:
    generator = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "_lazy_init": None,
        "_is_in_bad_fork": False,
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "pretended",
        "mem_get_info": (MEMORY_FREE, MEMORY),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "synchronize": None,
        "empty_cache": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "get_rng_state": generator,
        "get_rng_state_all": [generator],
        "set_rng_state": None,
        "set_rng_state_all": None,
    }
    for name, answer in answers.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, lambda *_args, _answer=answer, **_kwargs: _answer)


def _replace_hash_grid_kernels() -> None:
    """The Triton kernels' work is done by the CPU's, which promise the same; what they ask of their arguments is checked."""
    cpu = importlib.import_module(HASH_GRID)._backend(torch.device("cpu"))
    triton_kernels = importlib.import_module(f"{HASH_GRID}_triton")

    def stand_in(name: str):
        compute = getattr(cpu, name)

        def kernel(*tensors: Tensor) -> Tensor:
            assert {tensor.device for tensor in tensors} == {DEVICE}, f"{name} of tensors on two devices"
            assert len({tensor.dtype for tensor in tensors}) == 1, f"{name} of {[tensor.dtype for tensor in tensors]}"
            assert all(tensor.is_contiguous() for tensor in tensors), f"{name} of tensors that are not contiguous"
            return PretendedTensor(compute(*(tensor.held.contiguous() for tensor in tensors)))

        return kernel

    for name in ("forward", "table_gradient", "position_gradient"):
        assert callable(getattr(triton_kernels, name))
        setattr(triton_kernels, name, stand_in(name))
