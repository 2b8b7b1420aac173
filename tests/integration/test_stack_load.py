"""Two hundred picture requests at once against one encoder: answered, or refused with a reason."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from benchmarks.concurrency import measure
from tests.fakes.checkpoints import make_qwen2_vl
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_REQUESTS = 200
MIN_ANSWERED = 0.95


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(make_qwen2_vl(tmp_path_factory.mktemp("model")))
    yield running
    assert running.stop() == 0


def test_two_hundred_requests_at_once_are_answered_or_refused_with_a_reason(stack: Stack) -> None:
    _, many = asyncio.run(measure(stack.base_url, NUM_REQUESTS))

    assert len(many.answers) == NUM_REQUESTS
    assert many.num_complete >= MIN_ANSWERED * NUM_REQUESTS
    assert all('"code"' in answer.error for answer in many.answers if not answer.is_complete)
