"""The forward alone: transformers, our fused decoder, its bare matrix products, and the limit.

Runs the language model of a random Qwen2-VL checkpoint of the 0.35B class in bfloat16, with two
threads, in this process. The variants take turns within every round, so that a disturbance of the
machine meets all of them::

    python -m benchmarks.decoder
    python -m benchmarks.decoder --quick
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.engine import FULL, NUM_THREADS, QUICK, SEED, count_weight_bytes, measure_bandwidth
from benchmarks.engine_report import Limit, limit_lines
from chiasm.common.families import PositionScheme
from chiasm.common.half_load import load_half
from chiasm.common.packed_linear import PackedLinear
from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.scheduled_step import ScheduledSequence
from chiasm.generator.engine.sequence import Prompt, Sequence
from chiasm.generator.model.attention_plan import CacheShape
from chiasm.generator.model.forward_batch import build_forward_batch
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout
from chiasm.generator.model.make_decoder import make_decoder
from chiasm.generator.model.model_spec import read_model_spec
from chiasm.generator.model.positions import compute_positions
from chiasm.kernels.cpu.native import find_kernels
from tests.fakes.checkpoints import TextSizes, make_bfloat16_qwen2_vl

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.generator.model.decoder import Decoder
    from chiasm.generator.model.forward_batch import ForwardBatch

BLOCK_SIZE = 16
HEAD_DIM = 64


@dataclass(frozen=True, slots=True)
class Work:
    """One forward: ``num_sequences``, each computing ``num_tokens`` up to ``context``."""

    name: str
    num_sequences: int
    num_tokens: int
    context: int


WORKS = (
    Work("decode, batch 1", 1, 1, 256),
    Work("decode, batch 16", 16, 1, 256),
    Work("decode, batch 64", 64, 1, 256),
    Work("prefill of 512 tokens", 1, 512, 512),
)


class BareProducts:
    """The matrix products of one forward and nothing else, on packed weights of their own."""

    def __init__(self, text: TextSizes) -> None:
        width, inner = text.hidden_size, text.intermediate_size
        heads = width + 2 * text.num_kv_heads * HEAD_DIM
        shapes = [(heads, width), (width, width), (2 * inner, width), (width, inner)]
        self._layers = [_random_linear(shape) for _ in range(text.num_layers) for shape in shapes]
        self._head = _random_linear((text.vocab_size, width))

    def run(self, num_rows: int, num_logit_rows: int) -> None:
        """Multiply inputs of ``num_rows`` in every layer, and ``num_logit_rows`` in the head."""
        inputs = {
            width: torch.ones(num_rows, width, dtype=torch.bfloat16)
            for width in {layer.num_inputs for layer in self._layers}
        }
        for layer in self._layers:
            layer(inputs[layer.num_inputs])
        self._head(inputs[self._head.num_inputs][:num_logit_rows])


def main() -> None:
    """Measure all works and print their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small model, few rounds")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every work")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory() as directory:
        model = make_bfloat16_qwen2_vl(Path(directory) / "model", plan.text, SEED)
        limit = Limit(count_weight_bytes(plan.text), measure_bandwidth(plan.bandwidth_bytes))
        decoders = _load_decoders(model)
    products = BareProducts(plan.text)
    _print(limit_lines(limit))
    heads = ["forward", "transformers", "fused", "w8a8", "bare products", "ratio", "w8a8 / fused"]
    _print([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"])
    for work in WORKS:
        runs = {name: _forward_of(decoder, work) for name, decoder in decoders.items()}
        runs["products"] = partial(_time_products, products, work)
        _print([_line(work, _measure(runs, arguments.rounds))])


@torch.inference_mode()
def _measure(runs: dict[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run by name, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_rounds + 1):
        for name, run in runs.items():
            seconds[name].append(run())
    return {name: values[1:] for name, values in seconds.items()}


def _load_decoders(path: Path) -> dict[str, Decoder]:
    """Return decoders of one checkpoint on one cache, which only their keys write."""
    halves = [load_half(path, "generator") for _ in range(3)]
    spec = read_model_spec(halves[0])
    num_blocks = sum(work.num_sequences * -(-work.context // BLOCK_SIZE) for work in WORKS)
    layout = KVCacheLayout((GroupSize(num_blocks),), BLOCK_SIZE)
    dtype, device = halves[0].dtype, torch.device("cpu")
    cache = KVCache(spec, layout, dtype, device, find_kernels("auto"))
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    return {
        "transformers": make_decoder("transformers", halves[0], cache),
        "fused": make_decoder("fused", halves[1], cache),
        "w8a8": make_decoder("fused", halves[2], cache, "w8a8"),
    }


def _forward_of(decoder: Decoder, work: Work) -> Callable[[], float]:
    """Return what runs ``work`` on a new batch and returns the seconds of forward and head."""

    def run() -> float:
        batch = make_batch(work, decoder.spec.vocab_size, decoder.device)
        started = time.perf_counter()
        decoder.compute_logits(decoder.forward(batch)[batch.logit_rows])
        return time.perf_counter() - started

    return run


def make_batch(work: Work, vocab_size: int, device: torch.device) -> ForwardBatch:
    """Return a batch of random tokens on random blocks of a cache; its positions are M-RoPE's."""
    blocks_each = -(-work.context // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(SEED)
    blocks = torch.randperm(work.num_sequences * blocks_each, generator=generator).tolist()
    tokens = torch.randint(vocab_size, (work.context,), generator=generator).tolist()
    start = work.context - work.num_tokens
    # A sequence that decodes has one prompt token; all others are its output.
    num_prompt_tokens = work.context if start == 0 else 1
    scheduled = []
    for index in range(work.num_sequences):
        positions = compute_positions(PositionScheme.MROPE, num_prompt_tokens, ())
        prompt = Prompt(tuple(tokens[:num_prompt_tokens]), (), positions)
        sequence = Sequence(index, prompt, SamplingParams(work.context, temperature=0.0))
        sequence.token_ids.extend(tokens[num_prompt_tokens:])
        sequence.tables[0].blocks.extend(blocks[index * blocks_each : (index + 1) * blocks_each])
        scheduled.append(ScheduledSequence(sequence, start, work.num_tokens))
    return build_forward_batch(scheduled, CacheShape(BLOCK_SIZE, (0,), device))


def _time_products(products: BareProducts, work: Work) -> float:
    started = time.perf_counter()
    products.run(work.num_sequences * work.num_tokens, work.num_sequences)
    return time.perf_counter() - started


def _random_linear(shape: tuple[int, int]) -> PackedLinear:
    return PackedLinear(torch.randn(shape, dtype=torch.bfloat16))


def _line(work: Work, seconds: dict[str, list[float]]) -> str:
    cells = [_spread(values) for values in seconds.values()]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["transformers"] / medians["fused"]
    saved = medians["w8a8"] / medians["fused"]
    return f"| {work.name} | {' | '.join(cells)} | {ratio:.2f} | {saved:.2f} |"


def _spread(seconds: list[float]) -> str:
    least, median, most = (
        1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds))
    )
    return f"{median:.1f} ms ({least:.1f} to {most:.1f})"


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
