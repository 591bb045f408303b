"""The chat on the command line: reading lines, commands, streaming answers, stopping them.

How answers come about is in generation; the chat box for notebooks is in widgets.
"""

from __future__ import annotations

import difflib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import CourseError, ModelError, SettingError
from .generation import Answer, check_settings, fit_history, stream
from .models import adapter_off, base_folder, check_adapter, load_adapter, load_base_model, load_tokenizer
from .paths import CHECKPOINTS, outputs_dir, shown
from .profiles import Profile

HELP = """\
/reset            forget the conversation, keep the system prompt
/system TEXT      set the system prompt ("/system none" removes it); without TEXT, show it
/adapter on|off   answer with the adapter or with the base model alone
/checkpoint NAME  load another checkpoint of the adapter; without NAME, list them
/save FILE        write the conversation to a new JSON file, in the messages format that training reads
/help             this list
/exit             leave (so does Ctrl-D)
Ctrl-C stops an answer; the part that was written stays in the conversation.
A message that starts with / is written with two: //like this."""


@dataclass(frozen=True)
class ChatSettings:
    """How answers are written; temperature 0 is greedy."""

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 0.8
    repetition_penalty: float = 1.0
    seed: int | None = None


def run_chat(
    profile: Profile,
    adapter_dir: Path | None = None,
    temperature: float = 0.0,
    top_p: float = 0.8,
    repetition_penalty: float = 1.0,
    max_new_tokens: int | None = None,
    system: str | None = None,
    seed: int | None = None,
) -> int:
    """Chat until /exit or the end of input; returns the exit status 0.

    `adapter_dir` None chats with the base model alone; `max_new_tokens` and `system` None take the profile's. In a
    terminal lines are edited and Ctrl-C stops an answer only. Over a pipe every input line is a message or a command,
    standard output holds the answers alone, and notices go to standard error.
    Raises SettingError for settings out of range, ModelError where weights or adapter are absent or do not fit.
    """
    length = profile.max_new_tokens if max_new_tokens is None else max_new_tokens
    check_settings(length, temperature, top_p, repetition_penalty)
    settings = ChatSettings(length, temperature, top_p, repetition_penalty, seed)
    console = _Terminal(profile.name) if sys.stdin.isatty() and sys.stdout.isatty() else _Pipe()
    tokenizer = load_tokenizer(profile)
    # "auto" is about training speed; answers are to be those that evaluation scores, in float32.
    model = load_base_model(profile, "float32" if profile.dtype == "auto" else None)
    _check_room(model, length)
    chat = Chat(profile, tokenizer, model, settings, console, system if system is not None else profile.system_prompt)
    if adapter_dir is not None:
        chat.use_adapter(Path(adapter_dir))
    chat.run()
    return 0


def _check_room(model: PreTrainedModel, max_new_tokens: int) -> None:
    positions = model.config.max_position_embeddings
    if max_new_tokens >= positions:
        raise SettingError(
            f"max_new_tokens can't be {max_new_tokens:,}: question and answer share the model's {positions:,} positions.",
            f"Give max_new_tokens well below {positions:,}.",
        )


@dataclass
class Chat:
    """One conversation: the model with or without its adapter, the messages so far, and where lines come from."""

    profile: Profile
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | PeftModel
    settings: ChatSettings
    console: _Terminal | _Pipe
    system: str | None = None
    adapter_dir: Path | None = None
    adapter_on: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0

    def run(self) -> None:
        """Read and answer lines until /exit or their end. Errors with a known fix are shown, and the chat goes on."""
        self.console.note(f"{self._voice()}. /help lists the commands.")
        for line in self.console.lines():
            try:
                if self.handle(line) == "exit":
                    return
            except CourseError as error:
                self.console.note(f"error: {error}")
            except RuntimeError as error:  # torch's, memory above all: the conversation should outlive it
                self.console.note(f"error: the model failed: {error}\nFix: try again, or start anew with /reset.")

    def handle(self, line: str) -> str | None:
        """Run one command or answer one message; returns "exit" after /exit. Raises CourseError."""
        text = line.strip()
        if not text:
            return None
        if text.startswith("/") and not text.startswith("//"):
            name, _, argument = text[1:].partition(" ")
            return self._command(name)(argument.strip())
        self.answer(text[1:] if text.startswith("//") else text)
        return None

    def answer(self, text: str) -> None:
        """Stream the answer to one user message, and keep both in the conversation."""
        question = {"role": "user", "content": text}
        messages = self._fitted([*self.messages(), question])
        stop = threading.Event()
        with self.console.stopping(stop), adapter_off(self.model) if self._base_only() else nullcontext():
            answer = self._stream(messages, stop)
        if not answer.text:
            self.console.note("(no answer; the message is not kept)")
            return
        reply = {"role": "assistant", "content": answer.text}
        if not answer.stopped:
            reply["ended_by"] = "Ctrl-C" if stop.is_set() else "limit"
            self.console.note("(stopped)" if stop.is_set() else f"(cut at {self.settings.max_new_tokens} tokens)")
        self.turns += [question, reply]

    def messages(self) -> list[dict[str, Any]]:
        """The system prompt, if any, and all turns."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def use_adapter(self, folder: Path) -> None:
        """Put the adapter in this folder on the model, in place of its own. Raises ModelError; then all stays."""
        check_adapter(self.model, folder, self.profile)
        base = self.model.unload() if isinstance(self.model, PeftModel) else self.model
        self.model = load_adapter(base, folder, self.profile)
        self.adapter_dir, self.adapter_on = folder, True

    def _stream(self, messages: list[dict[str, Any]], stop: threading.Event) -> Answer:
        pieces = stream(self.model, self.tokenizer, messages, stop_event=stop, **asdict(self.settings))
        with closing(pieces):
            self.console.begin(self._speaker())
            try:
                while True:
                    self.console.say(next(pieces))
            except StopIteration as end:
                return end.value
            finally:
                self.console.say("\n")

    def _fitted(self, messages: list[dict[str, Any]]) -> list[Any]:
        """The messages that fit the model's positions beside the answer; says when more turns had to be left out."""
        room = self.model.config.max_position_embeddings - self.settings.max_new_tokens
        kept, dropped = fit_history(self.tokenizer, messages, room)
        if dropped > self.dropped:
            self.console.note(f"(the conversation is too long: its oldest {_count(dropped, 'turn')} left out)")
        self.dropped = dropped
        return kept

    def _base_only(self) -> bool:
        return self.adapter_dir is not None and not self.adapter_on

    def _speaker(self) -> str:
        return f"{self.profile.name} (adapter off)" if self._base_only() else self.profile.name

    def _voice(self) -> str:
        if self.adapter_dir is None:
            return f"{self.profile.name}, {shown(base_folder(self.profile))} without an adapter"
        return f"{self.profile.name}, adapter {shown(self.adapter_dir)} {'on' if self.adapter_on else 'off'}"

    # Commands

    def _command(self, name: str) -> Callable[[str], str | None]:
        commands: dict[str, Callable[[str], str | None]] = {
            "reset": self._reset,
            "system": self._set_system,
            "adapter": self._switch_adapter,
            "checkpoint": self._checkpoint,
            "save": self._save,
            "help": lambda _: self.console.note(HELP),
            "exit": lambda _: "exit",
        }
        if name not in commands:
            near = difflib.get_close_matches(name.lower(), commands, n=1, cutoff=0.5)
            raise SettingError(f"There is no command /{name}.", f"Try /{near[0] if near else 'help'}.")
        return commands[name]

    def _reset(self, _: str) -> None:
        self.turns, self.dropped = [], 0
        self.console.note("(a new conversation)")

    def _set_system(self, text: str) -> None:
        if text:
            self.system = None if text == "none" else text
        self.console.note(f"system prompt: {self.system or '(none)'}")

    def _switch_adapter(self, state: str) -> None:
        if state not in ("", "on", "off"):
            raise SettingError(f"/adapter can't be {state!r}.", "Write /adapter on or /adapter off.")
        if self.adapter_dir is None:
            raise ModelError("There is no adapter to switch: this is the base model alone.", "Load one: /checkpoint NAME.")
        self.adapter_on = state == "on" if state else self.adapter_on
        self.console.note(self._voice())

    def _checkpoint(self, name: str) -> None:
        known = self._checkpoints()
        if not name:
            self.console.note("\n".join(f"{name}  {shown(folder)}" for name, folder in known.items()) or "(no checkpoints)")
            return
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"Did you mean {near[0]}?" if near else f"Choose among: {', '.join(known) or 'none yet'}."
            raise ModelError(f"There is no checkpoint {name}.", fix)
        self.use_adapter(known[name])
        self.console.note(self._voice())

    def _checkpoints(self) -> dict[str, Path]:
        """Folders with an adapter, by name, in the run of the one in use, or in outputs/<profile>."""
        run = self.adapter_dir.parent if self.adapter_dir else outputs_dir(self.profile.name)
        if run.name == CHECKPOINTS:
            run = run.parent
        files = [*run.glob("*/adapter_config.json"), *run.glob(f"{CHECKPOINTS}/*/adapter_config.json")]
        return {file.parent.name: file.parent for file in sorted(files, key=lambda file: _natural(file.parent.name))}

    def _save(self, name: str) -> None:
        if not name:
            raise SettingError("/save needs a file name.", "Write /save conversation.json.")
        if not self.turns:
            raise SettingError("There is nothing to save yet.", "Say something first.")
        adapter = str(self.adapter_dir) if self.adapter_on else None
        row = {"messages": self.messages(), "profile": self.profile.name, "adapter": adapter}
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                json.dump([row], file, ensure_ascii=False, indent=2)
                file.write("\n")
        except OSError as error:
            raise SettingError(f"{name} can't be written: {error.strerror}.", "Choose another file name.") from error
        self.console.note(f"saved {_count(len(self.turns), 'message')} to {name}")


# Where lines come from and answers go


class _Terminal:
    """Lines edited by prompt_toolkit, which knows how wide Chinese characters are; answers after the model's name."""

    def __init__(self, name: str) -> None:
        from prompt_toolkit import PromptSession

        self.session: Any = PromptSession()
        self.name = name

    def lines(self) -> Iterator[str]:
        """Lines until Ctrl-D. Ctrl-C empties the line."""
        while True:
            try:
                line = self.session.prompt("you: ")
            except KeyboardInterrupt:
                self.note("(/exit or Ctrl-D leaves)")
                continue
            except EOFError:
                return
            yield _well_formed(line)

    def begin(self, speaker: str) -> None:
        print(f"{speaker}: ", end="", flush=True)

    def say(self, text: str) -> None:
        print(text, end="", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)

    @contextmanager
    def stopping(self, stop: threading.Event) -> Iterator[None]:
        """While the block runs, Ctrl-C sets the event and interrupts nothing else."""
        before = signal.signal(signal.SIGINT, lambda *_: stop.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class _Pipe:
    """Lines from standard input; answers to standard output, one after the other; notices to standard error."""

    def __init__(self) -> None:
        for stream_ in (sys.stdin, sys.stdout, sys.stderr):
            if hasattr(stream_, "reconfigure"):
                stream_.reconfigure(encoding="utf-8", errors="replace")

    def lines(self) -> Iterator[str]:
        for line in sys.stdin:
            yield _well_formed(line)

    def begin(self, speaker: str) -> None:
        """Nothing: only the answers are written."""

    def say(self, text: str) -> None:
        print(text, end="", flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stopping(self, stop: threading.Event) -> Iterator[None]:
        """Ctrl-C ends the program here, as it does for any filter."""
        yield


def _well_formed(line: str) -> str:
    """The line with bytes that were no UTF-8 (lone surrogates) replaced: tokenizers refuse them."""
    return line.encode("utf-8", "replace").decode("utf-8")


def _natural(name: str) -> tuple[str, int]:
    """Sorts checkpoint-2 before checkpoint-10."""
    head, _, number = name.rpartition("-")
    return (head, int(number)) if number.isdecimal() else (name, 0)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
