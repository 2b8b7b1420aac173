"""Step figures in metrics and in the trace file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY

from chiasm.generator.engine.observers import StepMetrics, StepTrace
from chiasm.generator.engine.outputs import SequenceTimes, StepStatistics

if TYPE_CHECKING:
    from pathlib import Path

STATISTICS = StepStatistics(
    step=3,
    num_sequences=5,
    num_prefill_tokens=12,
    num_decode_tokens=4,
    num_output_tokens=5,
    num_queried_tokens=40,
    num_cached_tokens=32,
    num_running=5,
    num_waiting=2,
    num_used_blocks=6,
    num_blocks=24,
    num_preemptions=1,
    schedule_s=0.001,
    build_s=0.002,
    forward_s=0.02,
    sample_s=0.003,
    update_s=0.001,
    step_s=0.025,
    finished=(SequenceTimes(queue_s=0.5, prefill_s=0.25, decode_s=2.0),),
)


def _value(name: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "tiny-observed"})


def test_metrics_keep_the_names_of_vllm() -> None:
    metrics = StepMetrics("tiny-observed", 24)

    metrics.observe(STATISTICS)
    metrics.observe(STATISTICS)

    assert _value("vllm:num_requests_running") == 5
    assert _value("vllm:num_requests_waiting") == 2
    assert _value("vllm:kv_cache_usage_perc") == 0.25
    assert _value("vllm:num_preemptions_total") == 2
    assert _value("vllm:prefix_cache_queries_total") == 80
    assert _value("vllm:prefix_cache_hits_total") == 64
    assert _value("vllm:iteration_tokens_total_sum") == 32
    assert _value("vllm:request_queue_time_seconds_sum") == 1.0
    assert _value("vllm:request_prefill_time_seconds_sum") == 0.5
    assert _value("vllm:request_decode_time_seconds_sum") == 4.0


def test_time_of_a_step_is_told_by_stage() -> None:
    def seconds(stage: str) -> float:
        name = "chiasm_generator_step_stage_seconds_sum"
        return REGISTRY.get_sample_value(name, {"stage": stage}) or 0.0

    before = {stage: seconds(stage) for stage in ("schedule", "build", "forward", "sample")}

    StepMetrics("tiny-observed", 24).observe(STATISTICS)

    grown = {stage: round(seconds(stage) - value, 6) for stage, value in before.items()}
    assert grown == {"schedule": 0.001, "build": 0.002, "forward": 0.02, "sample": 0.003}


def test_trace_has_one_readable_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = StepTrace(path)

    trace.observe(STATISTICS)
    trace.observe(STATISTICS)
    lines = path.read_text().splitlines()
    trace.close()

    assert len(lines) == 2
    assert json.loads(lines[0])["num_sequences"] == 5
