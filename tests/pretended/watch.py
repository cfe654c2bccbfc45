"""Looks over a method's shoulder: what it computes lies on the device and is finite, what it learns is single precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from pretended.tensors import held


class Watch:
    """Gathers what is wrong, so that one run tells of all of it."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def end(self) -> None:
        """Raises AssertionError with what was found since the last call."""
        faults, self.faults = dict.fromkeys(self.faults), []
        assert not faults, "\n".join(faults)

    def numbers(self, name: str, value: Any, on_device: bool = True) -> None:
        """Tensors and floats in `value` are finite; tensors lie on the device."""
        for path, number in _leaves(name, value):
            if isinstance(number, Tensor):
                if on_device and number.device.type != "cuda":
                    self.faults.append(f"{path} lies on {number.device}")
                finite = bool(held(number.detach()).isfinite().all())
            else:
                finite = number - number == 0
            if not finite:
                self.faults.append(f"{path} is not finite")

    def state(self, module: torch.nn.Module, optimizers: Mapping[str, torch.optim.Optimizer] | None = None) -> None:
        """Parameters, buffers and what optimizers keep of them: single precision, finite and on the device."""
        known = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if b.is_floating_point())]
        counts = [(name, buffer) for name, buffer in module.named_buffers() if not buffer.is_floating_point()]
        for group, optimizer in (optimizers or {}).items():
            for kept in optimizer.state.values():
                known += [(f"{group}'s {name}", value) for name, value in kept.items() if isinstance(value, Tensor)]
        for name, value in known:
            if value.dtype != torch.float32:
                self.faults.append(f"{name} is {value.dtype}")
        for name, value in known + counts:
            self.numbers(name, value)

    def learning(self, step: tuple[Any, Any, Any]) -> None:
        """Outputs, losses and metrics of a batch. Of the metrics, nerfstudio fetches some itself."""
        outputs, losses, metrics = step
        self.numbers("output", outputs)
        self.numbers("loss", losses)
        self.numbers("metric", metrics, on_device=False)

    def results_of(self, owner: Any, method: str, look: Callable[[Any], None]) -> None:
        """From now on `look` gets what `owner.method` returns."""
        unwatched = getattr(owner, method)

        @wraps(unwatched)
        def watched(*args, **kwargs):
            result = unwatched(*args, **kwargs)
            look(result)
            return result

        setattr(owner, method, watched)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor | float]]:
    """Tensors and floats in nested containers and dataclasses, with their place."""
    if isinstance(value, Tensor | float):
        yield name, value
    elif isinstance(value, Mapping):
        for key in list(value):
            yield from _leaves(f"{name}[{key}]", value[key])
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(f"{name}[{i}]", item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(f"{name}.{field.name}", getattr(value, field.name, None))
