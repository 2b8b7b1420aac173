"""Threads of the engine follow the shared core page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.generator.engine.step_threads import StepThreads

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Cores:
    def __init__(self) -> None:
        self.available = 1
        self.busy: list[bool] = []

    def set_busy(self, is_busy: bool) -> None:
        self.busy.append(is_busy)

    def available_threads(self) -> int:
        return self.available


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_each_step_takes_the_threads_that_peers_leave() -> None:
    cores = _Cores()
    threads = StepThreads(cores)

    seen = []
    for available in (2, 2, 1):
        cores.available = available
        threads.begin_step()
        seen.append(torch.get_num_threads())

    assert seen == [2, 2, 1]


def test_busy_word_is_written_when_it_changes() -> None:
    cores = _Cores()
    threads = StepThreads(cores)

    threads.rest()
    threads.begin_step()
    threads.begin_step()
    threads.rest()
    threads.rest()

    assert cores.busy == [True, False]
