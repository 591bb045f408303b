"""The chat box: a model and its fine-tuned self answer in a notebook, side by side or one alone.

Answers come from generation, adapters are switched in speakers, and what was said is kept in transcript.
"""

from __future__ import annotations

import html
import importlib.util
import math
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import CourseError
from ..generation import check_settings, fit_history, stream
from ..profiles import Profile
from . import transcript
from .speakers import Speakers
from .transcript import BASE, TUNED, Reply, Turn

SIDE_BY_SIDE = "side by side"
SECONDS_BETWEEN_UPDATES = 1 / 12
SECONDS_FOR_A_TEXT_TO_FOLLOW_ENTER = 0.5

_open_boxes: weakref.WeakSet[ChatBox] = weakref.WeakSet()


def chat_box(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    adapters: Mapping[str, Path] | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 0.8,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    in_background: bool | None = None,
) -> ChatBox:
    """A chat box to put last in a cell. A box that is still open in this kernel is closed first.

    `model` is a base model, or one that `load_adapter` returned. `adapters` maps names of checkpoints to their
    folders, the one to begin with last. While an answer is written the model may have another adapter on, or none:
    before other cells use it, `box.wait()`. `system` and `max_new_tokens` None take the profile's. Answers come in the
    background, so that the notebook stays usable; on Colab, which shows no updates from there, inside the click, and
    the notebook's interrupt button stops them. Raises ModelError for a base model that carries an adapter already,
    SettingError for values out of range.
    """
    length = profile.max_new_tokens if max_new_tokens is None else max_new_tokens
    check_settings(length, temperature, top_p, repetition_penalty)
    for box in list(_open_boxes):
        box.close()
    defaults = Defaults(
        system=(profile.system_prompt or "") if system is None else system,
        max_new_tokens=length,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    speakers = Speakers(model, profile, adapters)
    background = not _on_colab() if in_background is None else in_background
    return ChatBox(speakers, tokenizer, defaults, background)


@dataclass(frozen=True)
class Defaults:
    """What a chat box begins with; the first three can be changed in it. Temperature 0 is greedy."""

    system: str
    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int | None


class ChatBox:
    """A conversation with its widgets. Whatever the widgets do can be done from Python, too."""

    def __init__(
        self, speakers: Speakers, tokenizer: PreTrainedTokenizerBase, defaults: Defaults, in_background: bool
    ) -> None:
        self._speakers = speakers
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._in_background = in_background
        self._turns: list[Turn] = []
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._entered_at = -math.inf
        self._shown_at = -math.inf
        self.last_error: BaseException | None = None
        self._make_widgets()
        self._show("Ready.", busy=False)
        _open_boxes.add(self)

    # What can be read and done from Python

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages so far. Those of the models say which `model` wrote them, and what ended them if not itself."""
        return transcript.conversation(self._turns, self.system.value.strip())

    def messages(self, speaker: str = TUNED) -> list[dict[str, str]]:
        """The conversation as `speaker` ("base" or "fine-tuned") knows it, ready for `render` and `encode`."""
        return transcript.history(self._turns, speaker, self.system.value.strip())

    def transcript_markdown(self) -> str:
        """The conversation as Markdown, for GitHub, which shows no widgets."""
        return transcript.to_markdown(self._turns, self.system.value.strip())

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
            self._turns.clear()
            self._show("Ready.", busy=False)

    def close(self) -> None:
        """Stop, take the adapters off the model again, and remove the widgets. The conversation can still be read."""
        _open_boxes.discard(self)
        with self._lock:
            self._closed = True
        self.stop()
        self._idle.wait()
        self._speakers.close()
        _close_all(self.view)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.view)

    # Widgets

    def _make_widgets(self) -> None:
        wide = ipywidgets.Layout(flex="1 1 18em", width="auto")
        self._log = ipywidgets.HTML()
        self._status = ipywidgets.HTML()
        self.message = ipywidgets.Text(
            description="Message", placeholder="你好", continuous_update=False, layout=wide, style=_LABEL
        )
        self.send_button = _button("Send", "Send the message (Enter does, too)", "primary")
        self.stop_button = _button("Stop", "Stop the answer that is being written")
        self.clear_button = _button("Clear", "Forget the conversation")
        self._make_settings(wide)
        self.message.on_msg(self._on_entered)
        self.message.observe(self._on_text, "value")
        self.send_button.on_click(lambda _: self._send_typed())
        self.stop_button.on_click(lambda _: self.stop())
        self.clear_button.on_click(lambda _: self.clear())
        self.view = _Panel([self._scroller(), *self._rows(), self._status])

    def _make_settings(self, wide: ipywidgets.Layout) -> None:
        names = self._speakers.adapters
        self.mode = ipywidgets.Dropdown(
            options=[SIDE_BY_SIDE, TUNED, BASE] if names else [BASE], description="Answers", layout=_NARROW,
            style=_LABEL,
        )  # fmt: skip
        self.checkpoint = ipywidgets.Dropdown(
            options=names or ["none"], value=(names or ["none"])[-1], description="Checkpoint", layout=_NARROW,
            style=_LABEL,
        )  # fmt: skip
        self.temperature = ipywidgets.BoundedFloatText(
            value=self._defaults.temperature, min=0, max=2, step=0.1, description="Temperature", layout=_SMALL,
            style=_LABEL,
        )  # fmt: skip
        longest = max(self._speakers.model.config.max_position_embeddings // 2, self._defaults.max_new_tokens)
        self.length = ipywidgets.BoundedIntText(
            value=self._defaults.max_new_tokens, min=1, max=longest, description="Longest answer", layout=_WIDER,
            style=_LABEL, tooltip="in tokens",
        )  # fmt: skip
        self.system = ipywidgets.Text(
            value=self._defaults.system, description="System prompt", placeholder="none", continuous_update=False,
            layout=wide, style=_LABEL,
        )  # fmt: skip

    def _scroller(self) -> ipywidgets.Box:
        # column-reverse keeps the end in view without a script; the scroller outlives the updates of what is in it.
        layout = ipywidgets.Layout(
            display="flex", flex_flow="column-reverse", max_height="30em", overflow="auto",
            border="1px solid rgba(128,128,128,.4)",
        )  # fmt: skip
        return ipywidgets.Box([self._log], layout=layout)

    def _rows(self) -> list[ipywidgets.Box]:
        wrap = ipywidgets.Layout(flex_flow="row wrap")
        rows = (
            [self.message, self.send_button, self.stop_button, self.clear_button],
            [self.mode, self.checkpoint, self.temperature, self.length],
            [self.system],
        )
        return [ipywidgets.HBox(row, layout=wrap) for row in rows]

    def _show(self, status: str, busy: bool = True) -> None:
        """Bring log, status line and buttons up to date."""
        self._shown_at = time.monotonic()
        self._log.value = transcript.to_html(self._turns, self.system.value.strip())
        line = f'<div role="status" style="color:var(--jp-ui-font-color2,inherit)">{status}</div>'
        if self._status.value != line:
            self._status.value = line
        settings = (self.mode, self.checkpoint, self.temperature, self.length, self.system)
        for widget in (self.send_button, self.clear_button, *settings):
            widget.disabled = busy
        self.stop_button.disabled = not busy

    # What the widgets say

    def _on_entered(self, _: Any, content: Mapping[str, Any], __: Any) -> None:
        """Enter was pressed: the text, if it is new, follows as a change of value, and that sends it.

        A text that the kernel knows already (the box lost the focus before) is not told again. It is sent after a
        moment in which nothing newer came.
        """
        if content.get("event") != "submit":
            return
        self._entered_at = time.monotonic()
        if self._in_background and self.message.value:
            waiting = threading.Timer(SECONDS_FOR_A_TEXT_TO_FOLLOW_ENTER, self._send_if_still_entered)
            waiting.daemon = True
            waiting.start()

    def _on_text(self, change: Mapping[str, Any]) -> None:
        """The text changed: because of Enter, or only because the box lost the focus."""
        if change["new"] and time.monotonic() - self._entered_at < 2 * SECONDS_FOR_A_TEXT_TO_FOLLOW_ENTER:
            self._send_typed()

    def _send_if_still_entered(self) -> None:
        if self._entered_at > -math.inf:
            self._send_typed()

    def _send_typed(self) -> None:
        self._entered_at = -math.inf
        text = self.message.value.strip()
        if not text or not self._begin():
            return
        self.message.value = ""
        self._ask(text)

    # Answering

    def _begin(self) -> bool:
        """Whether this caller may ask now: nobody else can until the answers are there, and nobody once it is closed."""
        with self._lock:
            if self.busy or self._closed:
                return False
            self._idle.clear()
            self._stop.clear()
            return True

    def _ask(self, text: str) -> None:
        adapter = self.checkpoint.value
        both = [Reply(BASE), Reply(TUNED, adapter)]
        chosen = {SIDE_BY_SIDE: both, TUNED: both[1:], BASE: both[:1]}[self.mode.value]
        turn = Turn(text, [])
        self._turns.append(turn)
        if not self._in_background:
            self._answer(turn, chosen)
            return
        self._thread = threading.Thread(target=self._answer, args=(turn, chosen), name="chat box", daemon=True)
        self._thread.start()

    def _answer(self, turn: Turn, replies: list[Reply]) -> None:
        """Write the replies one after the other. Nothing raised here would reach anybody: errors are shown."""
        status = "Ready."
        try:
            for reply in replies:
                if not self._stop.is_set():
                    turn.replies.append(reply)
                    status = self._write(turn, reply)
        finally:
            try:
                self._show(status, busy=False)
            finally:
                self._idle.set()

    def _write(self, turn: Turn, reply: Reply) -> str:
        """One reply from its first piece to its end; returns the status line for afterwards."""
        status = "Ready."
        try:
            self._show(f"{html.escape(reply.name)} is answering.")
            with self._speakers.speaking(reply.adapter) as model:
                messages, dropped = self._fitted(model, turn, reply)
                if dropped:
                    status = f"Ready. The conversation is too long: turns left out at its start: {dropped}."
                self._stream(model, messages, reply)
        except KeyboardInterrupt:
            self.stop()
            reply.state = "stopped"
        except CourseError as error:
            self._fail(reply, error, f"error: {error}")
        except Exception as error:  # whatever it is: shown in the box, and kept for a look at its traceback
            self._fail(reply, error, f"error: {type(error).__name__}: {error}")
        return status

    def _stream(self, model: nn.Module, messages: list[Any], reply: Reply) -> None:
        pieces = stream(
            model,
            self._tokenizer,
            messages,
            max_new_tokens=self.length.value,
            temperature=self.temperature.value,
            top_p=self._defaults.top_p,
            repetition_penalty=self._defaults.repetition_penalty,
            seed=self._defaults.seed,
            stop_event=self._stop,
        )
        with closing(pieces):
            try:
                while True:
                    reply.text += next(pieces)
                    if time.monotonic() - self._shown_at >= SECONDS_BETWEEN_UPDATES:
                        self._show(f"{html.escape(reply.name)} is answering.")
            except StopIteration as end:
                reply.text = end.value.text
                reply.state = self._ending(end.value.stopped, reply.text)

    def _ending(self, stopped_itself: bool, text: str) -> str:
        if stopped_itself:
            return "done" if text else "empty"
        return "stopped" if self._stop.is_set() else "limit"

    def _fitted(self, model: nn.Module, turn: Turn, reply: Reply) -> tuple[list[Any], int]:
        before = transcript.history(self._turns[:-1], reply.speaker, self.system.value.strip())
        room = model.config.max_position_embeddings - self.length.value
        return fit_history(self._tokenizer, [*before, {"role": "user", "content": turn.question}], room)

    def _fail(self, reply: Reply, error: Exception, text: str) -> None:
        reply.state, reply.error = "failed", text
        self.last_error = error


_LABEL = {"description_width": "initial"}
_NARROW = ipywidgets.Layout(flex="1 1 11em", width="auto")
_SMALL = ipywidgets.Layout(width="10.5em")
_WIDER = ipywidgets.Layout(width="13.5em")


class _Panel(ipywidgets.VBox):
    """A box of widgets whose text form, which is what GitHub shows, is one line."""

    def __repr__(self) -> str:
        return "chat box: run the notebook to use it"


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
