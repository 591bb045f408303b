"""The shipped tokenizer comes from the builder that rehearsals use too, byte by byte."""

import json
from pathlib import Path

from nano.pretrain import build_tokenizer

SHIPPED = Path(__file__).parents[1] / "weights" / "glm4-nano" / "tokenizer.json"


def test_the_shipped_tokenizer_is_built_again_to_the_byte(tmp_path):
    vocabulary = json.loads(SHIPPED.read_text(encoding="utf-8"))["model"]["vocab"]
    build_tokenizer(token for token in vocabulary if len(token) == 1).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == SHIPPED.read_bytes()
