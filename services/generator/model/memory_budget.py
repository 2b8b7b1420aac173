"""Decide how many bytes the KV cache takes if nobody says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chiasm.generator.model.cache_sizes import CacheTooSmallError

if TYPE_CHECKING:
    import transformers

    from chiasm.generator.model.cache_sizes import CacheRequest

CPU_BUDGET_BYTES = 1 << 30

# What a step holds at once per token, in rows of these widths: norms in float32 beside the hidden
# states, queries, keys and values before and after they are turned, gate and up and their product.
_HIDDEN_ROWS = 8
_HEAD_ROWS = 6
_INNER_ROWS = 4
# Logits of a row: as they come, in float32, as probabilities, summed, and a mask of each kind.
_LOGITS_BYTES = 20
# Contexts that are gathered, masks, and what libraries take for themselves.
_SPARE_BYTES = 3 << 29


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device, of which ``free_bytes`` are taken by no process."""

    free_bytes: int
    total_bytes: int


def read_device_memory(device: torch.device) -> DeviceMemory | None:
    """Return the memory of a GPU; ``None`` for a CPU, whose memory others may take at any time."""
    if device.type != "cuda":
        return None
    # What torch keeps for later is free, too.
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return DeviceMemory(free_bytes, total_bytes)


def decide_budget(
    text_config: transformers.PreTrainedConfig,
    dtype: torch.dtype,
    request: CacheRequest,
    memory: DeviceMemory | None,
) -> int:
    """Return the bytes of the KV cache.

    Args:
        text_config: Configuration of the language model.
        dtype: Its element type.
        request: What is asked for.
        memory: Of its device, after its weights were loaded; ``None`` for a CPU.

    Raises:
        CacheTooSmallError: Weights and steps take the device's whole share.
    """
    if request.budget_bytes is not None:
        return request.budget_bytes
    if memory is None:
        return CPU_BUDGET_BYTES
    used_bytes = memory.total_bytes - memory.free_bytes
    step_bytes = count_step_bytes(text_config, dtype, request)
    share_bytes = int(request.device_share * memory.total_bytes)
    budget_bytes = share_bytes - used_bytes - step_bytes
    if budget_bytes <= 0:
        raise CacheTooSmallError(
            f"Of {memory.total_bytes >> 20} MiB of the GPU, {share_bytes >> 20} may be used:"
            f" {used_bytes >> 20} are taken by the weights and by others, {step_bytes >> 20} by a"
            f" step of {request.chunk_tokens} tokens, and nothing is left for the KV cache."
        )
    return budget_bytes


def count_step_bytes(
    text_config: transformers.PreTrainedConfig, dtype: torch.dtype, request: CacheRequest
) -> int:
    """Return the bytes that the largest step may take besides weights and KV cache."""
    hidden: int = text_config.hidden_size
    num_q_heads: int = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or hidden // num_q_heads
    num_kv_heads = getattr(text_config, "num_key_value_heads", None) or num_q_heads
    inner: int = getattr(text_config, "intermediate_size", None) or 4 * hidden
    heads: int = (num_q_heads + 2 * num_kv_heads) * head_dim
    token_values = _HIDDEN_ROWS * hidden + _HEAD_ROWS * heads + _INNER_ROWS * inner
    vocab_size: int = text_config.vocab_size
    logits_bytes = request.max_sequences * vocab_size * _LOGITS_BYTES
    return request.chunk_tokens * token_values * dtype.itemsize + logits_bytes + _SPARE_BYTES
