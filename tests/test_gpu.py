"""On a GPU everything comes out as on a CPU: the kernels of the hash grid, and a step and a picture of each method."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from nerfstudio.configs.method_configs import all_methods
from pretended.small import STEPS, small
from test_hash_grid import TOLERANCE, points, run
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ovs3d_nerfstudio.engine.checkpoints import checkpoints, read_checkpoint
from ovs3d_nerfstudio.fields import hash_grid
from ovs3d_nerfstudio.fields.hash_grid import FastHashEncoding
from ovs3d_nerfstudio.models.nerf import tcnn_imports
from ovs3d_nerfstudio.pipeline import OVS3DPipeline
from ovs3d_nerfstudio.run_files import our_methods

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (torch.cuda.is_available() is False)"),
]
DEVICE = "cuda"
METHODS = list(our_methods())


def grids_of(method: str) -> list[dict[str, int]]:
    """Sizes of all hash grids of a method: colour and density, semantics, proposal networks."""
    model = our_methods()[method].model
    others = ("max_res", "log2_hashmap_size", "features_per_level")
    semantic = {"num_levels": model.semantic_levels, "min_res": model.semantic_base_res}
    grids = [semantic | {name: getattr(model, f"semantic_{name}") for name in others}]
    if hasattr(model, "num_levels"):
        own = {"num_levels": model.num_levels, "min_res": model.base_res}
        grids.append(own | {name: getattr(model, name) for name in others})
    for grid in getattr(model, "proposal_net_args_list", ()):
        grids.append({name: grid[name] for name in ("num_levels", *others) if name in grid})
    return grids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("method", METHODS)
def test_the_kernels_of_each_grid_give_the_numbers_of_the_cpu(method: str, dtype: torch.dtype) -> None:
    backend = hash_grid._backend(torch.device(DEVICE))
    assert backend is not None and backend.__name__.endswith("hash_grid_triton"), "Triton's kernels do not run here"
    positions = points(20_000, dtype)
    for sizes in grids_of(method):
        torch.manual_seed(0)
        on_cpu = FastHashEncoding(**sizes, hash_init_scale=1.0).to(dtype)
        on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
        expected, actual = run(on_cpu, positions), run(on_gpu, positions.to(DEVICE))
        for name, value in expected.items():
            worst = (actual[name].cpu() - value).abs().max() / value.abs().max()
            # Thousands of points share a row of a coarse level, and a GPU adds them up in any order.
            assert worst <= 20 * TOLERANCE[dtype], (sizes, name, worst)


class DrawnOnTheCpu(TorchFunctionMode):
    """Random numbers come from the CPU's generator, whatever device they are for: equal seeds draw the same everywhere."""

    DRAWN = (torch.rand, torch.randn, torch.randint, torch.randperm)
    LIKE: ClassVar = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if call in self.LIKE:
            model = args[0]
            return self.LIKE[call](model.shape, dtype=kwargs.get("dtype", model.dtype)).to(model.device)
        if call in self.DRAWN and kwargs.get("generator") is None:
            device = kwargs.pop("device", None)
            drawn = call(*args, **kwargs)
            return drawn if device is None else drawn.to(device)
        return call(*args, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the tests of this file share the features that they extract."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(autouse=True)
def single_precision_products() -> Iterator[None]:
    """TF32 keeps three digits of what a convolution or a product of matrices multiplies."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def opened(method: str, scene: Path, folder: Path, device: str) -> OVS3DPipeline:
    """A small pipeline with its features; seeds make the photos come in the same order on every device."""
    random.seed(0)
    torch.manual_seed(0)
    pipeline = small(method, scene, folder, "compared", mixed=False).pipeline.setup(device=device, test_mode="val")
    pipeline.prepare_features()
    return pipeline


@torch.no_grad()
def make_lively(model: torch.nn.Module) -> None:
    """Fresh fields say nearly the same everywhere, and would hide what differs."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("hash_table"):
            parameter.uniform_(-1, 1)
    model.semantic_field.last.bias.zero_()


def step_and_picture(pipeline: OVS3DPipeline) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a step in which every loss takes part, and the outputs of a view, all on the CPU."""
    random.seed(1)
    torch.manual_seed(1)
    pipeline.train()
    with DrawnOnTheCpu():
        losses = pipeline.get_train_loss_dict(STEPS)[1]
    torch.stack(list(losses.values())).sum().backward()
    gradients = {n: p.grad.cpu() for n, p in pipeline.model.named_parameters() if p.grad is not None}
    pipeline.eval()
    camera = pipeline.datamanager.train_dataset.cameras[:1].to(pipeline.model.device)
    picture = pipeline.model.get_outputs_for_camera(camera)
    return ({n: v.detach().cpu() for n, v in losses.items()}, gradients, {n: v.cpu() for n, v in picture.items()})


@pytest.mark.parametrize("method", METHODS)
def test_a_step_and_a_picture_of_each_method_are_those_of_the_cpu(method: str, scene: Path, folder: Path) -> None:
    on_cpu, on_gpu = (opened(method, scene, folder, device) for device in ("cpu", DEVICE))
    make_lively(on_cpu.model)
    on_gpu.model.load_state_dict(on_cpu.model.state_dict())
    (losses, gradients, picture), (losses_gpu, gradients_gpu, picture_gpu) = map(step_and_picture, (on_cpu, on_gpu))
    assert losses.keys() == losses_gpu.keys() and "fda_positive_loss" in losses
    for name, loss in losses.items():
        assert (losses_gpu[name] - loss).abs() <= 1e-3 * loss.abs() + 1e-7, (name, losses_gpu[name], loss)
    assert gradients.keys() == gradients_gpu.keys()
    for name, gradient in gradients.items():
        # A camera's is a sum of what nearly cancels: a millionth off in the weights takes it half a percent off.
        off = (gradients_gpu[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert off <= 0.1, (name, off)
    assert picture.keys() == picture_gpu.keys() >= {"rgb", "depth", "segmentation", "scale"}
    assert len(picture["segmentation"].flatten(0, 1).unique(dim=0)) > 1
    for name, output in picture.items():
        off = (picture_gpu[name] - output).abs()
        if name.startswith("segmentation"):
            assert (off.amax(-1) <= 1e-3).float().mean() >= 0.99, name
        else:  # a ray that falls between two samples may fall the other way
            assert off.median() <= 1e-3 * output.abs().max(), name


@pytest.mark.parametrize("implementation", ["torch", "tcnn"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_saves(
    method: str, implementation: str, scene: Path, folder: Path, tmp_path: Path
) -> None:
    if implementation == "tcnn":
        if not hasattr(our_methods()[method].model, "implementation"):
            pytest.skip("this method has no networks of tiny-cuda-nn")
        if not tcnn_imports():
            pytest.skip("tiny-cuda-nn is not installed")
    config = small(method, scene, tmp_path, "trained", mixed=all_methods[method].mixed_precision)
    config.machine.device_type = DEVICE
    config.pipeline.datamanager.feature_cache_dir = folder / "features"
    config.pipeline.model.implementation = implementation
    trainer = config.setup(local_rank=0, world_size=1)
    config.save_config()
    trainer.setup()
    trainer.train()
    saved = checkpoints(trainer.checkpoint_dir)
    assert saved
    state = read_checkpoint(saved[0])["pipeline"]
    for name, parameter in trainer.pipeline.model.named_parameters():
        assert parameter.device.type == DEVICE and parameter.isfinite().all(), name
        assert torch.equal(state[f"_model.{name}"], parameter.cpu()), name
