"""What was found in rows, in counts and in words: what is left out, ignored, repeated or too long.

Rows are read and encoded in data.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..chat_format import IGNORE, encode
from .files import canonical

if TYPE_CHECKING:
    from datasets import Dataset


EXAMPLES = 3
"""How many rows are shown for each thing that is wrong."""


def rows_report(dataset: Dataset, found: Mapping[str, Any], held_out: Mapping[str, Dataset] | None = None) -> str:
    """What there is to know of rows before they are trained, line by line; ``found`` is that of ``load_and_count``.

    ``held_out`` are rows by name that training must not see; those that occur in both are counted.
    """
    shapes = ", ".join(f"{count} {shape}" for shape, count in found["shapes"].items())
    encodings = [name for name in found["encodings"] if name not in ("utf-8", "utf-8-sig")]
    kept = Counter(map(canonical, dataset["messages"]))
    near = Counter(map(_gist, dataset["messages"]))
    written = f" in {', '.join(encodings)}" if encodings else ""
    lines = [f"{found['rows']} rows read ({shapes}){written}", *findings(found)]
    if repeated := len(dataset) - len(kept):
        lines.append(f"rows equal to an earlier one: {repeated}")
    if alike := len(kept) - len(near):
        lines.append(f"rows equal to another but for spaces, punctuation, case and width: {alike}")
    for name, others in (held_out or {}).items():
        if both := sum(_gist(messages) in near for messages in others["messages"]):
            lines.append(f"{name} that are also in the training rows, and so can't judge it: {both} of {len(others)}")
    return "\n".join(lines)


def findings(found: Mapping[str, Any]) -> list[str]:
    """What a user has to know of rows that were read, in words; empty where there is nothing."""
    counted = (
        ("masked_turns", "turns that are read and not trained"),
        ("cut_answers", "answers that were cut when they were saved, and whose end is not trained"),
        ("placeholders", "rows with a placeholder such as {{name}}, which is taught as it is"),
    )
    lines = []
    for reason, places in found["bad_rows"].items():
        lines.append(f"rows left out: {len(places)}, {reason.removesuffix('.')} ({', '.join(places[:EXAMPLES])})")
    if found["absent_columns"]:
        lines.append(f"no row has the column {', '.join(found['absent_columns'])} that the setting columns names")
    lines += [f"{words}: {found[name]}" for name, words in counted if found[name]]
    if found["ignored"]:
        lines.append(f"ignored: {', '.join(f'{name} ({count})' for name, count in found['ignored'].items())}")
    if files := found["skipped_files"]:
        lines.append(f"files not read: {len(files)}, {', '.join(files[:EXAMPLES])}{', …' * (len(files) > EXAMPLES)}")
    return lines


def _gist(messages: Sequence[Mapping[str, Any]]) -> str:
    """The texts of a conversation without what rarely changes their meaning: width, case, spaces, sentence marks."""
    text = "\n".join(message["content"] for message in messages)
    return re.sub(r"[\s,.!?;:'\"，。、！？；：“”‘’…]+", "", unicodedata.normalize("NFKC", text).casefold())


def ledger(tokenizer, dataset: Dataset, max_lengths: Sequence[int] = (512, 1024, 2048)) -> dict[str, Any]:
    """What training would meet: counts of rows, over the whole of ``dataset``, before anything is dropped.

    ``duplicates`` are rows equal to an earlier one. For each of ``max_lengths`` (tokens) the rows with question and
    answer are ``fit``, ``lose_end`` (cutting would take at least the terminator) or ``lose_answer`` (at most the
    newline of the last answer would be left). ``encode_rows`` drops the latter two and the empty ones.
    """
    copies = Counter(canonical(messages) for messages in dataset["messages"])
    lacks = Counter(lack_of(messages) for messages in dataset["messages"])
    sizes = [_sizes(tokenizer, messages) for messages in dataset["messages"] if not lack_of(messages)]
    return {
        "rows": len(dataset),
        "duplicates": len(dataset) - len(copies),
        "empty_questions": lacks["empty_questions"],
        "empty_answers": lacks["empty_answers"],
        "untrained": lacks["untrained"],
        "tokens": sum(length for length, _ in sizes),
        "longest": max((length for length, _ in sizes), default=0),
        "by_max_length": [_fates(sizes, max_length) for max_length in max_lengths],
    }


LACKS = {
    "too_long": "longer than {} tokens",
    "empty_answers": "without an answer",
    "empty_questions": "without a question",
    "untrained": "whose answers are all marked as not to be trained",
}
"""Why rows are dropped, and how that is said."""


def lack_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Why the conversation can't be learned whatever its length, as a key of LACKS; else an empty string."""
    if any(message["role"] == "user" and not message["content"].strip() for message in messages):
        return "empty_questions"
    answers = [message for message in messages if message["role"] == "assistant"]
    if messages[-1]["role"] != "assistant" or any(not message["content"].strip() for message in answers):
        return "empty_answers"
    return "" if any(message.get("train") is not False for message in answers) else "untrained"


def beginning(messages: Sequence[Mapping[str, Any]]) -> str:
    """The first words of a conversation, to find it by."""
    spoken = [message["content"] for message in messages if message["role"] != "system"]
    text = " ".join(next((text for text in spoken if text.strip()), "").split())
    return f"“{text[:20]}{'…' * (len(text) > 20)}”"


def _sizes(tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[int, int]:
    """Tokens of the whole row, and tokens before its last answer."""
    labels = encode(tokenizer, messages)["labels"]
    return len(labels), max(index for index, label in enumerate(labels) if label == IGNORE) + 1


def _fates(sizes: Sequence[tuple[int, int]], max_length: int) -> dict[str, int]:
    over = [before for length, before in sizes if length > max_length]
    lose_answer = sum(max_length <= before + 1 for before in over)
    return {
        "max_length": max_length,
        "fit": len(sizes) - len(over),
        "lose_end": len(over) - lose_answer,
        "lose_answer": lose_answer,
    }


def counts_text(counts: Mapping[str, int], examples: Mapping[str, Sequence[str]], max_length: int) -> str:
    reasons = [
        f"{counts[name]} {words.format(max_length)}, such as {', '.join(examples[name])}"
        for name, words in LACKS.items()
        if counts[name]
    ]
    return f"{counts['rows'] - counts['kept']} of {counts['rows']} rows dropped: {'; '.join(reasons)}."
