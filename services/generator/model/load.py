"""Load the language model of a checkpoint together with a KV cache for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chiasm.common.half_load import load_half
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout, count_blocks
from chiasm.generator.model.make_decoder import make_decoder
from chiasm.generator.model.model_spec import read_model_spec

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.generator.model.decoder import Decoder
    from chiasm.generator.model.make_decoder import DecoderChoice
    from chiasm.generator.model.model_spec import ModelSpec


class CacheTooSmallError(Exception):
    """The KV cache cannot hold what was asked for."""


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """How large the KV cache should be.

    Attributes:
        block_size: Tokens per block.
        budget_bytes: Bytes of the cache.
        num_blocks: Blocks; overrides the budget unless ``None``.
        max_model_len: Context that it must hold; ``None`` for what model and cache allow.
        max_sequences: Sequences that hold blocks at once; more memory than they need is not
            reserved.
    """

    block_size: int
    budget_bytes: int
    num_blocks: int | None
    max_model_len: int | None
    max_sequences: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder with the sizes that were decided on for it."""

    decoder: Decoder
    dtype: torch.dtype
    layout: KVCacheLayout
    max_model_len: int


def load_model(
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    request: CacheRequest,
    decoder: DecoderChoice = "auto",
) -> LoadedModel:
    """Load the generator half of the checkpoint at ``path`` and reserve its KV cache.

    Args:
        path: Directory of the checkpoint.
        dtype: Element type of weights and cache; ``None`` takes the checkpoint's.
        device: Where it computes.
        request: How large the cache should be.
        decoder: Which implementation computes it; see ``make_decoder``.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        UnsupportedModelError: No family of ours has its type.
        UnsupportedDecoderError: The fused decoder is asked for, but does not compute it.
        CacheTooSmallError: ``max_model_len`` is over what model or cache hold.
    """
    model = load_half(path, "generator", dtype)
    torch.nn.Module.to(model, device)
    spec = read_model_spec(model)
    layout, max_model_len = decide_sizes(spec, model.dtype, request)
    dtype = model.dtype
    cache = KVCache(spec, layout, dtype, device)
    return LoadedModel(make_decoder(decoder, model, cache), dtype, layout, max_model_len)


def decide_sizes(
    spec: ModelSpec, dtype: torch.dtype, request: CacheRequest
) -> tuple[KVCacheLayout, int]:
    """Return the layout of the cache and the context length that model and cache hold.

    Raises:
        CacheTooSmallError: ``max_model_len`` is over either.
    """
    block_size = request.block_size
    most = min(spec.max_positions, request.max_model_len or spec.max_positions)
    num_blocks = request.num_blocks
    if num_blocks is None:
        affordable = count_blocks(spec, dtype, block_size, request.budget_bytes)
        num_blocks = min(affordable, request.max_sequences * -(-most // block_size))
    capacity = min(spec.max_positions, num_blocks * block_size)
    if capacity < (request.max_model_len or 2):
        raise CacheTooSmallError(
            f"A context of {request.max_model_len or 2} tokens is asked for, but the model takes"
            f" {spec.max_positions} and a KV cache of {num_blocks} blocks of {block_size} tokens"
            f" holds {num_blocks * block_size}."
        )
    return KVCacheLayout(num_blocks, block_size), min(most, capacity)
