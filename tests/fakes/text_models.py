"""Write tiny LLaVA checkpoints around each class of text model that the fused decoder computes.

Windows are shorter than the prompts, caps are low enough to bend scores, and every norm and bias is
random: what a decoder forgets changes tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.fakes.checkpoints import make_llava_around

import transformers  # isort: skip - after the torchvision shim, which `checkpoints` installs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_WINDOW = 8
_WINDOWED = {"sliding_window": _WINDOW, "use_sliding_window": True, "max_window_layers": 1}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

# A class that the fused decoder does not compute.
OTHER_MODEL_TYPE = "olmo2"

TEXT_CONFIGS: Mapping[str, Mapping[str, object]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama_biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama_yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": _WINDOW},
    "qwen2": _WINDOWED,
    "qwen3": {**_WINDOWED, "attention_bias": True},
    "gemma2": {
        "sliding_window": _WINDOW,
        "layer_types": _ALTERNATING,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": False,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "sliding_window": _WINDOW,
        "layer_types": _ALTERNATING,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    },
    "phi3": {
        "sliding_window": _WINDOW,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "granite": {
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
}

LONGROPE_CONTEXT = 64
LONGROPE_CONFIG: Mapping[str, object] = {
    "model_type": "phi3",
    "original_max_position_embeddings": LONGROPE_CONTEXT,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.7 * index for index in range(8)],
        "original_max_position_embeddings": LONGROPE_CONTEXT,
        "factor": 32.0,
    },
}
"""A text model whose angles depend on the longest sequence of a forward, beyond this context."""


def make_text_model(path: Path, name: str, seed: int = 0) -> Path:
    """Write a checkpoint around a text model and return it.

    Args:
        path: Directory to write to.
        name: Key of ``TEXT_CONFIGS``, or ``OTHER_MODEL_TYPE``.
        seed: Of the weights.
    """
    model_type = "llama" if name.startswith("llama") else name
    make_llava_around({"model_type": model_type, **TEXT_CONFIGS.get(name, {})}, path, seed)
    return randomise_vectors(path, seed)


def randomise_vectors(path: Path, seed: int = 0) -> Path:
    """Add noise to all norms and biases of the text model at ``path`` and return the path.

    A new model has ones or zeros there, which hide a norm or a bias that is left out.
    """
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(path)
    return path
