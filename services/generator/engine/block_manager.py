"""Give blocks of the KV cache to sequences, share them, and take them back."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from chiasm.generator.engine.block_hashes import extend_block_hashes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chiasm.generator.engine.sequence import Sequence


class OutOfBlocksError(Exception):
    """Too few free blocks."""


class BlockManager:
    """Owns the ids of all blocks of the KV cache.

    A sequence's block table lists its blocks in position order; token position ``p`` lives in slot
    ``block_table[p // block_size] * block_size + p % block_size``. Sequences with a common
    beginning may have the same blocks in front::

        sequence 7, 9 tokens, block_size 4     block_table [5, 0, 3]
        sequence 8, 6 tokens                   block_table [5, 2]
        position  0 1 2 3 | 4 5 6 7 | 8 . . .
        block        5    |  0 or 2 |    3

    A free block keeps its keys and values until it is given away, and is found again by the hash of
    what is in it. Free blocks form a queue: those without a hash first, then the least recently
    used; the blocks of one sequence with its last block in front, since only whole prefixes are of
    use.

    Invariants:
        1. A block is in the free queue exactly if no block table lists it.
        2. ``_num_users[block]`` is the number of tables that list the block; a table lists it once.
        3. ``_cached`` and ``_hashes`` are inverse to each other.
        4. A table has no more blocks than its tokens need.
        5. Only a full block is listed by two tables, except between ``fork`` and the next ``grow``.

    Sources: PagedAttention, Kwon et al. 2023, sections 4.2 and 4.4; vLLM's prefix caching.
    """

    def __init__(self, num_blocks: int, block_size: int, caches_prefixes: bool = True) -> None:
        """Start with ``num_blocks`` free blocks of ``block_size`` token positions each.

        Args:
            num_blocks: Blocks of the cache.
            block_size: Token positions of a block.
            caches_prefixes: Whether blocks are found again by what is in them.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens are no cache.")
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._caches_prefixes = caches_prefixes
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_users = [0] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

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
        """Blocks that no block table lists."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that block tables list."""
        return self._num_blocks - len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that are found by what is in them, used or free."""
        return len(self._cached)

    def count_blocks(self, num_tokens: int) -> int:
        """Return the number of blocks that hold ``num_tokens`` tokens of one sequence."""
        return -(-num_tokens // self._block_size)

    def find_prefix(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """Return the cached blocks that hold the beginning of ``sequence``; nothing is changed.

        Args:
            sequence: Sequence whose prompt, and known output, is looked up.
            max_tokens: Most tokens that the blocks may hold.
        """
        blocks: list[int] = []
        if not self._caches_prefixes:
            return blocks
        num_full = min(max_tokens, sequence.num_tokens) // self._block_size
        for index in range(num_full):
            block_hash = extend_block_hashes(sequence, self._block_size, index + 1)[index]
            block = self._cached.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_free_among(self, blocks: Iterable[int]) -> int:
        """Return how many of ``blocks`` would leave the free queue if they were shared."""
        return sum(not self._num_users[block] for block in blocks)

    def share_prefix(self, sequence: Sequence, blocks: list[int]) -> None:
        """Let the table of ``sequence`` begin with ``blocks``, as ``find_prefix`` returned them.

        A block that it has computed in part gives way to the whole one. ``blocks`` hold more tokens
        than it has scheduled.
        """
        table = sequence.block_table
        first = sequence.num_scheduled_tokens // self._block_size
        for block in blocks[first:]:
            self._take(block)
        for block in table[first:]:
            self._drop(block)
        table[first:] = blocks[first:]
        sequence.num_hashed_blocks = len(blocks)

    def count_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Return the number of blocks that ``grow`` with the same arguments would take."""
        start = sequence.num_scheduled_tokens
        missing = self.count_blocks(start + num_tokens) - len(sequence.block_table)
        return max(0, missing) + self._must_copy(sequence, start)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Return whether ``grow`` with the same arguments would succeed."""
        return self.count_missing(sequence, num_tokens) <= len(self._free)

    def grow(self, sequence: Sequence, num_tokens: int) -> tuple[int, int] | None:
        """Give ``sequence`` the blocks it needs to compute ``num_tokens`` more tokens.

        Args:
            sequence: Sequence to grow; its block table is changed in place.
            num_tokens: Tokens about to be written behind the scheduled ones.

        Returns:
            The block to copy from and the one to copy to before the tokens are written, if the
            first of them would go into a block that another sequence has too; else ``None``.

        Raises:
            OutOfBlocksError: Too few free blocks. Nothing was changed.
        """
        num_missing = self.count_missing(sequence, num_tokens)
        if num_missing > len(self._free):
            raise OutOfBlocksError(f"{num_missing} blocks needed, {len(self._free)} free.")
        copy = None
        if self._must_copy(sequence, sequence.num_scheduled_tokens):
            index = sequence.num_scheduled_tokens // self._block_size
            copy = (sequence.block_table[index], self._take_oldest())
            sequence.block_table[index] = copy[1]
            self._drop(copy[0])
            num_missing -= 1
        sequence.block_table.extend(self._take_oldest() for _ in range(num_missing))
        return copy

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give ``child``, which has no blocks, all blocks of ``parent``."""
        assert not child.block_table, "a fork begins without blocks"
        for block in parent.block_table:
            self._take(block)
        child.block_table.extend(parent.block_table)
        child.num_hashed_blocks = parent.num_hashed_blocks

    def commit(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Let the full blocks of ``sequence`` be found again by what is in them.

        Args:
            sequence: Sequence with known tokens up to ``num_computed_tokens``.
            num_computed_tokens: Tokens whose keys and values are in its blocks.
        """
        num_full = num_computed_tokens // self._block_size
        if not self._caches_prefixes or num_full <= sequence.num_hashed_blocks:
            return
        hashes = extend_block_hashes(sequence, self._block_size, num_full)
        for index in range(sequence.num_hashed_blocks, num_full):
            block = sequence.block_table[index]
            # Two sequences may compute the same block at once; one of them is enough.
            if hashes[index] not in self._cached and block not in self._hashes:
                self._cached[hashes[index]] = block
                self._hashes[block] = hashes[index]
        sequence.num_hashed_blocks = num_full

    def forget(self, sequence: Sequence) -> None:
        """Let no block of ``sequence`` be found any more: what is in them may be wrong."""
        for block in sequence.block_table:
            self._uncache(block)

    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of ``sequence``; its block table is empty afterwards."""
        for block in reversed(sequence.block_table):
            self._drop(block)
        sequence.block_table.clear()
        sequence.num_hashed_blocks = 0

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Verify the invariants of the class.

        Args:
            sequences: All sequences that are not finished.

        Raises:
            AssertionError: One of them does not hold.
        """
        users: Counter[int] = Counter()
        for sequence in sequences:
            table = sequence.block_table
            assert len(set(table)) == len(table), "a block is twice in a table"
            assert len(table) <= self.count_blocks(sequence.num_total_tokens), "too many blocks"
            users.update(table)
        assert [users[block] for block in range(self._num_blocks)] == self._num_users, "a leak"
        assert set(self._free) == {block for block, n in enumerate(self._num_users) if not n}
        assert {block: key for key, block in self._cached.items()} == self._hashes

    def _must_copy(self, sequence: Sequence, position: int) -> bool:
        """Return whether writing at ``position`` would change a block of another sequence."""
        index = position // self._block_size
        table = sequence.block_table
        return index < len(table) and self._num_users[table[index]] > 1

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._uncache(block)
        self._num_users[block] = 1
        return block

    def _take(self, block: int) -> None:
        if not self._num_users[block]:
            del self._free[block]
        self._num_users[block] += 1

    def _drop(self, block: int) -> None:
        self._num_users[block] -= 1
        if not self._num_users[block]:
            self._free[block] = None
            # What cannot be found again is given away first; its memory is warm.
            self._free.move_to_end(block, last=block in self._hashes)

    def _uncache(self, block: int) -> None:
        block_hash = self._hashes.pop(block, None)
        if block_hash is not None:
            del self._cached[block_hash]
