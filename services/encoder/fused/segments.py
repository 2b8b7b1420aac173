"""Cut the rows of one forward into segments, such as frames or windows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, slots=True, eq=False)
class SegmentGroup:
    """Segments of one length.

    Attributes:
        length: Rows of each.
        rows: Their rows, segment by segment; ``None`` if these are all rows, in order.
            [num_segments * length], int64.
    """

    length: int
    rows: torch.Tensor | None


class Segments:
    """How the rows of one forward are cut; every row is in one segment, and sees that alone."""

    def __init__(self, bounds: torch.Tensor, device: torch.device | None = None) -> None:
        """Cut rows.

        Args:
            bounds: First row of every segment, and the number of rows; ascending. On a CPU, if
                nothing shall wait for a GPU. [num_segments + 1].
            device: Where the rows are; ``None`` for where ``bounds`` are.
        """
        self._device = device or bounds.device
        starts, lengths = bounds[:-1].long(), bounds.diff().long()
        is_filled = lengths > 0
        self._starts, self._lengths = starts[is_filled], lengths[is_filled]

    @cached_property
    def groups(self) -> tuple[SegmentGroup, ...]:
        """The segments by their lengths."""
        distinct = sorted(set(self._lengths.tolist()))
        if len(distinct) == 1:
            return (SegmentGroup(distinct[0], None),)
        return tuple(
            SegmentGroup(length, self._rows_of_length(length).to(self._device))
            for length in distinct
        )

    @cached_property
    def contexts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The segments as ``CpuKernels.paged_prefill`` takes contexts, with blocks of one row."""
        lengths = self._lengths
        longest = int(lengths.max()) if len(lengths) else 0
        ends = lengths.repeat_interleave(lengths)
        bounds = torch.stack((self._starts, lengths), dim=1)
        seen = torch.stack((torch.zeros_like(ends), ends), dim=1)
        rows = _rows_of(self._starts, longest)
        return bounds.to(self._device), rows.to(self._device), seen.to(self._device)

    def _rows_of_length(self, length: int) -> torch.Tensor:
        return _rows_of(self._starts[self._lengths == length], length).flatten()


def _rows_of(starts: torch.Tensor, length: int) -> torch.Tensor:
    return starts[:, None] + torch.arange(length, device=starts.device)
