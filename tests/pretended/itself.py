"""Whether the pretence refuses and does what CUDA refuses and does; each line that goes wrong ends the process."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch

from pretended.cuda import pretend
from pretended.tensors import DEVICE, PretendedDevice
from pretended.waits import WAITS
from pretended.watch import Watch


def main() -> None:
    pretend()
    with PretendedDevice():
        refuses_two_devices()
        computes_in_half()
        trains()
        counts_waits()
        saves()
        is_watched()


def refuses_two_devices() -> None:
    there, here = torch.rand(3, 3, device="cuda"), torch.rand(3, 3)
    refused(lambda: there + here, RuntimeError)
    refused(lambda: torch.cat([there, here]), RuntimeError)
    refused(lambda: there @ here, RuntimeError)
    refused(lambda: here[there[0].long()], RuntimeError)
    refused(there.numpy, TypeError)
    assert (there * torch.tensor(2.0)).device == DEVICE, "a number on the CPU may be mixed in"
    torch.testing.assert_close((there + here.cuda()).cpu(), there.cpu() + here, rtol=0, atol=0)


def computes_in_half() -> None:
    """The fault that CPU autocast hides: CUDA's leaves these in half, for which they have no kernel."""
    square = torch.rand(3, 3, device="cuda")
    with torch.autocast("cuda"):
        product = square @ square
        assert product.dtype == torch.float16
        assert product.softmax(-1).dtype == torch.float32
        refused(lambda: torch.linalg.eigh(product), RuntimeError)
        refused(lambda: product.quantile(0.5), RuntimeError)


def trains() -> None:
    layer = torch.nn.Linear(3, 1, device="cuda")
    assert layer.weight.device == DEVICE
    adam = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
    values, before = torch.rand(8, 3).cuda(), layer.weight.detach().clone()
    losses = []
    for step in range(4):
        adam.zero_grad()
        with torch.autocast("cuda"):
            loss = (layer(values).float() - 1).pow(2).mean() * (torch.inf if step == 1 else 1)
        scaler.scale(loss).backward()
        assert layer.weight.grad.device == DEVICE and layer.weight.grad.dtype == torch.float32
        scaler.step(adam)
        scaler.update()
        losses.append(float(loss))
    assert scaler.get_scale() == 32.0, "one step was not finite: it is left out, and the scale halved"
    assert losses[3] < losses[0] and not layer.weight.equal(before)


def counts_waits() -> None:
    values = torch.rand(8, device="cuda")
    waits: dict[str, Callable] = {
        "copy to cpu": values.cpu,
        "copy to cuda": lambda: torch.tensor(2.0, device="cuda"),
        "item": values.sum().item,
        "tolist": values.tolist,
        "nonzero": lambda: (values > 0.5).nonzero(),
        "index of booleans": lambda: values[values > 0.5],
        "index on the CPU": lambda: values[torch.arange(3)],
    }
    for kind, wait in waits.items():
        with WAITS.counted():
            wait()
        assert kind in {site.kind for site in WAITS.sites}, kind
    with WAITS.counted():
        (values * 2).sum()
        torch.rand(3).to("cuda", non_blocking=True)
    assert not WAITS.sites, WAITS.sites


def saves() -> None:
    file = io.BytesIO()
    values = torch.rand(3, device="cuda")
    torch.save({"values": values}, file)
    file.seek(0)
    read = torch.load(file, map_location="cpu", weights_only=True)["values"]
    assert read.device.type == "cpu" and read.equal(values.cpu())


def is_watched() -> None:
    """Each kind of fault is seen, and what is in order is none."""
    layer, watch = torch.nn.BatchNorm1d(3).cuda(), Watch()
    watch.state(layer)
    watch.numbers("fine", {"a": torch.rand(3, device="cuda"), "b": 1.0})
    watch.end()
    faults = {
        "half": lambda: watch.state(torch.nn.Linear(3, 3).cuda().half()),
        "a buffer left behind": lambda: watch.state(torch.nn.BatchNorm1d(3, affine=False)),
        "not a number": lambda: watch.numbers("loss", {"a": [torch.full((2,), torch.nan, device="cuda")]}),
        "infinite": lambda: watch.numbers("figure", [float("inf")]),
        "on the CPU": lambda: watch.numbers("output", torch.rand(3)),
    }
    for work in faults.values():
        work()
        refused(watch.end, AssertionError)


def refused(work: Callable, error: type[Exception]) -> None:
    try:
        work()
    except error:
        return
    raise AssertionError("CUDA would have refused")


if __name__ == "__main__":
    main()
