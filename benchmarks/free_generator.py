"""A generator whose model costs nothing: the real service on an engine that invents its tokens.

Run by ``benchmarks.streams``; prints the port that it listens on.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import uvloop

from chiasm.common.grpc_server import GrpcServer
from chiasm.common.limits import Limits
from chiasm.common.logging import configure_logging
from chiasm.generator.admission import Admission
from chiasm.generator.embedding_loader import EmbeddingLoader
from chiasm.generator.engine.async_engine import AsyncEngine
from chiasm.generator.engine.outputs import Finished, FinishReason, SequenceOutput
from chiasm.generator.engine.queue_budget import QueueBudget, QueueLimits
from chiasm.generator.generation import GenerationService
from chiasm.generator.guides import Guides
from chiasm.generator.info import GeneratorInfo
from chiasm.generator.servicer import GeneratorServicer
from chiasm.v1.generator_pb2_grpc import add_GeneratorServiceServicer_to_server
from tests.fakes.generator_engine import BYTE_SPEC

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    from chiasm.generator.engine.sequence import Sequence

MAX_MODEL_LEN = 1 << 20
VOCAB_SIZE = 1 << 18


class FreeEngine:
    """Adds one token to every sequence in each step, and waits out the rest of the step."""

    def __init__(self, token_id: int, step_s: float) -> None:
        self._token_ids = (token_id,)
        self._step_s = step_s
        self._num_left: dict[int, int] = {}
        self._next_step_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a sequence is live."""
        return bool(self._num_left)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence."""
        self._num_left[sequence.seq_id] = sequence.sampling.max_tokens

    def cancel(self, seq_id: int) -> None:
        """Forget a sequence."""
        self._num_left.pop(seq_id, None)

    def report_state(self) -> None:
        """Report nothing."""

    def step(self) -> Items[SequenceOutput]:
        """Return a token for each sequence, at the pace of one step per ``step_s``."""
        time.sleep(max(0.0, self._next_step_s - time.monotonic()))
        self._next_step_s = time.monotonic() + self._step_s
        outputs = []
        for seq_id in tuple(self._num_left):
            self._num_left[seq_id] -= 1
            end = None
            if not self._num_left[seq_id]:
                del self._num_left[seq_id]
                end = Finished(FinishReason.LENGTH, None, 1, 1)
            outputs.append(SequenceOutput(seq_id, self._token_ids, end))
        return outputs


class _NoThreads:
    def rest(self) -> None:
        """Do nothing."""


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until the process is killed."""
    free = FreeEngine(arguments.token_id, arguments.step_s)
    budget = QueueBudget(QueueLimits(4096, 1 << 24, 1 << 30))
    engine = AsyncEngine(free, budget, _NoThreads())  # type: ignore[arg-type]  # a stand-in
    spec = replace(BYTE_SPEC, vocab_size=VOCAB_SIZE, max_positions=MAX_MODEL_LEN)
    service = GenerationService(
        Admission(spec, arguments.model_name, MAX_MODEL_LEN, Limits()),
        engine,
        EmbeddingLoader(None, torch.float32, 1 << 20),
        Guides(None),
        span_wait_s=30.0,
    )
    info = GeneratorInfo(arguments.model_name, MAX_MODEL_LEN, VOCAB_SIZE, 1, 16, 1, 0, (0,), "0")
    server = GrpcServer(
        address="127.0.0.1:0", service_names=["chiasm.v1.GeneratorService"], token=arguments.token
    )
    add_GeneratorServiceServicer_to_server(GeneratorServicer(service, lambda: info), server.server)
    engine.start()
    port = await server.start()
    await server.set_serving(True)
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await engine.wait_dead()


def main() -> None:
    """Parse the flags and serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--token-id", type=int, required=True)
    parser.add_argument("--step-s", type=float, required=True)
    configure_logging("generator", "warning")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
