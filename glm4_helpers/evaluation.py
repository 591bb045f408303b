"""Before/after scores on held-out rows: right answers with intervals, stop rate, loss, and what the base still knows.

Answers come from generation.py; figures are drawn in plots.py. Nothing here trains or chooses anything.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .chat_format import IGNORE, encode
from .datasets import to_messages
from .errors import DataError
from .generation import Answer, answers, continuations
from .models import adapter_off, load_adapter, load_base_model, load_tokenizer
from .paths import home
from .profiles import Profile

SET_NAMES = ("unseen_rows", "unseen_entities", "unseen_phrasings", "second_turns")
SENTENCE_ENDS = "。！？\n，；"


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of all, with a 95 % interval; fractions from 0 to 1."""

    right: int
    total: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class SetScores:
    """One held-out set: accuracy over all and per kind, part of the answers that stopped, loss per assistant token,
    and every answer as it was given. `accuracy` is None for free text, which is judged by loss and stop rate only."""

    accuracy: Accuracy | None
    kinds: dict[str, Accuracy]
    stop_rate: float
    loss: float
    answers: tuple[dict[str, Any], ...]


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a fraction (Wilson 1927, J. Am. Stat. Assoc. 22:209); z is 1.96 for 95 %."""
    if total == 0:
        return 0.0, 1.0
    fraction = right / total
    centre = fraction + z * z / (2 * total)
    spread = z * math.sqrt(fraction * (1 - fraction) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def accuracy(right: Iterable[bool]) -> Accuracy:
    """Count booleans into an Accuracy."""
    values = list(right)
    hits = sum(values)
    low, high = wilson_interval(hits, len(values))
    return Accuracy(hits, len(values), hits / len(values) if values else 0.0, low, high)


def normalised(text: str) -> str:
    """Text as it is compared: Unicode NFKC (full-width forms become plain ones), without space at its ends."""
    return unicodedata.normalize("NFKC", text).strip()


def check_answer(check: Mapping[str, Any], text: str) -> bool:
    """Whether the whole answer passes its row's check: `exact`, `one_of`, or N `distinct_of` a set.

    Raises DataError for a check of another type.
    """
    given = normalised(text)
    if check["type"] in ("exact", "one_of"):
        return given in {normalised(answer) for answer in check["answers"]}
    if check["type"] == "distinct_of":
        return _is_list_of(check, given)
    raise DataError(
        f"A held-out row has a check of the unknown type {check['type']!r}.", "Use exact, one_of or distinct_of."
    )


def _is_list_of(check: Mapping[str, Any], given: str) -> bool:
    prefix, suffix = normalised(check["prefix"]), normalised(check["suffix"])
    if not (given.startswith(prefix) and given.endswith(suffix)):
        return False
    inner = given[len(prefix) : len(given) - len(suffix)]
    items = [normalised(item) for item in inner.split(normalised(check["separator"]))]
    members = {normalised(member) for member in check["members"]}
    return len(items) == check["count"] == len(set(items)) and members.issuperset(items)


def is_right(row: Mapping[str, Any], answer: Answer) -> bool:
    """A right answer passes the row's check as a whole and ended with a stop id within the limit."""
    return answer.stopped and check_answer(row["check"], answer.text)


def evaluate_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 64,
    max_new_tokens: int = 200,
) -> SetScores:
    """Answer every row greedily and score it. Rows are Alpaca rows, with `check` where an answer can be right."""
    conversations = [to_messages(row, where=f"row {number}") for number, row in enumerate(rows, 1)]
    given = _answers_by_length(model, tokenizer, rows, conversations, batch_size, max_new_tokens)
    checked = all("check" in row for row in rows)
    right = [is_right(row, answer) if checked else None for row, answer in zip(rows, given, strict=True)]
    records = tuple(
        {
            "id": row.get("id", str(number)),
            "kind": row.get("kind", ""),
            "answer": answer.text,
            "stopped": answer.stopped,
            "right": hit,
        }
        for number, (row, answer, hit) in enumerate(zip(rows, given, right, strict=True), 1)
    )
    kinds = sorted({row["kind"] for row in rows}) if checked else []
    return SetScores(
        accuracy=accuracy(right) if checked else None,
        kinds={kind: accuracy(record["right"] for record in records if record["kind"] == kind) for kind in kinds},
        stop_rate=sum(answer.stopped for answer in given) / len(given),
        loss=assistant_token_loss(model, tokenizer, conversations, batch_size),
        answers=records,
    )


def _answers_by_length(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    conversations: Sequence[Sequence[Mapping[str, str]]],
    batch_size: int,
    max_new_tokens: int,
) -> list[Answer]:
    """Answers in order; rows with a short reference get a limit of 64 tokens, so that a base model, which never
    stops, does not cost minutes. No right answer of theirs comes near it."""
    lengths = [len(tokenizer(row["output"], add_special_tokens=False)["input_ids"]) for row in rows]
    given: dict[int, Answer] = {}
    for long in (False, True):
        chosen = [index for index, length in enumerate(lengths) if (length > 48) == long]
        limit = max_new_tokens if long else min(64, max_new_tokens)
        wanted = [conversations[index][:-1] for index in chosen]  # without the reference answer
        given |= zip(chosen, answers(model, tokenizer, wanted, max_new_tokens=limit, batch_size=batch_size), strict=True)
    return [given[index] for index in range(len(rows))]


@torch.no_grad()
def assistant_token_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    batch_size: int = 64,
) -> float:
    """Mean cross-entropy in nats over all assistant tokens (newline, content and end) of the conversations."""
    encoded = sorted((encode(tokenizer, messages) for messages in conversations), key=lambda item: len(item["labels"]))
    total, count = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        width = max(len(item["labels"]) for item in batch)
        ids = torch.tensor([item["input_ids"] + [tokenizer.pad_token_id] * (width - len(item["input_ids"])) for item in batch])
        labels = torch.tensor([item["labels"] + [IGNORE] * (width - len(item["labels"])) for item in batch])
        logits = model(input_ids=ids.to(model.device)).logits.float()
        # Padding on the right is never looked back at, so no attention mask is needed.
        total += nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=IGNORE, reduction="sum"
        ).item()
        count += int((labels[:, 1:] != IGNORE).sum())
    return total / count


def cloze_accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Mapping[str, Any]], batch_size: int = 64
) -> dict[str, Any]:
    """What a model knows as plain text: greedy continuations of unfinished sentences.

    A continuation is right when it begins with an answer and a sentence end follows. Returns `{"all": Accuracy as a
    dict, "kinds": {...}}`.
    """
    written = continuations(model, tokenizer, [fact["prompt"] for fact in facts], 24, "", batch_size)
    return _by_kind(facts, [_begins_with(text, fact["answers"]) for text, fact in zip(written, facts, strict=True)])


def plain_questions_accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Mapping[str, Any]], batch_size: int = 64
) -> dict[str, Any]:
    """Plain question and answer text (no chat format): right when the line that follows is an answer as a whole."""
    written = continuations(model, tokenizer, [item["prompt"] for item in questions], 64, "\n", batch_size)
    right = [
        normalised(text) in {normalised(answer) for answer in item["answers"]}
        for text, item in zip(written, questions, strict=True)
    ]
    return _by_kind(questions, right)


def _begins_with(text: str, accepted: Sequence[str]) -> bool:
    return any(text.startswith(answer) and text[len(answer) : len(answer) + 1] in SENTENCE_ENDS for answer in accepted)


def _by_kind(items: Sequence[Mapping[str, Any]], right: Sequence[bool]) -> dict[str, Any]:
    kinds = sorted({item["kind"] for item in items})
    return {
        "all": asdict(accuracy(right)),
        "kinds": {
            kind: asdict(accuracy(hit for item, hit in zip(items, right, strict=True) if item["kind"] == kind))
            for kind in kinds
        },
    }


def read_held_out(profile: Profile, half: str) -> dict[str, list[dict[str, Any]]]:
    """The held-out sets of one half ("dev" or "test") by name. Raises DataError for one that is absent or damaged."""
    folder = home() / str(profile.dev_data if half == "dev" else profile.test_data)
    return {name: _read_checked(folder / f"{name}.json") for name in SET_NAMES}


def read_plain(name: str) -> list[dict[str, Any]]:
    """The plain-text items of data/cloze.json or data/questions.json."""
    return _read_checked(home() / "data" / f"{name}.json")


def _read_checked(path: Path) -> list[dict[str, Any]]:
    fix = "Restore it (git checkout -- data) or make it again: python -m glm4_helpers nano data"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is not there.", fix) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}", fix) from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no rows.", fix)
    return rows


def scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Mapping[str, Sequence[Mapping[str, Any]]],
    batch_size: int = 64,
) -> dict[str, Any]:
    """All figures of one model: every held-out set, cloze facts and plain questions; ready for JSON."""
    return {
        "sets": {name: asdict(evaluate_rows(model, tokenizer, rows, batch_size)) for name, rows in held_out.items()},
        "cloze": cloze_accuracy(model, tokenizer, read_plain("cloze"), batch_size),
        "plain_questions": plain_questions_accuracy(model, tokenizer, read_plain("questions"), batch_size),
    }


def before_after(profile: Profile, adapter_dir: Path, half: str = "test", batch_size: int = 64) -> dict[str, Any]:
    """The base model and the fine-tuned model on the same held-out rows, in float32, from one set of weights.

    Returns {"profile", "half", "before", "after"}, the last two as `scores` gives them. Raises ModelError or DataError
    where weights, adapter or rows are absent.
    """
    held_out = read_held_out(profile, half)
    tokenizer = load_tokenizer(profile)
    model = load_adapter(load_base_model(profile, torch.float32), adapter_dir, profile)
    with adapter_off(model):
        before = scores(model, tokenizer, held_out, batch_size)
    return {"profile": profile.name, "half": half, "before": before, "after": scores(model, tokenizer, held_out, batch_size)}


def format_table(result: Mapping[str, Any]) -> str:
    """The before/after table as plain text: percentages with 95 % intervals."""
    lines = [f"{'':24}{'before':>26}{'after':>26}"]
    before, after = result["before"], result["after"]
    for name in before["sets"]:
        cells = [_percent(side["sets"][name]["accuracy"]) for side in (before, after)]
        lines.append(_line(f"{name} (right)", cells))
    for title, key in (("stop rate", "stop_rate"), ("loss per answer token", "loss")):
        lines.append(_line(title, [_overall(side["sets"], key) for side in (before, after)]))
    for title, key in (("cloze facts", "cloze"), ("plain questions", "plain_questions")):
        lines.append(_line(title, [_percent(side[key]["all"]) for side in (before, after)]))
    rows = sum(scored["accuracy"]["total"] for scored in before["sets"].values())
    lines.append(f"{rows} held-out rows of the {result['half']} half, answered through the chat format; [95 % interval]")
    return "\n".join(lines)


def _line(title: str, cells: Sequence[str]) -> str:
    return f"{title:24}" + "".join(f"{cell:>26}" for cell in cells)


def _percent(figures: Mapping[str, float]) -> str:
    return f"{figures['accuracy']:.1%} [{figures['low']:.1%}, {figures['high']:.1%}]"


def _overall(sets: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """Stop rate or loss over all sets, each weighted by its rows."""
    rows = {name: len(scored["answers"]) for name, scored in sets.items()}
    mean = sum(scored[key] * rows[name] for name, scored in sets.items()) / sum(rows.values())
    return f"{mean:.1%}" if key == "stop_rate" else f"{mean:.3f}"
