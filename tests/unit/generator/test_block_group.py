"""Tenants share the blocks: a flood of one leaves what others have up to their part."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.engine.block_manager import BlockManager
from chiasm.generator.fair_queue import PROTECTED_S
from tests.fakes.generator_engine import EngineParts, make_sequence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chiasm.generator.engine.sequence import Sequence

BLOCK_SIZE = 4
NUM_BLOCKS = 12
FLOOD_PROMPTS = 40
# Of the random machine: tenants, prompts of each, and most blocks of a prompt.
TENANTS, NUM_PROMPTS, MOST_BLOCKS = "abc", 6, 5


class _Cache:
    """A prefix cache, and tenants that compute prompts of their own."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        self.now = 0.0
        self.blocks = BlockManager([GroupSize(num_blocks)], BLOCK_SIZE, clock=lambda: self.now)
        self.numbers = itertools.count()

    def start(self, tenant: str, prompt: int, num_blocks: int) -> Sequence:
        """Compute a prompt, behind what is cached of it."""
        sequence = self._make(tenant, prompt, num_blocks)
        prefix = self.blocks.find_prefix(sequence, sequence.num_tokens)
        self.blocks.share_prefix(sequence, prefix)
        sequence.num_scheduled_tokens = prefix.num_tokens
        self.blocks.grow(sequence, sequence.num_tokens - prefix.num_tokens)
        sequence.num_scheduled_tokens = sequence.num_tokens
        self.blocks.commit(sequence, sequence.num_tokens)
        return sequence

    def compute(self, tenant: str, prompt: int, num_blocks: int) -> None:
        """Compute a prompt and end."""
        self.blocks.free(self.start(tenant, prompt, num_blocks))

    def flood(self, tenant: str, num_blocks: int = 2) -> None:
        """Compute many prompts that nobody asks for again."""
        for number in range(FLOOD_PROMPTS):
            self.compute(tenant, 1000 + number, num_blocks)
            self.blocks.check_invariants([])

    def cached(self, tenant: str, prompt: int, num_blocks: int) -> int:
        """Return how many blocks of a prompt are cached; they count as used no more than before."""
        sequence = self._make(tenant, prompt, num_blocks)
        return self.blocks.find_prefix(sequence, sequence.num_tokens).num_tokens // BLOCK_SIZE

    def _make(self, tenant: str, prompt: int, num_blocks: int) -> Sequence:
        tokens = [prompt, *range(1, num_blocks * BLOCK_SIZE)]
        return make_sequence(next(self.numbers), tokens, tenant=tenant)


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_flood_of_one_tenant_leaves_the_prefix_of_another_alone(num_blocks: int) -> None:
    cache = _Cache()
    cache.compute("b", 1, 6)

    cache.flood("a", num_blocks)

    assert cache.cached("b", 1, 6) == 6


def test_flood_takes_what_another_has_above_its_share_and_no_more() -> None:
    cache = _Cache()
    cache.compute("b", 1, 10)

    cache.flood("a")

    assert cache.cached("b", 1, 10) == 6


def test_flood_leaves_each_of_several_tenants_its_share() -> None:
    cache = _Cache()
    for tenant in ("b", "c"):
        cache.compute(tenant, 1, 4)

    cache.flood("a")

    assert [cache.cached(tenant, 1, 4) for tenant in ("b", "c")] == [4, 4]


def test_one_tenant_alone_has_the_whole_cache() -> None:
    cache = _Cache()
    for prompt in range(3):
        cache.compute("a", prompt, 4)

    assert [cache.cached("a", prompt, 4) for prompt in range(3)] == [4, 4, 4]


def test_shares_shrink_as_tenants_come() -> None:
    cache = _Cache()
    cache.compute("a", 1, 12)
    held = [cache.cached("a", 1, 12)]

    for tenant in ("b", "c"):
        cache.flood(tenant)
        held.append(cache.cached("a", 1, 12))

    assert held == [12, 6, 4]


def test_what_a_tenant_left_long_ago_is_no_share() -> None:
    cache = _Cache()
    cache.compute("b", 1, 6)
    cache.now = PROTECTED_S

    for prompt in range(3):
        cache.compute("a", prompt, 4)

    assert cache.cached("b", 1, 6) == 0
    assert [cache.cached("a", prompt, 4) for prompt in range(3)] == [4, 4, 4]


def test_live_sequences_may_have_everything() -> None:
    cache = _Cache()
    cache.compute("b", 1, 6)

    live = [cache.start("a", prompt, 4) for prompt in range(3)]

    cache.blocks.check_invariants(live)
    assert cache.blocks.num_free_blocks == 0
    assert cache.cached("b", 1, 6) == 0


def test_what_a_tenant_uses_now_counts_as_its_share() -> None:
    cache = _Cache()
    cache.compute("b", 1, 4)
    cache.compute("a", 1, 2)
    live = cache.start("a", 2, 6)

    cache.compute("a", 3, 2)

    cache.blocks.check_invariants([live])
    assert (cache.cached("a", 1, 2), cache.cached("b", 1, 4)) == (0, 4)


def test_blocks_with_nothing_in_them_are_given_away_before_any_that_are_cached() -> None:
    cache = _Cache()
    cache.compute("b", 1, 6)
    cache.compute("a", 1, 4)

    for prompt in range(20):
        sequence = make_sequence(100 + prompt, [prompt] * 2 * BLOCK_SIZE, tenant="a")
        cache.blocks.grow(sequence, 2 * BLOCK_SIZE)
        cache.blocks.free(sequence)
        cache.blocks.check_invariants([])

    assert (cache.cached("b", 1, 6), cache.cached("a", 1, 4)) == (6, 4)


def test_a_noisy_tenant_costs_another_no_hit_of_ten() -> None:
    parts = EngineParts(num_blocks=128, max_step_tokens=256)
    numbers = itertools.count()

    def ask(tenant: str, prompts: Iterable[int]) -> int:
        """Ask about prompts of 8 blocks at once; return the tokens found in the cache."""
        own = [
            make_sequence(next(numbers), [prompt] * 33, max_tokens=4, tenant=tenant)
            for prompt in prompts
        ]
        for sequence in own:
            parts.engine.add(sequence)
        parts.run()
        return sum(sequence.num_cached_tokens for sequence in own)

    ask("victim", [1, 2, 3])
    alone = ask("victim", [1, 2, 3])
    beside = []
    for number in range(8):
        ask("noisy", range(10 + 30 * number, 40 + 30 * number))
        beside.append(ask("victim", [1, 2, 3]))

    assert alone == 3 * 32
    assert min(beside) >= 0.9 * alone


class _TenantMachine(RuleBasedStateMachine):
    """Tenants compute prompts and end at random; nobody loses to one that could pay itself."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = _Cache()
        self.live: list[Sequence] = []

    def _held(self, tenant: str) -> int:
        """Return the blocks of a tenant; all that it has computed can be found."""
        return sum(self.cache.cached(tenant, prompt, MOST_BLOCKS) for prompt in range(NUM_PROMPTS))

    def _idle(self, tenant: str) -> int:
        """Return those that no sequence uses."""
        own = [sequence for sequence in self.live if sequence.origin.tenant == tenant]
        return self._held(tenant) - len({b for one in own for b in one.tables[0].blocks})

    @rule(
        tenant=st.sampled_from(TENANTS),
        prompt=st.integers(0, NUM_PROMPTS - 1),
        num_blocks=st.integers(1, MOST_BLOCKS),
    )
    def start(self, tenant: str, prompt: int, num_blocks: int) -> None:
        if self.cache.blocks.num_free_blocks < num_blocks:
            return
        before = {name: self._held(name) for name in TENANTS}
        self.live.append(self.cache.start(tenant, prompt, num_blocks))
        for loser in TENANTS:
            if loser != tenant and self._held(loser) < before[loser]:
                for rival in set(TENANTS) - {loser}:
                    assert not self._idle(rival) or self._held(rival) <= before[loser]

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def end(self, pick: int) -> None:
        self.cache.blocks.free(self.live.pop(pick % len(self.live)))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.cache.blocks.check_invariants(self.live)


TestTenantMachine = _TenantMachine.TestCase
TestTenantMachine.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
