"""Set the number of threads before each step, so that services on one host share its cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from chiasm.common.cores import Cores


class StepThreads:
    """Follows the shared core page: steps in the forward thread, rest while there are none.

    NOTE: torch keeps the number of threads per calling thread, so the forward thread sets its own.
    """

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._num_threads = 0
        self._is_busy = False

    def begin_step(self) -> None:
        """Mark this service busy and take the threads that its peers leave."""
        if not self._is_busy:
            self._cores.set_busy(True)
            self._is_busy = True
        num_threads = self._cores.available_threads()
        if num_threads != self._num_threads:
            torch.set_num_threads(num_threads)
            self._num_threads = num_threads

    def rest(self) -> None:
        """Leave the cores to others until the next step."""
        if self._is_busy:
            self._cores.set_busy(False)
            self._is_busy = False
