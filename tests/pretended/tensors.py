"""The tensors: each says that it lies on `cuda:0`, computes with the CPU tensor that it holds, and refuses what CUDA refuses.

torch sees a CUDA tensor until its kernels are chosen, so its real CUDA autocast, GradScaler and fused Adam come before us:
`dispatch` takes the place of the kernels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pretended.waits import WAITS

DEVICE = torch.device("cuda:0")

aten = torch.ops.aten

ALL_ON_ONE_DEVICE = frozenset(
    ["addbmm", "addmm", "baddbmm", "bmm", "cat", "dot", "embedding", "gather", "index_select", "matmul", "mm", "stack"]
)
"""Kernels that do not even take a CPU tensor of no dimension beside CUDA tensors; elementwise ones do."""
SIZES_KNOWN_LATE = frozenset(
    [
        "_linalg_check_errors",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    ]
)
"""Kernels whose answer, or its size, the CPU waits for."""


class PretendedTensor(Tensor):
    """Lies on `cuda:0`, or so it says."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> PretendedTensor:
        # In inference mode, torch wants views of ordinary tensors to be ordinary tensors.
        with torch.inference_mode(held.is_inference()) if torch.is_inference_mode_enabled() else nullcontext():
            made = Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                layout=held.layout,
                device=DEVICE,
                requires_grad=requires_grad,
            )
        made.held = held.detach() if held.requires_grad else held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        is_parameter = isinstance(self, torch.nn.Parameter)
        torch.utils.swap_tensors(self, torch.nn.Parameter(value, self.requires_grad) if is_parameter else value)

    def tolist(self) -> list:
        WAITS.note("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy: it is not on the CPU")
        WAITS.note("numpy")
        return self.held.numpy()

    def __array__(self, *_args, **_kwargs):
        return self.numpy()

    def __reduce_ex__(self, protocol):
        """Files hold the CPU tensor: whoever reads them says where it shall lie."""
        return self.held.__reduce_ex__(protocol)

    def __repr__(self, **_kwargs) -> str:
        return f"PretendedTensor({tuple(self.shape)}, {self.dtype}, requires_grad={self.requires_grad})"


class PretendedDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on `cuda` and moved there."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})


Rule = Callable[[Any, tuple, dict], Any]
_RULES: dict[Any, Rule] = {}


def _rule(*kernels: Any) -> Callable[[Rule], Rule]:
    """The function decorated does the work of these kernels."""

    def known(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kernels, rule))
        return rule

    return known


def dispatch(op: Any, args: tuple, kwargs: dict) -> Any:
    """What a CUDA kernel would do with these arguments, or its refusal."""
    rule = _RULES.get(op.overloadpacket)
    if rule is None and torch.is_inference_mode_enabled() and op._can_decompose():
        with PretendedDevice():  # without autograd before it, torch leaves it to us to take it apart
            result = op.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return (rule or _compute)(op, args, kwargs)


def held(value: Any) -> Any:
    """The same arguments or results, pretended tensors in them replaced by those that they hold."""
    return tree_map(lambda item: item.held if isinstance(item, PretendedTensor) else item, value)


def tensors_in(value: Any) -> list[Tensor]:
    return [item for item in tree_flatten(value)[0] if isinstance(item, Tensor)]


def _compute(op: Any, args: tuple, kwargs: dict) -> Any:
    """Any kernel: on the CPU tensors that the pretended ones hold."""
    name, given = op.overloadpacket.__name__, tensors_in((args, kwargs))
    pretended = [tensor for tensor in given if isinstance(tensor, PretendedTensor)]
    device = kwargs.get("device")
    if device is None:
        _refuse_mixing(op, given)
        on_gpu = bool(pretended)
    else:
        on_gpu = torch.device(device).type == "cuda"
        kwargs = {**kwargs, "device": torch.device("cpu")} if on_gpu else kwargs
    if pretended and name in SIZES_KNOWN_LATE:
        WAITS.note(name)
    result = op(*held(args), **held(kwargs))
    if pretended and torch.Tag.inplace_view in op.tags:
        with no_dispatch():  # the shape that the pretended tensor shows changes with that of the one that it holds
            op(*args, **kwargs)
    return _wrapped(result, pretended, on_gpu)


def _wrapped(result: Any, given: Sequence[PretendedTensor], on_gpu: bool) -> Any:
    """Results say that they lie on the GPU; those that are arguments, changed in place, are these very arguments."""
    known = {id(tensor.held): tensor for tensor in given}

    def wrap(item: Any) -> Any:
        if not isinstance(item, Tensor) or isinstance(item, PretendedTensor):
            return item
        if id(item) in known:
            assert known[id(item)].shape == item.shape, "a kernel that resizes its argument is not pretended"
            return known[id(item)]
        return PretendedTensor(item) if on_gpu else item

    return tree_map(wrap, result)


def _refuse_mixing(op: Any, given: Sequence[Tensor]) -> None:
    """Raises RuntimeError as CUDA's kernels do for tensors of two devices."""
    elsewhere = [tensor for tensor in given if not isinstance(tensor, PretendedTensor)]
    if len(elsewhere) in (0, len(given)):
        return
    strict = op.overloadpacket.__name__ in ALL_ON_ONE_DEVICE
    refused = [tuple(tensor.shape) for tensor in elsewhere if strict or tensor.dim() > 0]
    if refused:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {op} of CPU tensors {refused}"
        )


@_rule(aten._to_copy)
def _copy(op: Any, args: tuple, kwargs: dict) -> Tensor:
    """To another device or type. The CPU waits for a copy between devices unless that is asked not to block."""
    source = args[0]
    target = torch.device(kwargs.get("device") or source.device)
    asynchronous = kwargs.get("non_blocking", False)
    if target.type not in ("cpu", "cuda"):
        return op(*held(args), **kwargs)
    rest = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
    copied = op(held(source), **rest)
    if source.device.type != target.type and not asynchronous:
        WAITS.note(f"copy to {target.type}")
    return PretendedTensor(copied) if target.type == "cuda" else copied


@_rule(aten.copy_)
def _copy_into(op: Any, args: tuple, kwargs: dict) -> Tensor:
    target, source = args[:2]
    asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    if target.device.type != source.device.type and not asynchronous:
        WAITS.note(f"copy into {target.device.type}")
    op(*held(args), **kwargs)
    return target


@_rule(aten._local_scalar_dense)
def _read_number(op: Any, args: tuple, kwargs: dict) -> Any:
    if isinstance(args[0], PretendedTensor):
        WAITS.note("item")
    return op(*held(args), **kwargs)


@_rule(aten.repeat_interleave)
def _repeat(op: Any, args: tuple, kwargs: dict) -> Any:
    if tensors_in(args) and kwargs.get("output_size") is None:
        WAITS.note("repeat_interleave")
    return _compute(op, args, kwargs)


@_rule(aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_)
def _index(op: Any, args: tuple, kwargs: dict) -> Any:
    """Indices may lie on the CPU, at the price of a copy; where they are true or false, their number is waited for."""
    indexed, indices = args[0], [index for index in args[1] if index is not None]
    on_gpu = isinstance(indexed, PretendedTensor)
    for index in indices:
        index_on_gpu = isinstance(index, PretendedTensor)
        if index_on_gpu and not on_gpu:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if on_gpu and not index_on_gpu:
            WAITS.note("index on the CPU")
        if index_on_gpu and index.dtype in (torch.bool, torch.uint8):
            WAITS.note("index of booleans")
    if len(args) > 2:
        _refuse_mixing(op, [indexed, args[2]])
    given = [tensor for tensor in tensors_in(args) if isinstance(tensor, PretendedTensor)]
    return _wrapped(op(*held(args), **held(kwargs)), given, on_gpu)


@_rule(aten._softmax, aten._log_softmax)
def _softmax(op: Any, args: tuple, kwargs: dict) -> Any:
    """CUDA has kernels that take half and give single precision, which the CPU has not."""
    values, dim, to_float = args
    return _compute(op, (values.float() if to_float else values, dim, False), kwargs)


@_rule(aten._softmax_backward_data, aten._log_softmax_backward_data)
def _softmax_gradient(op: Any, args: tuple, kwargs: dict) -> Any:
    gradient, output, dim, dtype = args
    return _compute(op, (gradient, output, dim, gradient.dtype), kwargs).to(dtype)


@_rule(aten.scaled_dot_product_attention)
def _attend(op: Any, args: tuple, kwargs: dict) -> Any:
    """As one kernel: taken apart, it would choose among kernels that only a GPU has."""
    dtypes = {tensor.dtype for tensor in args[:3]}
    if len(dtypes) > 1:
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {dtypes}")
    return _compute(op, args, kwargs)
