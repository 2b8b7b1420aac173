"""Turn guides into grammars off the event loop, with bounds on time and memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError, OverloadedError
from chiasm.common.sampling import GUIDE_PARAM
from chiasm.generator.fair_queue import FairQueue

if TYPE_CHECKING:
    from chiasm.common.sampling import Guide
    from chiasm.generator.engine.grammar import Grammar, GrammarCompiler

    Key = tuple[str, Guide]

MAX_GRAMMARS = 64
MAX_COMPILATIONS = 32
MAX_TENANT_COMPILATIONS = 16
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
        self._compilations: Counter[str] = Counter()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    async def compile(self, guide: Guide, tenant: str) -> Grammar:
        """Return the grammar of ``guide``.

        Args:
            guide: What an output must look like.
            tenant: Who asks; one tenant takes at most half of the places.

        Raises:
            InvalidRequestError: It is not valid, costs too much, or the model has no tokenizer.
            OverloadedError: Too many guides, of all or of ``tenant``, wait to be compiled.
        """
        key = (tenant, guide)
        if key in self._grammars:
            self._queue.touch(key)
            return self._grammars[key]
        if self._compiler is None:
            raise InvalidRequestError(
                "The model has no tokenizer.json, which structured output needs.",
                param=GUIDE_PARAM,
            )
        num_waiting = self._compilations.total()
        if num_waiting >= MAX_COMPILATIONS or self._compilations[tenant] >= MAX_TENANT_COMPILATIONS:
            raise _overloaded()
        self._compilations[tenant] += 1
        compilation = self._thread.submit(self._compiler.compile, guide)
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                grammar = await asyncio.wrap_future(compilation)
        except TimeoutError:
            # The thread goes on with what it has begun; the library's own limits end it.
            if not compilation.running():
                raise _overloaded() from None
            raise InvalidRequestError(
                f"The guide of the output was not compiled within {COMPILE_TIMEOUT_S:g} seconds.",
                param=GUIDE_PARAM,
            ) from None
        finally:
            self._compilations[tenant] -= 1
            self._compilations += Counter()  # forgets tenants without any
        self._keep(key, grammar)
        return grammar

    def close(self) -> None:
        """End the thread after what it is at."""
        self._thread.shutdown(wait=False, cancel_futures=True)

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


def _overloaded() -> OverloadedError:
    return OverloadedError("Too many guides wait to be compiled.", retry_after_s=1.0)
