"""The data card of data/ and the model card of weights/glm4-nano/, written from counts and measurements.

Every figure in them is handed in; nothing is measured here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

SET_MEANINGS = {
    "train": "fine-tuning",
    "unseen_rows": "wordings and entities of the fine-tuning rows in combinations that no fine-tuning row has",
    "unseen_entities": "words, countries, facts and people that occur in no fine-tuning row, not even inside a word",
    "unseen_phrasings": "wordings that no fine-tuning row has",
    "second_turns": "the next turn of a conversation: follow-ups, repeating, remembering a name, a new topic",
}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def data_card(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], digests: Mapping[str, str], seed: int, documents: int
) -> str:
    """Text of data/README.md from the rows by set and the sha256 of every file."""
    sets = [
        (f"`{name}.json`", len(members), SET_MEANINGS[name.rpartition("/")[2]])
        for name, members in sorted(rows.items())
    ]
    kinds = Counter(row["kind"] for row in rows["train"])
    return f"""# Data of the small world

`nano/` invented this data for the course from seed {seed}; licence Apache-2.0. `python -m nano data` writes the same
bytes again. Facts are true as commonly taught; people are invented. No row asks for a country whose capital is
contested or not fixed by law, or that has its capital's name.

## Files
{table(("file", "rows", "what it is"), sets)}

`cloze.json` and `questions.json` ask for the same facts as plain text, without the chat format.

`pretrain.txt` is the text that glm4-nano was pretrained on: {documents:,} documents, one a line. The repository does
not store it; the command above writes it. About seven documents in ten are dialogues (问：… 答：…, *question* and
*answer*) about the same kinds of task as the fine-tuning rows, with the same answer sentences. So the base model
already answers in plain text, and *unseen* above means unseen in the fine-tuning rows.

A row has `instruction`, `input` and `output` as in Alpaca, and some have `history` and `system`. Held-out rows also
have `check`, the answers that count as right. The dev sets choose checkpoints and settings; the test sets are only
read for figures. No held-out wording occurs in the pretraining text or in a fine-tuning row; tests/test_nano_world.py
checks it.

## Kinds of task in the fine-tuning rows
{table(("kind", "rows"), kinds.most_common())}

## Digests (sha256)
{table(("file", "sha256"), [(f"`{name}`", f"`{digest}`") for name, digest in sorted(digests.items())])}
"""


def model_card(facts: Mapping[str, Any]) -> str:
    """Text of weights/glm4-nano/README.md.

    `facts` holds parameters, config, tokens, steps, minutes, cpu, curve (list of step and loss), cloze and questions
    (as `evaluation.cloze_accuracy` gives them), settings and the sha256 of the pretraining text.
    """
    curve = facts["curve"]
    chosen = [curve[round(index * (len(curve) - 1) / 10)] for index in range(11)]
    knowledge = [
        (kind, f"{figures['accuracy']:.1%}", f"{figures['right']}/{figures['total']}")
        for kind, figures in [*facts["cloze"]["kinds"].items(), ("all", facts["cloze"]["all"])]
    ]
    questions = facts["questions"]["all"]
    config = facts["config"]
    return f"""---
license: apache-2.0
language: zh
library_name: transformers
---
# glm4-nano

A base model of the GLM-4 architecture (`GlmForCausalLM`), small enough for a laptop's CPU: {facts["parameters"]:,}
parameters. It continues text about a small world (words, countries, numbers, invented people), and answers questions
about it that are written as plain text (问：… 答：…, *question* and *answer*). It has never seen GLM-4's chat format:
the course teaches it that. It is not ChatGLM and has none of GLM-4-9B's weights.

## Shape
{config["num_hidden_layers"]} layers · hidden {config["hidden_size"]} · intermediate {config["intermediate_size"]}
(fused gate_up_proj) · {config["num_attention_heads"]} heads, {config["num_key_value_heads"]} key/value heads ·
rotary on half of each head · vocabulary {config["vocab_size"]:,}: 256 bytes, one token per character, GLM-4's 14
special tokens · untied lm_head · bfloat16.

## Pretraining
{facts["tokens"]:,} tokens of generated Chinese text (`python -m nano data`, sha256
`{facts["text_sha256"]}`), {facts["steps"]:,} steps of {facts["tokens_per_step"]:,} tokens,
{facts["minutes"]:.0f} minutes on {facts["cpu"]}. Settings: `{facts["settings"]}`.
About seven documents in ten are dialogues in plain text, also with its name, greetings, follow-up questions and rules
in the first line. No role token (`<|user|>` and so on) occurs in the text.

{table(("step", "loss"), [(point["step"], point["loss"]) for point in chosen])}

## What it knows
Cloze accuracy (greedy continuation of an unfinished sentence):

{table(("kind", "accuracy", "right"), knowledge)}

Plain question and answer text: {questions["accuracy"]:.1%} of {questions["total"]}.

## What it can't do
It can't talk about anything outside its small world: it has never read about other topics, and characters that it has
not seen are only bytes to it. Sums go up to 100. It does not answer in the chat format before fine-tuning. It is for
learning and testing only.

## Use
`AutoModelForCausalLM.from_pretrained("weights/glm4-nano")` and `AutoTokenizer.from_pretrained("weights/glm4-nano")`; no
remote code. Tried with transformers 4.57.6 and 5.23.0: the answers are the same.
"""
