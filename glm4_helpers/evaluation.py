"""Before/after scores on held-out rows: right answers with intervals, stop rate, loss, and what the base still knows.

glm4-nano's rows have answers that are right or wrong; the larger profiles' free text is judged by loss and stop rate.
Answers come from generation.py; figures are drawn in plots.py. Nothing here trains or chooses anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .callbacks import read_json
from .chat_format import IGNORE, TERMINATOR, encode, stop_ids
from .datasets import can_be_asked, profile_rows, split, to_messages
from .errors import DataError, ModelError
from .generation import Answer, answers, continuations
from .models import (
    adapter_off,
    base_folder,
    check_adapter,
    check_trained_model,
    check_weights,
    load_adapter,
    load_base_model,
    load_tokenizer,
    meta_model,
)
from .paths import RUN_FILE, TRAINING_FILE, home
from .profiles import Profile, get_profile, profile_names

SET_NAMES = ("unseen_rows", "unseen_entities", "unseen_phrasings", "second_turns")
SENTENCE_ENDS = "。！？\n，；"

FREE_TEXT_SET = "held_out_rows"
FREE_TEXT_ROWS = 200
"""How many held-out rows of free text are scored: a 9B on one GPU answers them in minutes, not hours."""

BASELINE_TERMINATOR = "<|user|>"
"""How the published chat models end an answer: with the next turn's role."""

Scores = dict[str, Any]


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
    terminator: str = TERMINATOR,
) -> SetScores:
    """Answer every row greedily and score it. Rows are as `to_messages` takes them, with `check` where an answer can be
    right; the loss expects `terminator` after each answer."""
    conversations = [to_messages(row, where=f"row {number}") for number, row in enumerate(rows, 1)]
    checked = all("check" in row for row in rows)
    given = _answers_by_length(model, tokenizer, conversations, batch_size, max_new_tokens, checked)
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
    loss = assistant_token_loss(model, tokenizer, conversations, batch_size, terminator)
    return SetScores(
        accuracy=accuracy(right) if checked else None,
        kinds={kind: accuracy(record["right"] for record in records if record["kind"] == kind) for kind in kinds},
        stop_rate=sum(answer.stopped for answer in given) / len(given),
        loss=loss,
        answers=records,
    )


def _answers_by_length(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    batch_size: int,
    max_new_tokens: int,
    checked: bool,
) -> list[Answer]:
    """Answers in order, a batch to rows of like length.

    Where answers are right or wrong (`checked`), rows with a short reference get a limit of 64 tokens, so that a base
    model, which goes on for a hundred or more, does not cost minutes: no right answer of theirs comes near it. Stop
    rates are within the limit.
    """
    references = [messages[-1]["content"] for messages in conversations]
    lengths = [len(ids) for ids in tokenizer(references, add_special_tokens=False)["input_ids"]]
    given: dict[int, Answer] = {}
    for long in (False, True):
        chosen = [index for index, length in enumerate(lengths) if (length > 48) == long]
        limit = min(64, max_new_tokens) if checked and not long else max_new_tokens
        wanted = [conversations[index][:-1] for index in chosen]  # without the reference answer
        given |= zip(chosen, answers(model, tokenizer, wanted, max_new_tokens=limit, batch_size=batch_size), strict=True)
    return [given[index] for index in range(len(conversations))]


@torch.no_grad()
def assistant_token_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    batch_size: int = 64,
    terminator: str = TERMINATOR,
) -> float:
    """Mean cross-entropy in nats over all assistant tokens (newline, content and end) of the conversations."""
    encoded = [encode(tokenizer, messages, terminator) for messages in conversations]
    encoded.sort(key=lambda item: len(item["labels"]))
    total, count = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        width = max(len(item["labels"]) for item in batch)
        ids = torch.tensor([item["input_ids"] + [tokenizer.pad_token_id] * (width - len(item["input_ids"])) for item in batch])
        labels = torch.tensor([item["labels"] + [IGNORE] * (width - len(item["labels"])) for item in batch])
        # Padding on the right is never looked back at, so no attention mask is needed.
        logits = model(input_ids=ids.to(model.device)).logits
        # Row by row: a whole batch in float32 would take gigabytes at GLM-4's vocabulary of 151,552.
        for row, wanted in zip(logits, labels.to(logits.device), strict=True):
            total += nn.functional.cross_entropy(
                row[:-1].float(), wanted[1:], ignore_index=IGNORE, reduction="sum"
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


def read_free_text(
    profile: Profile, tokenizer: PreTrainedTokenizerBase, count: int = FREE_TEXT_ROWS
) -> dict[str, list[dict[str, Any]]]:
    """At most `count` of the rows that training keeps out of this profile's data, as one set.

    The choice depends on the rows' own content, so that every run and machine scores the same ones. Rows that training
    would drop (too long, or without an answer) are left out. The training's dev loss is measured on these rows too.
    Raises DataError where the profile holds nothing out.
    """
    held_out = sorted(_held_out_messages(profile), key=_digest)
    limit = profile.training.max_length
    usable = (messages for messages in held_out if _is_kept(tokenizer, messages, limit))
    rows = [{"id": str(number), "messages": messages} for number, messages in zip(range(1, count + 1), usable)]
    if not rows:
        raise DataError(
            f"{profile.name} holds out no row with an answer of at most {limit} tokens.",
            "Raise dev_fraction or training.max_length.",
        )
    return {FREE_TEXT_SET: rows}


def _held_out_messages(profile: Profile) -> list[list[dict[str, str]]]:
    """The dev conversations, split off as training does it."""
    if profile.dev_data is not None:
        return profile_rows(profile, "dev_data")["messages"]
    if not profile.dev_fraction:
        raise DataError(f"{profile.name} holds no rows out.", "Train with dev_fraction=0.05, or give dev_data.")
    return split(profile_rows(profile, "train_data"), profile.dev_fraction, profile.training.seed)[1]["messages"]


def _digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    return hashlib.sha256("\n".join(f"{turn['role']}\n{turn['content']}" for turn in messages).encode()).digest()


def _is_kept(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], max_length: int) -> bool:
    """Whether training would keep the conversation, and its last answer can be asked for."""
    return can_be_asked(messages) and len(encode(tokenizer, messages)["input_ids"]) <= max_length


def scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Mapping[str, Sequence[Mapping[str, Any]]],
    batch_size: int = 64,
    max_new_tokens: int = 200,
    terminator: str = TERMINATOR,
) -> Scores:
    """All figures of one model, ready for JSON: every held-out set, and for checked rows cloze facts and plain
    questions too, which ask for the small world that those rows are about."""
    sets = {
        name: asdict(evaluate_rows(model, tokenizer, rows, batch_size, max_new_tokens, terminator))
        for name, rows in held_out.items()
    }
    if any(scored["accuracy"] is None for scored in sets.values()):
        return {"sets": sets}
    return {
        "sets": sets,
        "cloze": cloze_accuracy(model, tokenizer, read_plain("cloze"), batch_size),
        "plain_questions": plain_questions_accuracy(model, tokenizer, read_plain("questions"), batch_size),
    }


def before_after(
    profile: Profile,
    adapter_dir: Path,
    half: str = "test",
    batch_size: int | None = None,
    row_count: int = FREE_TEXT_ROWS,
    baseline: Path | None = None,
) -> dict[str, Any]:
    """The base model and the fine-tuned one on the same held-out rows; `baseline` is the folder of a third model.

    A profile with test data is scored in float32 on one half of it. One without (free text) is scored in its own
    dtype and quantization on `row_count` rows that training held out, and `half` is not used. Without LoRA
    `adapter_dir` is the folder of the trained model. `batch_size` None is the profile's for evaluation.

    Returns {"profile", "half", "before", "after"} and, where asked for, "baseline"; the last three as `scores` gives
    them, the baseline with its "name". Raises ModelError or DataError where weights, adapter or rows are absent.
    """
    batch_size = batch_size or profile.training.evaluation_batch_size
    tokenizer = load_tokenizer(profile)
    free_text = profile.test_data is None
    dtype, limit = (None, profile.training.max_length) if free_text else (torch.float32, 200)
    check_trained(profile, adapter_dir)
    held_out = read_free_text(_as_trained(profile, adapter_dir), tokenizer, row_count) if free_text else read_held_out(profile, half)

    def score(model: nn.Module) -> Scores:
        return scores(model, tokenizer, held_out, batch_size, limit, profile.terminator)

    before, after = score_both(profile, adapter_dir, dtype, score)
    result = {"profile": profile.name, "half": "held-out" if free_text else half, "before": before, "after": after}
    if baseline is not None:
        other = baseline_profile(profile, baseline)
        own = load_tokenizer(other)
        third = scores(load_base_model(other, dtype), own, held_out, batch_size, limit, _baseline_terminator(own))
        result["baseline"] = {"name": baseline.name, **third}
    return result


def check_trained(profile: Profile, trained: Path) -> None:
    """Absent weights and an unfit adapter are refused before the base model, which may take minutes, is loaded."""
    check_weights(base_folder(profile), profile)
    if profile.lora is None:
        check_trained_model(trained)
    else:
        check_adapter(meta_model(profile), trained, profile)


def _as_trained(profile: Profile, trained: Path) -> Profile:
    """The profile with the rows and the split of this very training: those that another holds out may be among its rows."""
    record = read_json(Path(trained) / TRAINING_FILE) or read_json(Path(trained).parent / RUN_FILE)
    if record is None:
        return profile
    settings = record["facts"]["profile"]
    return replace(
        profile,
        **{name: settings[name] for name in ("train_data", "dev_data", "dev_fraction")},
        training=replace(profile.training, seed=settings["training"]["seed"]),
    )


def score_both(
    profile: Profile, trained: Path, dtype: torch.dtype | None, score: Callable[[nn.Module], Scores]
) -> tuple[Scores, Scores]:
    """Scores of the base model and of the fine-tuned one. Never are two models in memory."""
    if profile.lora is None:
        tuned = replace(profile, base_model=str(Path(trained).resolve()))
        return score(load_base_model(profile, dtype)), score(load_base_model(tuned, dtype))
    model = load_adapter(load_base_model(profile, dtype), trained, profile)
    with adapter_off(model):
        before = score(model)
    return before, score(model)


def find_baseline(profile: Profile, name: str | None = None) -> Path | None:
    """The folder of a model to compare with: `name` is a folder, a name in weights/, or a profile.

    None means the chat model published beside the profile's base model (weights/glm-4-9b-chat-hf for
    weights/glm-4-9b-hf), if it is there. Raises ModelError for a name that leads to no model.
    """
    if name is None:
        beside = home() / f"{profile.base_model.removesuffix('-hf')}-chat-hf"
        return beside if (beside / "config.json").is_file() else None
    places = [Path(name).expanduser(), home() / "weights" / name]
    if name in profile_names():
        places.append(home() / get_profile(name).base_model)
    for place in places:
        if (place / "config.json").is_file():
            return place.resolve()
    raise ModelError(
        f"There is no model to compare with in {' or '.join(map(str, places[-2:]))}.",
        "Fetch it: python -m glm4_helpers download --profile glm-4-9b-lora --repository zai-org/glm-4-9b-chat-hf",
    )


def baseline_profile(profile: Profile, folder: Path) -> Profile:
    """The profile with another model: its own tokenizer and chat template, the same dtype and quantization."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or [profile.architecture])[0]
    return replace(profile, name=folder.name, base_model=str(folder.resolve()), architecture=architecture, lora=None)


def _baseline_terminator(tokenizer: PreTrainedTokenizerBase) -> str:
    stops = tokenizer.convert_ids_to_tokens(stop_ids(tokenizer))
    return BASELINE_TERMINATOR if BASELINE_TERMINATOR in stops else stops[0]


def format_table(result: Mapping[str, Any]) -> str:
    """The before/after table as plain text: percentages with 95 % intervals where answers are right or wrong."""
    sides = [result[side] for side in ("before", "after", "baseline") if side in result]
    titles = ["before", "after", *(side["name"] for side in sides[2:])]
    lines = [_line("", titles)]
    scored = [name for name, figures in sides[0]["sets"].items() if figures["accuracy"]]
    for name in scored:
        lines.append(_line(f"{name} (right)", [_percent(side["sets"][name]["accuracy"]) for side in sides]))
    for title, key in (("stop rate", "stop_rate"), ("loss per answer token", "loss")):
        lines.append(_line(title, [_overall(side["sets"], key) for side in sides]))
    if not scored:
        lines.append(_line("perplexity", [_overall(side["sets"], "perplexity") for side in sides]))
    for title, key in (("cloze facts", "cloze"), ("plain questions", "plain_questions")):
        if key in sides[0]:
            lines.append(_line(title, [_percent(side[key]["all"]) for side in sides]))
    return "\n".join([*lines, _rows_line(result, bool(scored))])


def _rows_line(result: Mapping[str, Any], scored: bool) -> str:
    rows = sum(len(figures["answers"]) for figures in result["before"]["sets"].values())
    if scored:
        return f"{rows} held-out rows of the {result['half']} half, answered through the chat format; [95 % interval]"
    return f"{rows} rows of free text that training held out, answered through the chat format"


def _line(title: str, cells: Sequence[str]) -> str:
    return f"{title:24}" + "".join(f"{cell:>26}" for cell in cells)


def _percent(figures: Mapping[str, float]) -> str:
    return f"{figures['accuracy']:.1%} [{figures['low']:.1%}, {figures['high']:.1%}]"


def _overall(sets: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """Stop rate, loss or perplexity over all sets, each weighted by its rows."""
    rows = {name: len(scored["answers"]) for name, scored in sets.items()}
    figure = "loss" if key == "perplexity" else key
    mean = sum(scored[figure] * rows[name] for name, scored in sets.items()) / sum(rows.values())
    if key == "perplexity":
        return f"{math.exp(mean):.2f}"
    return f"{mean:.1%}" if key == "stop_rate" else f"{mean:.3f}"
