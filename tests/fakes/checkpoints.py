"""Write tiny random checkpoints of the served families, in the real hub layout.

Each has a trained byte-level tokenizer, a chat template, processor configurations and float32
weights that are large enough for greedy decoding to wander. ``AutoProcessor`` and
``AutoModelForImageTextToText`` load them like any checkpoint of the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chiasm.common import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VOCAB_SIZE = 320
QWEN_PIXEL_BOUNDS = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
QWEN_FRAME_BOUNDS = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_LLAVA_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_ONEVISION_TOKENS = (*_LLAVA_TOKENS, "<video>")
_ONEVISION_SIDE = 56
_ONEVISION_RESOLUTIONS = [[56, 56], [56, 112], [56, 168], [112, 56], [112, 112], [168, 56]]
_CORPUS = (
    "What color is the shape? The shape is a red circle on a white background.",
    "Describe the picture. There are three blue squares and one green star.",
)
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] in ('image', 'video') %}{{ '<' + content['type'] + '>' }}"
    "{% else %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WINDOWED_VISION_CONFIG: dict[str, object] = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 64,
    "fullatt_block_indexes": [1],
    "window_size": 56,
    "initializer_range": 0.3,
}


@dataclass(frozen=True, slots=True)
class TowerSizes:
    """Sizes of a Qwen2-VL tower, and the most pixels of a picture after resizing."""

    depth: int = 2
    embed_dim: int = 32
    num_heads: int = 4
    max_pixels: int = QWEN_PIXEL_BOUNDS["longest_edge"]


@dataclass(frozen=True, slots=True)
class TextSizes:
    """Sizes of a Qwen2-VL text model of realistic proportions, with 64 values per head."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_kv_heads: int
    vocab_size: int
    max_positions: int = 2048

    def config(self) -> dict[str, object]:
        """Return what differs from the tiny text model."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.hidden_size // 64,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": self.max_positions,
            "head_dim": 64,
            "initializer_range": 0.02,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            },
        }


def make_bfloat16_qwen2_vl(
    path: Path, text: TextSizes, seed: int = 0, tower: TowerSizes | None = None
) -> Path:
    """Write a Qwen2-VL checkpoint in bfloat16, tower tiny by default, and return ``path``."""
    sizes = tower or TowerSizes()
    vision_config = {**_vision_config(sizes), "hidden_size": text.hidden_size}
    config = {**text.config(), "dtype": torch.bfloat16}
    return _write_qwen(path, "Qwen2VL", vision_config, seed, sizes.max_pixels, config)


def make_sized_qwen2_5_vl(
    path: Path, text: TextSizes, vision_config: dict[str, object], max_pixels: int
) -> Path:
    """Write a Qwen2.5-VL checkpoint in bfloat16 of the given sizes to ``path`` and return it."""
    config = {**text.config(), "dtype": torch.bfloat16, "tie_word_embeddings": True}
    return _write_qwen(path, "Qwen2_5_VL", vision_config, 0, max_pixels, text_config=config)


def make_qwen2_vl(path: Path, seed: int = 0, tower: TowerSizes | None = None) -> Path:
    """Write a tiny Qwen2-VL checkpoint to ``path`` and return it."""
    sizes = tower or TowerSizes()
    return _write_qwen(path, "Qwen2VL", _vision_config(sizes), seed, sizes.max_pixels)


def make_qwen2_5_vl(path: Path, seed: int = 0) -> Path:
    """Write a tiny Qwen2.5-VL checkpoint to ``path`` and return it; its tower uses windows."""
    return _write_qwen(path, "Qwen2_5_VL", WINDOWED_VISION_CONFIG, seed)


def make_llava(path: Path, seed: int = 0) -> Path:
    """Write a tiny LLaVA-1.5 checkpoint to ``path`` and return it; 16 tokens per image."""
    return make_llava_around({}, path, seed)


def make_llava_around(text_config: Mapping[str, object], path: Path, seed: int = 0) -> Path:
    """Write a tiny LLaVA whose text model differs from a tiny Llama in ``text_config``."""
    tokenizer = make_tokenizer(_LLAVA_TOKENS, "</s>", _LLAVA_TEMPLATE)
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": 32,
            "initializer_range": 0.3,
        },
        text_config={"model_type": "llama", **small_text_config(tokenizer), **text_config},
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=16,
    )
    processor = transformers.LlavaProcessor(  # type: ignore[no-untyped-call]  # transformers' own
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_TEMPLATE,
    )
    return save_checkpoint(
        path, transformers.LlavaForConditionalGeneration, config, processor, seed
    )


def make_llava_onevision(path: Path, seed: int = 0) -> Path:
    """Write a tiny LLaVA-OneVision checkpoint to ``path`` and return it; tiles of 16 tokens."""
    tokenizer = make_tokenizer(_ONEVISION_TOKENS, "</s>", _ONEVISION_TEMPLATE)
    # Low enough that the features of some pictures are interpolated.
    aspect_ratio = "anyres_max_2"
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": _ONEVISION_SIDE,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **small_text_config(tokenizer)},
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=_ONEVISION_RESOLUTIONS,
        vision_aspect_ratio=aspect_ratio,
    )
    size = {"height": _ONEVISION_SIDE, "width": _ONEVISION_SIDE}
    processor = transformers.LlavaOnevisionProcessor(  # type: ignore[no-untyped-call]  # its own
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=_ONEVISION_RESOLUTIONS
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect_ratio,
        chat_template=_ONEVISION_TEMPLATE,
    )
    model_class = transformers.LlavaOnevisionForConditionalGeneration
    return save_checkpoint(path, model_class, config, processor, seed)


def load_whole(path: Path) -> tuple[Any, Any]:
    """Return the whole model of a checkpoint, in evaluation mode, and its processor."""
    processor: Any = transformers.AutoProcessor
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path)
    return model.eval(), processor.from_pretrained(path)


def _vision_config(sizes: TowerSizes) -> dict[str, object]:
    return {
        "depth": sizes.depth,
        "embed_dim": sizes.embed_dim,
        "hidden_size": 64,
        "num_heads": sizes.num_heads,
        "initializer_range": 0.3,
    }


def _write_qwen(
    path: Path,
    family: str,
    vision_config: dict[str, object],
    seed: int,
    max_pixels: int = QWEN_PIXEL_BOUNDS["longest_edge"],
    text_config: dict[str, object] | None = None,
) -> Path:
    tokenizer = make_tokenizer(QWEN_TOKENS, "<|im_end|>", QWEN_TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = getattr(transformers, f"{family}Config")(
        text_config={
            **small_text_config(tokenizer),
            "rope_parameters": rope,
            **(text_config or {}),
        },
        vision_config=vision_config,
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
    )
    processor = getattr(transformers, f"{family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(
            size={**QWEN_PIXEL_BOUNDS, "longest_edge": max_pixels}
        ),
        video_processor=transformers.Qwen2VLVideoProcessor(size=QWEN_FRAME_BOUNDS),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    model_class = getattr(transformers, f"{family}ForConditionalGeneration")
    return save_checkpoint(path, model_class, config, processor, seed)


def token_id(tokenizer: transformers.PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of a token."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


def small_text_config(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, object]:
    """Return the configuration of a tiny text model."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def make_tokenizer(
    special_tokens: tuple[str, ...],
    eos_token: str,
    chat_template: str,
    named_tokens: dict[str, str] | None = None,
) -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level tokenizer; ``named_tokens`` become attributes of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    pad_token = "<pad>" if "<pad>" in special_tokens else special_tokens[0]
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # its own
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=pad_token,
        additional_special_tokens=[
            token for token in special_tokens if token not in (eos_token, pad_token)
        ],
        extra_special_tokens=named_tokens or {},
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def save_checkpoint(
    path: Path,
    model_class: type[transformers.PreTrainedModel],
    config: transformers.PreTrainedConfig,
    processor: transformers.ProcessorMixin,
    seed: int,
) -> Path:
    """Write a model with random weights and its processor to ``path`` and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    torch.nn.Module.to(model, config.get_text_config().dtype or torch.float32)
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.generation_config.pad_token_id = config.get_text_config().pad_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
