"""Add a tile of positions to sums that are weighted by a softmax: the heart of both attentions.

Math: with scores ``s`` in powers of two, ``m' = max(m, max_t s_t)``, ``w_t = 2^(s_t - m')``,
``l' = l 2^(m - m') + sum_t w_t`` and ``o' = o 2^(m - m') + sum_t w_t v_t``; at the end ``o / l`` is
``sum_t softmax_t(s) v_t``.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022,
"FlashAttention", algorithm 1.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def score_tile(
    query,  # [rows, columns]
    key,  # [tile, columns]
    scale,  # of the products; with log2(e), unless there is a soft cap
    softcap,
    HAS_SOFTCAP: tl.constexpr,
):
    """Return scores in powers of two; [rows, tile], float32."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        # tanh by the exponential; the limits are right where that overflows.
        doubled = tl.exp2(scores * (2.0 * 1.4426950408889634 / softcap))
        scores = (1.0 - 2.0 / (doubled + 1.0)) * (softcap * 1.4426950408889634)
    return scores


@triton.jit
def add_tile(
    scores,  # [rows, tile], float32; minus infinity for what a row does not see
    value,  # [tile, columns]
    maximum,  # m, [rows], float32
    total,  # l, [rows], float32
    sums,  # o, [rows, columns], float32
):
    """Return maximum, total and sums with the tile."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen nothing yet keeps its zeros.
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    shrink = tl.exp2(maximum - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision="ieee")
    return new_maximum, total, sums
