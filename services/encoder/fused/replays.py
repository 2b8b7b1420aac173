"""Replay forwards of inputs whose shapes come again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import torch

    from chiasm.common.graph_recorder import Recorder

    Outputs = list[torch.Tensor]
    Forward = Callable[[torch.Tensor], Outputs]

# Shapes that are remembered, each with a graph of some hundred launches if it came twice.
_MAX_SHAPES = 32
# A forward of more rows keeps a GPU busy for longer than its launches take, and batches of several
# pictures are rarely alike.
_MAX_ROWS = 2048


@dataclass(slots=True)
class _Shape:
    """A shape of inputs: whether it was seen, and, once it is recorded, what repeats its forward.

    Attributes:
        is_known: Whether it came before.
        rows: What the recorded forward reads.
        replay: Repeats it.
    """

    is_known: bool = False
    rows: torch.Tensor | None = None
    replay: Callable[[], Outputs] | None = None


class Replays:
    """Runs forwards; one whose key comes for the second time is recorded, and then replayed.

    Pictures of many services have few sizes. Recording takes as long as some forwards, so that a
    size that comes once is not recorded.
    """

    def __init__(self, record: Recorder | None) -> None:
        """Keep what ``record`` makes of forwards; with ``None`` they just run."""
        self._record = record
        self._shape_of = lru_cache(_MAX_SHAPES)(lambda _: _Shape())

    def run(self, key: Hashable, rows: torch.Tensor, forward: Forward) -> Outputs:
        """Return what ``forward`` makes of ``rows``.

        Args:
            key: Tells apart whatever the work of the forward depends on besides the values in
                ``rows``, their shape included.
            rows: [num_rows, width].
            forward: Waits for nothing.

        Returns:
            Its outputs, until another forward is run.
        """
        if self._record is None or len(rows) > _MAX_ROWS:
            return forward(rows)
        shape = self._shape_of(key)
        if not shape.is_known:
            shape.is_known = True
            return forward(rows)
        if shape.replay is None or shape.rows is None:
            shape.rows = rows.clone()
            shape.replay = self._record(partial(forward, shape.rows))
        shape.rows.copy_(rows)
        return shape.replay()
