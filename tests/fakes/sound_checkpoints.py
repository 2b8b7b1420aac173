"""Write tiny random checkpoints of the families that hear, in the real hub layout."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from chiasm.common import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

from tests.fakes.checkpoints import (  # noqa: E402
    QWEN_PIXEL_BOUNDS,
    WINDOWED_VISION_CONFIG,
    make_tokenizer,
    save_checkpoint,
    small_text_config,
    token_id,
)

if TYPE_CHECKING:
    from pathlib import Path

HEARD_SECONDS = 4
_CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN2_AUDIO_TOKENS = (
    *_CHAT_TOKENS,
    "<|audio_bos|>",
    "<|AUDIO|>",
    "<|audio_eos|>",
)
_OMNI_TOKENS = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_OMNI_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif content['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif content['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2-Audio's own template.
_QWEN2_AUDIO_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio'"
    " or content['type'] == 'audio' %}{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_AUDIO_CONFIG: dict[str, object] = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "d_model": 32,
    "max_source_positions": 50 * HEARD_SECONDS,
    "initializer_range": 0.3,
}


def make_qwen2_audio(path: Path, seed: int = 0) -> Path:
    """Write a tiny Qwen2-Audio checkpoint to ``path`` and return it; it hears 4 seconds."""
    tokenizer = make_tokenizer(_QWEN2_AUDIO_TOKENS, "<|im_end|>", _QWEN2_AUDIO_TEMPLATE)
    config = transformers.Qwen2AudioConfig(
        audio_config={
            **_AUDIO_CONFIG,
            "model_type": "qwen2_audio_encoder",
        },
        text_config={"model_type": "qwen2", **small_text_config(tokenizer)},
        audio_token_index=token_id(tokenizer, "<|AUDIO|>"),
    )
    processor = transformers.Qwen2AudioProcessor(  # type: ignore[no-untyped-call]  # its own
        feature_extractor=_make_feature_extractor(),
        tokenizer=tokenizer,
        chat_template=_QWEN2_AUDIO_TEMPLATE,
    )
    model_class = transformers.Qwen2AudioForConditionalGeneration
    return save_checkpoint(path, model_class, config, processor, seed)


def make_qwen2_5_omni(path: Path, seed: int = 0) -> Path:
    """Write a tiny thinker of Qwen2.5-Omni to ``path`` and return it; it sees, and hears 4 s."""
    special_tokens = (*_CHAT_TOKENS, *_OMNI_TOKENS.values())
    tokenizer = make_tokenizer(special_tokens, "<|im_end|>", _OMNI_TEMPLATE, _OMNI_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config={**small_text_config(tokenizer), "rope_parameters": rope},
        vision_config={
            **WINDOWED_VISION_CONFIG,
            "model_type": "qwen2_5_omni_vision_encoder",
        },
        audio_config={
            **_AUDIO_CONFIG,
            "model_type": "qwen2_5_omni_audio_encoder",
            "n_window": 20,
            "output_dim": 64,
        },
        image_token_index=token_id(tokenizer, "<|IMAGE|>"),
        video_token_index=token_id(tokenizer, "<|VIDEO|>"),
        audio_token_index=token_id(tokenizer, "<|AUDIO|>"),
        audio_start_token_id=token_id(tokenizer, "<|audio_bos|>"),
        audio_end_token_id=token_id(tokenizer, "<|audio_eos|>"),
        # Real checkpoints have it, and `get_rope_index` reads it; its type does not say so.
        vision_start_token_id=token_id(tokenizer, "<|vision_bos|>"),  # type: ignore[call-arg]
    )
    processor = transformers.Qwen2_5OmniProcessor(  # type: ignore[no-untyped-call]  # its own
        image_processor=transformers.Qwen2VLImageProcessor(size=QWEN_PIXEL_BOUNDS),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        feature_extractor=_make_feature_extractor(),
        tokenizer=tokenizer,
        chat_template=_OMNI_TEMPLATE,
    )
    model_class = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    return save_checkpoint(path, model_class, config, processor, seed)


def nest_thinker(path: Path) -> Path:
    """Turn a thinker's checkpoint into the layout of the hub, where a talker lies beside it."""
    config = json.loads((path / "config.json").read_text())
    # The hub's has a class that transformers does not know.
    config["architectures"] = ["Qwen2OmniNaViTThinkerForConditionalGeneration"]
    whole = {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "thinker_config": config,
    }
    (path / "config.json").write_text(json.dumps(whole))
    weights = load_file(path / "model.safetensors")
    nested = {f"thinker.{name}": weight for name, weight in weights.items()}
    nested["talker.codec_head.weight"] = torch.zeros(4, 4)
    save_file(nested, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _make_feature_extractor() -> transformers.WhisperFeatureExtractor:
    return transformers.WhisperFeatureExtractor(  # type: ignore[no-untyped-call]  # its own
        feature_size=16, chunk_length=HEARD_SECONDS
    )
