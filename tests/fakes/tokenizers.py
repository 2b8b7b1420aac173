"""Write tiny checkpoints without weights: what the gateway reads of a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from pathlib import Path

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED_TOKENS = ("<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTE_FALLBACK_VOCABULARY = {
    **{f"<0x{byte:02X}>": byte for byte in range(256)},
    **{token: 256 + index for index, token in enumerate(["▁the", "▁", "cat", "▁sat", "<s>"])},
}
_CORPUS = (
    "What color is the shape? The shape is a red circle on a white background.",
    "Describe the picture. There are three blue squares and one green star.",
)


def make_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer with special and plain added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in PLAIN_ADDED_TOKENS])
    return tokenizer


def make_byte_fallback_tokenizer() -> Tokenizer:
    """Return a tokenizer as SentencePiece's are written: bytes for what no token covers.

    Its decoder takes a space from the start of a text.
    """
    tokenizer = Tokenizer(models.BPE(vocab=BYTE_FALLBACK_VOCABULARY, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def write_text_side(path: Path) -> Path:
    """Write tokenizer, template and configurations to ``path`` and return it."""
    path.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}),
        encoding="utf-8",
    )
    generation = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.25}
    (path / "generation_config.json").write_text(
        json.dumps({**generation, "min_p": 0.125}), encoding="utf-8"
    )
    return path
