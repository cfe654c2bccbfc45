"""Gaussians hidden and shown alone, as a browser shows them, read back as pixels."""

import numpy as np
import pytest
from test_browser import chromium, client, opened, shines  # noqa: F401 (fixtures)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("shown"), "ovs3d-splat-lite") as one:
        yield one


def test_what_is_hidden_is_gone_and_what_alone_is_shown_stands_alone(client, viewer):  # noqa: F811
    client.until(lambda: shines(client, "motorbike", "motorbike"))
    before = client.still()
    there = client.lit("motorbike")
    client.choose("Prompt", "motorbike")
    client.press("Hide")
    client.says("'motorbike' is hidden.")
    client.until(lambda: client.lit("motorbike").mean() < 0.01)
    client.until(lambda: "hidden" in client.page.locator("table").first.inner_text())
    client.press("Only")
    client.until(lambda: client.lit("motorbike")[there].mean() > 0.9)
    others = [prompt for prompt in viewer.pipeline.prompt_panel.live.asked if prompt != "motorbike"]
    client.until(lambda: max(client.lit(prompt).mean() for prompt in others) < 0.01)
    dark = client.still().max(-1) < 64  # or the grey that nerfstudio shows behind Gaussians
    client.photograph("only-classes")
    assert dark.mean() > 0.3
    client.choose("Output type", "rgb")
    client.until(lambda: client.lit("motorbike")[there].mean() < 0.1)
    client.photograph("only")
    assert client.still()[dark].mean() < 80, "where it is not, there is nothing"
    client.choose("Output type", "segmentation")
    client.press("All")
    client.until(lambda: np.abs(client.look() - before).mean() < 2)
