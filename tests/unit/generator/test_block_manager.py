"""Blocks are given, grown and taken back without a leak."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chiasm.generator.engine.block_manager import BlockManager, OutOfBlocksError
from tests.fakes.generator_engine import make_sequence


def test_growing_gives_enough_blocks_in_position_order() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    sequence = make_sequence(1, range(1, 10))

    new_blocks = blocks.grow(sequence, 9)

    assert new_blocks == sequence.block_table
    assert len(new_blocks) == 3
    assert blocks.num_used_blocks == 3


def test_growing_within_the_last_block_gives_nothing() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    sequence = make_sequence(1, range(1, 6))
    blocks.grow(sequence, 5)
    sequence.num_computed_tokens = 5

    assert blocks.grow(sequence, 3) == []
    assert len(blocks.grow(sequence, 4)) == 1


def test_growing_beyond_the_cache_changes_nothing() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    sequence = make_sequence(1, range(1, 10))

    assert not blocks.can_grow(sequence, 9)
    with pytest.raises(OutOfBlocksError, match="3 blocks needed, 2 free"):
        blocks.grow(sequence, 9)

    assert sequence.block_table == []
    assert blocks.num_free_blocks == 2


def test_freed_blocks_are_reused_before_new_ones() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    first, second = make_sequence(1, range(1, 9)), make_sequence(2, range(1, 9))
    freed = list(blocks.grow(first, 8))
    blocks.free(first)

    assert blocks.grow(second, 8) == freed


def test_leak_of_one_block_is_found() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    sequence = make_sequence(1, range(1, 9))
    blocks.grow(sequence, 8)
    sequence.block_table.pop()

    with pytest.raises(AssertionError, match="leaked"):
        blocks.check_invariants([sequence])


def test_block_in_two_tables_is_found() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    first, second = make_sequence(1, range(1, 5)), make_sequence(2, range(1, 5))
    blocks.grow(first, 4)
    second.block_table.extend(first.block_table)

    with pytest.raises(AssertionError, match="another owner"):
        blocks.check_invariants([first, second])


def test_cache_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no cache"):
        BlockManager(num_blocks=0, block_size=4)


class _BlockMachine(RuleBasedStateMachine):
    """Admits, grows and frees sequences at random."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(num_blocks=12, block_size=3)
        self.live = [make_sequence(0, [1])]
        self.next_id = 1

    @rule(num_tokens=st.integers(1, 12))
    def admit(self, num_tokens: int) -> None:
        sequence = make_sequence(self.next_id, [1] * num_tokens)
        self.next_id += 1
        self.live.append(sequence)
        if self.blocks.can_grow(sequence, num_tokens):
            self.blocks.grow(sequence, num_tokens)
            sequence.num_computed_tokens = num_tokens

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def extend(self, pick: int) -> None:
        sequence = self.live[pick % len(self.live)]
        num_tokens = sequence.num_tokens + 1 - sequence.num_computed_tokens
        if self.blocks.can_grow(sequence, num_tokens):
            self.blocks.grow(sequence, num_tokens)
            sequence.token_ids.append(1)
            sequence.num_computed_tokens = sequence.num_tokens
        else:
            with pytest.raises(OutOfBlocksError):
                self.blocks.grow(sequence, num_tokens)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def free(self, pick: int) -> None:
        self.blocks.free(self.live.pop(pick % len(self.live)))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.blocks.check_invariants(self.live)


TestBlockMachine = _BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
