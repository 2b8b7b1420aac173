"""Attend with the rows of chunks of prompts to their contexts, where the paged KV cache holds them.

Math: ``out[r, h] = sum_t softmax_t(score(q[r, h] . k[t, g])) v[t, g]`` with ``g = h // (H / G)``
for ``H`` query heads and ``G`` key heads, over ``first[r] <= t < stop[r]``, and
``score(x) = x * scale`` or, capped, ``softcap * tanh(x * scale / softcap)``. Causal order, windows
and images that attend both ways are all such ranges. See ``online_softmax.py`` for the sums.

Layout: keys and values are [num_slots, num_kv_heads, head_dim], and position ``t`` of a sequence
has the slot ``table[t // block_size] * block_size + t % block_size``. A program takes all query
heads of one key head for as many tokens of one chunk as fill its rows::

    rows    | token 0: heads of g | token 1: heads of g | ... | padding

Reference: ``attend_exactly`` in ``paged_reference.py``.

Source: Dao 2023, "FlashAttention-2"; PagedAttention, Kwon et al. 2023.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from chiasm.kernels.launch_target import find_architecture
from chiasm.kernels.online_softmax import LOG2_E, add_tile, score_tile
from chiasm.kernels.tensor_checks import check_fit

if TYPE_CHECKING:
    from chiasm.kernels.cache_kernels import PrefillRule

# The matrix units take no fewer rows or columns.
_MIN_DOT = 16
# Chunks for which the kernel is compiled at least.
_FEW_CHUNKS = 64
# Heads wider than this take twice the registers.
_WIDE = 128
# Architectures that multiply from shared memory, and so need fewer registers.
_HOPPER, _BLACKWELL = range(90, 100), range(100, 120)


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """How the work is cut.

    Attributes:
        rows: Queries of a program, one per token and head; a power of two, at least 16.
        tile: Positions that it reads at once; likewise.
        num_warps: Warps of a program.
        num_stages: Tiles that are under way at once.
    """

    rows: int
    tile: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype, architecture: int) -> PrefillTiles:
        """Return what registers and shared memory hold for heads of a width.

        Args:
            head_dim: Width of a head.
            dtype: Of queries and cache.
            architecture: See ``find_architecture``.
        """
        is_wide = head_dim > _WIDE
        if dtype is torch.float32:
            return cls(rows=32, tile=16, num_warps=8, num_stages=1)
        if architecture in _HOPPER:
            if is_wide:
                return cls(rows=128, tile=32, num_warps=8, num_stages=2)
            return cls(rows=64, tile=64, num_warps=4, num_stages=3)
        if architecture in _BLACKWELL:
            return cls(rows=128, tile=16 if is_wide else 64, num_warps=8, num_stages=2)
        # Padded heads are compared with their width, which takes registers too.
        has_padding = head_dim != triton.next_power_of_2(head_dim)
        return cls(rows=64 if is_wide or has_padding else 128, tile=32, num_warps=8, num_stages=2)


@triton.jit
def _attend_to_tile(
    query,  # [ROWS, COLUMNS]
    key_ptr,
    value_ptr,
    table_ptr,  # of this sequence
    start,  # first position of the tile
    end,  # position behind the last that any row sees
    first,  # [ROWS], int32: range of positions that each row sees
    stop,
    maximum,
    total,
    sums,
    scale,
    softcap,
    slot_stride,
    column,
    is_column,
    IS_MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCASTS: tl.constexpr,
    TILE: tl.constexpr,
):
    position = start + tl.arange(0, TILE)
    is_read = is_column[None, :]
    if IS_MASKED:
        is_seen = position < end
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=is_seen, other=0)
        is_read = is_seen[:, None] & is_column[None, :]
    else:
        block = tl.load(table_ptr + position // BLOCK_SIZE)
    slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    offsets = slot[:, None] * slot_stride + column[None, :]
    key = tl.load(key_ptr + offsets, mask=is_read, other=0.0)
    value = tl.load(value_ptr + offsets, mask=is_read, other=0.0)
    if UPCASTS:
        key = key.to(tl.float32)
        value = value.to(tl.float32)
    scores = score_tile(query, key, scale, softcap, HAS_SOFTCAP)
    if IS_MASKED:
        sees = (position[None, :] >= first[:, None]) & (position[None, :] < stop[:, None])
        scores = tl.where(sees, scores, float("-inf"))
    return add_tile(scores, value, maximum, total, sums)


@triton.jit(do_not_specialize=["num_chunks", "table_stride"])
def _paged_prefill_kernel(
    query_ptr,  # [num_rows, num_q_heads, head_dim]
    key_ptr,  # [num_slots, num_kv_heads, head_dim]
    value_ptr,  # [num_slots, num_kv_heads, head_dim]
    chunk_ptr,  # [num_chunks, 2], int64: first row and number of rows
    table_ptr,  # [num_chunks, max_blocks], int64
    seen_ptr,  # [num_rows, 2], int64: first position and the one behind the last
    out_ptr,  # [num_rows, num_q_heads, head_dim]
    scale,  # with log2(e), unless there is a soft cap
    softcap,
    query_stride,
    query_head_stride,
    slot_stride,
    head_stride,
    table_stride,
    num_chunks,
    GROUP: tl.constexpr,  # query heads of a key head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCASTS: tl.constexpr,  # the interpreter multiplies no bfloat16
    CHUNKS: tl.constexpr,  # at least num_chunks
    TOKENS: tl.constexpr,  # tokens of a program
    ROWS: tl.constexpr,  # TOKENS * GROUP, padded
    COLUMNS: tl.constexpr,  # HEAD_DIM, padded
    TILE: tl.constexpr,
):
    # The last tokens see most: their programs begin first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    num_q_heads = tl.num_programs(1) * GROUP

    # Which chunk, and which of its tokens: programs lie chunk by chunk.
    index = tl.arange(0, CHUNKS)
    counts = tl.load(chunk_ptr + index * 2 + 1, mask=index < num_chunks, other=0).to(tl.int32)
    num_programs = (counts + TOKENS - 1) // TOKENS
    ends = tl.cumsum(num_programs, 0)
    chunk = tl.sum((ends <= program).to(tl.int32), 0)
    if chunk >= num_chunks:
        return
    before = tl.sum(tl.where(index < chunk, num_programs, 0), 0)
    chunk_row = tl.load(chunk_ptr + chunk * 2)
    num_tokens = tl.load(chunk_ptr + chunk * 2 + 1).to(tl.int32)

    row = tl.arange(0, ROWS)
    token = (program - before) * TOKENS + row // GROUP
    is_row = (row < TOKENS * GROUP) & (token < num_tokens)
    query_row = chunk_row + token
    head = kv_head * GROUP + row % GROUP
    column = tl.arange(0, COLUMNS)
    is_column = column < HEAD_DIM
    is_element = is_row[:, None] & is_column[None, :]
    query_offsets = query_row * query_stride + head * query_head_stride
    query = tl.load(query_ptr + query_offsets[:, None] + column[None, :], is_element, other=0.0)
    if UPCASTS:
        query = query.to(tl.float32)

    first = tl.load(seen_ptr + query_row * 2, mask=is_row, other=0).to(tl.int32)
    stop = tl.load(seen_ptr + query_row * 2 + 1, mask=is_row, other=0).to(tl.int32)
    begin = tl.min(tl.where(is_row, first, 2147483647), 0)
    end = tl.max(stop, 0)
    # Tiles from here to there are seen by all rows; others are masked.
    last_first = tl.max(tl.where(is_row, first, 0), 0)
    first_stop = tl.min(tl.where(is_row, stop, 2147483647), 0)
    num_tiles = tl.cdiv(end - begin, TILE)
    full_from = tl.minimum(tl.cdiv(last_first - begin, TILE), num_tiles)
    full_to = tl.maximum(tl.maximum(first_stop - begin, 0) // TILE, full_from)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    keys = key_ptr + kv_head * head_stride
    values = value_ptr + kv_head * head_stride
    table = table_ptr + chunk.to(tl.int64) * table_stride
    for tile in range(full_from, full_to):
        maximum, total, sums = _attend_to_tile(
            query,
            keys,
            values,
            table,
            begin + tile * TILE,
            end,
            first,
            stop,
            maximum,
            total,
            sums,
            scale,
            softcap,
            slot_stride,
            column,
            is_column,
            False,
            BLOCK_SIZE,
            HAS_SOFTCAP,
            UPCASTS,
            TILE,
        )
    num_full = full_to - full_from
    for masked in range(0, num_tiles - num_full):
        tile = tl.where(masked < full_from, masked, masked + num_full)
        maximum, total, sums = _attend_to_tile(
            query,
            keys,
            values,
            table,
            begin + tile * TILE,
            end,
            first,
            stop,
            maximum,
            total,
            sums,
            scale,
            softcap,
            slot_stride,
            column,
            is_column,
            True,
            BLOCK_SIZE,
            HAS_SOFTCAP,
            UPCASTS,
            TILE,
        )
    out = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    out_offsets = (query_row * num_q_heads + head)[:, None] * HEAD_DIM + column[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=is_element)


def paged_prefill_attention(
    query: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor],
    contexts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rule: PrefillRule,
    output: torch.Tensor,
    tiles: PrefillTiles | None = None,
) -> None:
    """Attend with the rows of chunks of prompts, in one launch; nothing waits for the device.

    Args:
        query: [num_rows, num_q_heads, head_dim], float16/bfloat16/float32, the last dimension
            contiguous.
        cached: Keys and values. [num_slots, num_kv_heads, head_dim], dtype of ``query``, the last
            dimension contiguous, strides alike.
        contexts: First row and number of rows of each chunk, [num_chunks, 2]; block tables,
            [num_chunks, max_blocks]; and the range of positions that each row sees,
            [num_rows, 2]; int64, contiguous. A table covers what its chunk's rows see.
        rule: How scores are made.
        output: Where what the rows of chunks attend to is put; other rows are left alone. As
            ``query``, contiguous.
        tiles: How the work is cut; ``None`` for what suits the width of the heads.

    Raises:
        ValueError: The tensors do not fit together.
    """
    keys, values = cached
    chunks, tables, seen = contexts
    check_fit(query, cached)
    if not output.is_contiguous() or output.shape != query.shape or output.dtype != query.dtype:
        raise ValueError(f"The output is {output.dtype} {tuple(output.shape)}.")
    if len(seen) != len(query) or len(tables) != len(chunks):
        raise ValueError(f"{len(seen)} ranges and {len(tables)} tables for {len(chunks)} chunks.")
    if not len(chunks) or not len(query):
        return
    _, num_q_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    group = num_q_heads // num_kv_heads
    architecture = find_architecture(_paged_prefill_kernel)
    tiles = tiles or PrefillTiles.of(head_dim, query.dtype, architecture)
    rows = max(tiles.rows, triton.next_power_of_2(group))
    tokens = rows // group
    # No chunk has more than one program that is not full; the rest find no chunk and end.
    num_programs = len(query) // tokens + len(chunks)
    _paged_prefill_kernel[(num_programs, num_kv_heads)](
        query,
        keys,
        values,
        chunks,
        tables,
        seen,
        output,
        rule.scale if rule.softcap else rule.scale * LOG2_E,
        rule.softcap,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        tables.stride(0),
        len(chunks),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=rule.block_size,
        HAS_SOFTCAP=rule.softcap > 0,
        UPCASTS=not architecture,
        CHUNKS=max(_FEW_CHUNKS, triton.next_power_of_2(len(chunks))),
        TOKENS=tokens,
        ROWS=rows,
        COLUMNS=triton.next_power_of_2(max(head_dim, _MIN_DOT)),
        TILE=tiles.tile,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
