"""Generates answers in batches, as a stream, or as plain continuations; GLM-4's stop ids end each of them.

Answers are judged in evaluation. The chats of the command line and the notebooks only call this module.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from numbers import Integral, Real
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .chat_format import prompt_ids
from .checks.chat_template import stop_ids
from .support.errors import SettingError

Message = Mapping[str, Any]
# transformers 5.24 renamed the argument of `generate` that takes keys and values computed before.
_NAMES = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"


def _require(name: str, value: Any, kind: Any, valid: Callable[[Any], bool], wanted: str) -> None:
    if not isinstance(value, kind) or not valid(value):
        raise SettingError(f"{name} can't be {value!r}.", f"Give {name} as {wanted}.")


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated: at most `max_new_tokens` tokens, greedy at temperature 0.

    `top_p` and `seed` matter only above temperature 0; without a seed every answer differs. The repetition penalty (1
    for none) applies to tokens of the answer, not of the prompt. Raises SettingError for a value out of range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 0.8
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        most = float("inf")
        checks = (
            ("max_new_tokens", Integral, lambda n: n >= 1, "a whole number from 1"),
            ("temperature", Real, lambda t: 0 <= t < most, "0 (greedy) or a positive number such as 0.6"),
            ("top_p", Real, lambda p: 0 < p <= 1, "a number above 0 and up to 1"),
            ("repetition_penalty", Real, lambda r: 0 < r < most, "a number above 0; 1 is none"),
            (
                "seed",
                Integral | None,
                lambda s: s is None or 0 <= s < 2**32,
                "None or a whole number from 0, below 2**32",
            ),
        )
        for name, kind, valid, wanted in checks:
            _require(name, getattr(self, name), kind, valid, wanted)


@dataclass(frozen=True)
class Answer:
    """An answer's text without its leading newline and stop token, whether a stop id ended it, and its token count.

    Shown in 06, 6.1.
    """

    text: str
    stopped: bool
    token_count: int


@dataclass
class Past:
    """What a model computed for the tokens `ids` of a conversation, so that its next answer need not do it again."""

    ids: list[int] = field(default_factory=list)
    cache: DynamicCache = field(default_factory=DynamicCache)

    def up_to(self, prompt: Sequence[int]) -> DynamicCache:
        """The keys and values of the tokens with which `prompt` begins, too; at least its last token is left over."""
        pairs = enumerate(zip(self.ids, prompt[:-1]))
        common = next((place for place, (old, new) in pairs if old != new), min(len(self.ids), len(prompt) - 1))
        if not common:
            self.cache = DynamicCache()
        elif common < len(self.ids):
            self.cache.crop(common - len(self.ids))
        self.ids = self.ids[:common]
        return self.cache


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int | None = None,
    sampling: Sampling = Sampling(),
    batch_size: int = 64,
) -> list[Answer]:
    """The next answer of each conversation, in order: greedy, or as `sampling` says.

    `max_new_tokens` overrides that of `sampling`. Greedy answers in float32 do not depend on `batch_size`; sampled ones
    do, even with a seed. Raises SettingError for settings out of range and DataError for a conversation with nothing to
    answer.
    Shown in 01, 1.4.
    """
    sampling = sampling if max_new_tokens is None else replace(sampling, max_new_tokens=max_new_tokens)
    stops = stop_ids(tokenizer)
    prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
    new = _in_batches(model, tokenizer, prompts, sampling, stops, batch_size)
    return [_answer(tokenizer, ids, stops) for ids in new]


def continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_new_tokens: int = 50,
    stop_at: str = "\n",
    batch_size: int = 64,
) -> list[str]:
    """What a model writes after each text, greedily, up to `stop_at` or a stop id; `[gMASK]<sop>` precedes the text.

    It asks a base model what it knows without the chat format. Raises SettingError for settings out of range.
    Shown in 02, 2.3.
    """
    sampling = Sampling(max_new_tokens)
    if not texts:
        return []
    ends = tokenizer(stop_at, add_special_tokens=False)["input_ids"] if stop_at else []
    stops = stop_ids(tokenizer)
    # Only a one-token ending can end the generation itself; a longer one is cut from the text below.
    stops_and_end = stops + (ends if len(ends) == 1 else [])
    prompts = tokenizer(list(texts), split_special_tokens=True)["input_ids"]
    new = _in_batches(model, tokenizer, prompts, sampling, stops_and_end, batch_size)
    written = ["".join(_pieces(tokenizer, ids[: _end(ids, stops_and_end)])) for ids in new]
    return [text.split(stop_at, 1)[0] if stop_at else text for text in written]


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    max_new_tokens: int | None = None,
    sampling: Sampling = Sampling(),
    stop_event: Event | None = None,
    past: Past | None = None,
) -> Generator[str, None, Answer]:
    """The pieces of one answer as they are generated; joined they are the text that `answers` gives.

    The generator returns the Answer: the one that `answers` gives, or what there was when it was stopped. The model
    runs in another thread. Setting `stop_event` from any thread ends the answer at the next token, and so does closing
    the iterator. The thread ends with the iterator, which raises the thread's errors. `past` of the same conversation
    and model saves the time for its earlier tokens, and is brought up to this answer. Settings and messages are checked
    at the call, before the first piece; they raise what `answers` raises.
    """
    sampling = sampling if max_new_tokens is None else replace(sampling, max_new_tokens=max_new_tokens)
    return _stream(model, tokenizer, prompt_ids(tokenizer, messages), sampling, stop_event, past or Past())


def fit_history(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_tokens: int
) -> tuple[list[Message], int]:
    """The conversation cut to `max_tokens` prompt tokens, and the number of turns (question and answer) dropped.

    The oldest turns are dropped first; system messages at the start and the last user turn stay. Raises SettingError
    where these alone are too long.
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


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, sampling: Sampling, stops: Sequence[int]
) -> GenerationConfig:
    """Settings that name every sampling value: one left unset would come from the model's own file."""
    drawn = {"do_sample": True, "temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "top_k": 0}
    greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=list(stops),
        pad_token_id=tokenizer.pad_token_id,
        **(drawn if sampling.temperature > 0 else greedy),
    )


@contextmanager
def _answering(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Switch dropout off and set the seed, if any; restore training mode and random state afterwards."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
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
    sampling: Sampling,
    stops: Sequence[int],
    batch_size: int,
) -> list[list[int]]:
    """New ids for each prompt, in order; prompts of similar length share a batch, which keeps padding short."""
    _require("batch_size", batch_size, Integral, lambda n: n >= 1, "a whole number from 1")
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    new: list[list[int]] = [[] for _ in prompts]
    with _answering(model, sampling.seed):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = _generate(model, tokenizer, [prompts[index] for index in chosen], sampling, stops)
            for index, ids in zip(chosen, rows.tolist()):
                new[index] = ids
    return new


def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    stops: Sequence[int],
    **options: Any,
) -> torch.Tensor:
    """New ids, shape (prompts, at most max_new_tokens); rows that stopped early end in padding."""
    length = max(map(len, prompts))
    input_ids = [[tokenizer.pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts]
    attention_mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    # On the prompt the penalty would count padding, and stop ids such as `<|user|>`.
    penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty), length)
    output = model.generate(
        input_ids=torch.tensor(input_ids, device=model.device),
        attention_mask=torch.tensor(attention_mask, device=model.device),
        generation_config=_generation_config(tokenizer, sampling, stops),
        logits_processor=LogitsProcessorList([] if sampling.repetition_penalty == 1 else [penalty]),
        **options,
    )
    return output[:, length:]


def _answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> Answer:
    end = _end(ids, stops)
    return Answer("".join(_pieces(tokenizer, ids[:end])).removeprefix("\n"), end < len(ids), end)


def _end(ids: Sequence[int], stops: Sequence[int]) -> int:
    """The index of the first stop id, or the length where there is none."""
    return next((place for place, token in enumerate(ids) if token in stops), len(ids))


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come. Bytes wait until their character is complete; incomplete ones come at the end.

    Control tokens stay visible: an answer should not contain any. The tokenizers library's DecodeStream raises where
    broken bytes follow a character of several byte tokens, as glm4-nano writes its rare ones.
    """
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        if text and not text.endswith("\ufffd"):
            yield text
            waiting.clear()
    if waiting:
        yield tokenizer.decode(waiting, clean_up_tokenization_spaces=False)


# Streaming


class _EachToken(StoppingCriteria):
    """Hands each new id to a function, and ends the answer once one of the events is set."""

    def __init__(self, give: Callable[[int], None], *events: Event) -> None:
        self.give = give
        self.events = events

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """`input_ids` has shape (1, length so far); gives one bool, shape (1,)."""
        self.give(int(input_ids[0, -1]))
        asked = any(event.is_set() for event in self.events)
        return torch.full((1,), asked, dtype=torch.bool, device=input_ids.device)


def _stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sampling: Sampling,
    stop_event: Event | None,
    past: Past,
) -> Generator[str, None, Answer]:
    queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
    closed, stops = Event(), stop_ids(tokenizer)
    criteria = StoppingCriteriaList([_EachToken(queue.put, closed, stop_event or closed)])
    ids: list[int] = []

    def work() -> None:
        try:
            with _answering(model, sampling.seed):
                options = {"stopping_criteria": criteria, CACHE: past.up_to(prompt)}
                past.ids = []  # an error leaves a cache of unknown length
                new = _generate(model, tokenizer, [prompt], sampling, stops, **options)
                past.ids = prompt + new[0].tolist()[:-1]  # the last token was never read
            queue.put(None)
        except BaseException as error:  # raised for the consumer below
            queue.put(error)

    def arriving() -> Iterator[int]:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            ids.append(item)
            if item not in stops:
                yield item

    thread = Thread(target=work, name="answer", daemon=True)
    thread.start()
    try:
        begun = False
        for piece in _pieces(tokenizer, arriving()):
            # The format puts a newline in front of every answer.
            if shown := piece if begun else piece.removeprefix("\n"):
                yield shown
            begun = True
        return _answer(tokenizer, ids, stops)
    finally:
        closed.set()
        thread.join()


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
