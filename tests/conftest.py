"""What all tests share: no network, none of the caller's settings, the shipped model, a tiny random one, a report."""

from __future__ import annotations

import logging
import os
import string
from pathlib import Path

import pytest

import glm4_helpers  # noqa: F401 - before torch, since it sets how torch's threads wait

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub libraries are first imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "weights" / "glm4-nano"
REPORT = pytest.StashKey[dict[str, list[tuple[float, str]]]]()
COMMON_CHINESE = (
    "你好我叫什么名字告诉苹果英文的是一二三四五六七八九十天气北京很今多少等于吗了在有不人个大家请。，？！：、“”"
)


def pytest_configure(config):
    config.stash[REPORT] = {}


@pytest.fixture(scope="session")
def report(pytestconfig):
    """``report(title, text, order=0)`` shows text below a title when all tests are done, lowest order first."""

    def add(title: str, text: str, order: float = 0) -> None:
        pytestconfig.stash[REPORT].setdefault(title, []).append((order, text))

    return add


def pytest_terminal_summary(terminalreporter, config):
    for title, entries in config.stash[REPORT].items():
        terminalreporter.section(title)
        for _, text in sorted(entries, key=lambda entry: entry[0]):
            terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def _loggers_as_before():
    """The command line quiets the libraries' loggers; tests that look for warnings must not depend on the order."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch):
    for name in ("GLM4_HOME", "GLM4_PROFILE", "GLM4_HUB"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def nano_tokenizer():
    """The shipped tokenizer. Don't change it in a test."""
    if (NANO / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(NANO)
    from nano.pretrain import build_tokenizer

    return build_tokenizer(string.printable + COMMON_CHINESE)


@pytest.fixture(scope="session")
def nano_model():
    """The shipped base model in float32, ready to generate. Don't change it in a test."""
    if not (NANO / "model.safetensors").is_file():
        pytest.fail("weights/glm4-nano is not there: git checkout -- weights")
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval()


@pytest.fixture
def tiny_model(nano_tokenizer):
    """A fresh random GlmForCausalLM (hidden 32, 2 layers) for the shipped tokenizer, always with the same weights."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from glm4_helpers.checks.chat_template import stop_ids

    config = GlmConfig(
        vocab_size=len(nano_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        pad_token_id=nano_tokenizer.pad_token_id,
        eos_token_id=stop_ids(nano_tokenizer),
    )
    torch.manual_seed(0)
    return GlmForCausalLM(config).eval()
