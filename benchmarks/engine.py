"""The engine beside the physical limit and ``transformers``: one run, medians and spread.

Runs a real generator on a random Qwen2-VL checkpoint of the 0.35B class in bfloat16, with two
threads, and measures the part of a step outside the forward, throughput against ``generate``, the
first token after a shared prefix, and the cost of a step by its sequences::

    python -m benchmarks.engine --plot docs/engine-steps.svg
    python -m benchmarks.engine --quick
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import engine_report
from benchmarks.engine_load import BatchRun, PromptSource, measure_ttft, run_batch
from benchmarks.engine_report import Comparison, Limit
from benchmarks.generate_peer import GeneratePeer
from benchmarks.line_plot import Labels, draw_plot, fit_line
from tests.fakes.checkpoints import TextSizes, make_bfloat16_qwen2_vl
from tests.harness.generator_process import GeneratorProcess

NUM_THREADS = 2
SEED = 1
PREFIX_TOKENS, OWN_TOKENS = 1000, 53  # 95 % of the prompt is shared
SHORT_CONTEXT = 32
COMPARED_BATCH = 16
FLAGS = (
    *("--max-running-sequences", "256", "--max-waiting-sequences", "1024"),
    # Whole batches are measured: their prompts need not make room for streams.
    *("--max-step-ms", "0"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a run.

    Attributes:
        text: Sizes of the model.
        context: Mean tokens of a prompt in the first two cells.
        num_tokens: Tokens generated per prompt there.
        num_rounds: Rounds of each cell; the prefix cell takes three times as many.
        batches: Batches whose overhead is measured.
        sequence_counts: Sequences of the steps whose cost is measured.
        bandwidth_bytes: Size of the tensor that is read to measure bandwidth.
    """

    text: TextSizes
    context: int
    num_tokens: int
    num_rounds: int
    batches: tuple[int, ...]
    sequence_counts: tuple[int, ...]
    bandwidth_bytes: int


FULL = Plan(
    text=TextSizes(24, 1024, 2816, 4, 32_000),
    context=256,
    num_tokens=48,
    num_rounds=3,
    batches=(16, 64),
    sequence_counts=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    bandwidth_bytes=1 << 30,
)
QUICK = Plan(
    text=TextSizes(4, 256, 704, 2, 8_000),
    context=64,
    num_tokens=24,
    num_rounds=2,
    batches=(16, 64),
    sequence_counts=(1, 4, 16, 64),
    bandwidth_bytes=1 << 28,
)


def main() -> None:
    """Run all cells and print their tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small model, few rounds")
    parser.add_argument("--plot", type=Path, help="SVG file for the cost by sequences")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory() as directory:
        model = make_bfloat16_qwen2_vl(Path(directory) / "model", plan.text, SEED)
        limit = Limit(count_weight_bytes(plan.text), measure_bandwidth(plan.bandwidth_bytes))
        _print(engine_report.limit_lines(limit))
        state_dir = Path(directory) / "state"
        state_dir.mkdir()
        process = GeneratorProcess(model, state_dir, "", FLAGS, NUM_THREADS)
        try:
            _run_cells(process, model, plan, limit, arguments.plot)
        finally:
            process.stop()


def count_weight_bytes(text: TextSizes) -> int:
    """Return the bytes of the weights that every step reads: layers and head, in bfloat16."""
    width = text.hidden_size
    attention = 2 * width * width + 2 * width * text.num_kv_heads * 64
    layer = attention + 3 * width * text.intermediate_size
    return 2 * (text.num_layers * layer + width * text.vocab_size)


def measure_bandwidth(num_bytes: int, num_rounds: int = 7) -> float:
    """Return the most bytes per second with which a large tensor was read."""
    data = torch.ones(num_bytes // 4)
    durations = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        data.sum()
        durations.append(time.perf_counter() - start)
    return num_bytes / min(durations)


def _run_cells(
    process: GeneratorProcess, model: Path, plan: Plan, limit: Limit, plot: Path | None
) -> None:
    source = PromptSource(plan.text.vocab_size, SEED)
    run_batch(process, source.prompts(4, plan.context), plan.num_tokens)  # first touches
    _print(engine_report.overhead_lines(_measure_overhead(process, source, plan), limit))
    comparison = _compare(process, model, source, plan)
    _print(engine_report.comparison_lines(comparison, COMPARED_BATCH, limit))
    _print(engine_report.prefix_lines(*_measure_prefix(process, source, plan)))
    points = _measure_scaling(process, source, plan)
    _print(engine_report.scaling_lines(points, limit))
    if plot is not None:
        labels = Labels("Seconds of a decode step", "running sequences", "seconds")
        plot.write_text(draw_plot(points, fit_line(points), labels), encoding="utf-8")


def _measure_overhead(
    process: GeneratorProcess, source: PromptSource, plan: Plan
) -> dict[int, list[BatchRun]]:
    runs: dict[int, list[BatchRun]] = {batch: [] for batch in plan.batches}
    for _ in range(plan.num_rounds):
        for batch, rounds in runs.items():
            # Equal lengths: all are decoded from the same step on.
            prompts = [source.prompt(plan.context) for _ in range(batch)]
            rounds.append(run_batch(process, prompts, _enough_tokens(batch, plan)))
    return runs


def _compare(
    process: GeneratorProcess, model: Path, source: PromptSource, plan: Plan
) -> Comparison:
    peer = GeneratePeer(model, NUM_THREADS)
    comparison = Comparison(COMPARED_BATCH * plan.num_tokens, [], [], [])
    try:
        peer.generate(source.prompts(2, plan.context), plan.num_tokens, batch=True)
        for _ in range(plan.num_rounds):
            prompts = source.prompts(COMPARED_BATCH, plan.context)
            run = run_batch(process, prompts, plan.num_tokens)
            comparison.engine_s.append(run.wall_s)
            one_by_one_s = peer.generate(prompts, plan.num_tokens, batch=False)
            comparison.one_by_one_s.append(one_by_one_s)
            comparison.padded_s.append(peer.generate(prompts, plan.num_tokens, batch=True))
    finally:
        peer.stop()
    return comparison


def _measure_prefix(
    process: GeneratorProcess, source: PromptSource, plan: Plan
) -> tuple[list[float], list[float]]:
    cold, warm = [], []
    for _ in range(3 * plan.num_rounds):
        prefix = source.prompt(PREFIX_TOKENS)
        cold.append(measure_ttft(process, prefix + source.prompt(OWN_TOKENS)))
        warm.append(measure_ttft(process, prefix + source.prompt(OWN_TOKENS)))
    return cold, warm


def _measure_scaling(
    process: GeneratorProcess, source: PromptSource, plan: Plan
) -> list[tuple[float, float]]:
    """Return the median seconds of a decode step by its sequences, over all rounds."""
    steps: dict[int, list[float]] = {number: [] for number in plan.sequence_counts}
    for _ in range(plan.num_rounds):
        for number, seconds in steps.items():
            prompts = [source.prompt(SHORT_CONTEXT) for _ in range(number)]
            run = run_batch(process, prompts, _enough_tokens(number, plan))
            seconds.extend(step.total_s for step in run.steps)
    return [(float(number), statistics.median(seconds)) for number, seconds in steps.items()]


def _enough_tokens(batch: int, plan: Plan) -> int:
    """Return how many tokens keep the first sequence alive until the last one is prefilled."""
    return plan.num_tokens + batch // 4


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
