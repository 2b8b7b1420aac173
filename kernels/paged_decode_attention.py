"""Attend with one query per sequence to its context, where that lies in the paged KV cache.

Math: ``out[h] = sum_t softmax_t(score(q[h] . k[t, g])) v[t, g]`` with ``g = h // (H / G)`` for
``H`` query heads and ``G`` key heads, over the last ``window`` positions ``t``, and
``score(x) = x * scale`` or, capped, ``softcap * tanh(x * scale / softcap)``. The context is cut
into splits; each gives the ``o``, ``m`` and ``l`` of ``online_softmax.py``. A second launch joins
them: ``out = sum_i 2^(m_i - m) o_i / sum_i 2^(m_i - m) l_i`` with ``m = max_i m_i``.

Layout: keys and values are [num_slots, num_kv_heads, head_dim], and position ``t`` of a sequence
has the slot ``table[t // block_size] * block_size + t % block_size``.

Reference: ``attend_exactly`` in ``paged_reference.py``.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; PagedAttention, Kwon et al.
2023, section 4.3.
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
    from chiasm.kernels.cache_kernels import DecodeRule

# The matrix units take no fewer rows or columns.
_MIN_DOT = 16
# Most splits of a context.
_MAX_SPLITS = 64
# Splits that are joined at once.
_JOINED_SPLITS = 16
# Programs that keep a device busy, per multiprocessor.
_PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How the work is cut.

    Attributes:
        tile: Positions that a program reads at once; a power of two, at least 16.
        min_split: Fewest positions of a split; shorter contexts are cut into fewer.
        num_warps: Warps of a program.
        num_stages: Tiles that are under way at once.
    """

    tile: int
    min_split: int = 64
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype) -> DecodeTiles:
        """Return tiles of at most 16 KiB of keys."""
        row_bytes = triton.next_power_of_2(max(head_dim, _MIN_DOT)) * dtype.itemsize
        tile = max(_MIN_DOT, min(64, (16 << 10) // row_bytes))
        return cls(tile, num_warps=8 if dtype is torch.float32 else 4)


@triton.jit
def _find_split_length(length, num_splits, MIN_SPLIT: tl.constexpr, TILE: tl.constexpr):
    """Return the positions of each split of a context but the last: whole tiles."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, num_splits), TILE) * TILE, MIN_SPLIT)


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def _paged_decode_kernel(
    query_ptr,  # [num_sequences, num_q_heads, head_dim]
    key_ptr,  # [num_slots, num_kv_heads, head_dim]
    value_ptr,  # [num_slots, num_kv_heads, head_dim]
    table_ptr,  # [num_sequences, max_blocks], int64
    length_ptr,  # [num_sequences], int64
    out_ptr,  # [num_sequences, num_q_heads, head_dim], written if there is one split
    part_ptr,  # [num_sequences, num_q_heads, num_splits, head_dim], float32, if there are more
    part_stat_ptr,  # [num_sequences, num_q_heads, num_splits, 2], float32: maximum and sum
    scale,  # with log2(e), unless there is a soft cap
    softcap,
    query_stride,
    query_head_stride,
    slot_stride,
    head_stride,
    table_stride,
    num_splits,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    UPCASTS: tl.constexpr,  # the interpreter multiplies no bfloat16
    ROWS: tl.constexpr,  # GROUP, padded
    COLUMNS: tl.constexpr,  # HEAD_DIM, padded
    MIN_SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    num_q_heads = tl.num_programs(1) * GROUP

    length = tl.load(length_ptr + sequence).to(tl.int32)
    first = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    begin = first
    end = length
    if IS_SPLIT:
        split_length = _find_split_length(length - first, num_splits, MIN_SPLIT, TILE)
        begin = first + split * split_length
        end = tl.minimum(begin + split_length, length)
        if begin >= end:
            return

    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    head = kv_head * GROUP + row
    is_row = (row < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    query_offsets = sequence * query_stride + head[:, None] * query_head_stride + column[None, :]
    query = tl.load(query_ptr + query_offsets, mask=is_row, other=0.0)
    if UPCASTS:
        query = query.to(tl.float32)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, TILE):
        position = start + tl.arange(0, TILE)
        is_seen = position < end
        block = tl.load(
            table_ptr + sequence * table_stride + position // BLOCK_SIZE, mask=is_seen, other=0
        )
        slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        offsets = slot[:, None] * slot_stride + kv_head * head_stride + column[None, :]
        is_read = is_seen[:, None] & (column < HEAD_DIM)[None, :]
        key = tl.load(key_ptr + offsets, mask=is_read, other=0.0)
        value = tl.load(value_ptr + offsets, mask=is_read, other=0.0)
        if UPCASTS:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = score_tile(query, key, scale, softcap, HAS_SOFTCAP)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        maximum, total, sums = add_tile(scores, value, maximum, total, sums)

    if IS_SPLIT:
        part = (sequence * num_q_heads + head) * num_splits + split
        tl.store(part_ptr + part[:, None] * HEAD_DIM + column[None, :], sums, mask=is_row)
        tl.store(part_stat_ptr + part * 2, maximum, mask=row < GROUP)
        tl.store(part_stat_ptr + part * 2 + 1, total, mask=row < GROUP)
    else:
        out = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        out_offsets = (sequence * num_q_heads + head)[:, None] * HEAD_DIM + column[None, :]
        tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["num_splits"])
def _join_splits_kernel(
    part_ptr,  # [num_sequences, num_q_heads, num_splits, head_dim], float32
    part_stat_ptr,  # [num_sequences, num_q_heads, num_splits, 2], float32: maximum and sum
    length_ptr,  # [num_sequences], int64
    out_ptr,  # [num_sequences, num_q_heads, head_dim]
    num_splits,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # HEAD_DIM, padded
    SPLITS: tl.constexpr,  # at least num_splits; the same always, so that it is compiled once
    JOINED: tl.constexpr,  # splits that are joined at once
    MIN_SPLIT: tl.constexpr,  # as in the launch before
    TILE: tl.constexpr,  # as in the launch before
):
    head = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    seen = tl.load(length_ptr + sequence).to(tl.int32)
    if WINDOW:
        seen = tl.minimum(seen, WINDOW)
    num_written = tl.cdiv(seen, _find_split_length(seen, num_splits, MIN_SPLIT, TILE))

    first = (sequence * tl.num_programs(0) + head) * num_splits
    split = tl.arange(0, SPLITS)
    is_written = split < num_written
    stat_ptr = part_stat_ptr + (first + split) * 2
    maxima = tl.load(stat_ptr, mask=is_written, other=float("-inf"))
    maximum = tl.max(maxima, 0)
    # A sequence of length 0 has no split.
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    totals = tl.load(stat_ptr + 1, mask=is_written, other=0.0)
    total = tl.sum(totals * tl.exp2(maxima - base), 0)

    column = tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, num_written, JOINED):
        part = start + tl.arange(0, JOINED)
        is_part = part < num_written
        part_maxima = tl.load(part_stat_ptr + (first + part) * 2, mask=is_part, other=float("-inf"))
        weights = tl.exp2(part_maxima - base)
        is_read = is_part[:, None] & (column < HEAD_DIM)[None, :]
        offsets = (first + part)[:, None] * HEAD_DIM + column[None, :]
        parts = tl.load(part_ptr + offsets, mask=is_read, other=0.0)
        sums += tl.sum(parts * weights[:, None], 0)
    out = sums / tl.where(total > 0.0, total, 1.0)
    out_offsets = (sequence * tl.num_programs(0) + head) * HEAD_DIM + column
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)


def paged_decode_attention(
    query: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor],
    contexts: tuple[torch.Tensor, torch.Tensor],
    rule: DecodeRule,
    num_splits: int | None = None,
    tiles: DecodeTiles | None = None,
) -> torch.Tensor:
    """Attend with one query per sequence to its context; nothing waits for the device.

    Args:
        query: [num_sequences, num_q_heads, head_dim], float16/bfloat16/float32, the last dimension
            contiguous.
        cached: Keys and values. [num_slots, num_kv_heads, head_dim], dtype of ``query``, the last
            dimension contiguous, strides alike.
        contexts: Block tables, [num_sequences, max_blocks], and context lengths,
            [num_sequences]; int64, contiguous. A table covers its sequence's context. The row of a
            sequence of length 0 becomes 0.
        rule: How scores are made.
        num_splits: Parts of each context, at most 64, that are attended to at once; ``None`` for
            what keeps the device busy. It decides how sums are rounded. How long a part is, the
            device finds out, so that a launch can be replayed for other contexts.
        tiles: How the work is cut; ``None`` for what suits the width of the heads.

    Returns:
        What each query attends to, as ``query``, contiguous.

    Raises:
        ValueError: The tensors do not fit together.
    """
    keys, values = cached
    tables, lengths = contexts
    check_fit(query, cached)
    if len(tables) != len(query) or len(lengths) != len(query):
        raise ValueError(f"There are {len(tables)} block tables for {len(query)} queries.")
    num_sequences, num_q_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not num_sequences:
        return output
    # The width of the tables bounds the contexts, and the host knows it.
    longest = tables.shape[1] * rule.block_size
    if rule.window:
        longest = min(longest, rule.window)
    tiles = tiles or DecodeTiles.of(head_dim, query.dtype)
    if num_splits is None:
        num_programs = num_sequences * num_kv_heads
        num_splits = choose_num_splits(num_programs, _count_processors(query.device))
    num_splits = min(num_splits, -(-longest // tiles.min_split))
    columns = triton.next_power_of_2(max(head_dim, _MIN_DOT))
    group = num_q_heads // num_kv_heads
    is_split = num_splits > 1
    parts = stats = output
    if is_split:
        shape = (num_sequences, num_q_heads, num_splits)
        parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        stats = torch.empty((*shape, 2), dtype=torch.float32, device=query.device)
    _paged_decode_kernel[(num_splits, num_kv_heads, num_sequences)](
        query,
        keys,
        values,
        tables,
        lengths,
        output,
        parts,
        stats,
        rule.scale if rule.softcap else rule.scale * LOG2_E,
        rule.softcap,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        tables.stride(0),
        num_splits,
        WINDOW=rule.window,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=rule.block_size,
        HAS_SOFTCAP=rule.softcap > 0,
        IS_SPLIT=is_split,
        UPCASTS=not find_architecture(_paged_decode_kernel),
        ROWS=max(_MIN_DOT, triton.next_power_of_2(group)),
        COLUMNS=columns,
        MIN_SPLIT=tiles.min_split,
        TILE=tiles.tile,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if is_split:
        _join_splits_kernel[(num_q_heads, num_sequences)](
            parts,
            stats,
            lengths,
            output,
            num_splits,
            WINDOW=rule.window,
            HEAD_DIM=head_dim,
            COLUMNS=columns,
            SPLITS=_MAX_SPLITS,
            JOINED=_JOINED_SPLITS,
            MIN_SPLIT=tiles.min_split,
            TILE=tiles.tile,
            num_warps=4,
        )
    return output


def choose_num_splits(num_programs: int, num_processors: int) -> int:
    """Return into how many parts long contexts are cut so that no processor is idle.

    Args:
        num_programs: Programs of a launch without splits.
        num_processors: Multiprocessors of the device.
    """
    wanted = _PROGRAMS_PER_PROCESSOR * num_processors // num_programs
    return max(1, min(wanted, _MAX_SPLITS))


def _count_processors(device: torch.device) -> int:
    """Return the multiprocessors of a device; 1 where the interpreter runs programs in turn."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
