"""A random GLM of a few thousand parameters with its tokenizer, for tests that need a real model but no knowledge."""

import torch
from peft import get_peft_model
from transformers import GlmConfig, GlmForCausalLM

from glm4_helpers import models, training
from glm4_helpers.checks import adapters, chat_template
from nano.pretrain import build_tokenizer

CHARACTERS = "你好苹果香蕉西瓜天地人一二三四五六七八九十中国北京上海告诉我的名字等于多少？。，：！0123456789+=abcxyz \n"


def tiny_tokenizer():
    """A character tokenizer of about 350 tokens."""
    return build_tokenizer(CHARACTERS)


def tiny_glm(tokenizer, seed=0, max_position_embeddings=4096, **settings):
    """Two layers of 32; large random weights, so that greedy answers differ and are no ties."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.5,
    }
    config = GlmConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=max_position_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=chat_template.stop_ids(tokenizer),
        **shape | settings,
    )
    torch.manual_seed(seed)
    model = GlmForCausalLM(config).eval()
    models.set_stop_ids(model, tokenizer)
    return model


def write_only(model, tokenizer, characters):
    """Make the model's next token always one of these characters: it rambles and never stops."""
    allowed = tokenizer.convert_tokens_to_ids(list(characters))
    with torch.no_grad():
        kept = model.lm_head.weight[allowed].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[allowed] = kept
    return model


def save_model(folder, model, tokenizer):
    """Write model and tokenizer as a profile expects its base model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_live_adapter(folder, profile, std):
    """An adapter for the profile's base model that changes its answers, as if it had been trained: B is random."""
    model = get_peft_model(models.load_base_model(profile), training.lora_config(profile))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    model.save_pretrained(folder)
    adapters.save_adapter_facts(folder, profile)
