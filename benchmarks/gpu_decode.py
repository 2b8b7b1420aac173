"""A 3B language model and its tower on one GPU: ours, transformers, and the physical limit.

Runs a random Qwen2.5-VL of the 3B model's sizes in bfloat16, in this process. The limit of a decode
is what it must read over the rate at which a copy reads and writes; that of a prefill is its matrix
products over the best rate of a large one::

    python -m benchmarks.gpu_decode
    python -m benchmarks.gpu_decode --quick
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import tower
from benchmarks.decoder import Work, make_batch
from benchmarks.gpu_model import (
    CUDA,
    DTYPE,
    TEXT,
    StepClock,
    count_context_bytes,
    count_weight_bytes,
    make_decoders,
    make_model,
)
from chiasm.generator.engine.sampler import SampledRow, Sampler
from chiasm.generator.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chiasm.generator.model.decoder import Decoder

BATCHES = (1, 16, 64)
CONTEXT = 1024
PREFILL = 2048
NUM_STEPS = 12
# Room for the decodes, and for a chunk behind another one.
CACHE_TOKENS = max(BATCHES) * (CONTEXT + NUM_STEPS + max(BATCHES) + 32)
WORKS = (
    *(Work(f"decode, batch {batch}", batch, 1, CONTEXT) for batch in BATCHES),
    Work("prefill of 40", 1, 40, 40),
    Work("prefill of 320", 1, 320, 320),
    Work("prefill of 320 behind 1024", 1, 320, 1344),
    Work("prefill of 900", 1, 900, 900),
    Work(f"prefill of {PREFILL}", 1, PREFILL, PREFILL),
    Work(f"prefill of {PREFILL} behind {PREFILL}", 1, PREFILL, 2 * PREFILL),
)
COPY_BYTES = 4 << 30
PRODUCT_WIDTH = 8192
QUICK_TEXT = {**TEXT, "num_hidden_layers": 2}


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers instead of 36")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every forward")
    arguments = parser.parse_args()
    sizes = QUICK_TEXT if arguments.quick else TEXT
    with torch.inference_mode():
        limits = _Limits(sizes)
        _print(limits.lines())
        decoders = make_decoders(sizes, CACHE_TOKENS)
        _print(_forward_lines(decoders, limits, arguments.rounds))
        _print(_tower_lines(limits, arguments.rounds))
        for name in ("fused", "replayed"):
            _print(_step_lines(name, decoders[name], limits))
        _print(_generate_lines(make_model(sizes)))
        # Last, because launches stay slower once there was a profiler.
        for name in ("fused", "replayed"):
            _print(_profile_lines(name, decoders[name]))


class _Limits:
    """What the device can do at most, and what a forward needs of it."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        self._weight_bytes = count_weight_bytes(sizes)
        self._context_bytes = count_context_bytes(sizes)
        self._head_bytes = sizes["hidden_size"] * sizes["vocab_size"] * DTYPE.itemsize
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=CUDA)
        target = torch.empty_like(source)
        self.bandwidth = 2 * COPY_BYTES / min(time_rounds(lambda: target.copy_(source), 9))
        left, right = torch.randn(2, PRODUCT_WIDTH, PRODUCT_WIDTH, device=CUDA, dtype=DTYPE)
        seconds = min(time_rounds(lambda: left @ right, 9))
        self.product_rate = 2 * PRODUCT_WIDTH**3 / seconds

    def lines(self) -> list[str]:
        """Return what the device is and can do."""
        return [
            f"{torch.cuda.get_device_name(CUDA)}, torch {torch.__version__}",
            f"copy {self.bandwidth / 1e12:.2f} TB/s read and written, bfloat16 product"
            f" {self.product_rate / 1e12:.0f} TFLOP/s",
            f"weights of a step {self._weight_bytes / 1e9:.2f} GB, context"
            f" {self._context_bytes} bytes a token",
        ]

    def seconds_of(self, work: Work) -> float:
        """Return the least seconds of a forward."""
        num_rows = work.num_sequences * work.num_tokens
        context_bytes = work.num_sequences * work.context * self._context_bytes
        read_s = (self._weight_bytes + context_bytes) / self.bandwidth
        num_weights = (self._weight_bytes - self._head_bytes) // DTYPE.itemsize
        return max(read_s, float(2 * num_rows * num_weights / self.product_rate))


def time_rounds(run: Callable[[], object], num_rounds: int) -> list[float]:
    """Return the seconds of each round, the device's work included; one more comes before."""
    return _time_rounds(lambda: run, num_rounds)


def _time_rounds(prepare: Callable[[], Callable[[], object]], num_rounds: int) -> list[float]:
    """Return the seconds of what ``prepare`` returns, without its own; see ``time_rounds``."""
    seconds = []
    for _ in range(num_rounds + 1):
        run = prepare()
        torch.cuda.synchronize(CUDA)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(CUDA)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _forward_of(decoder: Decoder, work: Work) -> Callable[[], torch.Tensor]:
    """Return a forward of a new batch; where its sequences' contexts lie is found out within."""
    batch = make_batch(work, decoder.spec.vocab_size, decoder.device)
    return lambda: decoder.compute_logits(decoder.forward(batch)[batch.logit_rows])


def _forward_lines(decoders: dict[str, Decoder], limits: _Limits, num_rounds: int) -> list[str]:
    lines = ["", "forward and head, ms: median (least to most)"]
    lines += _table_head(["forward", *decoders, "limit", "replayed / limit"])
    for work in WORKS:
        seconds = {
            name: _time_rounds(partial(_forward_of, decoder, work), num_rounds)
            for name, decoder in decoders.items()
        }
        limit_s = limits.seconds_of(work)
        ratio = statistics.median(seconds["replayed"]) / limit_s
        cells = [*map(_spread, seconds.values()), f"{1e3 * limit_s:.2f}", f"{ratio:.1f}"]
        lines.append(f"| {work.name} | {' | '.join(cells)} |")
    return lines


def _step_lines(name: str, decoder: Decoder, limits: _Limits) -> list[str]:
    """Return the seconds of whole steps of the engine that decode, sampling included."""
    lines = ["", f"step of the engine, {name}, context {CONTEXT}, ms: median (least to most)"]
    lines += _table_head(["batch", "step", "build, forward, sample", "limit", "tokens/s"])
    clock = StepClock(decoder, CACHE_TOKENS)
    for work in WORKS[: len(BATCHES)]:
        batch = work.num_sequences
        steps = clock.decode(batch, CONTEXT, NUM_STEPS)
        parts = (
            f"{1e3 * statistics.median(getattr(step, name) for step in steps):.2f}"
            for name in ("build_s", "forward_s", "sample_s")
        )
        step_s = [step.step_s for step in steps]
        cells = [
            _spread(step_s),
            ", ".join(parts),
            f"{1e3 * limits.seconds_of(work):.2f}",
            f"{batch / statistics.median(step_s):.0f}",
        ]
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    clock.close()
    return lines


def _step_of(decoder: Decoder, work: Work) -> Callable[[], object]:
    """Return a forward with the choice of tokens behind it."""
    rows = [SampledRow(SamplingParams(8, temperature=0.0), 0)] * work.num_sequences
    forward = _forward_of(decoder, work)
    return lambda: Sampler().sample(forward(), rows)


def _profile_lines(name: str, decoder: Decoder) -> list[str]:
    """Return how much of a decode step the device works, and in how many launches."""
    lines = ["", f"a decode step of the decoder {name} under the profiler"]
    lines += _table_head(["batch", "launches", "device busy ms", "step ms", "busy"])
    tables = []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for work in WORKS[: len(BATCHES)]:
        prepare = partial(_step_of, decoder, work)
        step_s = statistics.median(_time_rounds(prepare, 9))
        run = prepare()
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize(CUDA)
        kernels = [event for event in profile.events() or () if "CUDA" in str(event.device_type)]
        busy_s = sum(event.self_device_time_total for event in kernels) / 1e6
        cells = [str(len(kernels)), f"{1e3 * busy_s:.2f}", f"{1e3 * step_s:.2f}"]
        lines.append(f"| {work.num_sequences} | {' | '.join(cells)} | {busy_s / step_s:.0%} |")
        tables.append(profile.key_averages().table("self_cuda_time_total", row_limit=12))
    return [*lines, *tables]


def _generate_lines(model: Any) -> list[str]:
    """Return what transformers' own ``generate`` takes, its cache as it comes."""
    lines = ["", "transformers generate (sdpa), ms: median (least to most)"]
    lines += _table_head(["batch", "a token", "prompt and first token"])
    for batch, context in ((1, CONTEXT), (16, CONTEXT), (64, CONTEXT), (1, PREFILL)):
        token_ids = torch.randint(1, 1000, (batch, context), device=CUDA)

        def run(num_tokens: int, token_ids: torch.Tensor = token_ids) -> None:
            model.generate(
                input_ids=token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
            )

        first = time_rounds(lambda: run(1), 3)
        whole = time_rounds(lambda: run(1 + NUM_STEPS), 3)
        each = [(one - statistics.median(first)) / NUM_STEPS for one in whole]
        lines.append(f"| {batch} x {context} | {_spread(each)} | {_spread(first)} |")
    return lines


def _tower_lines(limits: _Limits, num_rounds: int) -> list[str]:
    towers = tower.make_towers(tower.SIZES, CUDA)
    patches = torch.randn(
        tower.NUM_PATCHES, 3 * 2 * tower.PATCH * tower.PATCH, device=CUDA, dtype=DTYPE
    )
    grid = torch.tensor([[1, tower.GRID, tower.GRID]], device=CUDA)
    seconds = {
        name: time_rounds(lambda one=one: one(patches, grid_thw=grid), num_rounds)  # type: ignore[misc]  # a lambda
        for name, one in towers.items()
    }
    limit_s = tower.count_operations(tower.SIZES) / limits.product_rate
    lines = ["", f"tower, one picture of {tower.SIDE} x {tower.SIDE}, ms: median (least to most)"]
    lines += _table_head([*seconds, "limit"])
    return [*lines, f"| {' | '.join(map(_spread, seconds.values()))} | {1e3 * limit_s:.2f} |"]


def _table_head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _spread(seconds: Sequence[float]) -> str:
    least, median, most = (
        1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds))
    )
    return f"{median:.2f} ({least:.2f} to {most:.2f})"


def _print(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
