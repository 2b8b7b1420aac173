"""Write tiny random checkpoints of Pixtral and Mistral 3, in the real hub layout."""

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

LONGEST_EDGE = 256
PATCH_SIZE = 14
_IMAGE_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", *_IMAGE_TOKENS)
_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST]{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'text' %}{{ block['text'] }}"
    "{% elif block['type'] in ['image', 'image_url'] %}[IMG]{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}[/INST]{% else %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
)


def make_pixtral(path: Path, seed: int = 0) -> Path:
    """Write a tiny Pixtral to ``path`` and return it; sides up to 256 pixels, patches of 14."""
    tokenizer = make_tokenizer(_TOKENS, "</s>", _TEMPLATE)
    config = transformers.LlavaConfig(
        vision_config=_vision_config(),
        text_config=_text_config(tokenizer),
        image_token_index=token_id(tokenizer, "[IMG]"),
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model_class = transformers.LlavaForConditionalGeneration
    return _save(path, model_class, config, tokenizer, seed)


def make_mistral3(path: Path, seed: int = 0) -> Path:
    """Write a tiny Mistral 3 to ``path`` and return it: the same, and four patches to a token."""
    return _make_merging(path, {}, seed)


def make_ministral3(path: Path, seed: int = 0) -> Path:
    """Write a tiny Ministral 3 to ``path`` and return it: far tokens look more sharply."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.5,
    }
    return _make_merging(path, {"model_type": "ministral3", "rope_parameters": rope}, seed)


def _make_merging(path: Path, text_config: dict[str, object], seed: int) -> Path:
    tokenizer = make_tokenizer(_TOKENS, "</s>", _TEMPLATE)
    config = transformers.Mistral3Config(
        vision_config=_vision_config(),
        text_config={**_text_config(tokenizer), **text_config},
        image_token_index=token_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    model_class = transformers.Mistral3ForConditionalGeneration
    return _save(path, model_class, config, tokenizer, seed, merge_size=2)


def _vision_config() -> dict[str, object]:
    return {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": LONGEST_EDGE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "silu",
        "initializer_range": 0.15,
    }


def _text_config(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "model_type": "mistral",
        **small_text_config(tokenizer),
        # As in the real ones, heads are not as wide as the hidden size together.
        "head_dim": 32,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }


def _save(
    path: Path,
    model_class: type[transformers.PreTrainedModel],
    config: transformers.PreTrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
    seed: int,
    merge_size: int = 1,
) -> Path:
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": LONGEST_EDGE}, patch_size=PATCH_SIZE
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        spatial_merge_size=merge_size,
        chat_template=_TEMPLATE,
    )
    return _randomise_vectors(save_checkpoint(path, model_class, config, processor, seed))


def _randomise_vectors(path: Path) -> Path:
    """Add noise to all norms and biases, which are ones and zeros in a new model."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(path)
    return path
