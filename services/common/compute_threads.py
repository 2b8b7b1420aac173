"""Share a host's cores layer by layer: the thread that computes follows what others leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chiasm.common.thread_bound import ThreadBound

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.common.cores import Cores


class ComputeThreads:
    """Threads of the one thread that computes; take part in the page while there is work.

    Peers tell what they need; see ``cores.py``. Other processes do not; see ``thread_bound.py``.

    NOTE: torch keeps the number of threads per calling thread: call from the one that computes.
    """

    def __init__(self, cores: Cores, bound: ThreadBound | None = None) -> None:
        """Build at rest.

        Args:
            cores: Tells what peers leave.
            bound: Tells what other processes leave; injected by tests.
        """
        self._cores = cores
        self._bound = bound or ThreadBound()
        self._num_threads = 0
        self._is_busy = False

    def begin(self) -> None:
        """Mark this service busy and take the threads that its peers leave."""
        if not self._is_busy:
            self._cores.set_busy(True)
            self._is_busy = True
        self._bound.pause()
        self.adjust()

    def adjust(self) -> None:
        """Take the threads that others leave now; cheap enough for every layer."""
        num_threads = self._bound.apply(self._cores.available_threads())
        if num_threads != self._num_threads:
            torch.set_num_threads(num_threads)
            self._num_threads = num_threads

    def rest(self) -> None:
        """Leave the cores to others until there is work."""
        if self._is_busy:
            self._cores.set_busy(False)
            self._is_busy = False


def call_before_layers(model: torch.nn.Module, callback: Callable[[], None]) -> None:
    """Have ``callback`` called before each layer of ``model``: each member of a list of modules."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.register_forward_pre_hook(lambda *_: callback())
