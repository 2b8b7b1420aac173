"""Metrics of a request: dashboards for vLLM read the same of several answers as of one."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from chiasm.gateway.chat_events import Usage
from chiasm.gateway.request_metrics import RequestMetrics

NUM_ANSWERS = 8
STEP_S = 0.25


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _samples(model: str, name: str) -> tuple[float, float]:
    """Return how many samples a histogram has, and their sum."""
    labels = {"model_name": model}
    count, total = (
        REGISTRY.get_sample_value(f"vllm:{name}_{one}", labels) for one in ("count", "sum")
    )
    return count or 0.0, total or 0.0


def _answer(model: str, counts: list[list[int]]) -> None:
    """Answer a request; ``counts`` are the tokens of each answer in each step."""
    clock = _Clock()
    with RequestMetrics(model, "r", clock) as request:
        for step in counts:
            clock.now_s += STEP_S
            for index, num_tokens in enumerate(step):
                if num_tokens:
                    request.record_tokens(index, num_tokens)
        num_tokens = sum(map(sum, counts))
        request.finish("stop", Usage(num_output_tokens=num_tokens), len(counts[0]))


@pytest.mark.parametrize("num_answers", [1, NUM_ANSWERS])
def test_times_between_tokens_are_those_of_each_answer(num_answers: int) -> None:
    model = f"times-{num_answers}"

    _answer(model, [[1] * num_answers] * 5)

    assert _samples(model, "time_to_first_token_seconds") == (1, STEP_S)
    gaps = 4 * num_answers
    assert _samples(model, "inter_token_latency_seconds") == (gaps, gaps * STEP_S)
    expected = (num_answers, num_answers * STEP_S)
    assert _samples(model, "request_time_per_output_token_seconds") == expected


def test_the_most_tokens_are_those_of_the_longest_answer() -> None:
    _answer("most", [[1, 1, 2], [1, 0, 2], [1, 0, 0]])

    assert _samples("most", "request_max_num_generation_tokens") == (1, 4)
    assert _samples("most", "request_generation_tokens") == (1, 8)


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    _answer("single", [[1, 0], [0, 1]])

    assert _samples("single", "inter_token_latency_seconds") == (0, 0)
    assert _samples("single", "request_time_per_output_token_seconds") == (0, 0)


def test_tokens_that_come_together_share_the_time_they_took() -> None:
    _answer("merged", [[1], [4]])

    assert _samples("merged", "inter_token_latency_seconds") == (1, STEP_S / 4)
    assert _samples("merged", "request_time_per_output_token_seconds") == (1, STEP_S / 4)
