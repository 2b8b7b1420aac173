"""Load the language model of a checkpoint together with a KV cache for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog
import torch

from chiasm.common.graph_recorder import GraphRecorder
from chiasm.common.half_load import load_half
from chiasm.common.loading_memory import give_back_loading_memory
from chiasm.generator.model.cache_sizes import decide_sizes
from chiasm.generator.model.find_cache_kernels import find_cache_kernels
from chiasm.generator.model.fused.fused_decoder import FusedDecoder
from chiasm.generator.model.graph_inputs import GraphLimits
from chiasm.generator.model.graphed_decoder import GraphedDecoder
from chiasm.generator.model.kv_cache import KVCache
from chiasm.generator.model.make_decoder import make_decoder
from chiasm.generator.model.memory_budget import decide_budget, read_device_memory
from chiasm.generator.model.model_spec import read_model_spec

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.common.graph_recorder import Recorder
    from chiasm.generator.model.cache_sizes import CacheRequest
    from chiasm.generator.model.decoder import Decoder
    from chiasm.generator.model.kv_cache import KVCacheLayout
    from chiasm.generator.model.make_decoder import DecoderChoice
    from chiasm.kernels.cpu.quantized_layer import Quantization

log = structlog.get_logger("chiasm.generator")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder with the sizes that were decided on for it."""

    decoder: Decoder
    dtype: torch.dtype
    layout: KVCacheLayout
    max_model_len: int


def replay_steps(
    loaded: LoadedModel, max_decodes: int, max_step_tokens: int, record: Recorder | None = None
) -> LoadedModel:
    """Return ``loaded`` with a decoder that replays short steps, if that helps.

    Args:
        loaded: What computes them now.
        max_decodes: Most sequences of a step.
        max_step_tokens: Most tokens of a step.
        record: Records a forward; ``None`` for CUDA graphs on a GPU, and nothing elsewhere.
    """
    decoder = loaded.decoder
    if not isinstance(decoder, FusedDecoder) or not decoder.is_replayable:
        return loaded
    if record is None and decoder.device.type == "cuda":
        record = GraphRecorder(decoder.device)
    if record is None:
        return loaded
    limits = GraphLimits.of(max_decodes, max_step_tokens, loaded.max_model_len)
    return replace(loaded, decoder=GraphedDecoder(decoder, limits, record))


def load_model(
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    request: CacheRequest,
    decoder: DecoderChoice = "auto",
    quantization: Quantization = "none",
) -> LoadedModel:
    """Load the generator half of the checkpoint at ``path`` and reserve its KV cache.

    Args:
        path: Directory of the checkpoint.
        dtype: Element type of weights and cache; ``None`` takes the checkpoint's.
        device: Where it computes.
        request: How large the cache should be.
        decoder: Which implementation computes it; see ``make_decoder``.
        quantization: How its weights are held; as above.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        UnsupportedModelError: No family of ours has its type.
        UnsupportedDecoderError: The fused decoder is needed, but does not compute it.
        KernelsUnavailableError: The kernels that ``request`` names cannot be had.
        CacheTooSmallError: ``max_model_len`` is over what model or cache hold.
    """
    model = load_half(path, "generator", dtype)
    torch.nn.Module.to(model, device)
    spec = read_model_spec(model)
    if spec.positions_bound:
        log.warning(
            "context_shortened", max_positions=spec.max_positions, reason=spec.positions_bound
        )
    dtype = model.dtype
    budget_bytes = decide_budget(
        model.config.get_text_config(), dtype, request, read_device_memory(device)
    )
    layout, max_model_len = decide_sizes(spec, dtype, request, budget_bytes)
    kernels = find_cache_kernels(device, dtype, request.kernels)
    cache = KVCache(spec, layout, dtype, device, kernels)
    made = make_decoder(decoder, model, cache, quantization)
    give_back_loading_memory(path)
    return LoadedModel(made, dtype, layout, max_model_len)
