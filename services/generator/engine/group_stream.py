"""Carry what happens to the sequences of one request to whoever reads them together."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.generator.engine.outputs import Finished, TokenDelta

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.generator.engine.sequence_stream import SequenceStream, StreamEvent


class GroupStream:
    """The streams of sequences that share a prompt, read as one; belongs to the event loop.

    What it returns carries the index of its sequence. An error of one sequence is raised once for
    all of them.
    """

    def __init__(self, streams: tuple[SequenceStream, ...]) -> None:
        self._streams = streams
        self._live = dict(enumerate(streams))
        self._has_news = asyncio.Event()
        self.listen(self._has_news.set)

    @property
    def seq_id(self) -> int:
        """Id of the first sequence."""
        return self._streams[0].seq_id

    @property
    def seq_ids(self) -> tuple[int, ...]:
        """Ids of all sequences."""
        return tuple(stream.seq_id for stream in self._streams)

    @property
    def is_over(self) -> bool:
        """Whether the end of every sequence has been read."""
        return not self._live

    def need(self, embedding_id: bytes) -> None:
        """Ask the reader for an embedding that is not in the store; at most once per span."""
        # Of one that has ended and was read nothing is read any more.
        for stream in self._live.values():
            stream.need(embedding_id)
            return

    def fail(self, error: Exception) -> None:
        """End all sequences by ``error``; ignored by those that have ended."""
        for stream in self._streams:
            stream.fail(error)

    def stop(self, index: int) -> None:
        """End one sequence as the reader wants; see ``SequenceStream.stop``."""
        self._streams[index].stop()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` at all news from now on; then ``take`` is used and ``read`` is not."""
        for stream in self._streams:
            stream.listen(listener)

    async def read(self) -> StreamEvent:
        """Wait for news; see ``take``."""
        while (event := self.take()) is None:
            self._has_news.clear()
            await self._has_news.wait()
        return event

    def take(self, max_tokens: int | None = None) -> StreamEvent | None:
        """Return news of the first sequence that has some; see ``SequenceStream.take``."""
        for index, stream in self._live.items():
            event = stream.take(max_tokens)
            if event is None:
                continue
            if isinstance(event, Finished):
                del self._live[index]
            if index and isinstance(event, Finished | TokenDelta):
                return replace(event, index=index)
            return event
        return None
