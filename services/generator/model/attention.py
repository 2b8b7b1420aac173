"""Attend over the paged KV cache, by kernels that read it in place or in plain torch.

This is the attention function that transformers calls in every layer. Keys and values of the new
tokens go into the cache; each chunk of a prompt attends to the prompt up to its end, each decoding
sequence to its context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from torch.nn.functional import scaled_dot_product_attention

from chiasm.kernels.cache_kernels import DecodeRule, PrefillRule

if TYPE_CHECKING:
    from chiasm.generator.model.attention_plan import DecodeGroup, PrefillGroup, PrefillSegment
    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.generator.model.kv_cache import KVCache

ATTENTION_NAME = "chiasm_paged"

# Keys and values that are gathered at once, unless that were too few sequences. On a CPU they
# should still be in its caches when they are read; on a GPU they take memory from the KV cache.
_GATHER_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}
_MIN_GATHERED_SEQUENCES = 4


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What the layers of one forward share; travels through the model as a keyword argument."""

    batch: ForwardBatch
    cache: KVCache

    def slots_of(self, layer: int) -> torch.Tensor:
        """Return the slots that the new tokens take in ``layer``. [num_tokens], int64."""
        return self.batch.slot_mappings[self.cache.group_of[layer]]


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """How scores are made: ``softcap * tanh(query · key * scale / softcap)`` within the window.

    Attributes:
        scale: Factor of the products.
        window: Positions that a token sees, itself included; 0 is all before it.
        softcap: Bound of the scores; 0 is none.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0


class LayerOptions(TypedDict, total=False):
    """What a layer says besides its tensors; transformers adds more, which does not matter here.

    Attributes:
        scaling: Factor of the scores; always there.
        paged: Batch and cache of this forward; always there.
        sliding_window: Positions that a token sees; ``None`` is all before it.
        softcap: Bound of the scores; ``None`` is none.
        s_aux: Attention sinks; not supported.
    """

    scaling: float
    paged: AttentionContext
    sliding_window: int | None
    softcap: float | None
    s_aux: torch.Tensor | None


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Unpack[LayerOptions],
) -> tuple[torch.Tensor, None]:
    """Attend in one layer; the signature is that of transformers' attention functions.

    Args:
        module: Attention module, with its ``layer_idx``.
        query: Queries with rotary positions applied. [1, num_q_heads, num_tokens, head_dim].
        key: New keys, as ``query``. [1, num_kv_heads, num_tokens, head_dim].
        value: New values, as ``key``.
        attention_mask: ``None``; transformers builds no mask for this function.
        **options: See ``LayerOptions``.

    Returns:
        The output, [1, num_tokens, num_q_heads, head_dim], and no weights.

    Raises:
        ValueError: The model asks for what this function does not do.
    """
    if attention_mask is not None or options.get("s_aux") is not None:
        raise ValueError("Attention masks and attention sinks are not supported.")
    rule = ScoreRule(
        options["scaling"], options.get("sliding_window") or 0, options.get("softcap") or 0.0
    )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer = module.layer_idx
    assert isinstance(layer, int), "transformers numbers the layers"
    return attend(options["paged"], layer, (query, key, value), rule)[None], None


def attend(
    context: AttentionContext,
    layer: int,
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rule: ScoreRule,
) -> torch.Tensor:
    """Write the new keys and values of one layer into the cache and attend to what it holds.

    Args:
        context: Batch and cache of this forward.
        layer: Index of the layer.
        new: Queries and keys with rotary positions applied, and values.
            [num_tokens, num_heads, head_dim], dtype of the cache.
        rule: How scores are made.

    Returns:
        What each query attends to. [num_tokens, num_q_heads, head_dim], contiguous.
    """
    _, key, value = new
    context.cache.store(layer, context.slots_of(layer), key, value)
    return attend_to_cache(context, layer, new, rule)


def attend_to_cache(
    context: AttentionContext,
    layer: int,
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rule: ScoreRule,
) -> torch.Tensor:
    """Attend to what the cache holds in one layer, the new keys and values too; see ``attend``."""
    query, key, value = new
    batch, cache = context.batch, context.cache
    group = cache.group_of[layer]
    kept = cache.groups[group].window
    if kept and kept != rule.window:
        raise ValueError(f"Layer {layer} sees {rule.window} positions; its cache keeps {kept}.")
    if len(batch.decode_groups) == 1 and batch.prefills.is_empty:
        return _attend_decode(query, batch.decode_groups[0], cache, layer, rule)
    # Rows of padding, which only recorded forwards have, are written by nobody.
    make = torch.empty_like if batch.hidden is None else torch.zeros_like
    output = make(query, memory_format=torch.contiguous_format)
    for decodes in batch.decode_groups:
        output[decodes.rows] = _attend_decode(query[decodes.rows], decodes, cache, layer, rule)
    if cache.kernels is not None and not batch.prefills.is_empty:
        _attend_prefills_in_place(query, batch.prefills, cache, layer, rule, output)
        return output
    for segment in batch.prefills.segments:
        rows = segment.rows
        output[rows] = _attend_prefill(
            (query[rows], key[rows], value[rows]), segment, cache, layer, rule
        )
    return output


def _attend_decode(
    query: torch.Tensor, decodes: DecodeGroup, cache: KVCache, layer: int, rule: ScoreRule
) -> torch.Tensor:
    """Attend with one query per sequence; [num_sequences, num_heads, head_dim]."""
    if cache.kernels is None:
        return _attend_decode_gathered(query, decodes, cache, layer, rule)
    cached = (cache.keys[layer], cache.values[layer])
    contexts = decodes.context(cache.group_of[layer])
    decode_rule = DecodeRule(decodes.block_size, rule.scale, rule.window, rule.softcap)
    return cache.kernels.paged_decode(query, cached, contexts, decode_rule)


def _attend_decode_gathered(
    query: torch.Tensor, decodes: DecodeGroup, cache: KVCache, layer: int, rule: ScoreRule
) -> torch.Tensor:
    """Attend to gathered contexts; queries that share a key head form its query rows."""
    keys, values = cache.keys[layer], cache.values[layer]
    num_sequences, num_q_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    plan = decodes.plan(cache.group_of[layer], rule.window, query.dtype, query.device)
    grouped = query.reshape(num_sequences, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    outputs = []
    width = len(plan.slots) // num_sequences
    step = _count_gathered_together(width, keys)
    for start in range(0, num_sequences, step):
        part = slice(start, start + step)
        slots = plan.slots[start * width : (start + step) * width]
        shape = (-1, width, num_kv_heads, head_dim)
        gathered_keys = keys.index_select(0, slots).view(shape).transpose(1, 2)
        gathered_values = values.index_select(0, slots).view(shape).transpose(1, 2)
        mask = None if plan.mask is None else plan.mask[part]
        outputs.append(_attend(grouped[part], gathered_keys, gathered_values, mask, rule))
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return output.reshape(num_sequences, num_q_heads, head_dim)


def _count_gathered_together(width: int, keys: torch.Tensor) -> int:
    """Return how many contexts of ``width`` positions are gathered at once."""
    context_bytes = 2 * width * keys[0].nbytes
    return max(_MIN_GATHERED_SEQUENCES, _GATHER_BYTES[keys.device.type] // context_bytes)


def _attend_prefills_in_place(
    query: torch.Tensor,
    prefills: PrefillGroup,
    cache: KVCache,
    layer: int,
    rule: ScoreRule,
    output: torch.Tensor,
) -> None:
    """Attend with all chunks to their contexts; both [num_tokens, num_heads, head_dim]."""
    assert cache.kernels is not None
    cached = (cache.keys[layer], cache.values[layer])
    contexts = prefills.context(cache.group_of[layer], rule.window)
    prefill_rule = PrefillRule(cache.layout.block_size, rule.scale, rule.softcap)
    cache.kernels.paged_prefill(
        query[prefills.rows], cached, contexts, prefill_rule, output[prefills.rows]
    )


def _attend_prefill(
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    segment: PrefillSegment,
    cache: KVCache,
    layer: int,
    rule: ScoreRule,
) -> torch.Tensor:
    """Attend within one prompt, up to the end of its chunk; [num_tokens, num_heads, head_dim]."""
    query, key, value = new
    group = cache.group_of[layer]
    if not segment.begins_prompt:
        slots = segment.context(group).slots
        key, value = cache.keys[layer][slots], cache.values[layer][slots]
    # Without a mask every token sees those before it.
    mask = None
    if rule.softcap or not segment.is_causal(rule.window):
        mask = segment.mask(group, rule.window, query.dtype, query.device)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    if rule.softcap or (mask is not None and query.is_cuda):
        # With a mask, torch's only kernel for GPUs that does not write all scores to memory takes
        # equal numbers of heads.
        num_groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (key, value))
        output = _attend(query, key, value, mask, rule)
    else:
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=rule.scale,
            enable_gqa=True,
        )
    return output[0].transpose(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rule: ScoreRule,
) -> torch.Tensor:
    """Attend with equal head counts; ``mask`` is added to the scores."""
    if not rule.softcap:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scale)
    scores = query @ key.transpose(-1, -2) * rule.scale
    scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
