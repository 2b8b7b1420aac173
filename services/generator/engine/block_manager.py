"""Keep the blocks of all groups of cache layers together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.generator.engine.block_group import NO_BLOCK, BlockGroup
from chiasm.generator.engine.block_hashes import extend_block_hashes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Items

    from chiasm.generator.engine.block_group import GroupSize
    from chiasm.generator.engine.sequence import Sequence

__all__ = ["BlockCopy", "BlockManager", "OutOfBlocksError", "Prefix"]


class OutOfBlocksError(Exception):
    """Too few free blocks."""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A block to be copied before anything is written: of which group, from where to where."""

    group: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """A beginning of a sequence that is in the cache.

    Attributes:
        num_tokens: Its tokens; a multiple of the block size.
        blocks: Blocks by group; ``NO_BLOCK`` where a group needs none.
    """

    num_tokens: int
    blocks: tuple[list[int], ...]


class BlockManager:
    """Gives blocks to sequences in every group of cache layers at once.

    A group is a set of layers that see the same positions: all before a token, or a window of them
    (see ``BlockGroup``). Each group has blocks, tables and a prefix cache of its own; tokens, and
    so hashes, are the same for all. A change is made in all groups or in none.

    Groups of other kinds (compressed latents, cross-attention states, recurrent states) would be
    further classes with the methods of ``BlockGroup``.
    """

    def __init__(
        self,
        sizes: Items[GroupSize],
        block_size: int,
        caches_prefixes: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with all blocks free.

        Args:
            sizes: Blocks and window of each group; at least one.
            block_size: Token positions of a block.
            caches_prefixes: Whether blocks are found again by what is in them.
            clock: Tells seconds and never goes back.
        """
        self._groups = tuple(
            BlockGroup(index, size, block_size, clock) for index, size in enumerate(sizes)
        )
        self._windowed = tuple(group for group in self._groups if group.has_window)
        self._block_size = block_size
        self._caches_prefixes = caches_prefixes

    @property
    def block_size(self) -> int:
        """Token positions of one block."""
        return self._block_size

    @property
    def num_blocks(self) -> int:
        """Blocks of all groups."""
        return sum(group.num_blocks for group in self._groups)

    @property
    def num_free_blocks(self) -> int:
        """Blocks of all groups that no table lists."""
        return sum(group.num_free_blocks for group in self._groups)

    @property
    def num_used_blocks(self) -> int:
        """Blocks of all groups that tables list."""
        return self.num_blocks - self.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks of all groups that are found by what is in them, used or free."""
        return sum(group.num_cached_blocks for group in self._groups)

    def can_hold(self, num_tokens: int, chunk_tokens: int) -> bool:
        """Return whether a sequence could reach ``num_tokens`` tokens if it were alone.

        Args:
            num_tokens: Tokens of prompt and output.
            chunk_tokens: Most tokens that it grows by at one time.
        """
        return all(
            group.count_most(num_tokens, chunk_tokens) <= group.num_blocks for group in self._groups
        )

    def can_start(
        self, sequence: Sequence, prefix: Prefix, chunk_tokens: int, reserve: int
    ) -> bool:
        """Return whether ``sequence`` may begin behind ``prefix``.

        Args:
            sequence: Sequence without blocks.
            prefix: What it shares.
            chunk_tokens: Most tokens that it grows by at one time.
            reserve: Blocks that must stay free in each group.
        """
        for group, shared in zip(self._groups, prefix.blocks, strict=True):
            needed = group.count_most(sequence.num_total_tokens, chunk_tokens)
            needed -= sum(block != NO_BLOCK for block in shared)
            needed += group.count_free_among(shared)
            if needed + reserve > group.num_free_blocks:
                return False
        return True

    def find_prefix(self, sequence: Sequence, max_tokens: int) -> Prefix:
        """Return the longest beginning of ``sequence`` that every group has; nothing is changed.

        Args:
            sequence: Sequence whose prompt, and known output, is looked up.
            max_tokens: Most tokens that it may have.
        """
        num_blocks = 0
        if self._caches_prefixes:
            num_blocks = min(max_tokens, sequence.num_tokens) // self._block_size
        # A shorter prefix may lack a block that a longer one did not need: until all agree.
        while (shorter := self._shorten(sequence, num_blocks)) < num_blocks:
            num_blocks = shorter
        return Prefix(
            num_blocks * self._block_size,
            tuple(group.prefix_blocks(sequence, num_blocks) for group in self._groups),
        )

    def share_prefix(self, sequence: Sequence, prefix: Prefix) -> None:
        """Let ``sequence`` begin with ``prefix``, which is longer than what it has scheduled."""
        for group, blocks in zip(self._groups, prefix.blocks, strict=True):
            group.share_prefix(sequence, blocks)

    def trim(self, sequences: Iterable[Sequence]) -> None:
        """Give back the blocks that the next tokens of ``sequences`` do not see.

        Steps that were launched before may still read them; every later step writes behind those.
        """
        if self._windowed:
            for sequence in sequences:
                for group in self._windowed:
                    group.trim(sequence)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Return whether ``grow`` with the same arguments would succeed."""
        return all(
            group.count_missing(sequence, num_tokens) <= group.num_free_blocks
            for group in self._groups
        )

    def grow(self, sequence: Sequence, num_tokens: int) -> tuple[BlockCopy, ...]:
        """Give ``sequence`` the blocks it needs to compute ``num_tokens`` more tokens.

        Args:
            sequence: Sequence to grow.
            num_tokens: Tokens about to be written behind the scheduled ones.

        Returns:
            Blocks to copy before the tokens are written: those which the first of them would go
            into and which another sequence has too.

        Raises:
            OutOfBlocksError: Too few free blocks. Nothing was changed.
        """
        for group in self._groups:
            num_missing = group.count_missing(sequence, num_tokens)
            if num_missing > group.num_free_blocks:
                raise OutOfBlocksError(
                    f"{num_missing} blocks needed, {group.num_free_blocks} free."
                )
        copies = []
        for index, group in enumerate(self._groups):
            copy = group.grow(sequence, num_tokens)
            if copy is not None:
                copies.append(BlockCopy(index, *copy))
        return tuple(copies)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give ``child``, which has no blocks, all blocks of ``parent``."""
        for group in self._groups:
            group.fork(parent, child)

    def commit(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Let the full blocks of ``sequence`` be found again by what is in them.

        Args:
            sequence: Sequence with known tokens up to ``num_computed_tokens``.
            num_computed_tokens: Tokens whose keys and values are in its blocks.
        """
        num_full = num_computed_tokens // self._block_size
        if not self._caches_prefixes or num_full <= sequence.tables[0].num_hashed:
            return
        hashes = extend_block_hashes(sequence, self._block_size, num_full)[:num_full]
        for group in self._groups:
            group.commit(sequence, hashes)

    def forget(self, sequence: Sequence) -> None:
        """Let no block of ``sequence`` be found any more: what is in them may be wrong."""
        for group in self._groups:
            group.forget(sequence)

    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of ``sequence``."""
        for group in self._groups:
            group.free(sequence)

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Verify the invariants of every group.

        Args:
            sequences: All sequences that are not finished.

        Raises:
            AssertionError: One of them does not hold.
        """
        everyone = list(sequences)
        for group in self._groups:
            group.check_invariants(everyone)

    def _shorten(self, sequence: Sequence, num_blocks: int) -> int:
        for group in self._groups:
            num_blocks = group.find_prefix(sequence, num_blocks)
        return num_blocks
