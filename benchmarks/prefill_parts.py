"""A prefill beside the sum of its parts, each run alone over all layers.

Runs the fused decoder of a random Qwen2-VL checkpoint of the 0.35B class in bfloat16, with two
threads, in this process. Whole and parts take turns within every round::

    python -m benchmarks.prefill_parts
    python -m benchmarks.prefill_parts --tokens 512 --quantization w8a8
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.decoder import BLOCK_SIZE, Work, make_batch
from benchmarks.engine import FULL, NUM_THREADS, QUICK, SEED
from chiasm.common.half_load import load_half
from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.model.attention import AttentionContext, ScoreRule, attend_to_cache
from chiasm.generator.model.fused.fused_decoder import FusedDecoder
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout
from chiasm.generator.model.model_spec import read_model_spec
from chiasm.kernels.cpu.native import find_kernels
from tests.fakes.checkpoints import make_bfloat16_qwen2_vl

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.kernels.cpu.quantized_layer import Quantization


class Parts:
    """What a forward of the fused decoder consists of; each part runs in all layers."""

    def __init__(self, decoder: FusedDecoder, cache: KVCache, batch: ForwardBatch) -> None:
        """Prepare inputs of the right sizes."""
        self._decoder, self._cache, self._batch = decoder, cache, batch
        spec, dtype = decoder.spec, cache.keys[0].dtype
        num_rows = len(batch.token_ids)
        description = decoder._description
        self._hidden = torch.randn(num_rows, spec.hidden_size).to(dtype)
        self._addend = torch.randn(num_rows, spec.hidden_size).to(dtype)
        heads = (description.num_q_heads, spec.num_kv_heads, spec.num_kv_heads)
        self._heads = tuple(torch.randn(num_rows, n, spec.head_dim).to(dtype) for n in heads)
        self._qkv = torch.cat([heads.flatten(1) for heads in self._heads], dim=1)
        self._gated = torch.randn(num_rows, decoder._layers[0]._weights.down.num_inputs).to(dtype)
        self._rotations = decoder._make_rotations(self._hidden, batch)

    def products(self) -> None:
        """Multiply by all weights; gates are part of the products."""
        attended = self._heads[0].flatten(1)
        for layer in self._decoder._layers:
            weights = layer._weights
            weights.qkv(self._hidden)
            weights.output(attended)
            weights.gate_up(self._hidden)
            weights.down(self._gated)
        self._decoder.compute_logits(self._hidden[-1:])

    def attention(self) -> None:
        """Attend to the cache."""
        context = AttentionContext(self._batch, self._cache)
        rule = ScoreRule(self._decoder._description.attention_scale)
        query, key, value = self._heads
        for index in range(len(self._decoder._layers)):
            attend_to_cache(context, index, (query, key, value), rule)

    def norms(self) -> None:
        """Add and norm."""
        hidden = self._hidden.clone()
        for layer in self._decoder._layers:
            layer._attention_norm(hidden, self._addend)
            layer._mlp_norm(hidden, self._addend)
        self._decoder._last_norm(hidden, self._addend)

    def rotary(self) -> None:
        """Turn queries and keys, and store keys and values."""
        context = AttentionContext(self._batch, self._cache)
        for index, layer in enumerate(self._decoder._layers):
            layer._place(self._qkv, self._rotations[layer.rotary_type], context.slots_of(index))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small model")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--quantization", choices=("none", "w8a8"), default="none")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of whole and parts")
    given = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    plan = QUICK if given.quick else FULL
    work = Work("prefill", 1, given.tokens, given.tokens)
    with tempfile.TemporaryDirectory() as directory:
        model = make_bfloat16_qwen2_vl(Path(directory) / "model", plan.text, SEED)
        decoder, cache = _load(model, work, given.quantization)
    batch = make_batch(work, decoder.spec.vocab_size, decoder.device)
    parts = Parts(decoder, cache, batch)
    runs: dict[str, Callable[[], object]] = {
        "whole": lambda: decoder.compute_logits(decoder.forward(batch)[batch.logit_rows]),
        "products": parts.products,
        "attention": parts.attention,
        "norms": parts.norms,
        "rotary, store": parts.rotary,
    }
    seconds = _measure(runs, given.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    total = sum(medians.values()) - medians["whole"]
    cells = [f"{name} | {_spread(values)}" for name, values in seconds.items()]
    sys.stdout.write("\n".join(f"| {cell} |" for cell in cells))
    sys.stdout.write(f"\n| whole / sum of its parts | {medians['whole'] / total:.2f} |\n")


def _load(path: Path, work: Work, quantization: Quantization) -> tuple[FusedDecoder, KVCache]:
    half = load_half(path, "generator")
    layout = KVCacheLayout((GroupSize(-(-work.context // BLOCK_SIZE)),), BLOCK_SIZE)
    cache = KVCache(
        read_model_spec(half), layout, half.dtype, torch.device("cpu"), find_kernels("auto")
    )
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    return FusedDecoder(half, cache, quantization), cache


@torch.inference_mode()
def _measure(runs: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each run by name, the first round left out."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: values[1:] for name, values in times.items()}


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ms ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
