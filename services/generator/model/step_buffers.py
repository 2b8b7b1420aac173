"""Memory for the tensors of steps that is reserved once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from chiasm.common.device import send

if TYPE_CHECKING:
    from collections.abc import Sequence

# One step is built while the one before runs.
_NUM_SETS = 2


class StepBuffers:
    """Named int64 buffers at fixed addresses, in two sets that steps use in turn.

    On a GPU a value is written to pinned memory and copied from there by the device, in the order
    of its work, so that nothing waits; its address is one of two, which is what the capture of a
    forward as a graph needs.
    """

    def __init__(self, num_columns: int, device: torch.device) -> None:
        """Reserve nothing yet; a buffer is made when its name is first used.

        Args:
            num_columns: Most values in a row of a buffer; longer ones get memory of their own.
            device: Where the values are read.
        """
        self._num_columns = num_columns
        self._device = device
        self._is_pinned = device.type == "cuda"
        self._sets: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = [
            {} for _ in range(_NUM_SETS)
        ]
        self._turn = 0

    def begin(self) -> None:
        """Begin a step: what was put for the last but one is overwritten from now on."""
        self._turn = (self._turn + 1) % _NUM_SETS

    def put(self, name: str, values: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Return ``values`` on the device.

        Args:
            name: Which buffer; used once per step.
            values: [num_values] or [num_rows, num_values], integers; ``num_rows`` is the same in
                every step.
        """
        array = np.asarray(values, dtype=np.int64)
        if array.shape[-1] > self._num_columns:
            return send(array, self._device)
        host, device = self._buffer(name, array.shape[:-1])
        part = (..., slice(0, array.shape[-1]))
        host[part].copy_(torch.from_numpy(array))
        if host is not device:
            device[part].copy_(host[part], non_blocking=True)
        return device[part]

    def _buffer(self, name: str, rows: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the host's and the device's memory of a buffer; the same on a CPU."""
        buffers = self._sets[self._turn]
        if name not in buffers:
            shape = (*rows, self._num_columns)
            host = torch.zeros(shape, dtype=torch.int64, pin_memory=self._is_pinned)
            buffers[name] = (host, host.to(self._device))
        return buffers[name]
