"""The media items of one request, worked on together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .media_task import MediaTask

if TYPE_CHECKING:
    import types
    from collections.abc import Sequence
    from typing import Self

    from chiasm.common.media import RequestContext

    from .chat_request import MediaItem
    from .deadline import Deadline
    from .media_object import MediaReceipt
    from .media_task import EmbeddingSink, MediaServices, PlannedItem


class MediaBatch:
    """Starts one task per item when entered and ends all of them when left."""

    def __init__(
        self,
        items: Sequence[MediaItem],
        context: RequestContext,
        services: MediaServices,
        deadline: Deadline,
    ) -> None:
        self._items = items
        self._context = context
        self._services = services
        self._deadline = deadline
        self._tasks: list[MediaTask] = []

    async def __aenter__(self) -> Self:
        inline_ids: set[bytes] = set()
        self._tasks = [
            MediaTask(item, self._context, self._services, inline_ids, self._deadline)
            for item in self._items
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        # All of it before the first wait, which a second cancellation may end.
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(task.wait_ended() for task in self._tasks))

    async def planned(self) -> list[PlannedItem]:
        """Return the plan of every item, in their order.

        Raises:
            ChiasmError: The first failure of any item.
        """
        return await asyncio.gather(*(task.planned() for task in self._tasks))

    def connect(self, sink: EmbeddingSink) -> None:
        """Send what happens to the embeddings from now on to ``sink``."""
        for task in self._tasks:
            task.connect(sink)

    def resend(self, embedding_id: bytes) -> None:
        """Have an embedding that the generator misses encoded again and sent in chunks."""
        tasks = [task for task in self._tasks if task.embedding_id == embedding_id]
        if tasks:
            next((task for task in tasks if task.has_source), tasks[0]).resend()

    def receipts(self, offsets: Sequence[int]) -> tuple[MediaReceipt, ...]:
        """Tell how the items came to be available, in the order of the prompt.

        Args:
            offsets: Position of each item in the prompt, in the order of the items.
        """
        tasks = sorted(zip(offsets, self._tasks, strict=True), key=lambda pair: pair[0])
        return tuple(task.receipt() for _, task in tasks)

    def release_sources(self) -> None:
        """Forget all sources: the generator has the embeddings."""
        for task in self._tasks:
            task.release_source()
