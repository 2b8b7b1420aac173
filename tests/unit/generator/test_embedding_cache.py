"""Embeddings in host memory: the last used ones, within bytes, whatever is asked."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from chiasm.common.media import DataType, EmbeddingRef, Modality, TensorRole, TensorSpec
from chiasm.generator.embedding_cache import EmbeddingCache
from chiasm.generator.fair_queue import PROTECTED_S

ROW_BYTES = 4


def _ref(number: int, num_rows: int = 1) -> EmbeddingRef:
    spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (num_rows, 1))
    return EmbeddingRef(bytes([number]) * 32, bytes(32), Modality.IMAGE, (spec,))


def _rows(num_rows: int = 1) -> torch.Tensor:
    return torch.ones(num_rows, 1)


def test_what_was_kept_is_found_by_its_tenant_alone() -> None:
    cache, rows = EmbeddingCache(ROW_BYTES), _rows()
    cache.keep("a", _ref(1), rows)

    assert cache.find("a", _ref(1)) is rows
    assert cache.find("b", _ref(1)) is None
    assert cache.find("a", _ref(1, num_rows=2)) is None


def test_least_recently_used_leaves_first() -> None:
    cache = EmbeddingCache(2 * ROW_BYTES)
    for number in (1, 2):
        cache.keep("a", _ref(number), _rows())
    cache.find("a", _ref(1))
    cache.keep("a", _ref(3), _rows())

    assert cache.find("a", _ref(2)) is None
    assert cache.find("a", _ref(1)) is not None
    assert cache.find("a", _ref(3)) is not None


def test_rows_larger_than_the_cache_leave_the_others_alone() -> None:
    cache = EmbeddingCache(2 * ROW_BYTES)
    cache.keep("a", _ref(1), _rows())
    cache.keep("a", _ref(2, num_rows=3), _rows(3))

    assert cache.find("a", _ref(1)) is not None
    assert cache.find("a", _ref(2, num_rows=3)) is None


def test_cache_of_no_bytes_keeps_nothing() -> None:
    cache = EmbeddingCache(0)
    cache.keep("a", _ref(1), _rows())

    assert cache.find("a", _ref(1)) is None


def test_rows_that_replace_others_are_charged_once() -> None:
    cache, newest = EmbeddingCache(10 * ROW_BYTES), _rows()
    for rows in (_rows(), _rows(), newest):
        cache.keep("a", _ref(1), rows)

    assert cache.num_bytes == ROW_BYTES
    assert cache.find("a", _ref(1)) is newest


def test_flood_of_one_tenant_leaves_another_its_share() -> None:
    cache = EmbeddingCache(8 * ROW_BYTES)
    for number in range(6):
        cache.keep("b", _ref(number), _rows())

    for number in range(100):
        cache.keep("a", _ref(number % 16, num_rows=2), _rows(2))
        cache.check_invariants()

    assert [cache.find("b", _ref(number)) is not None for number in range(6)] == [False] * 2 + [
        True
    ] * 4


def test_tenant_that_keeps_makes_room_itself_where_it_holds_as_much_as_another() -> None:
    for keeps, other in ("ab", "ba"):
        cache = EmbeddingCache(5 * ROW_BYTES)
        for number in (1, 2):
            cache.keep(keeps, _ref(number), _rows())
            cache.keep(other, _ref(number), _rows())
        cache.keep(other, _ref(3), _rows())

        cache.keep(keeps, _ref(3), _rows())

        cache.check_invariants()
        assert [cache.find(keeps, _ref(number)) is not None for number in (1, 2, 3)] == [
            False,
            True,
            True,
        ]
        assert all(cache.find(other, _ref(number)) is not None for number in (1, 2, 3))


def test_rows_above_the_share_of_a_tenant_are_not_kept_at_the_cost_of_others() -> None:
    cache = EmbeddingCache(8 * ROW_BYTES)
    for number in range(4):
        cache.keep("b", _ref(number), _rows())

    cache.keep("a", _ref(1, num_rows=5), _rows(5))

    assert cache.find("a", _ref(1, num_rows=5)) is None
    assert all(cache.find("b", _ref(number)) is not None for number in range(4))


def test_what_a_tenant_left_long_ago_makes_room_first() -> None:
    now = 0.0
    cache = EmbeddingCache(8 * ROW_BYTES, lambda: now)
    cache.keep("b", _ref(1), _rows())
    now = PROTECTED_S

    for number in range(8):
        cache.keep("a", _ref(number), _rows())

    assert cache.find("b", _ref(1)) is None
    assert all(cache.find("a", _ref(number)) is not None for number in range(8))


@given(
    st.integers(0, 12),
    st.lists(st.tuples(st.booleans(), st.sampled_from("ab"), st.integers(0, 5), st.integers(1, 5))),
)
def test_bytes_stay_within_bounds_whatever_happens(
    max_rows: int, steps: list[tuple[bool, str, int, int]]
) -> None:
    cache = EmbeddingCache(max_rows * ROW_BYTES)
    for is_put, tenant, number, num_rows in steps:
        ref = _ref(number, num_rows)
        if is_put:
            cache.keep(tenant, ref, _rows(num_rows))
        found = cache.find(tenant, ref)
        assert found is None or found.shape == (num_rows, 1)
        cache.check_invariants()
