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

    def __init__(self, bounds: torch.Tensor) -> None:
        """Cut rows.

        Args:
            bounds: First row of every segment, and the number of rows; ascending.
                [num_segments + 1].
        """
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
            SegmentGroup(length, _rows_of(self._starts[self._lengths == length], length).flatten())
            for length in distinct
        )

    @cached_property
    def contexts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The segments as ``CpuKernels.paged_prefill`` takes contexts, with blocks of one row."""
        lengths = self._lengths
        longest = int(lengths.max()) if len(lengths) else 0
        ends = lengths.repeat_interleave(lengths)
        return (
            torch.stack((self._starts, lengths), dim=1),
            _rows_of(self._starts, longest),
            torch.stack((torch.zeros_like(ends), ends), dim=1),
        )


def _rows_of(starts: torch.Tensor, length: int) -> torch.Tensor:
    return starts[:, None] + torch.arange(length, device=starts.device)
