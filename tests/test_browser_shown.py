"""Hide, only and more like this, as a browser shows them: read back as pixels, on a viewer of their own."""

import numpy as np
import pytest
from test_browser import chromium, client, shines, truth, viewer  # noqa: F401 (fixtures)

pytestmark = pytest.mark.browser


def test_what_is_hidden_is_gone_and_what_alone_is_shown_stands_alone(client, viewer):  # noqa: F811
    client.until(lambda: shines(client, "motorbike", "motorbike"))
    before = client.still()
    there = client.lit("motorbike")
    client.choose("Prompt", "motorbike")
    client.press("Hide")
    client.says("'motorbike' is hidden.")
    client.until(lambda: client.lit("motorbike").mean() < 0.01)
    assert "hidden" in client.page.locator("table").first.inner_text()
    client.press("Only")
    client.until(lambda: client.lit("motorbike")[there].mean() > 0.9)
    others = [prompt for prompt in viewer.pipeline.prompt_panel.live.asked if prompt != "motorbike"]
    client.until(lambda: max(client.lit(prompt).mean() for prompt in others) < 0.01)
    dark = client.look().max(-1) < 48
    assert dark.mean() > 0.3
    client.choose("Output type", "rgb")
    client.until(lambda: client.lit("motorbike")[there].mean() < 0.1)
    client.photograph("only")
    assert client.look()[dark].mean() < 64, "where it is not, there is nothing"
    client.choose("Output type", "segmentation")
    client.press("All")
    client.until(lambda: np.abs(client.look() - before).mean() < 2)


def test_a_click_names_the_thing_and_more_like_it_are_found(client, viewer):  # noqa: F811
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
