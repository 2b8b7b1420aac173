"""Give blocks of the KV cache to sequences and take them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chiasm.generator.engine.sequence import Sequence


class OutOfBlocksError(Exception):
    """Too few free blocks."""


class BlockManager:
    """Owns the ids of all blocks of the KV cache.

    A sequence's block table lists its blocks in position order; token position ``p`` lives in slot
    ``block_table[p // block_size] * block_size + p % block_size``::

        sequence 7, 9 tokens, block_size 4     block_table [5, 0, 3]
        position  0 1 2 3 | 4 5 6 7 | 8 . . .
        block        5    |    0    |    3

    Invariants:
        1. Every block is either free or owned by exactly one sequence.
        2. The blocks that a sequence owns are those of its block table, each once.
        3. A block table has no more blocks than its tokens need.

    Source: PagedAttention, Kwon et al. 2023, section 4.2.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Start with ``num_blocks`` free blocks of ``block_size`` token positions each."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens are no cache.")
        self._num_blocks = num_blocks
        self._block_size = block_size
        # The last freed block is the first reused: its memory is warm.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners: dict[int, int] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole cache."""
        return self._num_blocks

    @property
    def block_size(self) -> int:
        """Token positions of one block."""
        return self._block_size

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence owns."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that sequences own."""
        return len(self._owners)

    def count_blocks(self, num_tokens: int) -> int:
        """Return the number of blocks that hold ``num_tokens`` tokens of one sequence."""
        return -(-num_tokens // self._block_size)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Return whether ``grow`` with the same arguments would succeed."""
        return self._count_missing(sequence, num_tokens) <= len(self._free)

    def grow(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Give ``sequence`` the blocks it needs to compute ``num_tokens`` more tokens.

        Args:
            sequence: Sequence to grow; its block table is extended in place.
            num_tokens: Tokens about to be written behind the computed ones.

        Returns:
            Ids of the new blocks, in position order; empty if the last block had room.

        Raises:
            OutOfBlocksError: Too few free blocks. Nothing was changed.
        """
        num_missing = self._count_missing(sequence, num_tokens)
        if num_missing > len(self._free):
            raise OutOfBlocksError(f"{num_missing} blocks needed, {len(self._free)} free.")
        blocks = [self._free.pop() for _ in range(num_missing)]
        for block in blocks:
            self._owners[block] = sequence.seq_id
        sequence.block_table.extend(blocks)
        return blocks

    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of ``sequence``; its block table is empty afterwards."""
        for block in reversed(sequence.block_table):
            del self._owners[block]
            self._free.append(block)
        sequence.block_table.clear()

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Verify the invariants of the class.

        Args:
            sequences: All sequences that are not finished.

        Raises:
            AssertionError: One of them does not hold.
        """
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert set(self._free).isdisjoint(self._owners), "a block is both free and owned"
        assert len(self._free) + len(self._owners) == self._num_blocks, "a block was lost"
        num_listed = 0
        for sequence in sequences:
            num_listed += len(sequence.block_table)
            assert len(set(sequence.block_table)) == len(sequence.block_table), "a block is twice"
            assert len(sequence.block_table) <= self.count_blocks(sequence.num_tokens), "too many"
            for block in sequence.block_table:
                assert self._owners.get(block) == sequence.seq_id, "a block has another owner"
        assert num_listed == len(self._owners), "a block leaked"

    def _count_missing(self, sequence: Sequence, num_tokens: int) -> int:
        needed = self.count_blocks(sequence.num_computed_tokens + num_tokens)
        return max(0, needed - len(sequence.block_table))
