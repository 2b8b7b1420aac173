"""Write tiny random checkpoints whose towers add rows behind layers of the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

from tests.fakes.checkpoints import (  # noqa: E402
    QWEN_TEMPLATE,
    QWEN_TOKENS,
    make_tokenizer,
    save_checkpoint,
    small_text_config,
    token_id,
)

if TYPE_CHECKING:
    from pathlib import Path

AREA_BOUNDS = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64}


def make_qwen3_vl(path: Path, seed: int = 0) -> Path:
    """Write a tiny Qwen3-VL checkpoint to ``path`` and return it; two deepstack levels."""
    tokenizer = make_tokenizer(QWEN_TOKENS, "<|im_end|>", QWEN_TEMPLATE)
    config = transformers.Qwen3VLConfig(
        text_config={
            **small_text_config(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 16,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.3,
        },
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
    )
    processor = transformers.Qwen3VLProcessor(  # type: ignore[no-untyped-call]  # transformers' own
        image_processor=transformers.Qwen2VLImageProcessor(
            size=AREA_BOUNDS, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        video_processor=transformers.Qwen3VLVideoProcessor(size=AREA_BOUNDS),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    model_class = transformers.Qwen3VLForConditionalGeneration
    return save_checkpoint(path, model_class, config, processor, seed)
