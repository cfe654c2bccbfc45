"""Times of the CPU rasterizer, step by step, beside plain loops over the same tiles; prints a markdown table.

    python benchmarks/rasterization.py                                   # synthetic Gaussians
    python benchmarks/rasterization.py --splat a.ply --scene a/          # a splat and the transforms.json of its scene

With a scene, the PSNR of its test views is printed too, and `--picture` writes the first of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from plyfile import PlyData
from torch import Tensor

from ovs3d_nerfstudio.compiled import compiled
from ovs3d_nerfstudio.gaussians.binning import TILE
from ovs3d_nerfstudio.gaussians.plan import Plan, plan_views
from ovs3d_nerfstudio.gaussians.rasterization import rasterization

GEOMETRY = ("means", "quats", "scales", "opacities")
WIDE = 64
WINDOW = 96


def naive_forward(records, items, starts, columns, colors, out, left):
    """Pixel after pixel, Gaussian after Gaussian: what compositing is, and nothing else."""
    height, width, channels = out.shape
    for y in range(height):
        for x in range(width):
            tile = y // TILE * columns + x // TILE
            transmittance = np.float32(1)
            out[y, x] = 0
            for entry in range(starts[tile], starts[tile + 1]):
                m = items[entry]
                dx, dy = records[m, 0] - np.float32(x + 0.5), records[m, 1] - np.float32(y + 0.5)
                sigma = np.float32(0.5) * (records[m, 2] * dx * dx + records[m, 4] * dy * dy) + records[m, 3] * dx * dy
                alpha = min(np.float32(0.999), records[m, 5] * np.exp(-sigma))
                if sigma < 0 or alpha < np.float32(1 / 255):
                    continue
                after = transmittance * (1 - alpha)
                if after <= np.float32(1e-4):
                    break
                for channel in range(channels):
                    out[y, x, channel] += alpha * transmittance * colors[m, channel]
                transmittance = after
            left[y, x] = transmittance


def naive_backward(records, items, starts, columns, colors, out, left, grad_out, grads, grad_colors):
    """Front to back again, with what is behind as the difference to the finished picture."""
    height, width, channels = out.shape
    for y in range(height):
        for x in range(width):
            tile = y // TILE * columns + x // TILE
            transmittance = np.float32(1)
            rest = np.float32(0)
            for channel in range(channels):
                rest += out[y, x, channel] * grad_out[y, x, channel]
            for entry in range(starts[tile], starts[tile + 1]):
                m = items[entry]
                a, b, c, opacity = records[m, 2], records[m, 3], records[m, 4], records[m, 5]
                dx, dy = records[m, 0] - np.float32(x + 0.5), records[m, 1] - np.float32(y + 0.5)
                sigma = np.float32(0.5) * (a * dx * dx + c * dy * dy) + b * dx * dy
                alpha = min(np.float32(0.999), opacity * np.exp(-sigma))
                if sigma < 0 or alpha < np.float32(1 / 255):
                    continue
                after = transmittance * (1 - alpha)
                if after <= np.float32(1e-4):
                    break
                weight, dot = alpha * transmittance, np.float32(0)
                for channel in range(channels):
                    dot += colors[m, channel] * grad_out[y, x, channel]
                    grad_colors[m, channel] += weight * grad_out[y, x, channel]
                rest -= weight * dot
                v = -alpha * (transmittance * dot - rest / (1 - alpha))
                grads[m, 0] += v * (a * dx + b * dy)
                grads[m, 1] += v * (b * dx + c * dy)
                grads[m, 2] += np.float32(0.5) * v * dx * dx
                grads[m, 3] += v * dx * dy
                grads[m, 4] += np.float32(0.5) * v * dy * dy
                grads[m, 5] -= v / opacity
                transmittance = after


def read_splat(path: Path) -> dict[str, Tensor]:
    """A PLY as the INRIA trainer writes it; colours of degree 0."""
    vertex = PlyData.read(path)["vertex"]

    def columns(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(vertex[name], np.float32) for name in names], -1))

    return {
        "means": columns("x", "y", "z"),
        "quats": columns("rot_0", "rot_1", "rot_2", "rot_3"),
        "scales": columns("scale_0", "scale_1", "scale_2").exp(),
        "opacities": columns("opacity")[:, 0].sigmoid(),
        "colors": columns("f_dc_0", "f_dc_1", "f_dc_2") * 0.28209479177387814 + 0.5,
    }


def read_views(scene: Path) -> tuple[dict[str, Tensor], tuple[int, int], list[Path]]:
    """Cameras (world to camera, OpenCV axes), size and pictures of the test views of a transforms.json."""
    transforms = json.loads((scene / "transforms.json").read_text())
    frames = [f for f in transforms["frames"] if f["file_path"] in set(transforms["test_filenames"])]
    poses = torch.tensor([frame["transform_matrix"] for frame in frames])
    poses[:, :3, 1:3] *= -1
    K = [[transforms["fl_x"], 0, transforms["cx"]], [0, transforms["fl_y"], transforms["cy"]], [0, 0, 1]]
    cameras = {"viewmats": torch.linalg.inv(poses), "Ks": torch.tensor(K).repeat(len(frames), 1, 1)}
    return cameras, (transforms["w"], transforms["h"]), [scene / frame["file_path"] for frame in frames]


def synthetic(count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gaussians on a wavy wall, a few pixels large, and one camera."""
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(count, 2, generator=generator) * torch.tensor([4.4, 3.4]) - torch.tensor([2.2, 1.7])
    depth = 4 + 0.5 * torch.sin(3 * place[:, :1]) + 0.2 * torch.rand(count, 1, generator=generator)
    gaussians = {
        "means": torch.cat([place, depth], -1),
        "quats": torch.randn(count, 4, generator=generator),
        "scales": 0.02 * torch.exp(0.7 * torch.randn(count, 3, generator=generator)),
        "opacities": torch.rand(count, generator=generator) * 0.9 + 0.05,
        "colors": torch.rand(count, 3, generator=generator),
    }
    K = torch.tensor([[515.0, 0, 240], [0, 515.0, 180], [0, 0, 1]])
    return gaussians, {"viewmats": torch.eye(4)[None], "Ks": K[None]}


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()  # compiles, and touches the memory
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def naive_times(plan: Plan, colors: Tensor, wide: Tensor, repeats: int) -> dict[str, float]:
    """Plain compiled loops over our lists of tiles, on one thread."""
    bins = plan.bins
    forward, backward = compiled(naive_forward), compiled(naive_backward)
    times = {}
    for name, values in (("RGB", colors), (f"{WIDE} channels", wide)):
        visible = values[plan.gaussians].numpy()
        out = np.empty((bins.height, bins.width, visible.shape[1]), np.float32)
        left, grads = np.empty(out.shape[:2], np.float32), np.zeros((len(visible), 6), np.float32)
        head = (bins.records, bins.items, bins.tile_start, bins.tiles[0], visible, out, left)
        tail = (np.ones_like(out), grads, np.zeros_like(visible))
        times[f"compositing, {name}: naive loops, forward"] = seconds(lambda head=head: forward(*head), repeats)
        times[f"compositing, {name}: naive loops, backward"] = seconds(
            lambda arguments=(*head, *tail): backward(*arguments), repeats
        )
    return times


def our_times(gaussians, camera, size: tuple[int, int], wide: Tensor, repeats: int) -> dict[str, float]:
    geometry = {name: gaussians[name] for name in GEOMETRY}
    sized = {**camera, "width": size[0], "height": size[1]}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in geometry.items()}
    times = {"plan: projection and binning": seconds(lambda: plan_views(**geometry, **sized), repeats)}
    for name, values in (("RGB", gaussians["colors"]), (f"{WIDE} channels", wide)):
        values = values.clone().requires_grad_()
        for gradients, tensors in (("all gradients", leaves), ("gradients of colours", geometry)):
            plan = plan_views(**tensors, **sized)
            picture, _ = plan.composite(values)
            weights = torch.ones_like(picture)
            if tensors is leaves:
                times[f"compositing, {name}: forward"] = seconds(lambda p=plan, v=values: p.composite(v), repeats)
            times[f"compositing, {name}: backward, {gradients}"] = seconds(
                lambda p=picture, w=weights: p.backward(w, retain_graph=True), repeats
            )

    def training_step() -> None:
        rasterization(**leaves, colors=gaussians["colors"].requires_grad_(), **sized)[0].sum().backward()

    windows = [((size[0] - WINDOW) // 2, (size[1] - WINDOW) // 2, WINDOW, WINDOW)]
    part = plan_views(**geometry, **sized, windows=windows)
    semantic = wide.clone().requires_grad_()
    times["RGB step with all gradients, projection to backward"] = seconds(training_step, repeats)
    times[f"window of {WINDOW}×{WINDOW}: plan"] = seconds(
        lambda: plan_views(**geometry, **sized, windows=windows), repeats
    )
    times[f"window of {WINDOW}×{WINDOW}: {WIDE} channels forward and backward, plan kept"] = seconds(
        lambda: part.composite(semantic)[0].sum().backward(), repeats
    )
    gaussians["colors"].requires_grad_(False)
    return times


def report_quality(gaussians, cameras, size: tuple[int, int], files: list[Path], picture: Path | None) -> None:
    ratios = []
    for i, file in enumerate(files):
        camera = {name: tensor[i : i + 1] for name, tensor in cameras.items()}
        rendered = rasterization(**gaussians, **camera, width=size[0], height=size[1])[0][0].clamp(0, 1).numpy()
        truth = np.asarray(Image.open(file).convert("RGB"), np.float32) / 255
        ratios.append(-10 * np.log10(np.mean((rendered - truth) ** 2)))
        if picture is not None and i == 0:
            Image.fromarray(np.round(rendered * 255).astype(np.uint8)).save(picture)
    print(f"\nPSNR of {len(files)} test views: {np.mean(ratios):.2f} dB ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splat", type=Path, help="a PLY; needs --scene")
    parser.add_argument("--scene", type=Path, help="a folder with transforms.json, in the splat's frame")
    parser.add_argument("--count", type=int, default=30_000, help="number of synthetic Gaussians")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7, help="the fastest of so many is reported")
    parser.add_argument("--picture", type=Path, help="where to write the first test view")
    options = parser.parse_args()
    files: list[Path] = []
    size = (480, 360)
    if options.splat is None:
        gaussians, cameras = synthetic(options.count)
    elif options.scene is None:
        parser.error("--splat needs the cameras of a --scene.")
    else:
        gaussians = read_splat(options.splat)
        cameras, size, files = read_views(options.scene)
    camera = {name: tensor[:1] for name, tensor in cameras.items()}
    wide = torch.rand(len(gaussians["means"]), WIDE, generator=torch.Generator().manual_seed(1))
    plan = plan_views(**{name: gaussians[name] for name in GEOMETRY}, **camera, width=size[0], height=size[1])

    torch.set_num_threads(1)
    columns = [naive_times(plan, gaussians["colors"], wide, max(options.repeats // 2, 1))]
    for threads in options.threads:
        torch.set_num_threads(threads)
        columns.append(our_times(gaussians, camera, size, wide, options.repeats))
    entries = len(plan.bins.items)
    print(
        f"{len(gaussians['means'])} Gaussians, {len(plan.gaussians)} visible, {entries} tile entries, {size[0]}×{size[1]}"
    )
    print("\n| ms | " + " | ".join(f"{n} thread{'s' * (n > 1)}" for n in options.threads) + " |")
    print("|---|" + "---|" * len(options.threads))
    for name, value in columns[0].items():
        print(f"| {name} | {1000 * value:.1f} |" + " – |" * (len(options.threads) - 1))
    for name in columns[1]:
        print(f"| {name} | " + " | ".join(f"{1000 * column[name]:.1f}" for column in columns[1:]) + " |")
    if files:
        report_quality(gaussians, cameras, size, files, options.picture)


if __name__ == "__main__":
    main()
