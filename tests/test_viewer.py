"""Live prompts without a browser: what is asked, what is rendered for it, and what training never notices."""

import copy
import shutil
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import viser.transforms as vtf
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components import renderers
from nerfstudio.viewer.viewer import Viewer
from nerfstudio.viewer.viewer_elements import ViewerClick
from test_training import data, pipeline, train  # noqa: F401 (fixtures)

from ovs3d_nerfstudio.cli.common import ask
from ovs3d_nerfstudio.data.frames import frame_of
from ovs3d_nerfstudio.encoders.base import EncoderError
from ovs3d_nerfstudio.prompts.likes import read_likes
from ovs3d_nerfstudio.prompts.prompts import PromptError
from ovs3d_nerfstudio.prompts.segmentation import Segmenter
from ovs3d_nerfstudio.run import Run
from ovs3d_nerfstudio.viewer.live import LiveModel, LivePrompts
from ovs3d_nerfstudio.viewer.panel import at_a_photo, described, keep_steps
from ovs3d_nerfstudio.viewer.things import Things


@pytest.fixture(scope="module")
def seen(scene, tmp_path_factory, checkpoints):
    """A pipeline that was trained for a few steps, and a camera."""
    folder = tmp_path_factory.mktemp("seen") / "scene"
    shutil.copytree(scene, folder, ignore=shutil.ignore_patterns(".ovs3d-cache"))
    trained = pipeline(folder, **checkpoints, prompts="a cat; a rocket; books")
    train(trained, 0, 4)
    trained.eval()
    camera = trained.datamanager.eval_dataset.cameras[:1]
    camera.rescale_output_resolution(0.5)
    return trained, camera


@pytest.fixture
def live(seen) -> tuple[LivePrompts, LiveModel]:
    prompts = LivePrompts(seen[0].model)
    prompts.follow_training()
    return prompts, LiveModel(prompts, threading.Lock())


def test_outside_a_crop_box_everything_is_background(seen, live):
    trained, camera = seen
    model, live_model = trained.model, live[1]
    middle = camera.camera_to_worlds[0, :, 3] - 0.6 * camera.camera_to_worlds[0, :, 2]
    box = OrientedBox(R=torch.eye(3), T=middle, S=torch.full((3,), 0.2))
    with renderers.background_color_override_context(torch.tensor([0.1, 0.2, 0.3])):
        outputs = dict(model.get_outputs_for_camera(camera, box))
        looked = live_model.get_outputs_for_camera(camera, box)
    assert all(output.isfinite().all() for output in outputs.values())
    nothing = outputs["accumulation"][..., 0] < 0.5
    assert nothing.float().mean() > 0.5
    assert torch.equal(model.labels_in(outputs) < 0, nothing)
    for name in ("segmentation", "segmentation_overlay", "features_pca"):
        assert torch.equal(outputs[name][nothing], outputs["rgb"][nothing])
        assert torch.equal(looked[name][nothing], outputs["rgb"][nothing])
    for name in ("scale", "relevancy_a_cat"):
        assert not outputs[name][nothing].any() and not looked[name][nothing].any()
    assert sum(looked.shares()) == pytest.approx(1 - float(nothing.float().mean()), abs=1e-4)


def test_the_trained_prompts_look_in_the_viewer_as_everywhere_else(seen, live):
    trained, camera = seen
    outputs, own = live[1].get_outputs_for_camera(camera), trained.model.get_outputs_for_camera(camera)
    assert list(outputs) == list(own)
    assert all(torch.allclose(outputs[name], own[name], atol=1 / 255) for name in own)


def test_other_prompts_are_answered_without_rendering_again(seen, live):
    trained, camera = seen
    prompts, model = live
    before = model.get_outputs_for_camera(camera)["segmentation"]
    rendered = []
    hook = trained.model.collider.register_forward_hook(lambda *_: rendered.append(1))
    prompts.ask(["sky", "a dog", "wood"])
    after = model.get_outputs_for_camera(camera)
    dogs = after["segmentation"]
    assert not torch.equal(dogs, before) and not rendered
    assert {"relevancy_sky", "relevancy_a_dog", "relevancy_wood"} < set(after) and "relevancy_a_cat" not in after
    prompts.ask(mode="threshold", threshold=0.9)
    assert not torch.equal(model.get_outputs_for_camera(camera)["segmentation"], dogs) and not rendered
    model.get_outputs_for_camera(trained.datamanager.eval_dataset.cameras[1:2])
    hook.remove()
    assert rendered


@pytest.mark.parametrize("fused", [False, True])
def test_a_view_is_rendered_anew_once_the_weights_have_changed(seen, fused):
    trained, camera = copy.copy(seen[0]), seen[1]
    prompts = LivePrompts(trained.model)
    model = LiveModel(prompts, threading.Lock())
    before = model.get_outputs_for_camera(camera)["rgb"]
    parameters = [p for p in trained.model.parameters() if p.numel()]
    optimizer = torch.optim.Adam(parameters, lr=0.01, fused=fused)
    trained.train()
    sum(trained.get_train_loss_dict(0)[1].values()).backward()
    optimizer.step()
    trained.eval()
    assert not torch.equal(model.get_outputs_for_camera(camera)["rgb"], before)


def test_training_and_its_checkpoints_know_nothing_of_what_is_asked(seen, live):
    model = seen[0].model
    before = copy.deepcopy(model.state_dict())
    live[0].ask(["sky", "a dog"], ["stuff"], mode="threshold", opacity=0.1)
    live[1].get_outputs_for_camera(seen[1])
    after = model.state_dict()
    assert model.segmenter.prompts == ["a cat", "a rocket", "books"]
    extra = [name for name in after if name.endswith("_extra_state")]
    assert extra and all(before[name] == after[name] for name in extra)
    assert all(torch.equal(before[name], after[name]) for name in after if name not in extra)


def test_prompts_are_added_removed_merged_and_set_back(live):
    prompts, _ = live
    prompts.add("a dog; A CAT;  wood ")
    assert prompts.asked == ["a cat", "a rocket", "books", "a dog", "wood"]
    prompts.remove("A dog; books")
    assert prompts.asked == ["a cat", "a rocket", "wood"]
    prompts.reset()
    assert prompts.asked == ["a cat", "a rocket", "books"] and prompts.prompts is None


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda live: live.add(" ; ;\u0007"), "There is no prompt"),
        (lambda live: live.add(";".join(f"thing {i}" for i in range(198))), "more than the 200 allowed"),
        (lambda live: live.remove("a dog"), "'a dog' is not among the prompts"),
        (lambda live: live.remove("a cat; books; a rocket"), "last prompt stays"),
        (lambda live: live.show("hide", "a dog"), "'a dog' is not among the prompts"),
        (lambda live: live.ask(["a " * 76]), "has 78 tokens, and tiny-ovs3d reads 77 at most"),
        (lambda live: live.ask(negatives=["🦔" * 100], mode="threshold"), "reads 77 at most"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_sentence_and_changes_nothing(live, edit, sentence):
    prompts, _ = live
    question, negatives = prompts.question, prompts.negatives
    with pytest.raises((PromptError, EncoderError), match=sentence):
        edit(prompts)
    assert prompts.question is question and prompts.negatives == negatives and prompts.answering.mode == "argmax"


def test_every_script_and_as_many_prompts_as_are_allowed_are_answered(seen, live):
    prompts, model = live
    words = ["שלום עולם", "مرحبا", "🦔🌲", "a " * 75, *(f"thing {i}" for i in range(196))]
    prompts.ask(words)
    outputs = model.get_outputs_for_camera(seen[1])
    assert len(outputs.answers().question.names) == 200 and len(outputs.shares()) == 200
    assert sum(outputs.shares()) == pytest.approx(1)


def test_without_the_text_tower_it_is_said_and_the_trained_prompts_stay(seen, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ovs3d_nerfstudio.encoders.open_clip", None)
    prompts = LivePrompts(seen[0].model)
    prompts.follow_training()
    with pytest.raises(EncoderError, match=r"text encoder 'open_clip:.*' cannot be had here .*run's own prompts"):
        prompts.ask(["a dog"])
    prompts.ask(["books", "A Rocket"])
    looked = LiveModel(prompts, threading.Lock()).get_outputs_for_camera(seen[1])
    assert [name for name in looked if "relevancy" in name] == ["relevancy_books", "relevancy_A_Rocket"]
    assert torch.isfinite(looked["segmentation"]).all()


def test_nothing_can_be_asked_before_training_has_begun_and_then_it_is_followed(data, checkpoints):  # noqa: F811
    fresh = pipeline(data, **checkpoints, prompts="a cat; a rocket")
    prompts = LivePrompts(fresh.model)
    model = LiveModel(prompts, threading.Lock())
    camera = fresh.datamanager.eval_dataset.cameras[:1]
    camera.rescale_output_resolution(0.25)
    with pytest.raises(PromptError, match="once training has begun"):
        prompts.ask(["a dog"])
    fresh.eval()
    assert "segmentation" not in model.get_outputs_for_camera(camera)
    train(fresh, 0, 2)
    fresh.eval()
    outputs = model.get_outputs_for_camera(camera)
    assert prompts.asked == ["a cat", "a rocket"] and "relevancy_a_cat" in outputs
    prompts.ask(["a dog"])
    fresh.model.segmenter.configure(*_configuration(fresh.model.segmenter))
    assert "relevancy_a_dog" in model.get_outputs_for_camera(camera) and prompts.asked == ["a dog"]


def _configuration(known: Segmenter) -> tuple:
    return known.prompts, known.text, known.basis.clone(), known.sample, known.encoder, known.fingerprint


def test_edits_and_renders_at_once_leave_every_view_whole(seen, live):
    prompts, model = live
    lock, failures, done = threading.Lock(), [], threading.Event()

    def edit(words: list[str]) -> None:
        for i in range(40):
            prompts.ask(words[: 1 + i % len(words)], mode=("argmax", "threshold")[i % 2])
            prompts.add("a hedgehog")

    def look(index: int) -> None:
        camera = seen[0].datamanager.eval_dataset.cameras[index : index + 1]
        while not done.is_set():
            with lock:
                outputs = model.get_outputs_for_camera(camera)
            for name in list(outputs):
                assert outputs[name].shape[-1] in (1, 3)
            assert outputs["relevancy_a_dog"].shape[-1] in (1, 3)

    def guarded(work, argument) -> None:
        try:
            work(argument)
        except BaseException as error:
            failures.append(error)

    lookers = [threading.Thread(target=guarded, args=(look, i)) for i in (0, 1)]
    editors = [threading.Thread(target=guarded, args=(edit, words)) for words in (["a dog", "sky"], ["wood"] * 1)]
    for thread in (*lookers, *editors):
        thread.start()
    for thread in editors:
        thread.join()
    done.set()
    for thread in lookers:
        thread.join()
    assert not failures


def test_a_click_finds_the_point_that_the_ray_hits(seen, live):
    trained, camera = seen
    rays = camera.generate_rays(0, keep_shape=True)[10:11, 20:21].flatten()
    depth = trained.model.features_along(rays.origins, rays.directions)["depth"][0].detach()
    point = live[1].point(rays.origins[0].tolist(), (3 * rays.directions[0]).tolist())
    assert torch.allclose(torch.tensor(point.position), rays.origins[0] + depth * rays.directions[0], atol=1e-4)
    assert point.prompts == ["a cat", "a rocket", "books"] and sum(point.chances) == pytest.approx(1, abs=1e-5)
    assert point.winner == max(range(3), key=lambda i: point.chances[i])


def test_a_click_into_a_cropped_view_hits_what_is_inside_the_box(seen, live):
    camera = seen[1]
    rays = camera.generate_rays(0, keep_shape=True)[10:11, 20:21].flatten()
    click = rays.origins[0].tolist(), rays.directions[0].tolist()
    whole = live[1].point(*click)
    way = float((torch.tensor(whole.position) - rays.origins[0]).norm())
    behind = OrientedBox(torch.eye(3), rays.origins[0] + (way + 0.6) * rays.directions[0], torch.full((3,), 0.2))
    live[1].get_outputs_for_camera(camera, behind)
    inside = torch.tensor(live[1].point(*click).position)
    assert bool(behind.within(inside[None])) and not behind.within(torch.tensor(whole.position)[None])
    live[1].get_outputs_for_camera(camera)
    assert live[1].point(*click).position == whole.position


def test_what_is_hidden_of_a_nerf_has_no_density_and_what_is_kept_of_views_knows(seen, live):
    trained, camera = seen
    prompts, model = live
    whole = model.get_outputs_for_camera(camera)
    shares = dict(zip(prompts.asked, whole.shares(), strict=True))
    most = max(shares, key=shares.get)
    rendered = []
    hook = trained.model.collider.register_forward_hook(lambda *_: rendered.append(1))
    prompts.show("hide", most.upper())
    hidden = model.get_outputs_for_camera(camera)
    assert rendered and hidden.shares()[prompts.asked.index(most)] == 0
    assert not torch.equal(hidden["rgb"], whole["rgb"]) and hidden["accumulation"].mean() < whole["accumulation"].mean()
    before = len(rendered)
    prompts.ask(opacity=0.2)
    model.get_outputs_for_camera(camera)
    prompts.show("all")
    assert torch.equal(model.get_outputs_for_camera(camera)["rgb"], whole["rgb"]) and len(rendered) == before
    prompts.show("only", most)
    alone = model.get_outputs_for_camera(camera)
    assert sum(share > 0 for share in alone.shares()) == 1 and len(rendered) > before
    prompts.remove(most)
    assert prompts.question.kept is None, "a prompt that is gone hides nothing"
    hook.remove()
    prompts.remove(prompts.asked[0])
    with pytest.raises(PromptError, match="Nothing would be left"):
        prompts.show("hide", prompts.asked[0])
    outputs = trained.model.get_outputs_for_camera(camera)
    assert torch.equal(outputs["rgb"], whole["rgb"]), "the run itself knows nothing of it"


def test_what_was_clicked_is_a_prompt_wherever_prompts_go(seen, live, tmp_path):
    trained, camera = seen
    prompts, model = live
    directions = trained.model.get_features_for_camera(camera)["directions"].flatten(0, 1)
    feature = directions[100].float() / 32767
    prompts.ask(["a dog", "sky"])
    assert prompts.like(feature) == "like 1" and prompts.asked == ["a dog", "sky", "like 1"]
    outputs = model.get_outputs_for_camera(camera)
    assert {"relevancy_like_1", "relevancy_sky"} < set(outputs) and outputs.answers().labels.flatten()[100] == 2
    prompts.ask(mode="threshold")
    assert prompts.question.labels(feature[None]).tolist() == [2]
    prompts.ask(mode="argmax")
    prompts.show("only", "like 1")
    assert model.get_outputs_for_camera(camera).shares()[2] > 0
    prompts.remove("like 1")
    assert prompts.asked == ["a dog", "sky"] and prompts.like(feature) == "like 2", "names are not used twice"
    prompts.add("Like 1")
    assert torch.equal(prompts.question.segmenter.text[-1], prompts.question.segmenter.text[-2])
    assert trained.model.segmenter.prompts == ["a cat", "a rocket", "books"]


def test_a_click_is_on_an_object_of_the_data(seen, live):
    trained, camera = seen
    cameras, frame = trained.datamanager.train_dataset.cameras, frame_of(trained.datamanager)
    things = Things(trained.model, cameras, frame, threading.Lock())
    rays = camera.generate_rays(0, keep_shape=True)[10:11, 20:21].flatten()
    point = live[1].point(rays.origins[0].tolist(), rays.directions[0].tolist())
    thing = things.at(point)
    assert thing is not None and 1 <= thing.number <= thing.count and thing.object.prompt == point.prompts[point.winner]
    assert (thing.size > 0).all() and things.at(point) == thing
    said = bytes(described(point, (1.0, 2.0, 3.0), thing), "ascii").decode("unicode_escape")
    assert (
        f"object {thing.number} of {thing.count}: {thing.size[0]:.2f} × " in said and "at (1.000, 2.000, 3.000)" in said
    )


@pytest.fixture
def viewer(seen, tmp_path):
    trained, _ = seen
    config = copy.deepcopy(all_methods["ovs3d-lite"].viewer)
    opened = Viewer(config, tmp_path / "viewer_log.txt", Path("."), trained, train_lock=threading.Lock())
    yield opened
    opened.viser_server.stop()


def test_the_chosen_outputs_survive_an_edit_where_they_still_exist(seen, viewer):
    panel, live = viewer.control_panel, viewer.pipeline.prompt_panel.live
    view = viewer.get_model()
    panel.update_output_options(list(view.get_outputs_for_camera(seen[1])))
    assert panel.output_render == "rgb"
    panel._output_render.value, panel._split_output_render.value = "relevancy_books", "relevancy_a_cat"
    live.add("a dog")
    outputs = view.get_outputs_for_camera(seen[1])
    panel.update_output_options(list(outputs))
    assert (panel.output_render, panel.split_output_render) == ("relevancy_books", "relevancy_a_cat")
    assert "relevancy_a_dog" in panel._output_render.gui_handle.options
    live.remove("books")
    assert outputs[panel.output_render].shape[-1] == 3, "a view that is on its way shows something that is there"
    panel.update_output_options(list(outputs))
    assert (panel.output_render, panel.split_output_render) == ("segmentation", "relevancy_a_cat")
    assert "relevancy_books" not in panel._output_render.gui_handle.options


def test_the_panel_says_what_it_did_or_why_not(seen, viewer):
    panel = viewer.pipeline.prompt_panel
    said = lambda: bytes(panel._status.content, "ascii").decode("unicode_escape")  # noqa: E731
    assert panel._text.value == "a cat; a rocket; books" and "prompts of the training" in said()
    panel._text.value = "a dog; ;A dog; wood"
    panel._apply()
    assert "2 prompts, embedded in" in said() and "1 said twice" in said() and panel._text.value == "a dog; wood"
    panel._one.value = "sky"
    panel._add()
    assert "3 prompts" in said() and panel._text.value == "a dog; wood; sky"
    panel._text.value = "; "
    panel._apply()
    assert "There is no prompt" in said() and panel.live.asked == ["a dog", "wood", "sky"]
    panel._mode.value, panel._negatives.value = "threshold per prompt", "a " * 100
    panel._settle()
    assert panel.live.answering.mode == "threshold"
    panel._mode.value, panel._text.value, panel._negatives.value = "argmax over prompts", "lamp", "object"
    panel._settle()
    panel._point.content = "an answer"
    panel._apply()
    assert "threshold per prompt" in said() and "Click" in panel._point.content
    panel._reset()
    assert panel.live.asked == ["a cat", "a rocket", "books"] == panel._text.value.split("; ")
    panel._on_view(viewer.get_model().get_outputs_for_camera(seen[1]))
    panel._show()
    assert "books" in panel._legend.content and "\\u0025" in panel._legend.content
    panel._prompt.value = "books"
    panel._hide()
    assert "is hidden" in said() and "hidden" in panel._legend.content and panel.live.shown.without == ("books",)
    panel._show_only()
    panel._show_all()
    assert "Everything" in said() and "hidden" not in panel._legend.content


def test_more_like_what_was_clicked_is_kept_for_other_commands_and_the_next_viewer(seen, viewer):
    panel, (trained, camera) = viewer.pipeline.prompt_panel, seen
    said = lambda: bytes(panel._status.content, "ascii").decode("unicode_escape")  # noqa: E731
    panel._like()
    assert "Click into the picture first" in said()
    ray = camera.generate_rays(0, keep_shape=True)[10:11, 20:21].flatten()
    panel._clicked(ViewerClick(ray.origins[0].tolist(), ray.directions[0].tolist(), (0.5, 0.5)))
    assert "object" in panel._point.content and panel._prompt.value in panel.live.asked
    panel._like()
    path = viewer.log_filename.parent / "likes.json"
    assert f"--prompts {path}" in said() and panel._text.value.endswith("; like 1")
    assert panel._prompt.options[-1] == "like 1"
    (like,) = read_likes(path)
    panel.live.likes = {}
    panel._read_likes()
    panel.live.ask(["sky", "like 1"])
    assert panel.live.question.segmenter.wordless
    before = copy.deepcopy(trained.model.segmenter)
    assert ask(Run(None, trained, path, 0), f"{path}; sky", None) == ["like 1", "sky"]
    assert trained.model.segmenter.text[0].tolist() == pytest.approx(like.feature, abs=1e-5)
    trained.model.segmenter = before
    path.write_text("{}")
    panel._read_likes()
    assert "no file of likes" in panel._told


def test_a_page_opens_where_a_photo_was_taken(seen, viewer):
    client = MagicMock()
    at_a_photo(client, viewer.pipeline)
    camera = viewer.pipeline.datamanager.train_dataset.cameras[4]
    assert np.allclose(client.camera.position, camera.camera_to_worlds[:, 3] * 10)
    looked = vtf.SO3(np.asarray(client.camera.wxyz)).as_matrix() @ [0, 0, 1]
    assert np.allclose(looked, -camera.camera_to_worlds[:, 2], atol=1e-5)
    assert np.isclose(np.tan(client.camera.fov / 2) * float(camera.fy) * 2, float(camera.height))


def test_a_run_opens_for_looking_when_its_photos_are_gone(seen, tmp_path, capsys):
    folder = shutil.copytree(seen[0].datamanager.config.data, tmp_path / "scene")
    shutil.rmtree(folder / "images"), shutil.rmtree(folder / ".ovs3d-cache")
    opened = pipeline(folder, test_mode="test")
    opened.load_pipeline(copy.deepcopy(seen[0].state_dict()), 4)
    assert "training photos are not there" in " ".join(capsys.readouterr().out.split())
    assert opened.datamanager.train_dataset[0]["image"].shape == (72, 96, 3)
    # As exports ask: no points are looked for in the photos, and every ray is a random one.
    rays, batch = opened.datamanager.next_train(0)
    assert len(rays) == len(batch["indices"]) and "distances" not in batch
    opened.eval()
    assert "relevancy_books" in opened.model.get_outputs_for_camera(seen[1])
    with pytest.raises(SystemExit):
        opened.get_average_eval_image_metrics()
    assert "is not there to compare with" in " ".join(capsys.readouterr().out.split())
    with pytest.raises((FileNotFoundError, SystemExit)):
        pipeline(folder)


def test_a_step_that_waits_is_not_lost_to_the_loops_own_static():
    # Not above: nerfstudio's modules import each other in a circle, and this one must be the second.
    from nerfstudio.viewer.render_state_machine import RenderAction, RenderStateMachine

    machine = RenderStateMachine(None, 1.0, None)
    machine.state = "high"  # where a static action renders nothing
    keep_steps(machine)
    keep_steps(machine)
    machine.action(RenderAction("static", None))
    assert machine.next_action.action == "static"
    machine.action(RenderAction("step", None))
    machine.action(RenderAction("static", None))
    assert machine.next_action.action == "step"
    machine.action(RenderAction("move", None))
    assert machine.next_action.action == "move"


def test_edits_while_training_renders_and_saves(data, checkpoints, tmp_path):  # noqa: F811
    config = copy.deepcopy(all_methods["ovs3d-lite"])
    config.pipeline = copy.deepcopy(pipeline(data, **checkpoints, prompts="a cat; a rocket").config)
    config.output_dir, config.experiment_name, config.timestamp = tmp_path, "run", "t"
    config.vis, config.data = "viewer", data
    config.max_num_iterations, config.steps_per_save, config.save_only_latest_checkpoint = 25, 3, True
    config.machine.device_type, config.viewer.quit_on_train_completion = "cpu", True
    config.get_base_dir().mkdir(parents=True)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    viewer, failures, done = trainer.viewer_state, [], threading.Event()
    live, view = trainer.pipeline.prompt_panel.live, viewer.get_model()
    camera = trainer.pipeline.datamanager.eval_dataset.cameras[:1]
    camera.rescale_output_resolution(0.25)
    asked = []

    def look_and_edit() -> None:
        try:
            while not done.is_set():
                with trainer.train_lock:
                    training = view.training
                    view.eval()
                    with torch.no_grad():
                        outputs = view.get_outputs_for_camera(camera)
                    view.train(training)
                if live.asked:
                    live.ask([f"thing {len(asked)}", "sky"])
                    asked.append(outputs["segmentation"].shape)
                time.sleep(0.02)  # as the viewer does between views, so that training has its turn
        except BaseException as error:
            failures.append(error)

    (looker := threading.Thread(target=look_and_edit)).start()
    try:
        trainer.train()
    finally:
        done.set()
        looker.join()
        viewer.viser_server.stop()
    assert not failures and len(asked) > 3
    saved = sorted(trainer.checkpoint_dir.glob("*.ckpt"))[-1]
    state = torch.load(saved, map_location="cpu")["pipeline"]["_model.segmenter._extra_state"]
    assert state["prompts"] == ["a cat", "a rocket"] == trainer.pipeline.model.segmenter.prompts
