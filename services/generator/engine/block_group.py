"""Give blocks of one group of cache layers to sequences, share them, and take them back."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chiasm.generator.engine.block_hashes import extend_block_hashes
from chiasm.generator.fair_queue import FairQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chiasm.generator.engine.sequence import Sequence


# Stands in a table where a block was given back because no token sees it any more.
NO_BLOCK = -1


@dataclass(frozen=True, slots=True)
class GroupSize:
    """How much of a sequence a group keeps, and how many blocks it has for that.

    Attributes:
        num_blocks: Blocks of all sequences together.
        window: Positions that a token sees, itself included; 0 is all before it.
    """

    num_blocks: int
    window: int = 0


def count_most_blocks(num_tokens: int, chunk_tokens: int, window: int, block_size: int) -> int:
    """Return the most blocks that a sequence holds on its way to ``num_tokens`` tokens.

    Args:
        num_tokens: Tokens that it reaches.
        chunk_tokens: Most tokens that it grows by at one time.
        window: Positions that a token sees; 0 is all before it.
        block_size: Token positions of a block.
    """
    whole = -(-num_tokens // block_size)
    if not window:
        return whole
    # Window and chunk may begin and end within a block.
    return min(whole, -(-(window + chunk_tokens) // block_size) + 1)


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence in one group.

    Attributes:
        blocks: Ids of the blocks, in position order; the first ``num_dropped`` are ``NO_BLOCK``.
        num_dropped: Blocks that lie wholly before the window.
        num_hashed: Blocks that the prefix cache was told of.
        given_back: Blocks that left the window before their step had ended: index in ``blocks``,
            id, and how often the block had been given away.
    """

    blocks: list[int] = field(default_factory=list)
    num_dropped: int = 0
    num_hashed: int = 0
    given_back: list[tuple[int, int, int]] = field(default_factory=list)


class BlockGroup:
    """Owns the ids of all blocks of one group: layers that see the same positions.

    A sequence's table lists its blocks in position order; token position ``p`` lives in slot
    ``blocks[p // block_size] * block_size + p % block_size``. Sequences with a common beginning may
    have the same blocks in front::

        sequence 7, 9 tokens, block_size 4     blocks [5, 0, 3]
        sequence 8, 6 tokens                   blocks [5, 2]
        position  0 1 2 3 | 4 5 6 7 | 8 . . .
        block        5    |  0 or 2 |    3

    With a window, blocks that no later token sees are given back as the sequence goes on, and a
    prefix needs only the blocks that its next token sees.

    A free block keeps its keys and values until it is given away, and is found again by the hash of
    what is in it. Those without a hash are given away first, then the least recently used ones, as
    ``FairQueue`` tells between tenants; the blocks of one sequence with its last block in front,
    since only whole prefixes are of use.

    Invariants:
        1. A block is blank or in the free queue, and not both, exactly if no table lists it.
        2. ``_num_users[block]`` is the number of tables that list the block; a table lists it once.
        3. ``_cached`` and ``_hashes`` are inverse to each other.
        4. A table has no more blocks than its tokens need.
        5. Only a full block is listed by two tables, except between ``fork`` and the next ``grow``.
        6. A block that is not blank is charged to its owner, the tenant that it was given to.

    Sources: PagedAttention, Kwon et al. 2023, sections 4.2 and 4.4; vLLM's prefix caching.
    """

    def __init__(
        self,
        index: int,
        size: GroupSize,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with all blocks free.

        Args:
            index: Number of the group: its key in ``Sequence.tables``.
            size: Its blocks and its window.
            block_size: Token positions of a block.
            clock: Tells seconds and never goes back.
        """
        if size.num_blocks < 1 or block_size < 1:
            raise ValueError(f"{size.num_blocks} blocks of {block_size} tokens are no cache.")
        self._index = index
        self._num_blocks = size.num_blocks
        self._window = size.window
        self._block_size = block_size
        self._blank = list(reversed(range(size.num_blocks)))
        self._free: FairQueue[int] = FairQueue(clock)
        self._owners: list[str | None] = [None] * size.num_blocks
        self._num_users = [0] * size.num_blocks
        self._num_takes = [0] * size.num_blocks
        self._cached: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole cache."""
        return self._num_blocks

    @property
    def has_window(self) -> bool:
        """Whether blocks are given back as a sequence goes on."""
        return self._window > 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no block table lists."""
        return len(self._blank) + len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that block tables list."""
        return self._num_blocks - self.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that are found by what is in them, used or free."""
        return len(self._cached)

    def count_most(self, num_tokens: int, chunk_tokens: int) -> int:
        """Return the most blocks of a sequence at one time; see ``count_most_blocks``."""
        return count_most_blocks(num_tokens, chunk_tokens, self._window, self._block_size)

    def find_prefix(self, sequence: Sequence, most: int) -> int:
        """Return the number of blocks of the longest cached prefix; nothing is changed.

        Args:
            sequence: Sequence whose known tokens are looked up.
            most: Most blocks that the prefix may have.
        """
        if not self._window:
            missing = (i for i in range(most) if self._cached_block(sequence, i) == NO_BLOCK)
            return next(missing, most)
        num_blocks = most
        while num_blocks:
            needed = range(self.first_needed(num_blocks * self._block_size), num_blocks)
            missing = (i for i in reversed(needed) if self._cached_block(sequence, i) == NO_BLOCK)
            last_missing = next(missing, None)
            if last_missing is None:
                break
            # Whatever reaches beyond it needs it too.
            num_blocks = last_missing
        return num_blocks

    def prefix_blocks(self, sequence: Sequence, num_blocks: int) -> list[int]:
        """Return the cached blocks of a prefix as ``find_prefix`` found it."""
        first = self.first_needed(num_blocks * self._block_size)
        found = [self._cached_block(sequence, index) for index in range(first, num_blocks)]
        return [NO_BLOCK] * first + found

    def first_needed(self, position: int) -> int:
        """Return the index of the first block that a token at ``position`` sees."""
        if not self._window:
            return 0
        return max(0, position - self._window + 1) // self._block_size

    def count_free_among(self, blocks: Iterable[int]) -> int:
        """Return how many of ``blocks`` would leave the free queue if they were shared."""
        return sum(block != NO_BLOCK and not self._num_users[block] for block in blocks)

    def share_prefix(self, sequence: Sequence, blocks: list[int]) -> None:
        """Let the table of ``sequence`` begin with ``blocks``.

        A block that it has computed in part gives way to the whole one.

        Args:
            sequence: Sequence that has fewer tokens scheduled than ``blocks`` hold.
            blocks: Cached blocks; ``NO_BLOCK`` where none is needed.
        """
        table = sequence.tables[self._index]
        first = sequence.num_scheduled_tokens // self._block_size
        for block in blocks[first:]:
            if block != NO_BLOCK:
                self._take(block)
        for block in table.blocks[first:]:
            self._drop(block)
        table.blocks[first:] = blocks[first:]
        table.num_hashed = len(blocks)
        self._drop_before(table, self.first_needed(len(blocks) * self._block_size))

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks that the next tokens of ``sequence`` do not see."""
        first = self.first_needed(sequence.num_scheduled_tokens)
        self._drop_before(sequence.tables[self._index], first)

    def count_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Return the number of blocks that ``grow`` with the same arguments would take."""
        start = sequence.num_scheduled_tokens
        table = sequence.tables[self._index]
        missing = self._count_blocks(start + num_tokens) - len(table.blocks)
        return max(0, missing) + self._must_copy(table, start)

    def grow(self, sequence: Sequence, num_tokens: int) -> tuple[int, int] | None:
        """Give ``sequence`` the blocks it needs to compute ``num_tokens`` more tokens.

        Args:
            sequence: Sequence to grow; its table is changed in place.
            num_tokens: Tokens about to be written behind the scheduled ones.

        Returns:
            The block to copy from and the one to copy to before the tokens are written, if the
            first of them would go into a block that another sequence has too; else ``None``.

        There must be as many free blocks as ``count_missing`` says.
        """
        num_missing = self.count_missing(sequence, num_tokens)
        copy = None
        table = sequence.tables[self._index]
        tenant = sequence.origin.tenant
        if self._must_copy(table, sequence.num_scheduled_tokens):
            index = sequence.num_scheduled_tokens // self._block_size
            copy = (table.blocks[index], self._give(tenant))
            table.blocks[index] = copy[1]
            self._drop(copy[0])
            num_missing -= 1
        table.blocks.extend(self._give(tenant) for _ in range(num_missing))
        return copy

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give ``child``, which has no blocks, all blocks of ``parent``."""
        source = parent.tables[self._index]
        assert not child.tables[self._index].blocks, "a fork begins without blocks"
        for block in source.blocks[source.num_dropped :]:
            self._take(block)
        child.tables[self._index] = BlockTable(
            list(source.blocks), source.num_dropped, source.num_hashed
        )

    def commit(self, sequence: Sequence, hashes: list[bytes]) -> None:
        """Let the full blocks of ``sequence`` be found again by what is in them.

        Args:
            sequence: Sequence that has computed all tokens of the blocks.
            hashes: Of each of its full blocks.
        """
        table = sequence.tables[self._index]
        for index, block, num_takes in table.given_back:
            if index < len(hashes) and self._num_takes[block] == num_takes:
                self._cache(block, hashes[index])
        table.given_back.clear()
        for index in range(max(table.num_hashed, table.num_dropped), len(hashes)):
            self._cache(table.blocks[index], hashes[index])
        table.num_hashed = max(table.num_hashed, len(hashes))

    def forget(self, sequence: Sequence) -> None:
        """Let no block of ``sequence`` be found any more: what is in them may be wrong."""
        for block in sequence.tables[self._index].blocks:
            self._uncache(block)

    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of ``sequence``; its table is empty afterwards."""
        table = sequence.tables.pop(self._index, BlockTable())
        for block in reversed(table.blocks[table.num_dropped :]):
            self._drop(block)

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Verify the invariants of the class.

        Args:
            sequences: All sequences that are not finished.

        Raises:
            AssertionError: One of them does not hold.
        """
        users: Counter[int] = Counter()
        for sequence in sequences:
            table = sequence.tables[self._index]
            held = table.blocks[table.num_dropped :]
            assert table.blocks[: table.num_dropped] == [NO_BLOCK] * table.num_dropped
            assert NO_BLOCK not in held, "a block behind the window is missing"
            assert len(set(held)) == len(held), "a block is twice in a table"
            most = self._count_blocks(sequence.num_total_tokens)
            assert len(table.blocks) <= most, "too many blocks"
            users.update(held)
        assert [users[block] for block in range(self._num_blocks)] == self._num_users, "a leak"
        blank = set(self._blank)
        assert len(blank) == len(self._blank), "a block is blank twice"
        for block, num_users in enumerate(self._num_users):
            assert (block in blank) + (block in self._free) == (not num_users)
        assert blank == {block for block, owner in enumerate(self._owners) if owner is None}
        charges = Counter(owner for owner in self._owners if owner is not None)
        assert self._free.charges == charges, "a tenant is charged wrongly"
        self._free.check_invariants()
        assert {block: key for key, block in self._cached.items()} == self._hashes

    def _count_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _cached_block(self, sequence: Sequence, index: int) -> int:
        block_hash = extend_block_hashes(sequence, self._block_size, index + 1)[index]
        return self._cached.get(block_hash, NO_BLOCK)

    def _must_copy(self, table: BlockTable, position: int) -> bool:
        """Return whether writing at ``position`` would change a block of another sequence."""
        index = position // self._block_size
        return index < len(table.blocks) and self._num_users[table.blocks[index]] > 1

    def _drop_before(self, table: BlockTable, first: int) -> None:
        """Give back the blocks before index ``first``, the last ones first.

        Those whose step has not ended may be found by what is in them once it has.
        """
        for index in reversed(range(table.num_dropped, first)):
            block = table.blocks[index]
            if block != NO_BLOCK:
                is_pending = index >= table.num_hashed
                if is_pending:
                    table.given_back.append((index, block, self._num_takes[block]))
                self._drop(block, is_pending=is_pending)
                table.blocks[index] = NO_BLOCK
        table.num_dropped = max(table.num_dropped, first)

    def _give(self, tenant: str) -> int:
        """Return the block that is given away next; it is charged to ``tenant``."""
        block = self._blank.pop() if self._blank else self._free.pop(tenant)
        owner = self._owners[block]
        if owner != tenant:
            if owner is not None:
                self._free.charge(owner, -1)
            self._free.charge(tenant, 1)
            self._owners[block] = tenant
        self._uncache(block)
        self._num_users[block] = 1
        self._num_takes[block] += 1
        return block

    def _take(self, block: int) -> None:
        if not self._num_users[block]:
            self._free.remove(block)
        self._num_users[block] += 1

    def _drop(self, block: int, *, is_pending: bool = False) -> None:
        self._num_users[block] -= 1
        owner = self._owners[block]
        if self._num_users[block] or owner is None:
            return
        if is_pending or block in self._hashes:
            self._free.push(block, owner)
        else:
            # What cannot be found again is given away first; its memory is warm.
            self._blank.append(block)
            self._free.charge(owner, -1)
            self._owners[block] = None

    def _cache(self, block: int, block_hash: bytes) -> None:
        # Two sequences may compute the same block at once; one of them is enough.
        if block_hash not in self._cached and block not in self._hashes:
            self._cached[block_hash] = block
            self._hashes[block] = block_hash

    def _uncache(self, block: int) -> None:
        block_hash = self._hashes.pop(block, None)
        if block_hash is not None:
            del self._cached[block_hash]
