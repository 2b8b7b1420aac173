"""Norm and turn queries and keys of new tokens, and write keys and values to the paged KV cache.

Math: for every head of queries and keys ``n = x / sqrt(mean(x * x) + epsilon) * weight``, if there
is a norm, and ``y = n * cos + swap(n) * sin``, where ``swap`` exchanges the halves of the first
``rotary_dim`` values and ``sin`` is negated for the first half; what is behind stays. Rounds where
torch's operators do. Of what kind the positions of the angles are (M-RoPE, say) does not matter.

Layout: keys and values of a token go to row ``slot`` of [num_slots, num_kv_heads, head_dim].

Reference: ``TorchOperators.place`` in ``services/generator/model/fused/torch_operators.py``.

Source: Su et al. 2021, "RoFormer", in the half-split layout of GPT-NeoX.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

# Heads of a program.
_HEADS = 4


@triton.jit
def _rope_store_kv_kernel(
    qkv_ptr,  # [num_tokens, num_q_heads + 2 * num_kv_heads, head_dim]
    cos_ptr,  # [num_tokens, 2 * HALF]
    sin_ptr,  # [num_tokens, 2 * HALF], the first half negated
    slot_ptr,  # [num_tokens], int64; negative for what is not kept
    weight_ptr,  # [num_q_heads + num_kv_heads, head_dim]
    turned_ptr,  # [num_tokens, num_q_heads + num_kv_heads, head_dim]
    key_ptr,  # [num_slots, num_kv_heads, head_dim]
    value_ptr,  # [num_slots, num_kv_heads, head_dim]
    epsilon,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # half of rotary_dim
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,  # heads of a program
    HALF_COLUMNS: tl.constexpr,  # HALF, padded
    REST_COLUMNS: tl.constexpr,  # what is behind both halves, padded; at least 1
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF_COLUMNS)
    behind = 2 * HALF + tl.arange(0, REST_COLUMNS)
    is_turned = head < NUM_Q_HEADS + NUM_KV_HEADS
    is_value = ~is_turned & (head < NUM_Q_HEADS + 2 * NUM_KV_HEADS)
    is_key = is_turned & (head >= NUM_Q_HEADS)
    is_column = column < HALF
    is_behind = behind < HEAD_DIM
    first_at = head[:, None] * HEAD_DIM + column[None, :]
    rest_at = head[:, None] * HEAD_DIM + behind[None, :]

    # Each head in three parts: those that are exchanged, and what stays.
    row_ptr = qkv_ptr + token * (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    is_read = (is_turned | is_value)[:, None]
    first = tl.load(row_ptr + first_at, mask=is_read & is_column[None, :], other=0.0)
    second = tl.load(row_ptr + first_at + HALF, mask=is_read & is_column[None, :], other=0.0)
    rest = tl.load(row_ptr + rest_at, mask=is_read & is_behind[None, :], other=0.0)
    slot = tl.load(slot_ptr + token)
    is_value &= slot >= 0
    is_key &= slot >= 0

    value_row = value_ptr + (slot * NUM_KV_HEADS - NUM_Q_HEADS - NUM_KV_HEADS) * HEAD_DIM
    tl.store(value_row + first_at, first, mask=is_value[:, None] & is_column[None, :])
    tl.store(value_row + first_at + HALF, second, mask=is_value[:, None] & is_column[None, :])
    tl.store(value_row + rest_at, rest, mask=is_value[:, None] & is_behind[None, :])

    dtype = qkv_ptr.dtype.element_ty
    left, right, stays = first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(left * left, 1) + tl.sum(right * right, 1) + tl.sum(stays * stays, 1)
        factor = (1.0 / tl.sqrt(squares / HEAD_DIM + epsilon))[:, None]
        is_weighed = is_turned[:, None] & is_column[None, :]
        left_weight = tl.load(weight_ptr + first_at, mask=is_weighed, other=0.0)
        right_weight = tl.load(weight_ptr + first_at + HALF, mask=is_weighed, other=0.0)
        rest_weight = tl.load(
            weight_ptr + rest_at, mask=is_turned[:, None] & is_behind[None, :], other=0.0
        )
        weight_type = weight_ptr.dtype.element_ty
        left = (left * factor).to(weight_type).to(tl.float32) * left_weight.to(tl.float32)
        right = (right * factor).to(weight_type).to(tl.float32) * right_weight.to(tl.float32)
        stays = (stays * factor).to(weight_type).to(tl.float32) * rest_weight.to(tl.float32)
        left = left.to(dtype).to(tl.float32)
        right = right.to(dtype).to(tl.float32)

    angle = token * 2 * HALF + column
    left_cos = tl.load(cos_ptr + angle, mask=is_column, other=0.0).to(tl.float32)[None, :]
    right_cos = tl.load(cos_ptr + angle + HALF, mask=is_column, other=0.0).to(tl.float32)[None, :]
    left_sin = tl.load(sin_ptr + angle, mask=is_column, other=0.0).to(tl.float32)[None, :]
    right_sin = tl.load(sin_ptr + angle + HALF, mask=is_column, other=0.0).to(tl.float32)[None, :]
    new_left = ((left * left_cos).to(dtype).to(tl.float32) + right * left_sin).to(dtype)
    new_right = ((right * right_cos).to(dtype).to(tl.float32) + left * right_sin).to(dtype)
    stays = stays.to(dtype)

    turned_row = turned_ptr + token * (NUM_Q_HEADS + NUM_KV_HEADS) * HEAD_DIM
    tl.store(turned_row + first_at, new_left, mask=is_turned[:, None] & is_column[None, :])
    tl.store(turned_row + first_at + HALF, new_right, mask=is_turned[:, None] & is_column[None, :])
    tl.store(turned_row + rest_at, stays, mask=is_turned[:, None] & is_behind[None, :])
    key_row = key_ptr + (slot * NUM_KV_HEADS - NUM_Q_HEADS) * HEAD_DIM
    tl.store(key_row + first_at, new_left, mask=is_key[:, None] & is_column[None, :])
    tl.store(key_row + first_at + HALF, new_right, mask=is_key[:, None] & is_column[None, :])
    tl.store(key_row + rest_at, stays, mask=is_key[:, None] & is_behind[None, :])


def rope_store_kv(
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor],
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Place the heads of new tokens.

    Args:
        qkv: All heads of queries, then of keys, then of values.
            [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], float16/bfloat16/float32,
            contiguous.
        tables: Cosines, and sines with the first half negated. Each [num_tokens, ..., rotary_dim],
            contiguous; ``rotary_dim`` is even.
        slots: Slot of every token, each once; what has a negative one is not kept. [num_tokens],
            int64. The caller vouches for what it holds.
        cached: Keys and values. [num_slots, num_kv_heads, head_dim], contiguous, dtype of ``qkv``.
        norm: Weight, [num_q_heads + num_kv_heads, head_dim], dtype of ``qkv`` or float32, and
            epsilon of a norm of every head before it is turned; ``None`` for none.

    Returns:
        Queries and keys, turned. [num_tokens, num_q_heads + num_kv_heads, head_dim].

    Raises:
        ValueError: The tensors do not fit together.
    """
    keys, values = cached
    cos, sin = tables
    _, num_kv_heads, head_dim = keys.shape
    num_tokens, num_heads = qkv.shape[0], qkv.shape[1] // head_dim
    if qkv.shape[1] != num_heads * head_dim or num_heads <= 2 * num_kv_heads:
        raise ValueError(f"Rows of {qkv.shape[1]} values are not heads of {tuple(keys.shape)}.")
    if not qkv.dtype == keys.dtype == values.dtype:
        raise ValueError(f"Rows are {qkv.dtype}, but keys {keys.dtype}.")
    if not all(one.is_contiguous() for one in (qkv, cos, sin, keys, values)):
        raise ValueError("Rows do not lie one behind the other.")
    if len(cos) != num_tokens or len(slots) != num_tokens or cos.shape[-1] > head_dim:
        raise ValueError(f"{num_tokens} rows, but angles {tuple(cos.shape)}.")
    half = cos.shape[-1] // 2
    num_turned = num_heads - num_kv_heads
    turned = qkv.new_empty(num_tokens, num_turned, head_dim)
    if num_tokens:
        _rope_store_kv_kernel[(num_tokens, triton.cdiv(num_heads, _HEADS))](
            qkv,
            cos,
            sin,
            slots,
            qkv if norm is None else norm[0],
            turned,
            keys,
            values,
            0.0 if norm is None else norm[1],
            NUM_Q_HEADS=num_turned - num_kv_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=half,
            HAS_NORM=norm is not None,
            HEADS=_HEADS,
            HALF_COLUMNS=triton.next_power_of_2(max(half, 1)),
            REST_COLUMNS=triton.next_power_of_2(max(head_dim - 2 * half, 1)),
            num_warps=2,
        )
    return turned
