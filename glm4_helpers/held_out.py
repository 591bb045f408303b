"""Rows that are kept out of training: dev rows choose a checkpoint, test rows score a model.

Rows are read in data; evaluation decides which answers are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .chat_format import encode
from .data import can_be_asked, data_source, fingerprint, profile_rows, read_rows, split, to_messages
from .profiles import Profile, unchanged
from .rows.files import canonical, local_copy
from .support.errors import DataError, SettingError
from .support.paths import home

SET_NAMES = ("unseen_rows", "unseen_entities", "unseen_phrasings", "second_turns")
FREE_TEXT_SET = "held_out_rows"
FREE_TEXT_ROWS = 200
"""How many held-out rows of free text are scored: a 9B on one GPU answers them in minutes, not hours."""
CHECKS = {
    "exact": ("answers",),
    "one_of": ("answers",),
    "distinct_of": ("count", "members", "prefix", "suffix", "separator"),
}
"""The types of checks and what each of them holds."""


def read_held_out(profile: Profile, half: str) -> dict[str, list[dict[str, Any]]]:
    """The profile's dev sets or test sets (`half` is "dev" or "test"), each named after its file.

    Rows have any shape that `to_messages` takes; answers to those with a `check` can be right or wrong. Raises
    DataError, naming file and row, for rows that are absent, damaged or can't be asked, and SettingError for a profile
    without such rows.
    Shown in 04, 4.4.
    """
    data = profile.dev_data if half == "dev" else profile.test_data
    if data is None:
        raise SettingError(f"{profile.name} has no {half}_data.", f"Give rows with --set {half}_data=FILE.")
    source = data_source(data)
    if not isinstance(source, Path):
        return {data.rpartition("/")[2]: _held_out_rows(source, data, profile.columns)}
    if not source.is_dir():
        return {source.stem: _held_out_rows(source, data, profile.columns)}
    files = [file for file in source.iterdir() if file.is_file() and file.name[0] != "." and file.suffix != ".md"]
    absent = [name for name in SET_NAMES if name not in {file.stem for file in files}]
    if absent and data in ("data/dev", "data/test"):
        raise DataError(f"{source / absent[0]}.json is not there.", _RESTORE)
    if not files:
        raise DataError(f"{source} holds no files of rows.", "Give a JSON or JSONL file, or a folder of such files.")
    order = {name: place for place, name in enumerate(SET_NAMES)}  # the course's own, from easy to hard
    files.sort(key=lambda file: (order.get(file.stem, len(order)), file.name))
    stems = Counter(file.stem for file in files)
    names = [file.stem if stems[file.stem] == 1 else file.name for file in files]
    return {
        name: _held_out_rows(file, f"{data}/{file.name}", profile.columns)
        for name, file in zip(names, files, strict=True)
    }


def _held_out_rows(source: str | Path, shown: str, columns: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """The rows of one set. Each can be asked, and each `check` can be applied."""
    rows = read_rows(source, columns)
    for number, row in enumerate(rows, 1):
        where = f"{shown}, row {number}"
        if not can_be_asked(to_messages(row, where)):
            raise DataError(f"{where} has no answer that follows a question.", "Give it both, or remove the row.")
        if row.get("check") is None:
            row.pop("check", None)
        else:
            _require_check(row["check"], where)
    return rows


def _require_check(check: Any, where: str) -> None:
    kind = check.get("type") if isinstance(check, Mapping) else None
    if kind not in CHECKS:
        raise DataError(f"{where} has a check of the unknown type {kind!r}.", f"Use {', '.join(CHECKS)}.")
    absent = [name for name in CHECKS[kind] if name not in check]
    texts = check.get("answers", check.get("members"))
    if absent or not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        example = '{"type": "one_of", "answers": ["好的。", "行。"]}'
        problem = f"{where} has a check without {absent[0] if absent else 'a list of texts'}."
        raise DataError(problem, f"Write it like {example}.")


def read_plain(name: str) -> list[dict[str, Any]]:
    """The plain-text items of data/cloze.json or data/questions.json; `name` is "cloze" or "questions".

    Raises DataError where the file is absent or damaged.
    Shown in 04, 4.5.
    """
    try:
        return read_rows(home() / "data" / f"{name}.json")
    except DataError as error:
        raise DataError(error.problem, _RESTORE) from None


_RESTORE = "Restore it (git checkout -- data) or make it again: python -m nano data"


def read_free_text(
    profile: Profile, tokenizer: PreTrainedTokenizerBase, count: int = FREE_TEXT_ROWS
) -> dict[str, list[dict[str, Any]]]:
    """At most `count` of the rows that training holds out, as one set.

    The choice depends on the rows' content, so that every run and machine scores the same ones. Rows that training
    would drop (too long, or without an answer) are left out. The dev loss is measured on these rows too.
    Raises DataError where the profile holds nothing out.
    """
    held_out = sorted(_held_out_messages(profile), key=lambda messages: fingerprint([{"messages": messages}]))
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
    dev = train_and_dev(profile)[1]
    if dev is None:
        raise DataError(f"{profile.name} holds no rows out.", "Train with dev_fraction=0.05, or give dev_data.")
    return dev["messages"]


def training_overlap(profile: Profile, held_out: Mapping[str, Sequence[Mapping[str, Any]]]) -> int | None:
    """How many held-out rows ask a question of a training row; None where the training rows are only on a hub.

    Shown in 06, 6.1.
    """
    sources = [profile.train_data] if isinstance(profile.train_data, str) else profile.train_data
    if not all(isinstance(data_source(each), Path) or local_copy(each).exists() for each in sources):
        return None
    trained = {canonical(messages[:-1]) for messages in train_and_dev(profile)[0]["messages"]}
    return sum(canonical(to_messages(row)[:-1]) in trained for rows in held_out.values() for row in rows)


def _is_kept(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], max_length: int) -> bool:
    """Whether training would keep the conversation, and its last answer can be asked for."""
    return can_be_asked(messages) and len(encode(tokenizer, messages)["input_ids"]) <= max_length


OWN_DEV_FRACTION = 0.1
"""Share of a user's own training rows that is held out where the profile names none."""

LEAST_DEV_ROWS = 4
"""Fewer held-out rows than these choose a checkpoint by chance: then all rows are trained on."""


def train_and_dev(profile: Profile) -> tuple[Dataset, Dataset | None]:
    """The profile's training conversations and its dev conversations, None where nothing is held out.

    The dev rows are those of `dev_data`, else `dev_fraction` of `train_data`, chosen by content. A user who changes
    `train_data` alone has other topics than the profile's dev rows. Then a share of the user's rows is held out instead
    (the profile's `dev_fraction`, else OWN_DEV_FRACTION), or nothing if that gives fewer than LEAST_DEV_ROWS.
    Raises DataError as `load_messages` and `split` do, SettingError for a `dev_fraction` that `dev_data` would leave
    unused.
    """
    rows, _ = profile_rows(profile, "train_data")
    usual = unchanged(profile)
    if _chooses_by_itself(profile):
        return _held_out_if_enough(rows, usual.dev_fraction or OWN_DEV_FRACTION, profile.training.seed)
    if profile.dev_data is None or (_has_own_rows(profile) and profile.dev_data == usual.dev_data):
        return split(rows, profile.dev_fraction, profile.training.seed) if profile.dev_fraction else (rows, None)
    if profile.dev_fraction != usual.dev_fraction:
        raise SettingError(
            f"dev_fraction is {profile.dev_fraction}, but the dev rows are those of dev_data ({profile.dev_data}).",
            "Set dev_data to null to hold out a share of train_data instead, or leave dev_fraction out.",
        )
    return rows, profile_rows(profile, "dev_data")[0]


def dev_note(profile: Profile, train: Dataset, dev: Dataset | None) -> str:
    """What a user should know about the dev rows, in one line; empty where there is nothing to say."""
    if dev is None:
        few = f"{len(train)} rows are too few to hold some out: less than {LEAST_DEV_ROWS} would judge"
        why = few if _chooses_by_itself(profile) else "no rows are held out"
        return f"There is no dev set ({why}): the weights of the last step are kept."
    if _chooses_by_itself(profile):
        data = profile.train_data if isinstance(profile.train_data, str) else ", ".join(profile.train_data)
        return (
            f"Dev set: {len(dev)} of the {len(train) + len(dev)} rows of {data}, chosen by their content "
            "and not trained on. Set dev_data or dev_fraction to judge by others."
        )
    seen = set(map(canonical, train["messages"]))
    shared = sum(canonical(messages) in seen for messages in dev["messages"])
    return (
        f"{shared} of the {len(dev)} dev rows are training rows too: the dev loss is lower than on rows never seen."
        if shared
        else ""
    )


def _has_own_rows(profile: Profile) -> bool:
    return _places(profile.train_data) != _places(unchanged(profile).train_data)


def _places(data: str | Sequence[str]) -> list[Path]:
    sources = [data] if isinstance(data, str) else data
    return [Path(data_source(source)).expanduser().resolve() for source in sources]


def _chooses_by_itself(profile: Profile) -> bool:
    """Whether the user changed the training rows and set nothing about dev rows."""
    usual = unchanged(profile)
    same_dev_rows = (profile.dev_data, profile.dev_fraction) == (usual.dev_data, usual.dev_fraction)
    return same_dev_rows and _has_own_rows(profile)


def _held_out_if_enough(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    try:
        train, dev = split(rows, fraction, seed)
    except DataError:  # one part would be empty
        return rows, None
    return (train, dev) if len(dev) >= LEAST_DEV_ROWS else (rows, None)
