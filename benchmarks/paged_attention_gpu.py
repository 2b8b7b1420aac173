"""Attention over the paged KV cache on a GPU: our Triton kernels beside torch, which gathers.

One model's layers (28 query heads, 4 key heads, width 128, bfloat16) attend in turn, so that no
layer's keys are still in the device's cache, through the same function as in a step. A pass over
the layers is a CUDA graph: what is measured is the device's time. The variants take turns within
every round. Bytes are those of the keys and values that are seen, beside a copy of the device's
memory; operations are those of the products of what is seen::

    python -m benchmarks.paged_attention_gpu
    python -m benchmarks.paged_attention_gpu --sweep   # cuts of the work, in place of torch
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from chiasm.common.families import PositionScheme
from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.model.attention import AttentionContext, ScoreRule, attend_to_cache
from chiasm.generator.model.attention_plan import (
    CacheShape,
    DecodeGroup,
    PrefillGroup,
    PrefillSegment,
)
from chiasm.generator.model.forward_batch import ForwardBatch
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout
from chiasm.generator.model.model_spec import ModelSpec
from chiasm.kernels.cache_kernels import DecodeRule, PrefillRule
from chiasm.kernels.paged_decode_attention import DecodeTiles, paged_decode_attention
from chiasm.kernels.paged_prefill_attention import PrefillTiles, paged_prefill_attention
from chiasm.kernels.triton_kernels import TritonKernels

if TYPE_CHECKING:
    from collections.abc import Callable

Variants: TypeAlias = "dict[str, Callable[[int], torch.Tensor]]"

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 28, 4, 128
BLOCK_SIZE = 16
DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
SCALE = HEAD_DIM**-0.5
# Keys and values of all layers of a pass: several times the device's cache.
PASS_BYTES = 256 << 20
MAX_LAYERS = 64
NUM_ROUNDS = 15
DECODES = list(itertools.product((1, 16, 64), (700, 4_096, 16_384)))
# Where a chunk starts and its tokens, for each of some prompts.
PREFILLS = [((0, 2_048),), ((8_192, 512),), ((0, 512),) * 8]
# What a sweep tries: positions or rows and positions, warps, stages.
DECODE_TILES = ((64, 4, 2), (64, 4, 4), (64, 8, 4), (128, 8, 3), (32, 4, 5))
PREFILL_TILES = (
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (64, 64, 4, 3),
    (128, 128, 8, 3),
)


@dataclass(frozen=True)
class Step:
    """A cache and a batch that reads it.

    Attributes:
        name: What the table calls it.
        batch: One group of decodes, or chunks.
        query: [num_tokens, num_q_heads, head_dim].
        caches: The same keys and values, by who reads them.
        num_layers: Layers of the caches.
        work: Bytes of a layer that decodes, operations of one that prefills.
    """

    name: str
    batch: ForwardBatch
    query: torch.Tensor
    caches: dict[str, KVCache]
    num_layers: int
    work: float

    def attend(self, variant: str, layer: int) -> torch.Tensor:
        """Attend in one layer."""
        context = AttentionContext(self.batch, self.caches[variant])
        new = self.query[:, :NUM_KV_HEADS]
        return attend_to_cache(context, layer, (self.query, new, new), ScoreRule(SCALE))


def main() -> None:
    """Print one table of decodes and one of prefills."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sweep", action="store_true", help="time cuts of the work")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}")
    print(f"copy: {_measure_copy():.0f} GB/s read and written\n")
    for num_sequences, length in DECODES:
        step = _make_decode(num_sequences, length)
        _report(step, _decode_cuts(step) if arguments.sweep else _variants(step), "GB/s", 1e9)
    for chunks in PREFILLS:
        step = _make_prefill(chunks)
        _report(step, _prefill_cuts(step) if arguments.sweep else _variants(step), "TFLOP/s", 1e12)


def _variants(step: Step) -> Variants:
    return {name: partial(step.attend, name) for name in step.caches}


def _decode_cuts(step: Step) -> Variants:
    cache = step.caches["triton"]
    (group,) = step.batch.decode_groups
    rule = DecodeRule(BLOCK_SIZE, SCALE)

    def run(num_splits: int, tiles: DecodeTiles, layer: int) -> torch.Tensor:
        cached = (cache.keys[layer], cache.values[layer])
        contexts = group.context(0)
        return paged_decode_attention(step.query, cached, contexts, rule, num_splits, tiles)

    num_programs = group.num_sequences * NUM_KV_HEADS
    cuts: Variants = {}
    for tile, num_warps, num_stages in DECODE_TILES:
        for per_processor in (1, 2, 4):
            num_splits = max(1, min(64, 132 * per_processor // num_programs))
            tiles = DecodeTiles(tile, num_warps, num_stages)
            name = f"{tile}/{num_warps}/{num_stages}, {num_splits} splits"
            cuts[name] = partial(run, num_splits, tiles)
    return cuts


def _prefill_cuts(step: Step) -> Variants:
    cache = step.caches["triton"]
    rule = PrefillRule(BLOCK_SIZE, SCALE)
    output = torch.empty_like(step.query)

    def run(tiles: PrefillTiles, layer: int) -> torch.Tensor:
        cached = (cache.keys[layer], cache.values[layer])
        context = step.batch.prefills.context(0, 0)
        paged_prefill_attention(step.query, cached, context, rule, output, tiles)
        return output

    return {
        "/".join(map(str, shape)): partial(run, PrefillTiles(*shape)) for shape in PREFILL_TILES
    }


def _report(step: Step, variants: Variants, unit: str, per: float) -> None:
    """Print the device's time of a layer for each variant, and its rate."""
    graphs = {name: _capture(step, run) for name, run in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(NUM_ROUNDS):
        for name, graph in graphs.items():
            times[name].append(_time(graph.replay) / step.num_layers)
    print(f"{step.name} ({step.num_layers} layers)")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(
            f"  {name:24s} {1e6 * median:9.1f} us ({1e6 * min(seconds):.1f} to"
            f" {1e6 * max(seconds):.1f}), {step.work / median / per:7.0f} {unit}",
            flush=True,
        )


def _capture(step: Step, run: Callable[[int], torch.Tensor]) -> torch.cuda.CUDAGraph:
    """Return a pass over the layers as a graph."""
    for layer in range(min(3, step.num_layers)):
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(step.num_layers):
            run(layer)
    graph.replay()
    return graph


def _time(run: Callable[[], object]) -> float:
    """Return seconds of the device."""
    start, end = (torch.Event(DEVICE, enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _measure_copy() -> float:
    source = torch.ones(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = [_time(lambda: target.copy_(source)) for _ in range(NUM_ROUNDS)]
    return 2 * source.nbytes / statistics.median(times) / 1e9


def _make_decode(num_sequences: int, length: int) -> Step:
    lengths = np.full(num_sequences, length)
    tables = _make_tables(num_sequences, length)
    group = DecodeGroup(0, lengths, (tables,), BLOCK_SIZE, DEVICE)
    num_bytes = num_sequences * length * 2 * NUM_KV_HEADS * HEAD_DIM * DTYPE.itemsize
    num_layers = max(1, min(MAX_LAYERS, PASS_BYTES // num_bytes))
    prefills = PrefillGroup(num_sequences, (), (tables[:0],), DEVICE)
    batch = _make_batch((group,), prefills)
    return Step(
        f"decode of {num_sequences} x {length}",
        batch,
        _random_rows(num_sequences),
        _make_caches(tables, num_layers),
        num_layers,
        num_bytes,
    )


def _make_prefill(chunks: tuple[tuple[int, int], ...]) -> Step:
    tables = _make_tables(len(chunks), max(start + length for start, length in chunks))
    shape = CacheShape(BLOCK_SIZE, (0,), DEVICE)
    rows = itertools.accumulate((length for _, length in chunks), initial=0)
    segments = tuple(
        PrefillSegment(row, length, start, (table,), shape)
        for row, (start, length), table in zip(rows, chunks, tables, strict=False)
    )
    num_rows = sum(length for _, length in chunks)
    seen = sum(length * start + length * (length + 1) / 2 for start, length in chunks)
    name = "prefill of " + ", ".join(f"{length} at {start}" for start, length in chunks)
    batch = _make_batch((), PrefillGroup(0, segments, (tables,), DEVICE))
    num_layers = min(8, MAX_LAYERS)
    return Step(
        name,
        batch,
        _random_rows(num_rows),
        _make_caches(tables, num_layers),
        num_layers,
        4 * NUM_Q_HEADS * HEAD_DIM * seen,
    )


def _make_batch(decodes: tuple[DecodeGroup, ...], prefills: PrefillGroup) -> ForwardBatch:
    """Return a batch that is good for attention alone."""
    none = torch.empty(0, dtype=torch.int64)
    return ForwardBatch(
        token_ids=none,
        unknown_rows=none,
        unknown_sources=none,
        positions=none,
        slot_mappings=(none,),
        embedding_rows=none,
        embeddings=None,
        logit_rows=none,
        decode_groups=decodes,
        prefills=prefills,
        sequences=(),
        sampled=(),
        scored=(),
    )


def _make_tables(num_sequences: int, length: int) -> np.ndarray:
    """Return tables of blocks that lie anywhere. [num_sequences, max_blocks], int64."""
    num_blocks = -(-length // BLOCK_SIZE)
    blocks = torch.randperm(num_sequences * num_blocks).numpy()
    return np.ascontiguousarray(blocks.reshape(num_sequences, num_blocks))


def _make_caches(tables: np.ndarray, num_layers: int) -> dict[str, KVCache]:
    """Return one cache for the kernels and one, with the same memory, for torch."""
    spec = ModelSpec(
        num_layers=num_layers,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        hidden_size=NUM_Q_HEADS * HEAD_DIM,
        vocab_size=1,
        max_positions=1 << 20,
        eos_token_ids=frozenset(),
        positions=PositionScheme.LINEAR,
        layer_windows=(0,) * num_layers,
    )
    layout = KVCacheLayout((GroupSize(tables.size),), BLOCK_SIZE)
    kernels = KVCache(spec, layout, DTYPE, DEVICE, TritonKernels())
    for tensor in (*kernels.keys, *kernels.values):
        tensor.normal_()
    torch_cache = KVCache(spec, KVCacheLayout((GroupSize(1),), BLOCK_SIZE), DTYPE, DEVICE)
    torch_cache.keys, torch_cache.values = kernels.keys, kernels.values
    return {"triton": kernels, "torch": torch_cache}


def _random_rows(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, NUM_Q_HEADS, HEAD_DIM, dtype=DTYPE, device=DEVICE)


if __name__ == "__main__":
    main()
