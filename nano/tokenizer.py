"""GLM-4's special tokens, prefix and chat template on a tokenizer of one's own: for glm4-nano and for rehearsals.

The vocabulary comes from the caller. Loading a finished tokenizer is left to models, the format itself to chat_format.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from glm4_helpers.checks.chat_template import CHAT_TEMPLATE, PREFIX, SPECIAL_TOKENS, TERMINATOR


def glm4_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A vocabulary as a tokenizer of GLM-4's kind.

    The special tokens get the ids after the last one of `backend`, in GLM-4's order. Like GLM-4's tokenizer it puts
    `[gMASK]<sop>` in front, pads on the left with `<|endoftext|>`, and carries a chat template.
    """
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.post_processor = processors.TemplateProcessing(
        single=[*PREFIX, "$A"],
        pair=[*PREFIX, "$A", "$B"],
        special_tokens=[(token, backend.token_to_id(token)) for token in PREFIX],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TERMINATOR,
        pad_token=TERMINATOR,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token != TERMINATOR],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )
