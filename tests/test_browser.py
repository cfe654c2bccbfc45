"""The viewer in a real browser: prompts are typed, and the pixels of the page say what was found."""

import io
import os
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import viser.transforms
from conftest import command
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ovs3d_nerfstudio.demo.scene import make_scene

pytestmark = pytest.mark.browser

STEPS = 300
PICTURES = os.environ.get("OVS3D_SCREENSHOTS")
"""A folder to leave screenshots in."""


@pytest.fixture(scope="module")
def chromium():
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("These tests need a browser: apt-get install chromium.")
    with sync_playwright() as playwright:
        # No GPU here, and often root: WebGL in software, no sandbox.
        words = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        words += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # the titlebar's logo lies elsewhere
        browser = playwright.chromium.launch(executable_path=program, args=words)
        yield browser
        browser.close()


OPTIONS = {
    "ovs3d-lite": ["--max-num-iterations", STEPS, "--pipeline.datamanager.train-num-rays-per-batch", 512],
    "ovs3d-splat-lite": ["--max-num-iterations", STEPS],
}
STARTS = {"ovs3d-lite": (60, 120), "ovs3d-splat-lite": (100, 150)}
"""Where semantics and class losses begin."""


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    """nerfstudio's viewer on a run that was trained on a small demo scene, as ns-viewer opens it."""
    with opened(tmp_path_factory.mktemp("browser"), "ovs3d-lite") as one:
        yield one


@contextmanager
def opened(folder: Path, method: str):
    """nerfstudio's viewer on a run of `method`."""
    from nerfstudio.utils.eval_utils import eval_setup  # first: nerfstudio's modules import each other in a circle
    from nerfstudio.utils import writer  # isort: skip
    from nerfstudio.viewer.viewer import Viewer

    scene = make_scene(folder / "scene", width=160, train_views=16, test_views=2)
    words = ["ns-train", method, "--data", scene, "--output-dir", folder, "--experiment-name", "run"]
    words += ["--timestamp", "t", "--vis", "tensorboard", *OPTIONS[method]]
    for name, step in zip(("semantics-start", "fda-start"), STARTS[method], strict=True):
        words += [f"--pipeline.model.{name}", step]
    command(*words, cwd=folder)
    config, pipeline, _, step = eval_setup(folder / "run" / method / "t" / "config.yml")
    one = Viewer(config.viewer, folder / "viewer_log.txt", scene, pipeline, train_lock=threading.Lock())
    config.logging.local_writer.enable = False
    writer.setup_local_writer(config.logging, max_iter=1)
    one.init_scene(pipeline.datamanager.train_dataset, "completed", pipeline.datamanager.eval_dataset)
    one.update_scene(step=step)
    one.set_camera_visibility(False)
    one.control_panel._max_res.value = 192
    yield one
    one.viser_server.stop()


class Client:
    """A browser on the viewer, looking from where the first held-out photo was taken."""

    def __init__(self, browser, viewer):
        self.viewer = viewer
        self.page: Page = browser.new_page(viewport={"width": 960, "height": 531})  # the picture is 640 × 480
        self.page.set_default_timeout(300_000)  # a busy machine is no mistake
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        known = set(viewer.viser_server.get_clients())
        self.page.goto(f"http://127.0.0.1:{viewer.viser_server.get_port()}", wait_until="commit")
        self.page.get_by_text("Negatives").wait_for()
        self.until(lambda: set(viewer.viser_server.get_clients()) - known)
        (new,) = set(viewer.viser_server.get_clients()) - known
        self.client = viewer.viser_server.get_clients()[new]
        self.stand(viewer.pipeline.datamanager.eval_dataset.cameras[0])

    def stand(self, camera) -> None:
        """Looks as `camera` does, once the browser says so: while it starts, it may turn back to viser's first view."""
        pose, view = camera.camera_to_worlds.numpy(), self.client.camera
        turned = viser.transforms.SO3.from_matrix(pose[:, :3]) @ viser.transforms.SO3.from_x_radians(np.pi)

        def stands() -> bool:
            view.fov = float(2 * np.arctan(camera.height / 2 / camera.fy))
            view.wxyz, view.position = turned.wxyz, pose[:, 3] * 10
            asked = view.update_timestamp
            self.page.wait_for_timeout(2000)
            return view.update_timestamp > asked and np.allclose(view.position, pose[:, 3] * 10, atol=0.01)

        self.until(lambda: stands() and np.allclose(self.client.camera.wxyz, turned.wxyz, atol=0.01))

    def until(self, true, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if true():
                return
            self.page.wait_for_timeout(250)
        self.photograph("failed")
        raise AssertionError(f"waited {seconds} s in vain; {self.status()}; {self.errors}")

    def box(self, label: str):
        return self.page.locator(f"xpath=//label[text()='{label}']/ancestor::*[.//input][1]//input").first

    def ask(self, prompts: str, label: str = "Prompts") -> None:
        self.box(label).fill(prompts)
        self.box(label).press("Enter")

    def choose(self, label: str, option: str) -> None:
        self.box(label).fill(option)  # which leaves only those options that have it in their names
        self.page.get_by_role("option", name=option, exact=True).click()

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).click()

    def status(self) -> str:
        return self.page.locator("body").inner_text()

    def says(self, text: str) -> None:
        self.until(lambda: text in self.status())

    def look(self) -> np.ndarray:
        """The picture as it is on the page, 480×640×3."""
        box = self.page.locator("canvas").last.bounding_box()
        shot = self.page.screenshot(clip={**box, "width": 640, "height": 479}, scale="css")
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB").resize((640, 480))).astype(int)

    def still(self) -> np.ndarray:
        """The picture at full resolution, once it no longer changes: on a busy machine a coarse one stands for seconds."""
        self.says(f"Resolution: {self.viewer.control_panel.max_res}x")
        looks = [self.look()]
        self.until(lambda: looks.append(self.look()) or np.array_equal(*looks[-2:]))
        return looks[-1]

    def photograph(self, name: str) -> None:
        if PICTURES:
            self.page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), scale="css")

    def lit(self, prompt: str) -> np.ndarray:
        """Where the picture has the colour of `prompt`, 480×640."""
        segmenter = self.viewer.pipeline.prompt_panel.live.question.segmenter
        if prompt not in segmenter.prompts:  # a click on the page has not come here yet
            return np.zeros((480, 640), bool)
        color = 255 * segmenter.colors[segmenter.prompts.index(prompt)].numpy()
        return np.abs(self.look() - color).max(-1) < 48  # JPEG and the page's scaling mix neighbours


@pytest.fixture
def client(chromium, viewer):
    one = Client(chromium, viewer)
    one.choose("Output type", "segmentation")
    yield one
    viewer.pipeline.prompt_panel._reset()
    viewer.pipeline.prompt_panel._show_all()
    assert not one.errors
    one.page.close()


def truth(viewer, prompt: str) -> np.ndarray:
    """Where a thing is in the first held-out photo, 480×640."""
    folder = Path(viewer.pipeline.datamanager.config.data) / "segmentations" / "test_00"
    return (
        np.asarray(Image.open(folder / f"{prompt}.png").convert("L").resize((640, 480), Image.Resampling.NEAREST)) > 127
    )


def shines(client: Client, prompt: str, thing: str, most: float = 0.5) -> bool:
    """Whether at least so much of a thing, and far less of all else, has the colour of a prompt."""
    there, lit = truth(client.viewer, thing), client.lit(prompt)
    return lit[there].mean() > max(most, 2 * lit[~there].mean())


def test_typed_prompts_light_up_where_their_things_are(client):
    client.ask("motorbike; kitten; books; espresso; palace; puzzle pieces; space rocket")
    client.says("7 prompts, embedded in")
    # The training knew of no kitten, and was short: most of the cat is not found, yet little else is taken for it.
    client.until(lambda: shines(client, "motorbike", "motorbike") and shines(client, "kitten", "cat", 0.15))
    client.photograph("segmentation")
    client.ask("zxqvy", "One prompt")
    client.says("8 prompts, embedded in")
    client.until(lambda: "zxqvy" in client.page.locator("table").first.inner_text())
    client.until(lambda: shines(client, "motorbike", "motorbike"))


def test_what_cannot_be_asked_is_told_on_the_page_and_the_viewer_goes_on(client):
    client.ask("; ;")
    client.says("There is no prompt")
    client.ask("{process.exit()}; <b>x</b>; ![x](/etc/hostname); שלום; 🦔; cat; CAT")
    client.says("6 prompts, embedded in")
    client.says("1 said twice")
    client.until(lambda: "![x](/etc/hostname)" in client.page.locator("table").first.inner_text())
    assert "{process.exit()}" in client.page.locator("table").first.inner_text()
    assert client.page.locator("table b").count() == 0
    client.page.get_by_role("button", name="Trained").click()
    client.until(lambda: shines(client, "motorbike", "motorbike"))


def test_a_second_browser_sees_the_same_and_edits_the_same(client, chromium, viewer):
    client.ask("motorbike; books; puzzle pieces; palace; cat")
    client.says("5 prompts, embedded in")
    other = Client(chromium, viewer)
    assert other.box("Prompts").input_value() == "motorbike; books; puzzle pieces; palace; cat"
    other.until(lambda: shines(other, "motorbike", "motorbike"))
    other.box("One prompt").fill("cat")  # without Enter, which would add it again
    other.page.wait_for_timeout(300)  # the page holds letters back for a moment
    other.page.get_by_role("button", name="Remove").click()
    client.says("4 prompts.")
    client.until(lambda: client.box("Prompts").input_value() == "motorbike; books; puzzle pieces; palace")
    for each in (client, other):
        each.until(lambda each=each: shines(each, "motorbike", "motorbike"))
    assert not other.errors
    other.page.close()


def test_a_threshold_gives_what_is_not_named_to_no_prompt(client):
    client.ask("motorbike")
    client.says("1 prompt, embedded in")
    client.until(lambda: client.lit("motorbike").mean() > 0.95)  # the only prompt fits best everywhere
    client.choose("Classes", "threshold per prompt")
    client.until(lambda: shines(client, "motorbike", "motorbike"))
    assert client.lit("motorbike").mean() < 0.5
    client.photograph("threshold")
    client.choose("Classes", "argmax over prompts")
    client.until(lambda: client.lit("motorbike").mean() > 0.95)


def test_the_chosen_output_stays_until_its_prompt_goes(client):
    client.choose("Output type", "relevancy_cat")
    client.ask("cat; a dog")
    client.says("2 prompts, embedded in")
    client.until(lambda: "a dog" in client.page.locator("table").first.inner_text())
    assert client.box("Output type").input_value() == "relevancy_cat"
    client.ask("a dog; books")
    client.until(lambda: client.box("Output type").input_value() == "segmentation")


def test_a_click_names_the_thing_and_more_like_it_are_found(client, viewer):
    client.until(lambda: shines(client, "motorbike", "motorbike"))
    client.still()
    y, x = np.argwhere(truth(viewer, "motorbike") & client.lit("motorbike")).mean(0)
    client.page.mouse.click(x, y + 51)
    client.says("motorbike at (")
    client.photograph("click")
    chances = client.page.locator("table").last.inner_text()
    assert all(prompt in chances for prompt in viewer.pipeline.prompt_panel.live.asked)
    client.says("object 1 of ")
    assert client.box("Prompt").input_value() == "motorbike"
    client.press("More like this")
    client.says("'like 1' is what was clicked.")
    client.until(lambda: client.lit("like 1")[round(y) - 4 : round(y) + 5, round(x) - 4 : round(x) + 5].mean() > 0.5)
    there, like = truth(viewer, "motorbike"), client.lit("like 1")
    assert like[there].mean() > 2 * like[~there].mean()
    client.photograph("like")
    assert client.box("Prompt").input_value() == "like 1"
    client.press("Only")
    client.until(lambda: "hidden" in client.page.locator("table").first.inner_text())
    client.photograph("only-clicked")
