"""Attend within segments of rows: frames or windows, those of one length in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention


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


@dataclass(frozen=True, slots=True)
class Segments:
    """How the rows of one forward are cut; every row is in one segment, and sees that alone."""

    groups: tuple[SegmentGroup, ...]


def cut_segments(bounds: torch.Tensor) -> Segments:
    """Group the segments that lie between ``bounds`` by their lengths.

    Args:
        bounds: First row of every segment, and the number of rows; ascending. [num_segments + 1].
    """
    starts, lengths = bounds[:-1].long(), bounds.diff().long()
    distinct = sorted({length for length in lengths.tolist() if length > 0})
    if len(distinct) == 1:
        return Segments((SegmentGroup(distinct[0], None),))
    return Segments(
        tuple(
            SegmentGroup(length, _rows_of(starts[lengths == length], length)) for length in distinct
        )
    )


def attend(heads: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Attend within every segment.

    Args:
        heads: Queries, keys and values. [num_rows, 3, num_heads, head_dim].
        segments: Where the rows are cut.

    Returns:
        [num_rows, num_heads * head_dim], contiguous, dtype of ``heads``.
    """
    first = segments.groups[0]
    if first.rows is None:
        return _attend_equal(heads, first.length)
    attended = heads.new_empty(len(heads), heads.shape[2] * heads.shape[3])
    for group in segments.groups:
        assert group.rows is not None, "several groups name their rows"
        attended[group.rows] = _attend_equal(heads[group.rows], group.length)
    return attended


def _rows_of(starts: torch.Tensor, length: int) -> torch.Tensor:
    return (starts[:, None] + torch.arange(length, device=starts.device)).reshape(-1)


def _attend_equal(heads: torch.Tensor, length: int) -> torch.Tensor:
    num_rows, _, num_heads, head_dim = heads.shape
    parts = heads.view(-1, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    attended = scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).reshape(num_rows, num_heads * head_dim)
