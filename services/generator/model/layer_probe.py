"""Find out whether every layer of a model of transformers attends by a function that we give it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from transformers import AttentionInterface

from chiasm.common.families import PositionScheme, UnsupportedModelError

if TYPE_CHECKING:
    import transformers

    from chiasm.generator.model.model_spec import ModelSpec

_PROBE_NAME = "chiasm_probe"


class _LayerOptions(TypedDict, total=False):
    """What a layer says besides its tensors, as far as it tells whether it can be served.

    Attributes:
        paged: What the forward was given under this name; a list here, which gets what each layer
            attends by: its index, the heads of its keys and values, and their widths.
        s_aux: Attention sinks.
    """

    paged: list[tuple[int, torch.Size, torch.Size]]
    s_aux: torch.Tensor | None


@torch.inference_mode()
def check_layers(text_model: transformers.PreTrainedModel, spec: ModelSpec) -> None:
    """Compute one token without a cache, and look at what each layer asks of its attention.

    Leaves the model with an attention function of no use: the caller sets another.

    Args:
        text_model: The decoder of a half-loaded checkpoint.
        spec: Facts about it, by which the cache was made.

    Raises:
        UnsupportedModelError: A layer does not attend, or attends twice, or by what the cache
            does not hold.
    """
    AttentionInterface.register(_PROBE_NAME, _note_layer)
    text_model.set_attn_implementation(_PROBE_NAME)
    axes = (3, 1, 1) if spec.positions is PositionScheme.MROPE else (1, 1)
    device, dtype = text_model.device, text_model.dtype
    layers: list[tuple[int, torch.Size, torch.Size]] = []
    text_model(
        inputs_embeds=torch.zeros(1, 1, spec.hidden_size, dtype=dtype, device=device),
        position_ids=torch.zeros(axes, dtype=torch.int64, device=device),
        use_cache=False,
        paged=layers,
    )
    expected = torch.Size((spec.num_kv_heads, spec.head_dim))
    if layers != [(layer, expected, expected) for layer in range(spec.num_layers)]:
        attending = [layer for layer, *_ in layers]
        shapes = sorted({tuple(shape) for _, *pair in layers for shape in pair})
        raise _refusal(
            f"attends in its layers {attending} with heads of {shapes}, but the cache has"
            f" {spec.num_layers} layers of {tuple(expected)}"
        )


def _note_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Unpack[_LayerOptions],
) -> tuple[torch.Tensor, None]:
    """Note what a layer attends by; tensors as ``paged_attention`` gets them."""
    if "paged" not in options:
        raise _refusal("does not hand on to its layers what the cache needs")
    if attention_mask is not None or options.get("s_aux") is not None:
        raise _refusal("has masks or attention sinks of its own")
    layer = module.layer_idx
    assert isinstance(layer, int), "transformers numbers the layers"
    options["paged"].append((layer, key.shape[1::2], value.shape[1::2]))
    return query.transpose(1, 2), None


def _refusal(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"The text model is not served: it {what}.")
