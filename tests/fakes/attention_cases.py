"""Steps of attention over a paged KV cache, for the kernels of every device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import torch

from chiasm.kernels.paged_reference import attend_exactly
from tests.fakes.paged_context import make_paged_context

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chiasm.kernels.cache_kernels import CacheKernels, DecodeRule, PrefillRule


@dataclass(frozen=True)
class Chunk:
    """Positions of a sequence from ``start`` to before ``end``, of which each sees a window."""

    start: int
    end: int
    window: int = 0

    def seen(self) -> torch.Tensor:
        """Return the range of positions that each row sees. [num_rows, 2]."""
        positions = torch.arange(self.start, self.end)
        first = (positions - self.window + 1).clamp(min=0) if self.window else positions * 0
        return torch.stack((first, positions + 1), dim=1)


@dataclass(frozen=True)
class _Tensors:
    """Queries and a cache; what no row sees is NaN."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor

    def to(self, device: str) -> Self:
        """Return the same step on a device."""
        return type(self)(*(getattr(self, one.name).to(device) for one in fields(self)))

    @property
    def cached(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values."""
        return self.keys, self.values


@dataclass(frozen=True)
class DecodeCase(_Tensors):
    """Inputs of a decode step."""

    lengths: torch.Tensor

    def run(
        self, kernels: CacheKernels, rule: DecodeRule, rows: slice = slice(None)
    ) -> torch.Tensor:
        """Return what the rows attend to."""
        contexts = (self.tables[rows], self.lengths[rows])
        return kernels.paged_decode(self.query[rows], self.cached, contexts, rule)

    def attend_exactly(self, rule: DecodeRule) -> torch.Tensor:
        """Attend in float64, one sequence after the other; dtype of the queries."""
        outputs = []
        for row, length in enumerate(self.lengths.tolist()):
            first = max(0, length - rule.window) if rule.window else 0
            seen = torch.tensor([[first, length]], device=self.query.device)
            query = self.query[row : row + 1]
            outputs.append(attend_exactly(query, self.cached, self.tables[row], seen, rule))
        return torch.cat(outputs).to(self.query.dtype)


@dataclass(frozen=True)
class PrefillCase(_Tensors):
    """Chunks of sequences, packed; blocks that none sees are not blocks."""

    chunks: torch.Tensor
    seen: torch.Tensor

    def run(
        self, kernels: CacheKernels, rule: PrefillRule, chunks: slice = slice(None)
    ) -> torch.Tensor:
        """Return the rows of ``chunks``; the others are NaN."""
        output = torch.full_like(self.query, float("nan"), memory_format=torch.contiguous_format)
        contexts = (self.chunks[chunks], self.tables[chunks], self.seen)
        kernels.paged_prefill(self.query, self.cached, contexts, rule, output)
        return output

    def rows(self) -> Iterator[slice]:
        """Yield the rows of each chunk."""
        for first, count in self.chunks.tolist():
            yield slice(first, first + count)

    def attend_exactly(self, rule: PrefillRule) -> torch.Tensor:
        """Attend in float64, one chunk after the other; dtype of the queries."""
        outputs = [
            attend_exactly(self.query[rows], self.cached, table, self.seen[rows], rule)
            for table, rows in zip(self.tables, self.rows(), strict=True)
        ]
        return torch.cat(outputs).to(self.query.dtype)


def make_decode_case(
    lengths: Sequence[int],
    heads: tuple[int, int, int] = (4, 2, 64),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> DecodeCase:
    """Return a step of sequences with those context lengths.

    Args:
        lengths: One per sequence.
        heads: Query heads, key heads and their width.
        block_size: Tokens per block.
        dtype: Of queries and cache.
    """
    num_q_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(len(lengths) + head_dim)
    positions = [(0, length) for length in lengths]
    tables, keys, values = make_paged_context(
        positions, (num_kv_heads, head_dim), block_size, dtype, generator
    )
    # As the decoder's: a view of a wider tensor.
    wide = torch.randn(len(lengths), num_q_heads + 3, head_dim, generator=generator).to(dtype)
    return DecodeCase(wide[:, :num_q_heads], keys, values, tables, torch.tensor(lengths))


def make_prefill_case(
    chunks: Sequence[Chunk],
    heads: tuple[int, int, int] = (4, 2, 64),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> PrefillCase:
    """Return a step of those chunks; arguments as those of ``make_decode_case``."""
    num_q_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(len(chunks) + head_dim)
    positions = [(int(chunk.seen()[:, 0].min()), chunk.end) for chunk in chunks]
    tables, keys, values = make_paged_context(
        positions, (num_kv_heads, head_dim), block_size, dtype, generator
    )
    counts = [chunk.end - chunk.start for chunk in chunks]
    firsts = itertools.accumulate(counts, initial=0)
    bounds = torch.tensor(list(zip(firsts, counts, strict=False)))
    # As the decoders': a view of a wider tensor, heads before rows.
    wide = torch.randn(num_q_heads + 3, sum(counts), head_dim, generator=generator).to(dtype)
    seen = torch.cat([chunk.seen() for chunk in chunks])
    return PrefillCase(wide[:num_q_heads].transpose(0, 1), keys, values, tables, bounds, seen)
