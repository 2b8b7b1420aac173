"""Turn guides into grammars off the event loop, with bounds on time and memory."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.common.sampling import GUIDE_PARAM
from chiasm.generator.compile_turns import CompileTurns
from chiasm.generator.fair_queue import FairQueue

if TYPE_CHECKING:
    from chiasm.common.sampling import Guide
    from chiasm.generator.engine.grammar import Grammar, GrammarCompiler

    Key = tuple[str, Guide]

MAX_GRAMMARS = 64
COMPILE_TIMEOUT_S = 5.0


class Guides:
    """Compiles guides in one thread and keeps the grammars that were used last.

    They are kept by tenant, who would otherwise see by the time it takes what others ask for;
    tenants share the places as ``FairQueue`` tells.
    """

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        """Start without grammars; ``compiler`` is ``None`` where there is no tokenizer."""
        self._compiler = compiler
        self._grammars: dict[Key, Grammar] = {}
        self._queue: FairQueue[Key] = FairQueue()
        self._turns = CompileTurns()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    async def compile(self, guide: Guide, tenant: str) -> Grammar:
        """Return the grammar of ``guide``.

        Args:
            guide: What an output must look like.
            tenant: Who asks; tenants take turns as ``CompileTurns`` tells.

        Raises:
            InvalidRequestError: It is not valid, costs too much, or the model has no tokenizer.
            OverloadedError: Too many guides wait to be compiled, or this one waited too long.
        """
        key = (tenant, guide)
        if key in self._grammars:
            return self._use(key)
        if self._compiler is None:
            raise InvalidRequestError(
                "The model has no tokenizer.json, which structured output needs.",
                param=GUIDE_PARAM,
            )
        await self._turns.take(tenant)
        if key in self._grammars:  # another request compiled it while this one waited
            self._turns.end()
            return self._use(key)
        compilation = asyncio.wrap_future(self._thread.submit(self._compiler.compile, guide))
        compilation.add_done_callback(self._end_turn)
        # The thread goes on with what nobody waits for; the library's own limits end it.
        done, _ = await asyncio.wait([compilation], timeout=COMPILE_TIMEOUT_S)
        if not done:
            raise InvalidRequestError(
                f"The guide of the output was not compiled within {COMPILE_TIMEOUT_S:g} seconds.",
                param=GUIDE_PARAM,
            )
        grammar = compilation.result()
        self._keep(key, grammar)
        return grammar

    def close(self) -> None:
        """End the thread after what it is at."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _end_turn(self, compilation: asyncio.Future[Grammar]) -> None:
        if not compilation.cancelled():
            compilation.exception()  # is read here, where nobody may wait for it
        self._turns.end()

    def _use(self, key: Key) -> Grammar:
        self._queue.touch(key)
        return self._grammars[key]

    def _keep(self, key: Key, grammar: Grammar) -> None:
        tenant, _ = key
        if key not in self._grammars:
            self._queue.charge(tenant, 1)
            self._queue.push(key, tenant)
        self._grammars[key] = grammar
        while len(self._grammars) > MAX_GRAMMARS:
            forgotten = self._queue.pop(tenant)
            self._queue.charge(forgotten[0], -1)
            del self._grammars[forgotten]
