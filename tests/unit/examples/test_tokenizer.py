"""The demo tokenizer: any text survives it, and pieces of a prompt encode as the whole does."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from examples.demo_model.tokenizer import (
    SPECIAL_TOKENS,
    VOCAB_LIMIT,
    load_tokenizer,
    save_tokenizer,
    token_id,
)

TEXTS = (
    "What colour is the shape?",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>",
    "  spaces\tand\n\nlines ",
    "smørrebrød 漢字 \N{GRINNING FACE}",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_token_each(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("".join(SPECIAL_TOKENS), add_special_tokens=False).ids
    assert ids == [token_id(tokenizer, token) for token in SPECIAL_TOKENS]
    assert tokenizer.get_vocab_size() <= VOCAB_LIMIT


def test_a_missing_token_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lacks <nothing>"):
        token_id(tokenizer, "<nothing>")


def test_the_saved_tokenizer_is_the_same_through_transformers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert loaded(text).input_ids == ids
        assert load_tokenizer(tmp_path).encode(text, add_special_tokens=False).ids == ids


def test_the_chat_template_writes_text_and_pictures_in_order(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:"}},
            ],
        },
    ]
    prompt = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\nWhat is this?<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
