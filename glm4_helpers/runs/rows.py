"""Whose rows train and whose rows judge: one answer for training, for loading what is finished and for evaluation.

Reading and encoding rows is left to datasets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from ..datasets import data_source, profile_rows, split, without_nulls
from ..errors import DataError, SettingError
from ..profiles import Profile, unchanged

OWN_DEV_FRACTION = 0.1
"""Share of own training rows that is held out where the profile names no share."""

LEAST_DEV_ROWS = 4
"""Fewer held-out rows than these choose a checkpoint by chance: then all rows are trained on."""


def train_and_dev(profile: Profile) -> tuple[Dataset, Dataset | None]:
    """Training and dev conversations of the profile; None where nothing is held out.

    The dev rows are those of `dev_data`, else `dev_fraction` of `train_data`, chosen by content. Where `train_data` was
    changed and neither of the two was, the profile's dev rows are about other things than the rows trained on: then a
    share of the own rows is held out instead (the profile's `dev_fraction`, else OWN_DEV_FRACTION), and nothing where
    that gives fewer than LEAST_DEV_ROWS. Raises DataError as `load_messages` and `split` do, SettingError for a
    `dev_fraction` that `dev_data` would leave unused.
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
    """What a user should know of the rows that judge a run, in one line; empty where there is nothing to say."""
    if dev is None:
        few = f"{len(train)} rows are too few to hold some out"
        why = few if _chooses_by_itself(profile) else "no rows are held out"
        return f"There is no dev set ({why}): the weights of the last step are kept."
    if _chooses_by_itself(profile):
        return (
            f"Dev set: {len(dev)} of the {len(train) + len(dev)} rows of {profile.train_data}, chosen by their content "
            "and not trained on. Set dev_data or dev_fraction to judge by others."
        )
    seen = set(map(_text, train["messages"]))
    shared = sum(_text(messages) in seen for messages in dev["messages"])
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
    """Whether the training rows are a user's own and nothing was said about dev rows."""
    usual = unchanged(profile)
    same_dev_rows = (profile.dev_data, profile.dev_fraction) == (usual.dev_data, usual.dev_fraction)
    return same_dev_rows and _has_own_rows(profile)


def _held_out_if_enough(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    try:
        train, dev = split(rows, fraction, seed)
    except DataError:  # one part would be empty
        return rows, None
    return (train, dev) if len(dev) >= LEAST_DEV_ROWS else (rows, None)


def _text(messages: list[dict[str, str]]) -> str:
    return json.dumps(without_nulls(messages), sort_keys=True)
