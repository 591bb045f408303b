"""The chat box: a model and its fine-tuned self answer in a notebook, side by side or one alone.

Only widgets are here: who speaks and what was said is kept in conversation, and drawn in transcript.
"""

from __future__ import annotations

import html
import importlib.util
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..chat import transcript
from ..chat.conversation import BASE, TUNED, Conversation, Reply, Speakers, Turn, all_messages, history
from ..generation import Sampling
from ..profiles import Profile
from ..support.errors import CourseError

SIDE_BY_SIDE = "side by side"
SECONDS_BETWEEN_UPDATES = 1 / 12

ENTERED = "\u0004"
"""Ends the message's text when Enter was pressed: text and key are one change, so neither can overtake the other."""

_ENTER_SENDS = """
if (!window.glm4EnterSends) {
  window.glm4EnterSends = true;
  document.addEventListener("keydown", event => {
    const box = event.target;
    // While an input method composes, Enter takes its suggestion; Safari then says so by the key code alone.
    if (event.key !== "Enter" || event.isComposing || event.keyCode === 229) return;
    if (event.shiftKey || event.ctrlKey || event.altKey || event.metaKey || !box.closest?.(".glm4-enter-sends")) return;
    event.preventDefault();
    event.stopPropagation();
    const text = box.value;
    box.value = text + "\\u0004";
    box.dispatchEvent(new Event("change", {bubbles: true}));
    if (box.value.endsWith("\\u0004")) box.value = text;
  }, true);
}
"""
"""For the browser, since ipywidgets' Textarea tells of no keys. Where no script runs, the Send button is left."""

_open_boxes: weakref.WeakSet[ChatBox] = weakref.WeakSet()


def chat_box(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    adapters: Mapping[str, Path] | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
    in_background: bool | None = None,
) -> ChatBox:
    """A chat box to put last in a cell. A box that is still open in this kernel is closed first.

    `model` is a base model, or one that `load_adapter` returned. `adapters` maps names of checkpoints to their
    folders, the one to begin with last. While an answer is written the model may have another adapter on, or none:
    before other cells use it, `box.wait()`. `system` None takes the profile's prompt, `sampling` None is greedy with
    the profile's length. Answers come in the background, so that the notebook stays usable; on Colab, which shows no
    updates from there, inside the click, and the notebook's interrupt button stops them. Raises ModelError for a base
    model that carries an adapter already, SettingError for answers as long as the model's positions.
    """
    for box in list(_open_boxes):
        box.close()
    talk = Conversation(
        Speakers(model, profile, adapters),
        tokenizer,
        sampling or Sampling(profile.max_new_tokens),
        (profile.system_prompt or "") if system is None else system,
    )
    return ChatBox(talk, not _on_colab() if in_background is None else in_background)


class ChatBox:
    """A conversation with its widgets. Whatever the widgets do can be done from Python, too."""

    def __init__(self, talk: Conversation, in_background: bool) -> None:
        self._talk = talk
        self._in_background = in_background
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._closed = False
        self.last_error: BaseException | None = None
        self._make_widgets()
        self._show("Ready.", busy=False)
        _open_boxes.add(self)

    # What can be read and done from Python

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages so far. Those of the models say which `model` wrote them, and what ended them if not itself."""
        return all_messages(self._talk.turns, self._talk.system)

    def messages(self, speaker: str = TUNED) -> list[dict[str, str]]:
        """The conversation as `speaker` ("base" or "fine-tuned") knows it, ready for `render` and `encode`."""
        return history(self._talk.turns, speaker, self._talk.system)

    def transcript_markdown(self) -> str:
        """The conversation as Markdown, for GitHub, which shows no widgets."""
        return transcript.to_markdown(self._talk.turns, self._talk.system)

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return not self._idle.is_set()

    def send(self, text: str, wait: bool = False) -> None:
        """Ask something, as if it were typed and sent; `wait` returns when the answers are there.

        Blank text is ignored, and so is anything while an answer is written.
        """
        if text.strip() and self._begin():
            self._ask(text.strip())
        if wait:
            self.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the answers are there; False if they are not within `timeout` seconds."""
        return self._idle.wait(timeout)

    def stop(self) -> None:
        """End the answer at its next token; an answer that has not begun is left out."""
        self._stop.set()

    def clear(self) -> None:
        """Forget the conversation; the settings stay. Ignored while an answer is written."""
        if not self.busy:
            self._talk.turns.clear()
            self._show("Ready.", busy=False)

    def close(self) -> None:
        """Stop, take the adapters off the model again, and remove the widgets. The conversation can still be read."""
        _open_boxes.discard(self)
        with self._lock:
            self._closed = True
        self.stop()
        self._idle.wait()
        self._talk.speakers.close()
        _close_all(self.view)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.view)

    # Widgets

    def _make_widgets(self) -> None:
        self._log, self._status = ipywidgets.HTML(), ipywidgets.HTML()
        self.message = _text_box("Message", "", "你好", rows=2)
        self.message.add_class("glm4-enter-sends")
        self.send_button = _button("Send", "Send the message (Enter does, too)", "primary")
        self.stop_button = _button("Stop", "Stop the answer that is being written")
        self.clear_button = _button("Clear", "Forget the conversation")
        names, sampling = self._talk.speakers.adapters, self._talk.sampling
        hottest, longest = (
            max(2, sampling.temperature),
            max(self._talk.speakers.positions // 2, sampling.max_new_tokens),
        )
        self.mode = _labelled(
            ipywidgets.Dropdown, "Answers", _NARROW, options=[SIDE_BY_SIDE, TUNED, BASE] if names else [BASE]
        )
        self.checkpoint = _labelled(
            ipywidgets.Dropdown, "Checkpoint", _NARROW, options=names or ["none"], value=(names or ["none"])[-1]
        )
        self.temperature = _labelled(
            ipywidgets.BoundedFloatText, "Temperature", _SMALL, value=sampling.temperature, min=0, max=hottest, step=0.1
        )
        self.length = _labelled(
            ipywidgets.BoundedIntText,
            "Longest answer (tokens)",
            _WIDER,
            value=sampling.max_new_tokens,
            min=1,
            max=longest,
        )
        self.system = _text_box("System prompt", self._talk.system, "none", rows=1)
        self.message.observe(self._on_text, "value")
        for setting in (self.temperature, self.length, self.system):
            setting.observe(self._take_settings, "value")
        self.send_button.on_click(lambda _: self._send_typed())
        self.stop_button.on_click(lambda _: self.stop())
        self.clear_button.on_click(lambda _: self.clear())
        self.view = _Panel(self._rows())

    def _rows(self) -> list[ipywidgets.Widget]:
        # column-reverse keeps the end in view without a script; the scroller outlives the updates of what is in it.
        scroller = ipywidgets.Layout(
            display="flex",
            flex_flow="column-reverse",
            max_height="30em",
            overflow="auto",
            border="1px solid rgba(128,128,128,.4)",
        )
        script = {"output_type": "display_data", "data": {"application/javascript": _ENTER_SENDS}, "metadata": {}}
        rows = (
            [self.message, self.send_button, self.stop_button, self.clear_button],
            [self.mode, self.checkpoint, self.temperature, self.length],
            [self.system],
        )
        return [
            ipywidgets.Box([self._log], layout=scroller),
            *(ipywidgets.HBox(row, layout=ipywidgets.Layout(flex_flow="row wrap")) for row in rows),
            self._status,
            ipywidgets.Output(outputs=(script,)),
        ]

    def _show(self, status: str, busy: bool = True) -> None:
        """Bring log, status line and buttons up to date."""
        self._shown_at = time.monotonic()
        self._log.value = transcript.to_html(self._talk.turns, self._talk.system)
        line = f'<div role="status" style="color:var(--jp-ui-font-color2,inherit)">{status}</div>'
        if self._status.value != line:
            self._status.value = line
        settings = (self.mode, self.checkpoint, self.temperature, self.length, self.system)
        for widget in (self.send_button, self.clear_button, *settings):
            widget.disabled = busy
        self.stop_button.disabled = not busy

    # What the widgets say

    def _on_text(self, change: Mapping[str, Any]) -> None:
        if change["new"].endswith(ENTERED):
            self.message.value = change["new"].removesuffix(ENTERED)
            self._send_typed()

    def _send_typed(self) -> None:
        text = self.message.value.strip()
        if text and self._begin():
            self.message.value = ""
            self._ask(text)

    def _take_settings(self, _: Any) -> None:
        self._talk.system = self.system.value.strip()
        self._talk.sampling = replace(
            self._talk.sampling, max_new_tokens=self.length.value, temperature=self.temperature.value
        )

    # Answering

    def _begin(self) -> bool:
        """Whether this caller may ask now: nobody else can until the answers are there, nobody in a closed box."""
        with self._lock:
            if self.busy or self._closed:
                return False
            self._idle.clear()
            self._stop.clear()
            return True

    def _ask(self, text: str) -> None:
        both = [Reply(BASE), Reply(TUNED, self.checkpoint.value)]
        chosen = {SIDE_BY_SIDE: both, TUNED: both[1:], BASE: both[:1]}[self.mode.value]
        self._talk.turns.append(Turn(text))
        if self._in_background:
            threading.Thread(target=self._answer, args=(chosen,), name="chat box", daemon=True).start()
        else:
            self._answer(chosen)

    def _answer(self, replies: list[Reply]) -> None:
        """Write the replies one after the other. Nothing raised here would reach anybody: errors are shown."""
        status = "Ready."
        try:
            for reply in replies:
                if not self._stop.is_set():
                    self._talk.turns[-1].replies.append(reply)
                    self._write(reply)
            if self._talk.dropped:
                status += f" The conversation is too long: turns left out at its start: {self._talk.dropped}."
        finally:
            try:
                self._show(status, busy=False)
            finally:
                self._idle.set()

    def _write(self, reply: Reply) -> None:
        """One reply from its first piece to its end."""
        answering = f"{html.escape(reply.name)} is answering."
        try:
            self._show(answering)
            with closing(self._talk.write(reply, self._stop)) as pieces:
                for piece in pieces:
                    reply.text += piece
                    if time.monotonic() - self._shown_at >= SECONDS_BETWEEN_UPDATES:
                        self._show(answering)
        except KeyboardInterrupt:
            self.stop()
            reply.state = "stopped"
        except Exception as error:  # whatever it is: shown in the box, and kept for a look at its traceback
            named = "" if isinstance(error, CourseError) else f"{type(error).__name__}: "
            reply.state, reply.error = "failed", f"error: {named}{error}"
            self.last_error = error


_NARROW = ipywidgets.Layout(flex="1 1 11em", width="auto")
_SMALL = ipywidgets.Layout(width="10.5em")
_WIDER = ipywidgets.Layout(width="17em")


class _Panel(ipywidgets.VBox):
    """A box of widgets whose text form, which is what GitHub shows, is one line."""

    def __repr__(self) -> str:
        return "chat box: run the notebook to use it"


def _labelled(kind: type, description: str, layout: ipywidgets.Layout, **values: Any) -> Any:
    """A widget whose label is shown in full."""
    return kind(description=description, layout=layout, style={"description_width": "initial"}, **values)


def _text_box(description: str, value: str, placeholder: str, rows: int) -> ipywidgets.Textarea:
    """Text of several lines; the kernel is told of it when the box loses the focus."""
    wide = ipywidgets.Layout(flex="1 1 18em", width="auto")
    return _labelled(
        ipywidgets.Textarea, description, wide, value=value, placeholder=placeholder, rows=rows, continuous_update=False
    )


def _button(description: str, tooltip: str, button_style: str = "") -> ipywidgets.Button:
    layout = ipywidgets.Layout(width="6em")
    return ipywidgets.Button(description=description, tooltip=tooltip, button_style=button_style, layout=layout)


def _close_all(widget: ipywidgets.Widget) -> None:
    for child in getattr(widget, "children", ()):
        _close_all(child)
    widget.close()


def _on_colab() -> bool:
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # there is no package google at all
        return False
