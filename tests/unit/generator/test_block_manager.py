"""Blocks are given, shared, found again and taken back without a leak."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chiasm.generator.engine.block_group import NO_BLOCK, GroupSize
from chiasm.generator.engine.block_manager import BlockCopy, BlockManager, OutOfBlocksError
from tests.fakes.generator_engine import make_sequence

if TYPE_CHECKING:
    from chiasm.generator.engine.sequence import Sequence


def _computed(blocks: BlockManager, seq_id: int, length: int, first: int = 1) -> Sequence:
    """Return a sequence whose prompt is in the cache and can be found there."""
    sequence = make_sequence(seq_id, range(first, first + length))
    blocks.grow(sequence, length)
    sequence.num_scheduled_tokens = length
    blocks.commit(sequence, length)
    return sequence


def test_growing_gives_as_many_blocks_as_the_tokens_need() -> None:
    blocks = BlockManager([GroupSize(8)], 4)
    sequence = make_sequence(1, range(1, 10))

    assert blocks.grow(sequence, 9) == ()

    assert len(sequence.tables[0].blocks) == 3
    assert blocks.num_used_blocks == 3


def test_growing_within_the_last_block_gives_nothing() -> None:
    blocks = BlockManager([GroupSize(8)], 4)
    sequence = make_sequence(1, range(1, 6))
    blocks.grow(sequence, 5)
    sequence.num_scheduled_tokens = 5

    blocks.grow(sequence, 3)
    assert len(sequence.tables[0].blocks) == 2
    blocks.grow(sequence, 4)
    assert len(sequence.tables[0].blocks) == 3


def _launched(blocks: BlockManager) -> Sequence:
    """Return a sequence of 16 tokens, launched in one step and trimmed before that has ended."""
    sequence = make_sequence(1, range(1, 17))
    blocks.grow(sequence, 16)
    sequence.num_scheduled_tokens = 16
    blocks.trim([sequence])
    return sequence


def _find(blocks: BlockManager) -> int:
    return blocks.find_prefix(make_sequence(2, range(1, 17)), 15).num_tokens


def test_block_that_left_the_window_before_its_step_ended_is_found_afterwards() -> None:
    blocks = BlockManager([GroupSize(8, window=4)], 4)
    sequence = _launched(blocks)
    assert sequence.tables[0].num_dropped == 3

    before = _find(blocks)
    blocks.commit(sequence, 16)

    assert (before, _find(blocks)) == (0, 12)
    assert sequence.tables[0].given_back == []
    blocks.check_invariants([sequence])


def test_block_that_was_given_away_before_its_step_ended_is_not_found() -> None:
    blocks = BlockManager([GroupSize(8, window=4)], 4)
    sequence = _launched(blocks)
    other = make_sequence(3, range(100, 128))
    # All that are free, the three among them.
    blocks.grow(other, 28)
    other.num_scheduled_tokens = 28
    blocks.free(other)

    blocks.commit(sequence, 16)

    assert _find(blocks) == 0
    blocks.check_invariants([sequence])


def test_blocks_of_a_step_that_failed_are_not_found() -> None:
    blocks = BlockManager([GroupSize(8, window=4)], 4)
    blocks.free(_launched(blocks))

    assert _find(blocks) == 0
    assert blocks.num_free_blocks == 8


def test_growing_beyond_the_cache_changes_nothing() -> None:
    blocks = BlockManager([GroupSize(2)], 4)
    sequence = make_sequence(1, range(1, 10))

    assert not blocks.can_grow(sequence, 9)
    with pytest.raises(OutOfBlocksError, match="3 blocks needed, 2 free"):
        blocks.grow(sequence, 9)

    assert sequence.tables[0].blocks == []
    assert blocks.num_free_blocks == 2


def test_freed_blocks_without_a_hash_are_reused_before_new_ones() -> None:
    blocks = BlockManager([GroupSize(8)], 4)
    first, second = make_sequence(1, range(1, 9)), make_sequence(2, range(1, 9))
    blocks.grow(first, 8)
    freed = list(first.tables[0].blocks)
    blocks.free(first)
    blocks.grow(second, 8)

    assert second.tables[0].blocks == freed


def test_common_beginning_is_found_while_its_owner_lives_and_afterwards() -> None:
    blocks = BlockManager([GroupSize(8)], 4)
    owner = _computed(blocks, 1, 10)
    owned = list(owner.tables[0].blocks)
    other = make_sequence(2, [*range(1, 9), 99])

    assert blocks.find_prefix(other, 8).blocks[0] == owned[:2]
    blocks.free(owner)
    assert blocks.find_prefix(other, 8).blocks[0] == owned[:2]
    assert blocks.num_used_blocks == 0


def test_prefix_is_never_longer_than_asked_for() -> None:
    blocks = BlockManager([GroupSize(8)], 4)
    _computed(blocks, 1, 8)

    assert len(blocks.find_prefix(make_sequence(2, range(1, 9)), 7).blocks[0]) == 1


def test_shared_block_stays_until_its_last_user_frees_it() -> None:
    blocks = BlockManager([GroupSize(8)], 4)
    owner, other = _computed(blocks, 1, 8), make_sequence(2, range(1, 10))
    blocks.share_prefix(other, blocks.find_prefix(other, 8))

    blocks.free(owner)
    blocks.check_invariants([other])
    assert blocks.num_used_blocks == 2
    blocks.free(other)

    assert blocks.num_used_blocks == 0


def test_last_blocks_of_the_oldest_sequence_are_forgotten_first() -> None:
    blocks = BlockManager([GroupSize(4)], 4)
    old, new = _computed(blocks, 1, 8), _computed(blocks, 2, 8, first=50)
    blocks.free(old)
    blocks.free(new)

    _computed(blocks, 3, 4, first=100)

    assert len(blocks.find_prefix(make_sequence(4, range(1, 9)), 8).blocks[0]) == 1
    assert len(blocks.find_prefix(make_sequence(5, range(50, 58)), 8).blocks[0]) == 2


def test_found_blocks_count_as_used_most_recently() -> None:
    blocks = BlockManager([GroupSize(2)], 4)
    blocks.free(_computed(blocks, 1, 4))
    blocks.free(_computed(blocks, 2, 4, first=50))
    again = make_sequence(3, range(1, 6))
    blocks.share_prefix(again, blocks.find_prefix(again, 4))
    blocks.free(again)

    _computed(blocks, 4, 4, first=100)

    assert len(blocks.find_prefix(make_sequence(5, range(1, 5)), 4).blocks[0]) == 1
    assert blocks.find_prefix(make_sequence(6, range(50, 54)), 4).blocks[0] == []


def test_forgotten_blocks_are_not_found() -> None:
    blocks = BlockManager([GroupSize(4)], 4)
    sequence = _computed(blocks, 1, 8)

    blocks.forget(sequence)

    assert blocks.find_prefix(make_sequence(2, range(1, 9)), 8).blocks[0] == []
    blocks.check_invariants([sequence])


def test_nothing_is_found_when_prefixes_are_not_cached() -> None:
    blocks = BlockManager([GroupSize(4)], 4, caches_prefixes=False)
    _computed(blocks, 1, 8)

    assert blocks.find_prefix(make_sequence(2, range(1, 9)), 8).blocks[0] == []
    assert blocks.num_cached_blocks == 0


def test_fork_shares_all_blocks_and_copies_the_last_one_when_it_is_written() -> None:
    blocks = BlockManager([GroupSize(8)], 4)
    parent, child = _computed(blocks, 1, 6), make_sequence(2, range(1, 7))
    blocks.fork(parent, child)
    child.num_scheduled_tokens = 6
    shared = list(parent.tables[0].blocks)

    assert child.tables[0].blocks == shared
    copies = blocks.grow(child, 1)
    assert copies == (BlockCopy(0, shared[1], child.tables[0].blocks[1]),)
    assert child.tables[0].blocks[0] == shared[0]
    # The parent is alone with its last block now and writes in place.
    assert blocks.grow(parent, 1) == ()
    assert parent.tables[0].blocks == shared
    blocks.check_invariants([parent, child])


def test_fork_at_the_end_of_a_block_needs_no_copy() -> None:
    blocks = BlockManager([GroupSize(8)], 4)
    parent, child = _computed(blocks, 1, 8), make_sequence(2, range(1, 9))
    blocks.fork(parent, child)
    child.num_scheduled_tokens = 8

    assert blocks.grow(child, 1) == ()
    assert child.tables[0].blocks[:2] == parent.tables[0].blocks


def test_copy_counts_as_a_block_that_is_needed() -> None:
    blocks = BlockManager([GroupSize(2)], 4)
    parent, child = _computed(blocks, 1, 6), make_sequence(2, range(1, 7))
    blocks.fork(parent, child)
    child.num_scheduled_tokens = 6

    assert blocks.num_free_blocks == 0
    assert not blocks.can_grow(child, 1)
    with pytest.raises(OutOfBlocksError):
        blocks.grow(child, 1)


def test_leak_of_one_block_is_found() -> None:
    blocks = BlockManager([GroupSize(8)], 4)
    sequence = make_sequence(1, range(1, 9))
    blocks.grow(sequence, 8)
    sequence.tables[0].blocks.pop()

    with pytest.raises(AssertionError, match="leak"):
        blocks.check_invariants([sequence])


def test_cache_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no cache"):
        BlockManager([GroupSize(0)], 4)


class _BlockMachine(RuleBasedStateMachine):
    """Admits, extends, forks, preempts and frees sequences at random.

    A shadow of the cache keeps what is in each slot, so that a block that is found, shared or
    copied wrongly, or given back too early, shows as wrong content.
    """

    sizes: tuple[GroupSize, ...] = (GroupSize(14),)

    def __init__(self) -> None:
        super().__init__()
        self.size = 3
        self.blocks = BlockManager(self.sizes, self.size)
        # By group and slot.
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}
        self.live: list[Sequence] = []
        self.next_id = 0

    def _write(self, sequence: Sequence) -> None:
        """Compute all tokens that are not computed yet, if there is room."""
        self.blocks.trim([sequence])
        num_tokens = sequence.num_tokens - sequence.num_scheduled_tokens
        if not self.blocks.can_grow(sequence, num_tokens):
            with pytest.raises(OutOfBlocksError):
                self.blocks.grow(sequence, num_tokens)
            return
        for copy in self.blocks.grow(sequence, num_tokens):
            for offset in range(self.size):
                source, target = (
                    (copy.group, block * self.size + offset) for block in (copy.source, copy.target)
                )
                self.content[target] = self.content.get(source, ())
        for position in range(sequence.num_scheduled_tokens, sequence.num_tokens):
            for group in range(len(self.sizes)):
                key = (group, self._slot(sequence, group, position))
                self.content[key] = tuple(sequence.token_ids[: position + 1])
        sequence.num_scheduled_tokens = sequence.num_tokens
        self.blocks.commit(sequence, sequence.num_tokens)

    def _slot(self, sequence: Sequence, group: int, position: int) -> int:
        block = sequence.tables[group].blocks[position // self.size]
        assert block != NO_BLOCK, "it was given back too early"
        return block * self.size + position % self.size

    @rule(tokens=st.lists(st.integers(1, 2), min_size=1, max_size=12))
    def admit(self, tokens: list[int]) -> None:
        sequence = make_sequence(self.next_id, tokens)
        self.next_id += 1
        self.live.append(sequence)
        self.resume(len(self.live) - 1)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def resume(self, pick: int) -> None:
        sequence = self.live[pick % len(self.live)]
        if not sequence.tables[0].blocks:
            prefix = self.blocks.find_prefix(sequence, sequence.num_tokens - 1)
            self.blocks.share_prefix(sequence, prefix)
            sequence.num_scheduled_tokens = prefix.num_tokens
            self._write(sequence)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100), token=st.integers(1, 2))
    def extend(self, pick: int, token: int) -> None:
        sequence = self.live[pick % len(self.live)]
        if sequence.tables[0].blocks and sequence.num_scheduled_tokens == sequence.num_tokens:
            sequence.token_ids.append(token)
            self._write(sequence)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def fork(self, pick: int) -> None:
        parent = self.live[pick % len(self.live)]
        child = make_sequence(self.next_id, parent.token_ids)
        self.next_id += 1
        if parent.num_scheduled_tokens == parent.num_tokens:
            self.blocks.fork(parent, child)
            child.num_scheduled_tokens = parent.num_scheduled_tokens
            self.live.append(child)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def preempt(self, pick: int) -> None:
        sequence = self.live[pick % len(self.live)]
        self.blocks.free(sequence)
        sequence.num_scheduled_tokens = 0

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def cancel(self, pick: int) -> None:
        self.blocks.free(self.live.pop(pick % len(self.live)))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.blocks.check_invariants(self.live)

    @invariant()
    def each_slot_holds_what_its_sequences_wrote(self) -> None:
        for sequence in self.live:
            # What the next token sees.
            end = sequence.num_scheduled_tokens
            for group, size in enumerate(self.sizes):
                first = max(0, end - size.window + 1) if size.window else 0
                for position in range(first, end):
                    key = (group, self._slot(sequence, group, position))
                    assert self.content[key] == tuple(sequence.token_ids[: position + 1])

    def teardown(self) -> None:
        for sequence in self.live:
            self.blocks.free(sequence)
        assert self.blocks.num_used_blocks == 0


TestBlockMachine = _BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


class _WindowMachine(_BlockMachine):
    """The same, with a group that keeps everything and one that keeps a window."""

    sizes = (GroupSize(14), GroupSize(9, window=4))


TestWindowMachine = _WindowMachine.TestCase
TestWindowMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


class _WindowsOnlyMachine(_BlockMachine):
    """The same, with two groups that keep windows."""

    sizes = (GroupSize(8, window=5), GroupSize(8, window=1))


TestWindowsOnlyMachine = _WindowsOnlyMachine.TestCase
TestWindowsOnlyMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
