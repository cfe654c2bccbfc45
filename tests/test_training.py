"""The pipeline in one process: real encoders on small checkpoints, no prompts, resuming, and what a user does wrong."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CLIP
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.optimizers import Optimizers

from ovs3d_nerfstudio.losses.apart import told_apart
from ovs3d_nerfstudio.models.nerf import OVS3DModel, rays_that_fit
from ovs3d_nerfstudio.pipeline import OVS3DPipeline


def pipeline(data: Path, test_mode="val", model=(), **settings) -> OVS3DPipeline:
    """`ovs3d-lite` with a few rays, without a command, from seed 0."""
    torch.manual_seed(0)
    config = copy.deepcopy(all_methods["ovs3d-lite"].pipeline)
    config.datamanager.data = data
    config.datamanager.train_num_rays_per_batch = 64
    config.datamanager.eval_num_rays_per_batch = 64
    config.datamanager.num_windows = 1
    config.datamanager.window_size = 4
    config.datamanager.scales = (2.0, 3.0)
    config.model.semantics_start, config.model.fda_start = 1, 2
    for name, value in {**dict(model)}.items():
        setattr(config.model, name, value)
    if "dataparser" in settings:
        config.datamanager.dataparser = settings.pop("dataparser")
    for name, value in settings.items():
        setattr(config, name, value)
    return config.setup(device="cpu", test_mode=test_mode)


def train(trained: OVS3DPipeline, first: int, last: int) -> list[dict[str, float]]:
    optimizers = Optimizers(copy.deepcopy(all_methods["ovs3d-lite"].optimizers), trained.get_param_groups())
    trained.train()
    history = []
    for step in range(first, last):
        optimizers.zero_grad_all()
        _, losses, _ = trained.get_train_loss_dict(step)
        sum(losses.values()).backward()
        optimizers.optimizer_step_all()
        history.append({name: float(value) for name, value in losses.items()})
    return history


@pytest.fixture
def data(scene, tmp_path) -> Path:
    return shutil.copytree(scene, tmp_path / "scene", ignore=shutil.ignore_patterns(".ovs3d-cache"))


def test_clip_and_dino_checkpoints_train_for_real(data, checkpoints):
    history = train(pipeline(data, **checkpoints, prompts="a cat; a rocket"), 0, 5)
    assert {"rgb_loss", "feature_loss", "patch_loss", "rda_loss"} <= set(history[1])
    assert not {"unmixing_loss", "color_loss"} & set(history[1]) and {"unmixing_loss", "color_loss"} <= set(history[3])
    assert "fda_positive_loss" not in history[1] and {"fda_positive_loss", "fda_negative_loss"} <= set(history[3])
    assert all(torch.isfinite(torch.tensor(value)) for step in history for value in step.values())
    assert history[0].keys() == {"rgb_loss", "interlevel_loss", "distortion_loss", "depth_loss", "opacity_loss"}
    assert history[-1]["opacity_loss"] < history[0]["opacity_loss"]


def test_the_papers_own_setting_trains(data, checkpoints):
    paper = all_methods["ovs3d-paper"].pipeline.model
    names = [name for name in vars(paper) if name.startswith(("fda_", "rda_")) or name.endswith("_loss_mult")]
    model = {name: getattr(paper, name) for name in names if name not in ("fda_start", "fda_pairs")}
    history = train(pipeline(data, model=model, **checkpoints, prompts="a cat; a rocket"), 0, 4)
    assert {"feature_loss", "rda_loss", "fda_positive_loss", "fda_negative_loss"} <= set(history[3])
    assert not {"patch_loss", "unmixing_loss", "color_loss"} & set(history[3])
    assert all(torch.isfinite(torch.tensor(value)) for step in history for value in step.values())


def test_unlike_pairs_are_told_apart_from_their_step_on(data, checkpoints, monkeypatch):
    """Colours are at hand then, though no colour loss asks for them."""
    weights = []

    def watched(*arguments):
        weights.append(told_apart(*arguments))
        return weights[-1]

    monkeypatch.setattr("ovs3d_nerfstudio.models.semantics.told_apart", watched)
    model = {"fda_apart_start": 3, "color_loss_mult": 0.0}
    trained = pipeline(data, model=model, **checkpoints, prompts="a cat; a rocket")
    train(trained, 0, 3)
    assert not weights
    train(trained, 3, 5)
    assert len(weights) == 2 and all(0 <= float(each.amin()) <= float(each.amax()) <= 1 for each in weights)


@pytest.mark.parametrize("kept", [-1, 2], ids=["all photos in memory", "two photos in memory"])
def test_windows_have_the_colors_of_their_pixels(data, checkpoints, kept):
    trained = pipeline(data, **checkpoints, prompts="a cat; a rocket")
    manager = trained.datamanager
    manager.config.train_num_images_to_sample_from, manager.config.num_windows = kept, 6
    manager.setup_train()
    trained.prepare_features()
    _, windows = manager.next_windows(colors=True)
    expected = [manager.train_dataset.get_image_float32(view)[row, col] for view, row, col in windows.indices.tolist()]
    assert torch.equal(windows.colors.reshape(-1, 3), torch.stack(expected)[:, :3])
    views = manager.train_image_dataloader.cached_collated_batch
    assert views is None or set(windows.indices[:, 0].tolist()) <= set(views["image_idx"].tolist())
    assert manager.next_windows()[1].colors is None


def test_rays_and_windows_rendered_in_one_call_are_as_if_rendered_apart(data, checkpoints):
    trained = pipeline(data, **checkpoints, prompts="a cat; a rocket")
    train(trained, 0, 2)
    model = trained.model.train()
    rays, _ = trained.datamanager.next_train(0)
    window_rays, _ = trained.datamanager.next_windows()

    def seen(**windows):
        torch.manual_seed(0)
        return model(rays, **windows)

    joined, alone = seen(window_rays=window_rays), seen()
    assert torch.allclose(joined["semantics"].coefficients, alone["semantics"].coefficients, atol=1e-5)
    assert torch.equal(joined["rgb"], alone["rgb"])
    assert len(joined["window_semantics"].scales) == len(window_rays) and "window_semantics" not in alone


def test_features_wait_until_training_asks_for_a_batch(data, checkpoints):
    trained = pipeline(data, **checkpoints, prompts="a cat; a rocket")
    assert not (data / ".ovs3d-cache").exists()
    train(trained, 0, 1)
    assert len(list((data / ".ovs3d-cache").glob("pyramid-*/*.safetensors"))) == 8


def test_without_prompts_the_features_are_learned_alone_and_it_is_said(data, checkpoints, capsys):
    shutil.rmtree(data / "segmentations")
    trained = pipeline(data, **checkpoints)
    assert "prompt" in capsys.readouterr().out
    history = train(trained, 0, 4)
    assert "feature_loss" in history[-1] and not any("fda" in name or "rda" in name for name in history[-1])
    trained.eval()
    outputs = trained.model.get_outputs_for_camera(trained.datamanager.eval_dataset.cameras[:1])
    assert "features_pca" in outputs and "segmentation" not in outputs


def test_what_classes_are_compared_by_is_chosen_and_stays_with_the_run(data, checkpoints, monkeypatch):
    monkeypatch.setattr("ovs3d_nerfstudio.prompts.segmentation.AT_HOME", 2.0)  # no prompt is
    trained = pipeline(data, **checkpoints, prompts="a cat; a rocket")
    train(trained, 0, 3)
    monkeypatch.undo()
    opened = pipeline(data, test_mode="inference", **checkpoints, prompts="a cat; a rocket")
    opened.load_pipeline(trained.state_dict(), 3)
    assert trained.model.segmenter.scores == opened.model.segmenter.scores == "centred"
    segmenter = opened.model.segmenter
    features = torch.randn(9, segmenter.basis.shape[1])
    middles = segmenter.range.mean(0)
    assert torch.equal(opened.model.class_scores(features), segmenter.similarities(features) - middles)


def test_a_run_opens_and_renders_the_same_from_its_state_alone(data, checkpoints):
    trained = pipeline(data, **checkpoints, prompts="a cat; a rocket; rgb cube")
    train(trained, 0, 4)
    opened = pipeline(data, test_mode="test")
    opened.load_pipeline(copy.deepcopy(trained.state_dict()), 4)
    assert opened.model.segmenter.prompts == ["a cat", "a rocket", "rgb cube"]
    camera = trained.datamanager.eval_dataset.cameras[:1]
    outputs = [p.eval() and p.model.get_outputs_for_camera(camera) for p in (trained, opened)]
    names = set(outputs[0])
    assert {"segmentation", "segmentation_overlay", "relevancy_a_cat", "scale", "features_pca"} <= names
    assert not any("rgb" in name for name in names - {"rgb"})
    for name in names - {"rgb"}:
        assert torch.allclose(outputs[0][name], outputs[1][name], atol=1e-5), name
        if name.startswith(("seg", "rel", "scale", "features")):
            assert outputs[0][name].shape[-1] in (1, 3) and 0 <= outputs[0][name].min() <= outputs[0][name].max() <= 1


def test_a_resumed_run_keeps_its_basis_and_goes_on(data, checkpoints):
    first = pipeline(data, **checkpoints, prompts="a cat; a rocket")
    train(first, 0, 3)
    second = pipeline(data, **checkpoints, prompts="a cat; a rocket")
    second.load_pipeline(copy.deepcopy(first.state_dict()), 2)
    basis = second.model.segmenter.basis.clone()
    train(second, 3, 5)
    assert torch.equal(second.model.segmenter.basis, basis) and torch.equal(first.model.segmenter.basis, basis)


@pytest.mark.parametrize("basis_dim", [0, 7])
def test_the_basis_can_be_left_out_or_set_by_hand(data, checkpoints, basis_dim):
    model = {"basis_dim": basis_dim, "basis_energy": 1.0}
    trained = pipeline(data, model=model, **checkpoints, prompts="a cat; a rocket")
    train(trained, 0, 2)
    assert trained.model.semantic_field.dim == (basis_dim or CLIP["embed_dim"])


def test_the_semantic_losses_leave_the_density_alone_unless_asked(data, checkpoints):
    for detach in (True, False):
        trained = pipeline(data, model={"detach_density": detach}, **checkpoints, prompts="a cat; a rocket")
        trained.train()
        _, losses, _ = trained.get_train_loss_dict(3)
        sum(value for name, value in losses.items() if name in ("feature_loss", "patch_loss", "rda_loss")).backward()
        gradients = [p.grad for p in trained.model.field.parameters() if p.grad is not None]
        assert any(g.abs().sum() > 0 for g in gradients) is not detach


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"image_text_encoder": "clipp"}, "There is no encoder 'clipp'"),
        ({"token_encoder": "dino:/nowhere/at/all"}, "/nowhere/at/all"),
        ({"image_text_encoder": "open_clip:ViT-B-16@/nowhere.pt"}, "/nowhere.pt"),
        ({"prompts": " ; ;"}, "no prompt"),
        ({"prompts": "a", "prompts_file": Path("b.txt")}, "prompts"),
    ],
)
def test_a_users_mistake_ends_with_a_sentence(data, checkpoints, capsys, settings, sentence):
    with pytest.raises(SystemExit) as stopped:
        pipeline(data, **{**checkpoints, **settings}).get_train_loss_dict(0)
    assert stopped.value.code == 1
    assert sentence.lower() in capsys.readouterr().out.replace("\n", " ").lower()


def test_a_loss_that_is_no_number_ends_training_with_its_name_and_step(data, checkpoints, capsys):
    trained = pipeline(data, **checkpoints, prompts="a cat; a rocket")
    train(trained, 0, 2)
    trained.model.semantic_field.last.bias.data[0] = torch.nan
    with pytest.raises(SystemExit) as stopped:
        train(trained, 2, 3)
    printed = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 1 and "stopped at step 2: feature_loss is nan" in printed and "rgb_loss" not in printed


def test_tiny_cuda_nn_is_no_requirement(data):
    model = pipeline(data).model
    assert isinstance(model, OVS3DModel) and model.config.implementation == "torch"


def test_a_picture_is_rendered_in_smaller_chunks_where_memory_is_short(data, monkeypatch):
    trained = pipeline(data).eval()
    camera, model = trained.datamanager.eval_dataset.cameras[:1], trained.model
    most, seen = model.config.eval_num_rays_per_chunk, []
    whole = model.get_outputs_for_camera(camera)["rgb"]
    hook = model.collider.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    monkeypatch.setattr("ovs3d_nerfstudio.models.nerf.free_memory", lambda _device: 2 * 300 * 60_000)
    assert torch.allclose(model.get_outputs_for_camera(camera)["rgb"], whole, atol=1e-5)
    hook.remove()
    assert max(seen) == 256 and model.config.eval_num_rays_per_chunk == most == rays_that_fit(model.config, 1 << 30)
