"""Before/after scores on held-out rows: right answers with intervals, stop rate, loss, and what the base still knows.

Rows with a check have answers that are right or wrong; free text is judged by loss, stop rate and exact match. Answers
come from generation; figures are drawn in plots. Nothing here trains or chooses anything.
"""

from __future__ import annotations

import gc
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .chat_format import IGNORE, encode, prompt_ids
from .checks.adapters import check_adapter, check_trained_model
from .checks.chat_template import TERMINATOR, stop_ids
from .checks.shapes import meta_model
from .checks.weights import base_folder, check_weights, read_required_json
from .data import to_messages
from .generation import Answer, answers, continuations
from .held_out import FREE_TEXT_ROWS, SET_NAMES, read_free_text, read_held_out, read_plain, training_overlap
from .models import adapter_off, load_adapter, load_base_model, load_tokenizer
from .profiles import Profile, get_profile, profile_names
from .runs.provenance import as_trained
from .support.errors import DataError, ModelError
from .support.paths import home

SENTENCE_ENDS = "。！？\n，；"
BASELINE_TERMINATOR = "<|user|>"
"""How the published chat models end an answer: with the next turn's role."""


@dataclass(frozen=True)
class Rate:
    """`right` out of `total`: answers, stops or any other count."""

    right: int
    total: int

    @classmethod
    def of(cls, hits: Iterable[bool]) -> Rate:
        """Count booleans."""
        values = list(hits)
        return cls(sum(values), len(values))

    @property
    def value(self) -> float:
        """The fraction, from 0 to 1; 0 where there is nothing to count."""
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the fraction, by Wilson."""
        return wilson_interval(self.right, self.total)

    def as_dict(self) -> dict[str, float]:
        """Right, total, accuracy, low and high, as figures and JSON hold it."""
        low, high = self.interval
        return {"right": self.right, "total": self.total, "accuracy": self.value, "low": low, "high": high}

    def __str__(self) -> str:
        return _percent(self.as_dict())


@dataclass(frozen=True)
class SetScores:
    """One held-out set.

    `accuracy` counts the rows with a check, over all and in `kinds`; `exact` the rows without one, whose whole answer
    has to be the row's own. Either is None where the set has no such rows. `stop_rate` is the fraction of answers that
    ended by themselves, `loss` is in nats per assistant token, `answers` holds each answer as it was given.
    """

    accuracy: Rate | None
    exact: Rate | None
    kinds: dict[str, Rate]
    stop_rate: float
    loss: float
    answers: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON holds them."""
        rates = {"accuracy": self.accuracy and self.accuracy.as_dict(), "exact": self.exact and self.exact.as_dict()}
        kinds = {kind: rate.as_dict() for kind, rate in self.kinds.items()}
        return {**rates, "kinds": kinds, "stop_rate": self.stop_rate, "loss": self.loss, "answers": self.answers}


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a fraction (Wilson 1927, J. Am. Stat. Assoc. 22:209); z is 1.96 for 95 %."""
    if total == 0:
        return 0.0, 1.0
    fraction = right / total
    centre = fraction + z * z / (2 * total)
    spread = z * math.sqrt(fraction * (1 - fraction) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_test(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """McNemar's exact test of two models on the same rows (McNemar 1947, Psychometrika 12:153).

    Only rows on which the two differ tell them apart: those `gained` and those `lost`. `p_value` is how often a fair
    coin, thrown for each of them, is at least as far from half and half. Returns the three. Raises DataError for rows
    that are neither right nor wrong.
    """
    pairs = Counter(zip(before, after, strict=True))
    if any(None in pair for pair in pairs):
        raise DataError("Rows without a check are neither right nor wrong.", "Leave them out, or compare `exact`.")
    gained, lost = pairs[False, True], pairs[True, False]
    tail = sum(math.comb(gained + lost, heads) for heads in range(min(gained, lost) + 1))
    return {"gained": gained, "lost": lost, "p_value": min(1.0, 2 * tail / 2 ** (gained + lost))}


def wording_bootstrap(
    values: Sequence[float], wordings: Sequence[Hashable], draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a mean over rows whose wordings are a sample: whole wordings are drawn again, not rows.

    Rows of one wording are right or wrong together, so an interval that counts rows is too narrow for other wordings.
    `values` are 0 or 1 for each row, or differences between two models; `wordings` tells which wording the row has.
    Equal seeds give equal intervals. Raises DataError for fewer than two wordings.
    """
    places = {wording: place for place, wording in enumerate(dict.fromkeys(wordings))}
    if len(places) < 2:
        raise DataError("All rows have the same wording.", "Give rows of several wordings; one can't be drawn from.")
    sums, rows = np.zeros(len(places)), np.zeros(len(places))
    for value, wording in zip(values, wordings, strict=True):
        sums[places[wording]] += value
        rows[places[wording]] += 1
    drawn = np.random.default_rng(seed).integers(len(places), size=(draws, len(places)))
    means = sums[drawn].sum(axis=1) / rows[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


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
    """A right answer passes the row's check as a whole and ended with a stop id within the limit. Shown in 06, 6.1."""
    return answer.stopped and check_answer(row["check"], answer.text)


def evaluate_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
    max_new_tokens: int = 200,
    terminator: str = TERMINATOR,
    answer_batch_size: int = 32,
) -> SetScores:
    """Answer every row greedily and score it. Rows are as `to_messages` takes them, with `check` where an answer can be
    right; the loss, `batch_size` rows at a time, expects `terminator` after each answer."""
    conversations = [to_messages(row, where=f"row {number}") for number, row in enumerate(rows, 1)]
    given = _answers_by_limit(model, tokenizer, rows, conversations, answer_batch_size, max_new_tokens)
    records = []
    for number, (row, messages, answer) in enumerate(zip(rows, conversations, given, strict=True), 1):
        record = {"id": row.get("id", str(number)), "kind": row.get("kind") or "", "answer": answer.text}
        record |= {"stopped": answer.stopped, "right": is_right(row, answer) if "check" in row else None}
        if "check" not in row:
            record["exact"] = answer.stopped and normalised(answer.text) == normalised(messages[-1]["content"])
        records.append(record)
    checked = [record for record in records if record["right"] is not None]
    free = [record for record in records if record["right"] is None]
    return SetScores(
        accuracy=Rate.of(record["right"] for record in checked) if checked else None,
        exact=Rate.of(record["exact"] for record in free) if free else None,
        kinds=_rates_by_kind(checked, [record["right"] for record in checked]),
        stop_rate=sum(answer.stopped for answer in given) / len(given),
        loss=assistant_token_loss(model, tokenizer, conversations, batch_size, terminator),
        answers=tuple(records),
    )


def _answers_by_limit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    conversations: Sequence[Sequence[Mapping[str, str]]],
    batch_size: int,
    max_new_tokens: int,
) -> list[Answer]:
    """Answers in order, a batch to rows of one limit and like length.

    Where a row has a check and short right answers, its limit is 64 tokens, so that a base model, which writes for a
    hundred or more, does not cost minutes: no right answer comes near it. Stop rates are within the limit.
    """
    limits = []
    for row, messages in zip(rows, conversations, strict=True):
        right = [messages[-1]["content"], *row.get("check", {}).get("answers", ())]
        longest = max(len(ids) for ids in tokenizer(right, add_special_tokens=False)["input_ids"])
        limits.append(min(64, max_new_tokens) if "check" in row and longest <= 48 else max_new_tokens)
    given: dict[int, Answer] = {}
    for limit in sorted(set(limits)):
        chosen = [index for index, own in enumerate(limits) if own == limit]
        wanted = [conversations[index][:-1] for index in chosen]  # without the reference answer
        longest = max(len(prompt_ids(tokenizer, messages)) for messages in wanted)
        size = _rows_that_fit(model, batch_size, longest + limit)
        given |= zip(chosen, answers(model, tokenizer, wanted, max_new_tokens=limit, batch_size=size), strict=True)
    return [given[index] for index in range(len(conversations))]


def _rows_that_fit(model: nn.Module, wanted: int, tokens: int) -> int:
    """At most `wanted` rows: those whose keys and values, copied as they grow, fit into the GPU's free memory."""
    if model.device.type != "cuda":
        return wanted
    config = model.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * model.dtype.itemsize
    return max(1, min(wanted, torch.cuda.mem_get_info(model.device)[0] // (2 * row)))


@torch.no_grad()
def assistant_token_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    batch_size: int = 16,
    terminator: str = TERMINATOR,
) -> float:
    """Mean cross-entropy in nats over all assistant tokens (newline, content and end) of the conversations.

    The logits of a batch, (`batch_size`, longest row, vocabulary), are in memory at once.
    """
    encoded = [encode(tokenizer, messages, terminator) for messages in conversations]
    encoded.sort(key=lambda item: len(item["labels"]))
    total, count = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        ids, labels = (
            nn.utils.rnn.pad_sequence([torch.tensor(item[name]) for item in batch], True, padding)
            for name, padding in (("input_ids", tokenizer.pad_token_id), ("labels", IGNORE))
        )
        # Padding on the right is never looked back at, so no attention mask is needed.
        logits = model(input_ids=ids.to(model.device)).logits
        # Row by row: a whole batch in float32 would take gigabytes at GLM-4's vocabulary of 151,552.
        for row, target in zip(logits, labels.to(logits.device), strict=True):
            total += nn.functional.cross_entropy(
                row[:-1].float(), target[1:], ignore_index=IGNORE, reduction="sum"
            ).item()
        count += int((labels[:, 1:] != IGNORE).sum())
    return total / count


def cloze_accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Mapping[str, Any]], batch_size: int = 64
) -> dict[str, Any]:
    """What a model knows as plain text: greedy continuations of unfinished sentences.

    A continuation is right when it begins with an answer and a sentence end follows. Returns `{"all": ..., "kinds":
    {...}}`, each of them as `Rate.as_dict` gives it.
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


PLAIN_TURNS = {"system": "", "user": "问：", "assistant": "答："}
"""How each role's turn begins in plain text, as the pretraining text of glm4-nano writes questions and answers."""


def score_as_text(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, held_out: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """What a prompt alone gets: rows with a check, asked as plain text in place of the chat format.

    A system prompt comes first, then turns of 问： and 答：. An answer ends with its line, one of several lines where
    the next 问： begins, and is judged by the row's check. Returns {"sets": {name: {"accuracy", "answers"}}}, each of
    the answers with "answer" and "right". Shown in 06, 6.1.
    """
    sets = {}
    for name, rows in held_out.items():
        told: list[dict[str, Any]] = [{} for _ in rows]
        for end, limit, lines in (("\n", 64, False), ("\n问：", 200, True)):
            chosen = [number for number, row in enumerate(rows) if ("\n" in row["output"]) == lines]
            prompts = [_as_text(to_messages(rows[number])[:-1]) for number in chosen]
            for number, text in zip(chosen, continuations(model, tokenizer, prompts, limit, end), strict=True):
                told[number] = {"answer": text, "right": check_answer(rows[number]["check"], text)}
        sets[name] = {"accuracy": Rate.of(item["right"] for item in told).as_dict(), "answers": told}
    return {"sets": sets}


def _as_text(messages: Sequence[Mapping[str, str]]) -> str:
    return "".join(f"{PLAIN_TURNS[message['role']]}{message['content']}\n" for message in messages) + "答："


def _begins_with(text: str, accepted: Sequence[str]) -> bool:
    return any(text.startswith(answer) and text[len(answer) : len(answer) + 1] in SENTENCE_ENDS for answer in accepted)


def _by_kind(items: Sequence[Mapping[str, Any]], right: Sequence[bool]) -> dict[str, Any]:
    kinds = {kind: rate.as_dict() for kind, rate in _rates_by_kind(items, right).items()}
    return {"all": Rate.of(right).as_dict(), "kinds": kinds}


def _rates_by_kind(items: Sequence[Mapping[str, Any]], right: Sequence[bool]) -> dict[str, Rate]:
    hits: dict[str, list[bool]] = {kind: [] for kind in sorted({item["kind"] for item in items})}
    for item, hit in zip(items, right, strict=True):
        hits[item["kind"]].append(hit)
    return {kind: Rate.of(values) for kind, values in hits.items()}


def score_model(
    profile: Profile,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Mapping[str, Sequence[Mapping[str, Any]]],
    terminator: str | None = None,
) -> dict[str, Any]:
    """All figures of one model, ready for JSON: every held-out set, and for the course's own sets cloze facts and plain
    questions too, which ask for the small world that those rows are about. `terminator` None is the profile's."""
    checked = all("check" in row for rows in held_out.values() for row in rows)
    # Free text may be as long as the answers that were trained.
    limit = profile.max_new_tokens if checked else profile.training.max_length
    batch, end = profile.training.evaluation_batch_size, terminator or profile.terminator
    sets = {}
    for name, rows in held_out.items():
        sets[name] = evaluate_rows(model, tokenizer, rows, batch, limit, end, profile.answer_batch_size).as_dict()
    if not set(sets) <= set(SET_NAMES):
        return {"sets": sets}
    return {
        "sets": sets,
        "cloze": cloze_accuracy(model, tokenizer, read_plain("cloze")),
        "plain_questions": plain_questions_accuracy(model, tokenizer, read_plain("questions")),
    }


def before_after(
    profile: Profile,
    adapter_dir: Path,
    half: str = "test",
    row_count: int = FREE_TEXT_ROWS,
    baseline: Path | None = None,
) -> dict[str, Any]:
    """The base model and the fine-tuned one on the same held-out rows; `baseline` is the folder of a third model.

    A profile with test data, the course's or your own, is scored on all rows of one half of it; one without on
    `row_count` rows that training held out, and `half` is not used. The profile's dtype "auto" is float32 here. Without
    LoRA `adapter_dir` is the folder of the trained model.

    Returns {"profile", "half", "data", "overlap", "before", "after"} and, where asked for, "baseline"; the last three
    as `score_model` gives them, the baseline with its "name"; `overlap` as `training_overlap` does. Raises ModelError
    or DataError where weights, adapter or rows are absent.
    """
    tokenizer = load_tokenizer(profile)
    check_trained(profile, adapter_dir)
    trained = as_trained(profile, adapter_dir)
    free_text = profile.test_data is None
    held_out = read_free_text(trained, tokenizer, row_count) if free_text else read_held_out(profile, half)
    result = {
        "profile": profile.name,
        "half": "held-out" if free_text else half,
        "data": trained.train_data if free_text else profile.dev_data if half == "dev" else profile.test_data,
        "overlap": 0 if free_text else training_overlap(trained, held_out),
    }
    dtype = torch.float32 if profile.dtype == "auto" else None

    def score(model: nn.Module) -> dict[str, Any]:
        return score_model(profile, model, tokenizer, held_out)

    result["before"], result["after"] = score_both(profile, adapter_dir, dtype, score)
    if baseline is not None:
        other = baseline_profile(profile, baseline)
        own = load_tokenizer(other)
        third = score_model(profile, load_base_model(other, dtype), own, held_out, _baseline_terminator(own))
        result["baseline"] = {"name": baseline.name, **third}
    return result


def check_trained(profile: Profile, trained: Path) -> None:
    """Check weights and adapter before the slow load of the base model."""
    check_weights(base_folder(profile), profile)
    if profile.lora is None:
        check_trained_model(trained)
    else:
        check_adapter(meta_model(profile), trained, profile)


def score_both(
    profile: Profile, trained: Path, dtype: torch.dtype | None, score: Callable[[nn.Module], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of the base model and of the fine-tuned one. Two models are never in memory at the same time."""
    if profile.lora is None:
        tuned = replace(profile, base_model=str(Path(trained).resolve()))
        before = score(load_base_model(profile, dtype))
        _free_memory()
        after = score(load_base_model(tuned, dtype))
    else:
        model = load_adapter(load_base_model(profile, dtype), trained, profile)
        with adapter_off(model):
            before = score(model)
        after = score(model)
        del model
    _free_memory()
    return before, after


def _free_memory() -> None:
    """Give back what a model held: PEFT's models are in cycles, and torch keeps a GPU's memory for itself."""
    gc.collect()
    torch.cuda.empty_cache()


def find_baseline(profile: Profile, name: str | None = None) -> Path | None:
    """The folder of a model to compare with: `name` is a folder, a name in weights/, or a profile.

    None means the profile's `chat_model`, if it is there. Raises ModelError for a name that leads to no model.
    """
    if name is None:
        found = profile.chat_model and home() / profile.chat_model
        return found if found and (found / "config.json").is_file() else None
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
    config = read_required_json(folder / "config.json", "Get the file again.")
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
    sets = sides[0]["sets"]
    for title, key in (("right", "accuracy"), ("exact match", "exact")):
        for name in (name for name, figures in sets.items() if figures.get(key)):
            lines.append(_line(f"{name} ({title})", [_percent(side["sets"][name][key]) for side in sides]))
    for title, key in (("stop rate", "stop_rate"), ("loss per answer token", "loss")):
        lines.append(_line(title, [_overall(side["sets"], key) for side in sides]))
    if not all(figures["accuracy"] for figures in sets.values()):
        lines.append(_line("perplexity", [_overall(side["sets"], "perplexity") for side in sides]))
    for title, key in (("cloze facts", "cloze"), ("plain questions", "plain_questions")):
        if key in sides[0]:
            lines.append(_line(title, [_percent(side[key]["all"]) for side in sides]))
    return "\n".join([*lines, *_rows_lines(result)])


def _rows_lines(result: Mapping[str, Any]) -> list[str]:
    rows = sum(len(figures["answers"]) for figures in result["before"]["sets"].values())
    if result["half"] == "held-out":
        return [f"{rows} rows of free text that training held out, answered through the chat format; [95 % interval]"]
    lines = [f"{rows} held-out rows of the {result['half']} set, answered through the chat format; [95 % interval]"]
    overlap = result.get("overlap", 0)
    if overlap is None:
        lines.append("not known: how many of them are among the training rows, which are not on this machine")
    elif overlap:
        lines.append(f"warning: {overlap} of them ask a question of the training rows, so they are not held out")
    return lines


def _line(title: str, cells: Sequence[str]) -> str:
    return f"{title:32}" + "".join(f"{cell:>26}" for cell in cells)


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
