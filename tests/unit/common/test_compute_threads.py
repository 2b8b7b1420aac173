"""The thread that computes follows the shared core page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.compute_threads import ComputeThreads, call_before_layers
from chiasm.common.thread_bound import ThreadBound

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


def test_each_begin_takes_the_threads_that_peers_leave() -> None:
    cores = _Cores()
    threads = ComputeThreads(cores)

    seen = []
    for available in (2, 2, 1):
        cores.available = available
        threads.begin()
        seen.append(torch.get_num_threads())

    assert seen == [2, 2, 1]


def test_no_more_threads_are_taken_than_other_processes_leave() -> None:
    class Bound(ThreadBound):
        num_pauses = 0

        def apply(self, wanted: int) -> int:
            return wanted - 1

        def pause(self) -> None:
            self.num_pauses += 1

    cores = _Cores()
    cores.available = 3
    bound = Bound()
    threads = ComputeThreads(cores, bound)

    threads.begin()
    assert torch.get_num_threads() == 2
    assert bound.num_pauses == 1
    cores.available = 2
    threads.adjust()
    assert torch.get_num_threads() == 1
    assert bound.num_pauses == 1


def test_busy_word_is_written_when_it_changes() -> None:
    cores = _Cores()
    threads = ComputeThreads(cores)

    threads.rest()
    threads.begin()
    threads.begin()
    threads.rest()
    threads.rest()

    assert cores.busy == [True, False]


def test_threads_change_between_layers_with_what_peers_leave() -> None:
    cores = _Cores()
    threads = ComputeThreads(cores)
    seen = []

    class Layer(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            cores.available = 2
            return rows

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                rows = layer(rows)
            return rows

    model = Model()
    call_before_layers(model, threads.adjust)
    threads.begin()
    model(torch.zeros(1))

    assert seen == [1, 2]
