"""Record what a GPU is told to do, and tell it again in one launch.

Source: CUDA Graphs, CUDA C++ Programming Guide, section 4.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


class Recorder(Protocol):
    """Makes work that can be repeated."""

    def __call__(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Return what repeats ``work`` on whatever the tensors that it reads hold by then.

        What it returns lies in the same memory each time, until work that was recorded later, or
        earlier, is repeated.
        """
        ...


class GraphRecorder:
    """Records work as CUDA graphs, which share the memory of what they compute on the way."""

    def __init__(self, device: torch.device) -> None:
        """Record on a stream of ``device`` of its own."""
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """See ``Recorder``."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        # Once before: kernels are compiled and libraries take their memory, which no graph can.
        with torch.cuda.stream(self._stream):
            work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile does not matter.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = work()
        current.wait_stream(self._stream)
        return _Replay(graph, work, result)


class _Replay(Generic[Result]):
    """Repeats recorded work; keeps it, as the graph reads the memory of all that it holds."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, work: Callable[[], Result], result: Result
    ) -> None:
        self._graph = graph
        self._work = work
        self._result = result

    def __call__(self) -> Result:
        """Queue it, and return where its result will be."""
        self._graph.replay()
        return self._result
