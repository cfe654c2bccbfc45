"""The group of controls that nerfstudio's viewer shows for our methods: live prompts, a legend, clicks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import viser.transforms as vtf
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer_elements import ViewerClick, ViewerControl
from rich.markup import escape
from viser import GuiEvent

from ovs3d_nerfstudio.data.frames import frame_of
from ovs3d_nerfstudio.encoders.base import EncoderError
from ovs3d_nerfstudio.memory import MemoryShortage, told_what_to_lower
from ovs3d_nerfstudio.models.semantics import SemanticModel
from ovs3d_nerfstudio.prompts.likes import LikesError, read_likes, write_likes
from ovs3d_nerfstudio.prompts.prompts import PromptError, clean_prompt, parse_prompts, prompt_key
from ovs3d_nerfstudio.viewer.live import NEGATIVES, LiveModel, LiveOutputs, LivePrompts, Point, still_there
from ovs3d_nerfstudio.viewer.things import Thing, Things

if TYPE_CHECKING:
    from nerfstudio.viewer.render_state_machine import RenderAction, RenderStateMachine
    from nerfstudio.viewer.viewer import Viewer

MODES = {"argmax over prompts": "argmax", "threshold per prompt": "threshold"}
CLICK = "Click into the picture to ask what is there."
ALONE = "A single prompt takes everything by argmax; choose threshold per prompt to see where it is."
LIKES_FILE = "likes.json"
"""Where prompts without words are kept, in the run's folder."""
NO_PROMPT = "–"
"""Stands for the prompts where there are none to choose from."""
SECONDS_A_LEGEND = 0.25
"""Least time between two updates of the shares, which a browser typesets anew each time."""

# viser's text boxes tell the server of each letter and never of Enter, but its markdown may hold JSX, which has this one
# element press the button instead. It waits, as viser holds letters back for up to 50 ms and drops what is overtaken.
_ENTER = """<span ref={(node) => {
  if (!node || window.ovs3dEnter) return;
  window.ovs3dEnter = true;
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing || event.target.tagName !== "INPUT") return;
    let row = event.target;
    while (row && !row.querySelector("label")) row = row.parentElement;
    const name = {Prompts: "Apply", Negatives: "Apply", "One prompt": "Add"}[row?.querySelector("label").textContent];
    const button = Array.from(document.querySelectorAll("button")).find((each) => name && each.textContent === name);
    if (button) setTimeout(() => button.click(), 150);
  });
}} />"""


class PromptPanel(ViewerControl):
    """Live prompts in nerfstudio's viewer: an attribute of the pipeline that does nothing until a viewer opens."""

    def __init__(self, model: SemanticModel):
        self._model = model

    def _setup(self, viewer: Viewer) -> None:
        """Called by the viewer once its own panel stands."""
        super()._setup(viewer)  # type: ignore[no-untyped-call]
        self.live = LivePrompts(self._model)
        self.live.follow_training()
        self._shown: LiveOutputs | None = None
        self._looked = threading.Event()
        self._outputs_lock = threading.Lock()
        self._showing = threading.RLock()
        self._told = ""  # what was printed last: the panel alone is easily overlooked
        lock, datamanager = viewer.train_lock or nullcontext(), cast(Any, viewer.pipeline.datamanager)
        self._view = LiveModel(self.live, lock, self._on_view)
        self._frame = frame_of(datamanager)
        self._things = Things(self._model, datamanager.train_dataset.cameras, self._frame, lock)
        self._found: Point | None = None  # what was clicked last
        self._likes_file = viewer.log_filename.parent / LIKES_FILE
        self._build()
        self._read_likes()
        # Evaluation and checkpoints go on with the model itself; only what the viewer shows is asked of the live prompts.
        viewer.get_model = lambda: self._view  # type: ignore[method-assign, assignment, return-value]
        viewer.control_panel.update_output_options = self._update_outputs  # type: ignore[assignment, method-assign]
        self.register_pointer_cb("click", self._clicked)
        self.viser_server.on_client_connect(lambda client: at_a_photo(client, viewer.pipeline))
        threading.Thread(target=self._keep_legend, name="ovs3d legend", daemon=True).start()

    def _build(self) -> None:
        gui, answering = self.viser_server.gui, self.live.answering
        with gui.add_folder("Prompts", order=self.viewer.stats_markdown.order + 0.5):
            gui.add_markdown(_ENTER)
            self._text = gui.add_text("Prompts", "; ".join(self.live.asked), hint="Separated by semicolons.")
            self._negatives = gui.add_text(
                "Negatives", NEGATIVES, hint="What everything else is called, in the mode 'threshold per prompt'."
            )
            self._buttons(Apply=self._apply, Trained=self._reset)
            self._one = gui.add_text("One prompt", "", hint="To add to the prompts, or to remove from them.")
            self._buttons(Add=self._add, Remove=self._remove)
            self._prompt = gui.add_dropdown(
                "Prompt",
                (NO_PROMPT,),
                hint="What to show alone or to hide; a click into the picture chooses what is there.",
            )
            self._buttons(All=self._show_all, Only=self._show_only, Hide=self._hide)
            self._mode = gui.add_dropdown(
                "Classes",
                tuple(MODES),
                hint="Each point belongs to the prompt that fits best; or only where a prompt is probable enough against "
                "all negatives, else to none.",
            )
            self._threshold = gui.add_slider("Threshold", 0.0, 1.0, 0.01, answering.threshold, disabled=True)
            self._temperature = gui.add_slider(
                "Temperature",
                0.05,
                5.0,
                0.05,
                answering.temperature,
                hint="Of probabilities, in units of the spread of the scene's similarities.",
            )
            self._opacity = gui.add_slider(
                "Opacity", 0.0, 1.0, 0.05, answering.opacity, hint="Of the segmentation in segmentation_overlay."
            )
            self._normalise = gui.add_checkbox(
                "Normalise",
                answering.normalise,
                hint="Stretch each relevancy by its range over the scene; else it is the prompt's probability.",
            )
            self._legend = gui.add_markdown("")
            self._status = gui.add_markdown("")
            self._point = gui.add_markdown(CLICK)
            self._buttons(**{"More like this": self._like})
        for control in (self._mode, self._threshold, self._temperature, self._opacity, self._normalise):
            control.on_update(lambda event: self._change(self._settle) if event.client is not None else None)
        self._show()
        self._say("The prompts of the training." if self.live.asked else "No prompts yet; write some.")

    def _buttons(self, **actions: Callable[[], None]) -> None:
        """A row of buttons."""
        row = self.viser_server.gui.add_button_group("", tuple(actions))
        row.value = ""  # viser reports a press only where it is another than the last

        @row.on_click
        def _(event: GuiEvent) -> None:
            pressed = row.value
            if event.client is not None and pressed:
                row.value = ""
                actions[pressed]()

    # Edits. Each runs in a thread of viser's; LivePrompts lets one in at a time.

    def _apply(self) -> None:
        typed = self._text.value

        def ask() -> str:
            prompts = parse_prompts(typed)
            seconds = self.live.ask(prompts, parse_prompts(self._negatives.value))
            merged = sum(bool(clean_prompt(part)) for part in typed.split(";")) - len(prompts)
            return _embedded(len(prompts), seconds) + (f" {merged} said twice." if merged > 0 else "")

        self._change(ask, typed)

    def _reset(self) -> None:
        def reset() -> str:
            self.live.reset()
            return "The prompts of the training."

        self._change(reset, self._text.value)

    def _add(self) -> None:
        def add() -> str:
            seconds = self.live.add(self._one.value)
            return _embedded(len(self.live.asked), seconds)

        self._change(add, self._text.value)

    def _remove(self) -> None:
        def remove() -> str:
            self.live.remove(self._one.value)
            return _count(len(self.live.asked)) + "."

        self._change(remove, self._text.value)

    def _show_all(self) -> None:
        self._see("all", "Everything is shown.")

    def _show_only(self) -> None:
        self._see("only", f"Only '{self._prompt.value}' is shown.")

    def _hide(self) -> None:
        self._see("hide", f"'{self._prompt.value}' is hidden.")

    def _see(self, how: Literal["all", "only", "hide"], said: str) -> None:
        prompt = self._prompt.value

        def see() -> str:
            self.live.show(how, prompt)
            return said

        self._change(see)

    def _like(self) -> None:
        def like() -> str:
            if self._found is None:
                raise PromptError("Click into the picture first, on what more is to be found of.")
            name = self.live.like(self._found.feature)
            self._list(self.live.asked, name)
            try:
                write_likes(self._likes_file, list(self.live.likes.values()))
            except OSError as error:
                return f"'{name}' is what was clicked; it could not be saved ({error.strerror})."
            return f"'{name}' is what was clicked. For other commands: --prompts {self._likes_file}"

        self._change(like, self._text.value)

    def _read_likes(self) -> None:
        """Takes up what an earlier viewer of the run has left."""
        if self._likes_file.exists():
            try:
                self.live.likes = {prompt_key(like): like for like in read_likes(self._likes_file)}
            except LikesError as error:
                self._tell(str(error))

    def _settle(self) -> str:
        mode = MODES[self._mode.value]
        seconds = self.live.ask(
            mode=mode,
            threshold=self._threshold.value,
            temperature=self._temperature.value,
            opacity=self._opacity.value,
            normalise=self._normalise.value,
        )
        return _embedded(len(self.live.asked), seconds)

    def _change(self, edit: Callable[[], str], typed: str | None = None) -> None:
        """Do an edit and show what came of it; `typed` is what the box of prompts held, to be replaced by what it means."""
        if typed is not None:
            self._say("Embedding… (the first time, the text encoder is loaded for that)")
        try:
            with told_what_to_lower("loading the encoder"):
                said = edit()
        except (PromptError, EncoderError, LikesError, MemoryShortage) as error:
            said = str(error)
            if not isinstance(error, PromptError):
                self._tell(said)
        else:
            if typed is not None and self._text.value == typed:
                self._text.value = "; ".join(self.live.asked)
            if typed is not None:
                self._point.content = CLICK  # what was answered was another question
        mode = self.live.answering.mode
        self._say(f"{said} {ALONE}" if len(self.live.asked) == 1 and mode == "argmax" else said)
        self._threshold.disabled = mode != "threshold"
        if MODES[self._mode.value] != mode:
            self._mode.value = next(name for name, value in MODES.items() if value == mode)
        self._show()
        self._redraw()

    # What is shown.

    def _say(self, sentence: str) -> None:
        self._status.content = _jsx(sentence)

    def _tell(self, sentence: str) -> None:
        """Prints a sentence, once."""
        if sentence != self._told:
            self._told = sentence
            CONSOLE.print(f"[bold yellow]Viewer:[/bold yellow] {escape(sentence)}")

    def _redraw(self) -> None:
        """Have each client shown its view again: as a step of training does, so that a view at full resolution stays one."""
        from nerfstudio.viewer.render_state_machine import RenderAction

        for machine in list(self.viewer.render_statemachines.values()):
            keep_steps(machine)
            machine.action(RenderAction("step", self.viewer.get_camera_state(machine.client)))

    def _update_outputs(self, names: list[str]) -> None:
        """In place of nerfstudio's own, which forgets the second output and renders at low resolution once more."""
        panel = self.viewer.control_panel
        with self._outputs_lock:
            for dropdown, first in ((panel._output_render, names[0]), (panel._split_output_render, names[-1])):
                handle = dropdown.gui_handle
                assert handle is not None
                if handle.options == tuple(names):
                    continue
                stays = first if dropdown.value == "not set" else still_there(dropdown.value, names)
                if dropdown.value != stays:
                    # viser falls back on the first option, and only so without calling for another render.
                    dropdown.set_options([stays, *(name for name in names if name != stays)])
                dropdown.set_options(names)
                self.viewer.output_type_changed = self.viewer.output_split_type_changed = True
            panel.update_control_panel()

    def _on_view(self, outputs: LiveOutputs | None) -> None:
        self._shown = outputs
        self._looked.set()

    def _keep_legend(self) -> None:
        while True:
            self._looked.wait()
            self._looked.clear()
            self._show()
            time.sleep(SECONDS_A_LEGEND)

    def _show(self) -> None:
        """The legend, with the shares of the view that was looked at last; one after the other, so that none is of an earlier
        question than what it replaces."""
        with self._showing:
            self._show_now()

    def _show_now(self) -> None:
        question, shown = self.live.question, self._shown
        if shown is not None and shown.note:
            self._say(shown.note)
            self._tell(shown.note)
        if question is None:
            return
        if not self._text.value and self.live.asked:
            self._text.value = "; ".join(self.live.asked)  # training has just begun
        shares = shown.shares() if shown is not None else []
        if len(shares) != len(question.names):
            shares = []
        segmenter = question.segmenter
        self._list(segmenter.prompts)
        shown_ones = question.shown.flags(segmenter.prompts)
        content = legend(segmenter.prompts, segmenter.colors.tolist(), shares, shown_ones)
        if content != self._legend.content:
            self._legend.content = content

    def _list(self, prompts: Sequence[str], choice: str = "") -> None:
        """Has the prompts to choose from; the chosen one stays as long as it is there, unless there is another `choice`."""
        with self._outputs_lock:
            options = tuple(map(str, prompts)) or (NO_PROMPT,)
            chosen = str(choice) or self._prompt.value
            if self._prompt.options != options:
                self._prompt.options = options  # type: ignore[assignment]
            if chosen in options and chosen != self._prompt.value:
                self._prompt.value = chosen

    def _clicked(self, click: ViewerClick) -> None:
        try:
            point = self._found = self._view.point(click.origin, click.direction)
            if point is None:
                self._point.content = ""
                return
            position = self._frame.to_data(np.array([point.position]))[0].tolist()
            self._point.content = described(point, position)
            if point.winner >= 0:
                self._list(self.live.asked, point.prompts[point.winner])
            # Said second: for a NeRF, objects are looked for among pictures, which take their time.
            thing = self._things.at(point)
            if self._found is point and thing is not None:
                self._point.content = described(point, position, thing)
        except MemoryShortage as error:
            self._point.content = _jsx(str(error))


def at_a_photo(client: Any, pipeline: Any) -> None:
    """Has a page that has just been opened look from where a training photo was taken, with its angle of view."""
    from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO

    cameras = pipeline.datamanager.train_dataset.cameras
    camera = cameras[len(cameras) // 2]
    pose = camera.camera_to_worlds.cpu().double().numpy()
    turned = vtf.SO3.from_matrix(pose[:, :3]) @ vtf.SO3.from_x_radians(np.pi)
    with client.atomic():
        client.camera.position = pose[:, 3] * VISER_NERFSTUDIO_SCALE_RATIO
        client.camera.wxyz = turned.wxyz
        client.camera.fov = float(2 * np.arctan(float(camera.height) / 2 / float(camera.fy)))


def keep_steps(machine: RenderStateMachine) -> None:
    """Has a view that waits to be rendered wait on when nerfstudio's loop comes up with nothing to do.

    That loop asks for a static picture after 0.2 s without an action. It would take the place of a step that came in just
    then, and does nothing itself where the view stands at full resolution: the page would keep the old picture.
    """
    if "action" in vars(machine):
        return
    act = machine.action

    def action(action: RenderAction) -> None:
        if action.action != "static" or machine.next_action is None:
            act(action)

    machine.action = action  # type: ignore[method-assign]


def legend(
    prompts: Sequence[str], colors: Sequence[Sequence[float]], shares: Sequence[float], shown: Sequence[bool] = ()
) -> str:
    """Colour, prompt and, where known, the share of the picture of each prompt, and of none; or that it is hidden, by `shown`.
    Markdown as viser reads it."""
    rows = []
    for i, (prompt, color) in enumerate(zip(prompts, colors, strict=True)):
        square = f'<span style={{{{color: "{_hex(color)}"}}}}>{_jsx("■")}</span>'
        share = _jsx(f"{shares[i]:.1%}") if shares else ""
        rows.append([square, _jsx(prompt), share if not shown or shown[i] else _jsx("hidden")])
    if shares and 1 - sum(shares) > 5e-4:
        rows.append(["", _jsx("none of them"), _jsx(f"{1 - sum(shares):.1%}")])
    return _table(rows)


def described(point: Point, position: Sequence[float], thing: Thing | None = None) -> str:
    """Sentences about a point and the object that it is on, with their places in the data's frame, and each prompt's
    probability, the highest first; markdown as viser reads it."""
    x, y, z = position
    winner = point.prompts[point.winner] if point.winner >= 0 else "none of the prompts"
    order = sorted(range(len(point.prompts)), key=lambda i: -point.chances[i])
    rows = [[_jsx(point.prompts[i]), _jsx(f"{point.chances[i]:.1%}")] for i in order]
    lines = [_jsx(f"{winner} at ({x:.3f}, {y:.3f}, {z:.3f})")]
    if thing is not None:
        size = " × ".join(f"{side:.2f}" for side in thing.size)
        centre = ", ".join(f"{value:.2f}" for value in thing.object.centroid)
        lines.append(_jsx(f"object {thing.number} of {thing.count}: {size}, around ({centre})"))
    return "".join(f"<div>{line}</div>" for line in lines) + _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = "".join("<tr>" + "".join(f'<td dir="auto">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    style = '{{maxHeight: "11em", overflowY: "auto", fontSize: "0.875em"}}'
    return f'<div style={style}><table style={{{{width: "100%"}}}}><tbody>{lines}</tbody></table></div>'


def _jsx(text: str) -> str:
    """`text` as a literal of JSX. viser evaluates markdown as code, and prompts are anybody's words."""
    units = text.encode("utf-16-be", "replace")
    codes = [units[i] << 8 | units[i + 1] for i in range(0, len(units), 2)]
    return (
        '{"'
        + "".join(chr(c) if chr(c).isascii() and (chr(c).isalnum() or c == 32) else f"\\u{c:04x}" for c in codes)
        + '"}'
    )


def _hex(color: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in color)


def _embedded(prompts: int, seconds: float) -> str:
    return f"{_count(prompts)}, embedded in {1000 * seconds:.0f} ms."


def _count(prompts: int) -> str:
    return "1 prompt" if prompts == 1 else f"{prompts} prompts"
