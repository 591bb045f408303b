"""The tokenizer of glm4-nano, its pretraining that goes on after a kill, and the shipped base model itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm4_helpers.checks.chat_template import SPECIAL_TOKENS
from glm4_helpers.evaluation import cloze_accuracy, plain_questions_accuracy
from glm4_helpers.held_out import read_plain
from glm4_helpers.support.errors import ModelError
from nano import pretrain as nano

WEIGHTS = Path(__file__).parents[1] / "weights" / "glm4-nano"
TINY = nano.PretrainingSettings(
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=2,
    key_value_heads=1,
    block=16,
    blocks_per_step=2,
    epochs=1,
    warmup_steps=2,
    checkpoint_steps=4,
)


@pytest.fixture
def blocks():
    tokenizer = nano.build_tokenizer("苹果是一种水果。")
    return tokenizer, nano.token_blocks(tokenizer, ["苹果是一种水果。", "一种水果。"] * 24, TINY.block)


def test_any_text_survives_a_round_trip(nano_tokenizer):
    for text in ["苹果 apple 123", "  前后 \n\n", "𠮷野家 😀 é \u200b", "<|user|>[gMASK]", "\t\x00"]:
        ids = nano_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert nano_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_stand_last_in_the_order_of_glm_4(nano_tokenizer):
    ids = nano_tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(nano_tokenizer) - len(SPECIAL_TOKENS), len(nano_tokenizer)))
    assert nano_tokenizer.convert_ids_to_tokens(nano_tokenizer("好")["input_ids"])[:2] == ["[gMASK]", "<sop>"]
    assert nano_tokenizer.padding_side == "left" and nano_tokenizer.pad_token == "<|endoftext|>"


def test_blocks_hold_the_documents_between_prefix_and_end(blocks):
    tokenizer, rows = blocks
    assert rows.shape[1] == TINY.block
    text = tokenizer.decode(rows[0].tolist())
    assert text.startswith("[gMASK]<sop>苹果是一种水果。<|endoftext|>[gMASK]<sop>")


def test_an_interrupted_run_goes_on_to_the_same_weights(blocks, tmp_path, monkeypatch):
    tokenizer, rows = blocks
    whole = nano.pretrain(tokenizer, rows, tmp_path / "whole.pt", TINY, lambda *figures: None)
    save = nano.save_checkpoint

    def save_and_die(*state):
        save(*state)
        raise KeyboardInterrupt

    monkeypatch.setattr(nano, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        nano.pretrain(tokenizer, rows, tmp_path / "killed.pt", TINY, lambda *figures: None)
    monkeypatch.undo()
    resumed = nano.pretrain(tokenizer, rows, tmp_path / "killed.pt", TINY, lambda *figures: None)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [point["step"] for point in resumed.curve] == [point["step"] for point in whole.curve]


def test_a_checkpoint_of_other_settings_or_another_text_is_refused(blocks, tmp_path):
    tokenizer, rows = blocks
    nano.pretrain(tokenizer, rows, tmp_path / "run.pt", TINY, lambda *figures: None)
    with pytest.raises(ModelError, match="other settings"):
        nano.pretrain(tokenizer, rows, tmp_path / "run.pt", replace(TINY, seed=1), lambda *figures: None)
    with pytest.raises(ModelError, match="another text"):
        nano.pretrain(tokenizer, rows.flip(0), tmp_path / "run.pt", TINY, lambda *figures: None)


def test_absent_pretraining_text_names_the_command(tmp_path):
    with pytest.raises(ModelError, match="nano data"):
        nano.read_documents(tmp_path / "pretrain.txt")


def test_the_shipped_model_is_plain_glm_and_small():
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["architectures"] == ["GlmForCausalLM"] and "auto_map" not in config
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 25_000_000
    with safe_open(WEIGHTS / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    assert model.num_parameters() <= 12_000_000
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    assert model.generation_config.eos_token_id == stops == model.config.eos_token_id


def test_the_model_card_says_what_it_is_and_what_it_cannot_do():
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    for heading in ("## Shape", "## Pretraining", "## What it knows", "## What it can't do"):
        assert heading in card


@pytest.mark.slow
def test_the_base_model_knows_its_world(nano_model, nano_tokenizer):
    cloze = cloze_accuracy(nano_model, nano_tokenizer, read_plain("cloze"))
    questions = plain_questions_accuracy(nano_model, nano_tokenizer, read_plain("questions"))
    print("cloze", cloze["all"], "plain questions", questions["all"])
    assert cloze["all"]["accuracy"] >= 0.98
    assert questions["all"]["accuracy"] >= 0.90
