"""Answers from a model: in batches, streamed, or as plain continuations, each ended by GLM-4's stop ids.

What an answer is worth is judged in evaluation; the chat on the command line and in notebooks only calls this.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .chat_format import prompt_ids, stop_ids
from .errors import SettingError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """One answer: its text without the leading newline and the stop token, whether a stop id ended it, its tokens."""

    text: str
    stopped: bool
    token_count: int


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 0.8,
    repetition_penalty: float = 1.0,
    batch_size: int = 64,
    seed: int | None = None,
) -> list[Answer]:
    """The next answer in each conversation, in their order. Temperature 0 is greedy.

    Greedy answers in float32 do not depend on `batch_size`; sampled ones do, even with a `seed`. The repetition
    penalty counts the answer's own tokens only. Raises SettingError for settings out of range and DataError for
    conversations with nothing to answer.
    """
    check_settings(max_new_tokens, temperature, top_p, repetition_penalty, batch_size)
    settings = (max_new_tokens, temperature, top_p, repetition_penalty)
    stops = stop_ids(tokenizer)
    prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
    with _random(seed, model.device):
        new = _in_batches(model, tokenizer, prompts, settings, stops, batch_size)
    return [_answer(tokenizer, ids, stops) for ids in new]


def continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_new_tokens: int = 50,
    stop_at: str = "\n",
    batch_size: int = 64,
) -> list[str]:
    """What a base model writes after each text (`[gMASK]<sop>` in front), greedily, up to `stop_at` or a stop id.

    This asks a base model what it knows without the chat format. Raises SettingError for settings out of range.
    """
    check_settings(max_new_tokens, 0.0, 1.0, 1.0, batch_size)
    if not texts:
        return []
    ends = tokenizer(stop_at, add_special_tokens=False)["input_ids"] if stop_at else []
    stops = stop_ids(tokenizer)
    # Only a one-token ending can end the generation itself; a longer one is cut from the text below.
    stops_and_end = stops + (ends if len(ends) == 1 else [])
    prompts = tokenizer(list(texts), split_special_tokens=True)["input_ids"]
    new = _in_batches(model, tokenizer, prompts, (max_new_tokens, 0.0, 1.0, 1.0), stops_and_end, batch_size)
    written = [_decode(tokenizer, ids[: _end(ids, stops_and_end)]) for ids in new]
    return [text.split(stop_at, 1)[0] if stop_at else text for text in written]


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 0.8,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_event: Event | None = None,
) -> Generator[str, None, Answer]:
    """The pieces of one answer as they are written; joined they are the text that `answers` gives.

    The generator's return value is the Answer: the one that `answers` gives, or what there was when it was stopped.
    The model runs in a thread of its own. Setting `stop_event`, from any thread, ends the answer at the next token;
    so does closing the iterator. The thread is over when the iterator is, and its errors are raised here. Settings
    and messages are checked at the call, before the first piece is asked for.
    """
    check_settings(max_new_tokens, temperature, top_p, repetition_penalty)
    prompt = prompt_ids(tokenizer, messages)
    settings = (max_new_tokens, temperature, top_p, repetition_penalty)
    return _stream(model, tokenizer, prompt, settings, seed, stop_event)


def fit_history(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_tokens: int
) -> tuple[list[Message], int]:
    """The conversation cut to `max_tokens` prompt tokens, and how many turns (a question with its answer) were dropped.

    The oldest turns go first; system messages at the start and the last user turn stay. Raises SettingError where
    these alone are too long.
    """
    system, turns = _turns(messages)
    for dropped in range(len(turns)):
        kept = system + [message for turn in turns[dropped:] for message in turn]
        length = len(prompt_ids(tokenizer, kept))
        if length <= max_tokens:
            return kept, dropped
    raise SettingError(
        f"The last message{' with the system prompt' if system else ''} is {length:,} tokens long; {max_tokens:,} fit.",
        f"Shorten the message{' or the system prompt' if system else ''}, or lower the number of new tokens.",
    )


# Settings


def check_settings(
    max_new_tokens: int, temperature: float, top_p: float, repetition_penalty: float, batch_size: int = 1
) -> None:
    """Raise SettingError, naming the setting, for one that is out of range."""
    checks = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "a whole number from 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or a positive number such as 0.6"),
        ("top_p", top_p, 0 < top_p <= 1, "a number above 0 and up to 1"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "a number above 0; 1 is none"),
        ("batch_size", batch_size, batch_size >= 1, "a whole number from 1"),
    )
    for name, value, valid, wanted in checks:
        if not valid:
            raise SettingError(f"{name} can't be {value}.", f"Give {name} as {wanted}.")


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float, top_p: float, stops: Sequence[int]
) -> GenerationConfig:
    """Settings that name every sampling value: what stays unset would be taken from the model's own file."""
    sampling = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
    greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=list(stops),
        pad_token_id=tokenizer.pad_token_id,
        **(sampling if temperature > 0 else greedy),
    )


def _penalty(repetition_penalty: float, prompt_length: int) -> LogitsProcessorList:
    """The penalty on the answer's own tokens. On the prompt it would count padding, and stop ids such as `<|user|>`."""
    if repetition_penalty == 1:
        return LogitsProcessorList()
    return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(repetition_penalty), prompt_length)])


@contextmanager
def _random(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeded inside, and the random state outside left alone; without a seed nothing happens."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; a model that was training goes on training afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# Batches


def _in_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    settings: tuple[int, float, float, float],
    stops: Sequence[int],
    batch_size: int,
) -> list[list[int]]:
    """New ids for each prompt, in order; prompts of like length share a batch, so little is spent on padding."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    new: list[list[int]] = [[] for _ in prompts]
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = _generate(model, tokenizer, [prompts[index] for index in chosen], settings, stops)
            for index, ids in zip(chosen, rows.tolist()):
                new[index] = ids
    return new


def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    settings: tuple[int, float, float, float],
    stops: Sequence[int],
    **options: Any,
) -> torch.Tensor:
    """New ids, shape (prompts, at most max_new_tokens); rows that stopped early end in padding."""
    max_new_tokens, temperature, top_p, repetition_penalty = settings
    length = max(map(len, prompts))
    input_ids = [[tokenizer.pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts]
    attention_mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids=torch.tensor(input_ids, device=model.device),
        attention_mask=torch.tensor(attention_mask, device=model.device),
        generation_config=_generation_config(tokenizer, max_new_tokens, temperature, top_p, stops),
        logits_processor=_penalty(repetition_penalty, length),
        **options,
    )
    return output[:, length:]


def _answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> Answer:
    end = _end(ids, stops)
    return Answer(_decode(tokenizer, ids[:end]).removeprefix("\n"), end < len(ids), end)


def _end(ids: Sequence[int], stops: Sequence[int]) -> int:
    """Where the first stop id stands, or the length where none does."""
    return next((place for place, token in enumerate(ids) if token in stops), len(ids))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of new ids, piece by piece as in streaming. Control tokens stay visible: an answer should not hold any."""
    pieces = _Pieces(tokenizer)
    return "".join(pieces.add(token) for token in ids) + pieces.rest()


# Streaming


class _Pieces:
    """Text of ids as they come; bytes of an unfinished character are held back until it is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []
        self.given = 0

    def add(self, token: int) -> str:
        """The text that this id completes, often one character, sometimes none."""
        self.pending.append(token)
        text = self._text()
        whole = text.rstrip("\ufffd")
        # UTF-8 needs at most three bytes before the one that completes a character: four are not a beginning.
        if len(text) - len(whole) >= 4:
            return self.rest()
        piece, self.given = whole[self.given :], max(self.given, len(whole))
        if whole == text:
            self.pending, self.given = [], 0
        return piece

    def rest(self) -> str:
        """What was held back, with replacement characters where it never became whole."""
        piece = self._text()[self.given :] if self.pending else ""
        self.pending, self.given = [], 0
        return piece

    def _text(self) -> str:
        return self.tokenizer.decode(self.pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class _QueueStreamer(BaseStreamer):
    """Hands each new id to a function; the prompt, which `generate` puts first, is left out."""

    def __init__(self, give: Callable[[int], None]) -> None:
        self.give = give
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.give(int(value.reshape(-1)[0]))
        self.prompt_seen = True

    def end(self) -> None:
        """The worker announces the end itself, so that errors count as one too."""


class _StopWhenAsked(StoppingCriteria):
    def __init__(self, *events: Event) -> None:
        self.events = events

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """A bool for each row, shape (batch,): all True once any of the events is set."""
        asked = any(event.is_set() for event in self.events)
        return torch.full((input_ids.shape[0],), asked, dtype=torch.bool, device=input_ids.device)


def _stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    settings: tuple[int, float, float, float],
    seed: int | None,
    stop_event: Event | None,
) -> Generator[str, None, Answer]:
    queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
    closed = Event()
    asked = _StopWhenAsked(closed, stop_event or closed)
    options = {"streamer": _QueueStreamer(queue.put), "stopping_criteria": StoppingCriteriaList([asked])}

    def work() -> None:
        try:
            with _evaluating(model), _random(seed, model.device):
                _generate(model, tokenizer, [prompt], settings, stop_ids(tokenizer), **options)
            queue.put(None)
        except BaseException as error:  # it belongs to the consumer, who is told below
            queue.put(error)

    thread = Thread(target=work, name="answer", daemon=True)
    thread.start()
    try:
        return (yield from _texts(tokenizer, queue))
    finally:
        closed.set()
        thread.join()


def _texts(
    tokenizer: PreTrainedTokenizerBase, queue: SimpleQueue[int | BaseException | None]
) -> Generator[str, None, Answer]:
    """Pieces of text from the queue of ids until its end (None), without the leading newline and the stop id."""
    pieces, stops = _Pieces(tokenizer), stop_ids(tokenizer)
    text, count, stopped = "", 0, False
    while (item := queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        stopped = item in stops
        count += not stopped
        piece = pieces.rest() if stopped else pieces.add(item)
        if shown := _without_newline(piece, text):
            yield shown
        text += piece
    if shown := _without_newline(rest := pieces.rest(), text):
        yield shown
    return Answer((text + rest).removeprefix("\n"), stopped, count)


def _without_newline(piece: str, before: str) -> str:
    """The piece, without the newline that the format puts in front of an answer when it is the first one."""
    return piece if before else piece.removeprefix("\n")


# Histories


def _turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """System messages at the start, then the turns: each a user message with all that follows it."""
    first = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns: list[list[Message]] = []
    for message in messages[first:]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return list(messages[:first]), turns or [[]]
