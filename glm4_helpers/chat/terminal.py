"""The chat on the command line: messages and commands from a terminal or a pipe, answers as they are written.

The conversation itself is in conversation, and so for the chat box in notebooks, too.
"""

from __future__ import annotations

import difflib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..checks.adapters import checkpoints, require_adapter
from ..checks.weights import base_folder
from ..generation import Sampling
from ..models import load_base_model, load_tokenizer
from ..profiles import Profile
from ..support.errors import CourseError, ModelError, SettingError
from ..support.paths import CHECKPOINTS, outputs_dir, shown
from .conversation import BASE, TUNED, Conversation, Reply, Speakers, Turn

HELP = """\
/retry            answer the last message again, with what is set now
/reset            forget the conversation, keep the system prompt
/system TEXT      set the system prompt ("/system none" removes it); without TEXT, show it
/adapter on|off   answer with the adapter or with the base model alone
/checkpoint NAME  load another checkpoint of the adapter; without NAME, list them
/save FILE        write the conversation to a new JSON file, in the messages format that training reads
/help             this list
/exit             leave (so does Ctrl-D)
Ctrl-C stops an answer; the part that was written stays in the conversation.
Alt+Enter, or Esc and then Enter, breaks the line; so do breaks in pasted text.
A message that starts with / is written with two: //like this."""

COMMANDS = re.findall(r"^/(\w+)", HELP, re.MULTILINE)


def run_chat(
    profile: Profile,
    adapter_dir: Path | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    delimiter: str | None = None,
) -> int:
    """Chat until /exit or the end of input; returns the exit status 0.

    `adapter_dir` None chats with the base model alone; `sampling` None is greedy with the profile's length, `system`
    None takes the profile's prompt. In a terminal lines are edited and Ctrl-C stops an answer only. Over a pipe every
    input line is a message or a command, or, with a `delimiter`, all lines up to one that holds it alone, which then
    also ends every answer; standard output holds the answers alone, and notices go to standard error.
    Raises SettingError for settings out of range, ModelError where weights or adapter are absent or do not fit.
    """
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal and delimiter is not None:
        raise SettingError("--delimiter is for messages from a pipe.", "Leave it out: Alt+Enter breaks the line here.")
    if adapter_dir is not None:
        require_adapter(Path(adapter_dir))
    tokenizer = load_tokenizer(profile)
    # "auto" is about training speed; answers are to be those that evaluation scores, in float32.
    model = load_base_model(profile, "float32" if profile.dtype == "auto" else None)
    sampling = sampling or Sampling(profile.max_new_tokens)
    system = profile.system_prompt if system is None else system
    talk = Conversation(Speakers(model, profile), tokenizer, sampling, system or "")
    chat = Chat(profile, talk, in_terminal, delimiter)
    if adapter_dir is not None:
        chat.use_adapter(Path(adapter_dir))
    chat.run(_typed() if in_terminal else _piped(delimiter))
    return 0


@dataclass
class Chat:
    """One conversation in a terminal, or over a pipe; the adapter's folder, if it has one, and whether it is on."""

    profile: Profile
    talk: Conversation
    in_terminal: bool = False
    delimiter: str | None = None
    adapter_dir: Path | None = None
    adapter_on: bool = False

    def run(self, lines: Iterator[str]) -> None:
        """Answer the messages until /exit or their end. Errors with a known fix are shown, and the chat continues."""
        self.note(f"{self._voice()}. /help lists the commands.")
        for line in lines:
            try:
                if self.handle(line) == "exit":
                    return
            except CourseError as error:
                self.note(f"error: {error}")
            except RuntimeError as error:  # torch's, memory above all: the conversation should outlive it
                self.note(f"error: the model failed: {error}\nFix: /retry, or start again with /reset.")

    def handle(self, line: str) -> str | None:
        """Run one command or answer one message; returns "exit" after /exit. Raises CourseError."""
        # Bytes that were no UTF-8 come as lone surrogates, which tokenizers refuse.
        text = line.encode("utf-8", "replace").decode("utf-8").strip()
        if not text:
            return None
        if text.startswith("/") and not text.startswith("//"):
            name, _, argument = text[1:].partition(" ")
            return self._command(name, argument.strip())
        self.answer(text.removeprefix("/"))
        return None

    def answer(self, text: str) -> None:
        """Stream the answer to one message; both stay in the conversation where there is an answer."""
        reply = Reply(TUNED, self.adapter_dir.name) if self.adapter_on else Reply(BASE)
        turns = self.talk.turns
        turns.append(Turn(text, [reply]))
        try:
            self._write(reply)
        finally:
            if not reply.text:
                turns.pop()
        if not reply.text:
            self.note("(no answer; the message is not kept)")
        elif reply.state != "done":
            limit = self.talk.sampling.max_new_tokens
            self.note("(stopped)" if reply.state == "stopped" else f"(cut at {limit} tokens)")

    def use_adapter(self, folder: Path) -> None:
        """Put the adapter in this folder on the model, in place of the former. Raises ModelError; then all stays."""
        speakers = self.talk.speakers
        speakers.folders[folder.name] = folder
        speakers.load(folder.name)
        self.adapter_dir, self.adapter_on = folder, True

    def note(self, text: str) -> None:
        """Tell the user something that is no answer."""
        print(text, file=sys.stdout if self.in_terminal else sys.stderr, flush=True)

    def _write(self, reply: Reply) -> None:
        stop, dropped = threading.Event(), self.talk.dropped
        with self._ctrl_c_stops(stop), closing(self.talk.write(reply, stop)) as pieces:
            if self.talk.dropped > dropped:
                turns = "turn" if self.talk.dropped == 1 else "turns"
                self.note(f"(the conversation is too long: its oldest {self.talk.dropped} {turns} left out)")
            if self.in_terminal:
                print(f"{self.profile.name}{self._off()}: ", end="", flush=True)
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            finally:
                print("" if self.delimiter is None else f"\n{self.delimiter}", flush=True)

    @contextmanager
    def _ctrl_c_stops(self, stop: threading.Event) -> Iterator[None]:
        """In a terminal Ctrl-C sets the event and interrupts nothing else; a pipe it ends, as it does any filter."""
        if not self.in_terminal:
            yield
            return
        before = signal.signal(signal.SIGINT, lambda *_: stop.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _off(self) -> str:
        return " (adapter off)" if self.adapter_dir and not self.adapter_on else ""

    def _voice(self) -> str:
        if self.adapter_dir is None:
            return f"{self.profile.name}, {shown(base_folder(self.profile))} without an adapter"
        return f"{self.profile.name}, adapter {shown(self.adapter_dir)} {'on' if self.adapter_on else 'off'}"

    # Commands

    def _command(self, name: str, argument: str) -> str | None:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name.lower(), COMMANDS, n=1, cutoff=0.5)
            raise SettingError(f"There is no command /{name}.", f"Try /{near[0] if near else 'help'}.")
        return getattr(self, f"_{name}")(argument)

    def _help(self, _: str) -> None:
        self.note(HELP)

    def _exit(self, _: str) -> str:
        return "exit"

    def _retry(self, _: str) -> None:
        if not self.talk.turns:
            raise SettingError("There is no message to answer again.", "Say something first.")
        before = self.talk.turns.pop()
        kept = len(self.talk.turns)
        try:
            self.answer(before.question)
        finally:
            if len(self.talk.turns) == kept:
                self.talk.turns.append(before)

    def _reset(self, _: str) -> None:
        self.talk.turns.clear()
        self.talk.dropped = 0
        self.note("(a new conversation)")

    def _system(self, text: str) -> None:
        if text:
            self.talk.system = "" if text == "none" else text
        self.note(f"system prompt: {self.talk.system or '(none)'}")

    def _adapter(self, state: str) -> None:
        if state not in ("", "on", "off"):
            raise SettingError(f"/adapter can't be {state!r}.", "Write /adapter on or /adapter off.")
        if self.adapter_dir is None:
            problem = "There is no adapter to switch: this is the base model alone."
            raise ModelError(problem, "Load one: /checkpoint NAME.")
        self.adapter_on = state == "on" if state else self.adapter_on
        self.note(self._voice())

    def _checkpoint(self, name: str) -> None:
        run = self.adapter_dir.parent if self.adapter_dir else outputs_dir(self.profile.name)
        known = checkpoints(run.parent if run.name == CHECKPOINTS else run)
        if not name:
            self.note("\n".join(f"{name}  {shown(folder)}" for name, folder in known.items()) or "(no checkpoints)")
            return
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"Did you mean {near[0]}?" if near else f"Choose among: {', '.join(known) or 'none yet'}."
            raise ModelError(f"There is no checkpoint {name}.", fix)
        self.use_adapter(known[name])
        self.note(self._voice())

    def _save(self, name: str) -> None:
        if not name:
            raise SettingError("/save needs a file name.", "Write /save conversation.json.")
        adapter = str(self.adapter_dir) if self.adapter_on else None
        count = self.talk.save(Path(name), TUNED, profile=self.profile.name, adapter=adapter)
        self.note(f"saved {count} messages to {name}")


# Where messages come from


def _typed() -> Iterator[str]:
    """Messages until Ctrl-D, edited by prompt_toolkit, which knows how wide Chinese characters are."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys)
    while True:
        try:
            line = session.prompt("you: ")
        except KeyboardInterrupt:  # Ctrl-C empties the line
            print("(/exit or Ctrl-D leaves)", flush=True)
            continue
        except EOFError:
            return
        yield line


def _piped(delimiter: str | None) -> Iterator[str]:
    """The lines of standard input; with a delimiter, what is between two lines that hold it alone."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if delimiter is None:
        yield from sys.stdin
        return
    message = ""
    for line in sys.stdin:
        if line.strip() == delimiter.strip():
            yield message
            message = ""
        else:
            message += line
    yield message
