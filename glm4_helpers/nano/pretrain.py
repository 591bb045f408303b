"""The base model glm4-nano: its tokenizer, its shape and its pretraining.

The world's text and rows come from world.py, through the files in data/. Fine-tuning and scoring live elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from glm4_helpers.chat_format import CHAT_TEMPLATE, SPECIAL_TOKENS


def build_tokenizer(characters: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character and the special tokens of GLM-4.

    Order of ids: 256 byte tokens, the characters sorted, the special tokens in GLM-4's order. A character outside
    the vocabulary becomes its UTF-8 bytes, so any text survives a round trip. Like GLM-4's tokenizer it puts
    `[gMASK]<sop>` in front, pads on the left with `<|endoftext|>`, and carries a chat template.
    """
    bytes_first = [f"<0x{value:02X}>" for value in range(256)]
    vocabulary = {token: index for index, token in enumerate(bytes_first + sorted(set(characters)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    prefix = ["[gMASK]", "<sop>"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*prefix, "$A"],
        pair=[*prefix, "$A", "$B"],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in prefix],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token != "<|endoftext|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )
