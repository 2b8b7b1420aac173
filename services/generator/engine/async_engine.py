"""Join the event loop and the engine thread; the only border between the two."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING, Protocol

import structlog

from chiasm.common.errors import UnavailableError
from chiasm.generator.engine.sequence import NO_ORIGIN, Origin, Sequence
from chiasm.generator.engine.sequence_stream import SequenceStream

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Items

    import torch

    from chiasm.generator.engine.engine import Engine
    from chiasm.generator.engine.outputs import SequenceOutput
    from chiasm.generator.engine.queue_budget import Charge, QueueBudget
    from chiasm.generator.engine.sampling_params import SamplingParams
    from chiasm.generator.engine.sequence import Prompt

    Command = Callable[[Engine], None]

log = structlog.get_logger(__name__)


class EngineDeadError(Exception):
    """The engine thread ended by a bug; the process must end too."""


class Threads(Protocol):
    """Shares the host's cores with other services; ``ComputeThreads`` is the real one."""

    def rest(self) -> None:
        """Leave the cores until the next step."""
        ...


class AsyncEngine:
    """Runs an ``Engine`` in a thread of its own.

    Loop to thread: commands through a queue, all done before the next step. Thread to loop: what a
    step did to all sequences, by one callback. All methods belong to the event loop.
    """

    def __init__(self, engine: Engine, budget: QueueBudget, threads: Threads) -> None:
        self._engine = engine
        self._budget = budget
        self._threads = threads
        # Bounded by the budget: a sequence has one command of each kind and one per span.
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[int, tuple[SequenceStream, Charge]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_died = asyncio.Event()
        self._is_draining = False
        self._last_seq_id = 0

    @property
    def num_sequences(self) -> int:
        """Sequences whose callers have not closed them."""
        return len(self._streams)

    def start(self) -> None:
        """Start the engine thread; outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def wait_dead(self) -> None:
        """Wait until the engine thread has died of a bug.

        Raises:
            EngineDeadError: It has; its traceback is in the log.
        """
        await self._has_died.wait()
        raise EngineDeadError("The engine thread has died.")

    def drain(self) -> None:
        """Refuse new sequences from now on; live ones go on."""
        self._is_draining = True

    async def stop(self) -> None:
        """End all sequences with ``UnavailableError`` and join the engine thread."""
        self.drain()
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._fail_all(_stopping_error())

    def submit(
        self, prompt: Prompt, sampling: SamplingParams, origin: Origin = NO_ORIGIN
    ) -> SequenceStream:
        """Queue a new sequence of ``origin``; see ``submit_group``."""
        (stream,) = self.submit_group(prompt, (sampling,), origin)
        return stream

    def submit_group(
        self, prompt: Prompt, samplings: Items[SamplingParams], origin: Origin
    ) -> tuple[SequenceStream, ...]:
        """Queue sequences that share a prompt, which is computed once.

        The caller must ``close`` each of them, whatever happens. Embeddings are provided to all.

        Args:
            prompt: Checked prompt.
            samplings: How the tokens of each sequence are chosen; at least one.
            origin: Whose they are.

        Returns:
            The stream of what happens to each sequence.

        Raises:
            UnavailableError: The engine drains or has died (reason ``DRAINING``).
            OverloadedError: The queue is full. Nothing was queued.
        """
        if self._is_draining or self._has_died.is_set():
            raise _stopping_error()
        embedding_bytes = sum(span.ref.num_bytes for span in prompt.spans)
        charges = self._budget.admit_group(len(prompt.token_ids), embedding_bytes, len(samplings))
        sequences = []
        for sampling in samplings:
            self._last_seq_id += 1
            sequences.append(Sequence(self._last_seq_id, prompt, sampling, origin))
        first, *forks = sequences
        for fork in forks:
            fork.embeddings = first.embeddings
        first.forks = tuple(forks)
        streams = tuple(SequenceStream(sequence.seq_id) for sequence in sequences)
        for stream, charge in zip(streams, charges, strict=True):
            self._streams[stream.seq_id] = (stream, charge)
        self._commands.put(lambda engine: engine.add(first))
        return streams

    def provide(self, seq_ids: Items[int], span_index: int, embedding: torch.Tensor) -> None:
        """Hand over the embedding of one span of a group; see ``Engine.provide``."""

        def provide(engine: Engine) -> None:
            for seq_id in seq_ids:
                engine.provide(seq_id, span_index, embedding)

        self._commands.put(provide)

    def close(self, seq_id: int) -> None:
        """Forget a sequence; if it has not ended, its blocks are free before the next step."""
        stream, charge = self._streams.pop(seq_id, (None, None))
        if stream is None or charge is None:
            return
        charge.release()
        self._commands.put(lambda engine: engine.cancel(seq_id))

    def _run(self) -> None:
        assert self._loop is not None, "the thread is started by start()"
        try:
            while self._do_commands():
                outputs = self._engine.step()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
        except Exception:
            log.exception("engine_died")
            self._loop.call_soon_threadsafe(self._die)
        finally:
            self._engine.close()
            self._threads.rest()

    def _do_commands(self) -> bool:
        """Do what is asked, waiting while there is nothing to compute.

        Returns:
            Whether to go on; ``False`` after ``stop``.
        """
        while not self._commands.empty() or not self._engine.has_work:
            if self._commands.empty():
                self._engine.report_state()
                self._threads.rest()
            command = self._commands.get()
            if command is None:
                return False
            command(self._engine)
        return True

    def _deliver(self, outputs: Items[SequenceOutput]) -> None:
        for output in outputs:
            stream, charge = self._streams.get(output.seq_id, (None, None))
            if stream is not None and charge is not None:
                charge.leave_queue()
                stream.push(output)

    def _die(self) -> None:
        self._fail_all(EngineDeadError("The engine thread has died."))
        self._has_died.set()

    def _fail_all(self, error: Exception) -> None:
        for stream, _ in self._streams.values():
            stream.fail(error)


def _stopping_error() -> UnavailableError:
    return UnavailableError("The generator is stopping.", reason="DRAINING", retry_after_s=1.0)
