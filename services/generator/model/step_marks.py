"""Tell how long the parts of a step take where they are computed."""

from __future__ import annotations

import itertools
import time

import torch


class StepMarks:
    """Points between the parts of a step, in the order of the work of the device.

    A GPU passes them later than the host sets them.
    """

    def __init__(self, device: torch.device) -> None:
        """Set the first mark."""
        self._is_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self.set()

    def set(self) -> None:
        """Set a mark behind the work that was queued before."""
        if not self._is_gpu:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
        event.record()
        self._events.append(event)

    def wait(self) -> list[float]:
        """Wait until the device has passed the last mark and return the seconds between them."""
        if not self._is_gpu:
            return [after - before for before, after in itertools.pairwise(self._times)]
        self._events[-1].synchronize()
        pairs = itertools.pairwise(self._events)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]
