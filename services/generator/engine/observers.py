"""Record the figures of each step: metrics for dashboards, a trace for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from chiasm.common import metrics

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.generator.engine.outputs import EngineState, StepStatistics


class StepMetrics:
    """Feeds the engine's metrics."""

    def __init__(self, model_name: str, num_blocks: int) -> None:
        self._running = metrics.NUM_REQUESTS_RUNNING.labels(model_name)
        self._waiting = metrics.NUM_REQUESTS_WAITING.labels(model_name)
        self._usage = metrics.KV_CACHE_USAGE_PERC.labels(model_name)
        self._preemptions = metrics.NUM_PREEMPTIONS.labels(model_name)
        self._tokens = metrics.ITERATION_TOKENS.labels(model_name)
        self._queue_s = metrics.REQUEST_QUEUE_TIME_SECONDS.labels(model_name)
        self._prefill_s = metrics.REQUEST_PREFILL_TIME_SECONDS.labels(model_name)
        self._decode_s = metrics.REQUEST_DECODE_TIME_SECONDS.labels(model_name)
        self._queried = metrics.PREFIX_CACHE_QUERIES.labels(model_name)
        self._cached = metrics.PREFIX_CACHE_HITS.labels(model_name)
        self._stages = {
            f"{stage}_s": metrics.GENERATOR_STEP_STAGE_SECONDS.labels(stage)
            for stage in ("schedule", "build", "forward", "sample", "update")
        }
        metrics.GENERATOR_BLOCKS.set(num_blocks)

    def observe(self, statistics: StepStatistics) -> None:
        """Take note of one step."""
        self.observe_state(statistics.state)
        self._preemptions.inc(statistics.num_preemptions)
        self._tokens.observe(statistics.num_prefill_tokens + statistics.num_decode_tokens)
        metrics.GENERATOR_STEP_SEQUENCES.observe(statistics.num_sequences)
        metrics.GENERATOR_STEP_SECONDS.observe(statistics.step_s)
        self._queried.inc(statistics.num_queried_tokens)
        self._cached.inc(statistics.num_cached_tokens)
        for stage, seconds in self._stages.items():
            seconds.observe(getattr(statistics, stage))
        for times in statistics.finished:
            self._queue_s.observe(times.queue_s)
            self._prefill_s.observe(times.prefill_s)
            self._decode_s.observe(times.decode_s)

    def observe_state(self, state: EngineState) -> None:
        """Take note of what the engine holds."""
        self._running.set(state.num_running)
        self._waiting.set(state.num_waiting)
        self._usage.set(state.num_used_blocks / state.num_blocks)
        metrics.GENERATOR_BLOCKS_USED.set(state.num_used_blocks)


class StepTrace:
    """Appends one JSON object per step to a file, readable while the engine runs."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def observe(self, statistics: StepStatistics) -> None:
        """Write one line."""
        self._file.write(json.dumps(dataclasses.asdict(statistics)) + "\n")

    def observe_state(self, state: EngineState) -> None:
        """Write nothing: there was no step."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()
