"""Write tiny random checkpoints of Gemma 3, in the real hub layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chiasm.common import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

from tests.fakes.checkpoints import (  # noqa: E402
    make_tokenizer,
    save_checkpoint,
    small_text_config,
    token_id,
)

if TYPE_CHECKING:
    from pathlib import Path

NUM_IMAGE_TOKENS = 16
IMAGE_SIDE = 112
_NAMED_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
_TOKENS = ("<pad>", "<eos>", "<start_of_turn>", "<end_of_turn>", *_NAMED_TOKENS.values())
_TEMPLATE = (
    "{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<start_of_image>"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def make_gemma3(path: Path, seed: int = 3, sliding_window: int = 24) -> Path:
    """Write a tiny Gemma 3 to ``path`` and return it; 16 tokens per image, two of three windows."""
    tokenizer = make_tokenizer(_TOKENS, "<end_of_turn>", _TEMPLATE, _NAMED_TOKENS)
    config = transformers.Gemma3Config(
        text_config={
            **small_text_config(tokenizer),
            "sliding_window": sliding_window,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIDE,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=NUM_IMAGE_TOKENS,
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"),
        image_token_index=token_id(tokenizer, "<image_soft_token>"),
        tie_word_embeddings=False,
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(
            size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        ),
        tokenizer=tokenizer,
        image_seq_length=NUM_IMAGE_TOKENS,
        chat_template=_TEMPLATE,
    )
    model_class = transformers.Gemma3ForConditionalGeneration
    return _randomise_projector(save_checkpoint(path, model_class, config, processor, seed))


def _randomise_projector(path: Path) -> Path:
    """Fill the projection of a new model, which is made of zeros."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path)
    weight = model.model.multi_modal_projector.mm_input_projection_weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(path)
    return path
