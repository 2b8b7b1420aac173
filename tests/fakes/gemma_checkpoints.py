"""Write tiny random Gemma 3 checkpoints: pictures whose tokens see each other, and windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.fakes.checkpoints import make_tokenizer, save_checkpoint, small_text_config, token_id

import transformers  # isort: skip - after the torchvision shim, which `checkpoints` installs

if TYPE_CHECKING:
    from pathlib import Path

NUM_IMAGE_TOKENS = 16
# Fewer positions than a picture has: also its tokens do not see all of each other there.
NARROW_WINDOW = 8
# More than a picture has, as in the checkpoints of the hub.
WIDE_WINDOW = 24
_SIDE = 112
_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
_NAMED_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role'])"
    " + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def make_gemma3(path: Path, seed: int = 0, window: int = NARROW_WINDOW) -> Path:
    """Write a tiny Gemma 3 checkpoint to ``path`` and return it; 16 tokens per image.

    The layers in the middle see everything, the others ``window`` positions.
    """
    tokenizer = make_tokenizer(_TOKENS, "<eos>", _TEMPLATE, _NAMED_TOKENS)
    config = transformers.Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": _SIDE,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            **small_text_config(tokenizer),
            "model_type": "gemma3_text",
            "sliding_window": window,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            },
        },
        mm_tokens_per_image=NUM_IMAGE_TOKENS,
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"),
        image_token_index=token_id(tokenizer, "<image_soft_token>"),
        # With a tied head a random model repeats the token that it has read.
        tie_word_embeddings=False,
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(
            size={"height": _SIDE, "width": _SIDE}, do_pan_and_scan=False
        ),
        tokenizer=tokenizer,
        image_seq_length=NUM_IMAGE_TOKENS,
        chat_template=_TEMPLATE,
    )
    save_checkpoint(path, transformers.Gemma3ForConditionalGeneration, config, processor, seed)
    return _fill_projector(path, seed)


def _fill_projector(path: Path, seed: int) -> Path:
    """Put noise where a new model has zeros, so that pictures differ."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path)
    generator = torch.Generator().manual_seed(seed)
    weight = model.model.multi_modal_projector.mm_input_projection_weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(path)
    return path
