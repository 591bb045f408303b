"""Joined rows train as padded ones do, at the true widths of the profiles that join them."""

import random

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from glm4_helpers import training
from glm4_helpers.chat_format import IGNORE
from glm4_helpers.checks import shapes
from glm4_helpers.profiles import get_profile

LENGTHS = (9, 40, 23, 31)
"""Tokens of the rows of one batch: short, since the models are wide."""


class KeepGradients(TrainerCallback):
    """The gradients of the first step, before they are clipped or used."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }


def one_step(profile, padding_free, folder):
    """Loss and gradients of the stock trainer's first step, on the same weights and rows each time."""
    tokenizer = tiny_tokenizer()
    config = shapes.model_config(profile)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 2, len(tokenizer), tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    draw = random.Random(0)
    ids = [[draw.randrange(len(tokenizer)) for _ in range(length)] for length in LENGTHS]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[IGNORE] * 5 + row[5:] for row in ids]})
    profile = get_profile(
        profile.name,
        **{
            "training.padding_free": padding_free,
            "training.per_device_batch_size": len(LENGTHS),
            "lora.dropout": 0.0,
            "training.epochs": 1,
            "training.evaluations_per_run": 0,
        },
    )
    settings = training.sft_config(profile, folder, torch.float32)
    settings.logging_steps, settings.max_grad_norm = 1, 0.0
    keeping = KeepGradients()
    trainer = training.build_trainer(model, tokenizer, rows, None, profile, folder, [keeping], settings)
    with torch.no_grad():  # B is all zeros at first, and A would have no gradient
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape == ((1, sum(LENGTHS)) if padding_free else (len(LENGTHS), max(LENGTHS)))
    trainer.train()
    return trainer.state.log_history[0]["loss"], keeping.gradients


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm-4-9b-lora", "glm-4-9b-0414", "glm-edge-1.5b"])
def test_joined_rows_have_the_loss_and_the_gradients_of_padded_ones(tmp_path, name, report):
    profile = get_profile(name)
    (loss, padded), (joined_loss, joined) = (one_step(profile, free, tmp_path / str(free)) for free in (False, True))
    assert joined_loss == pytest.approx(loss, rel=1e-5)
    assert padded.keys() == joined.keys() and len(padded) == 2 * 2 * len(profile.lora.target_modules)
    off = max(((padded[each] - joined[each]).norm() / padded[each].norm()).item() for each in padded)
    report(
        "Joined rows against padded ones", f"{name}: loss {loss:.6f} and {joined_loss:.6f}, gradients off by {off:.1e}"
    )
    assert off < 1e-4
