"""Order what waits to run: by priority, then by fair shares between tenants, then by arrival."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chiasm.generator.engine.scheduled_step import ScheduledSequence
    from chiasm.generator.engine.sequence import Sequence

DECODE_COST = 2
"""What a decoded token counts for, in prefilled ones."""


class WaitingQueue:
    """Sequences that wait for room, and what each tenant has been served.

    The next sequence is, among those of the lowest priority number, the oldest one of the tenant
    that has been served least. A tenant that comes back after a pause begins where the least served
    of the active ones is, so that nobody saves up for a burst.

    Source: virtual token counters, Sheng et al. 2024, "Fairness in serving large language models".
    """

    def __init__(self) -> None:
        # Sorted by priority and arrival, per tenant; a tenant without sequences has no entry.
        self._queues: dict[str, list[Sequence]] = {}
        self._served: dict[str, int] = {}
        self._num_active: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        """Yield all sequences, in no order that means anything."""
        for queue in self._queues.values():
            yield from queue

    def enter(self, tenant: str) -> None:
        """Count a new live sequence of ``tenant``, waiting or not."""
        if tenant not in self._num_active:
            least = min(self._served.values(), default=0)
            self._served[tenant] = least
            self._num_active[tenant] = 0
        self._num_active[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Count a sequence of ``tenant`` out; its last one takes the tenant's record along."""
        self._num_active[tenant] -= 1
        if not self._num_active[tenant]:
            del self._num_active[tenant], self._served[tenant]

    def charge(self, item: ScheduledSequence) -> None:
        """Note what a step computes for the tenant of a sequence."""
        cost = DECODE_COST if item.is_decode else item.num_tokens
        self._served[item.sequence.origin.tenant] += cost

    def push(self, sequence: Sequence) -> None:
        """Add a sequence at its place."""
        queue = self._queues.setdefault(sequence.origin.tenant, [])
        bisect.insort(queue, sequence, key=rank)

    def remove(self, sequence: Sequence) -> None:
        """Take ``sequence`` out."""
        tenant = sequence.origin.tenant
        queue = self._queues[tenant]
        index = bisect.bisect_left(queue, rank(sequence), key=rank)
        assert queue[index] is sequence, "it waits in the queue of its tenant"
        del queue[index]
        if not queue:
            del self._queues[tenant]

    def peek(self) -> Sequence | None:
        """Return the sequence that is next; ``None`` if none waits."""
        heads = (queue[0] for queue in self._queues.values())
        return min(heads, key=self._turn, default=None)

    def _turn(self, sequence: Sequence) -> tuple[int, int, int]:
        origin = sequence.origin
        return (origin.priority, self._served[origin.tenant], sequence.seq_id)


def rank(sequence: Sequence) -> tuple[int, int]:
    """Return what orders sequences of one tenant: the lower comes first and is preempted last."""
    return (sequence.origin.priority, sequence.seq_id)
