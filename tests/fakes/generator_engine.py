"""A language model that costs nothing, and engines built on it.

The model keeps the value of every token in its paged cache and predicts a hash of the whole
context, so that a wrong slot, block table, position or embedding shows in the next token.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import torch

from chiasm.common.families import PositionScheme
from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.engine.block_manager import BlockManager
from chiasm.generator.engine.chunking import Chunking
from chiasm.generator.engine.engine import Engine
from chiasm.generator.engine.sampler import Sampler
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.scheduler import Scheduler, SchedulerLimits
from chiasm.generator.engine.sequence import Origin, Prompt, Sequence
from chiasm.generator.model.model_spec import ModelSpec
from chiasm.generator.model.positions import compute_positions
from chiasm.generator.model.runner import ModelRunner

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Items

    from chiasm.common.media import MediaSpan
    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.engine.outputs import SequenceOutput
    from chiasm.generator.engine.step_report import StepObserver
    from chiasm.generator.model.forward_batch import ForwardBatch

VOCAB_SIZE = 256
EOS_TOKEN_ID = 0

CUT_BY_BUDGET = Chunking()

BYTE_SPEC = ModelSpec(
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    hidden_size=1,
    vocab_size=VOCAB_SIZE,
    max_positions=512,
    eos_token_ids=frozenset({EOS_TOKEN_ID}),
    positions=PositionScheme.LINEAR,
)


class FakeDecoder:
    """Predicts ``next_token`` of each context; optionally fails or breaks down on a token."""

    def __init__(self, num_blocks: int, block_size: int, spec: ModelSpec = BYTE_SPEC) -> None:
        self._spec = spec
        self._block_size = block_size
        self._cache = torch.full((num_blocks * block_size,), float("nan"))
        self.failing_token: int | None = None
        self.nan_token: int | None = None
        self.num_sequences_per_forward: list[int] = []
        self.num_computed_tokens = 0

    @property
    def spec(self) -> ModelSpec:
        """Facts about the model."""
        return self._spec

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device("cpu")

    @property
    def gathers_contexts(self) -> bool:
        """Whether similar lengths go together: nothing is gathered here."""
        return True

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Return the prediction of each row that samples as its hidden state."""
        if self.failing_token is not None and (batch.token_ids == self.failing_token).any():
            raise RuntimeError("The fake decoder was told to fail.")
        self.num_sequences_per_forward.append(len(batch.sequences))
        self.num_computed_tokens += batch.num_tokens
        values = batch.token_ids.float()
        if batch.embeddings is not None:
            values[batch.embedding_rows] = batch.embeddings[:, 0]
        self._cache[batch.slot_mappings[0]] = values
        hidden = torch.zeros(batch.num_tokens, 1)
        for group in batch.decode_groups:
            plan = group.plan(0, 0, torch.float32, self.device)
            table = plan.slots.view(group.num_sequences, -1)
            for row, length in enumerate(group.context_lengths.tolist()):
                hidden[group.start + row] = self._predict(self._cache[table[row, :length]])
        for segment in batch.prefills.segments:
            last = segment.start + segment.length - 1
            context = values[segment.rows]
            if not segment.begins_prompt:
                context = self._cache[segment.context(0).slots]
            hidden[last] = self._predict(context)
        return hidden

    def call_before_layers(self, callback: Callable[[], None]) -> None:
        """It has no layers."""

    def copy_blocks(self, copies: Items[BlockCopy]) -> None:
        """Copy the values of blocks."""
        blocks = self._cache.view(-1, self._block_size)
        blocks[[copy.target for copy in copies]] = blocks[[copy.source for copy in copies]]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits that put everything on the predicted token."""
        logits = torch.zeros(len(hidden), VOCAB_SIZE)
        is_nan = hidden[:, 0].isnan()
        best = hidden[:, 0].nan_to_num().long()
        logits[torch.arange(len(hidden)), best] = 50.0
        logits[is_nan] = float("nan")
        return logits

    def _predict(self, context: torch.Tensor) -> float:
        values = [int(value) for value in context.tolist()]
        if self.nan_token in values:
            return float("nan")
        return float(next_token(values))


def next_token(context: Items[int]) -> int:
    """Return the token that the fake model predicts; never the end token."""
    digest = hashlib.blake2s(b",".join(str(value).encode() for value in context)).digest()
    return 1 + digest[0] % (VOCAB_SIZE - 1)


def expected_tokens(prompt: Items[int], num_tokens: int) -> list[int]:
    """Return what the fake model generates for ``prompt``."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


def make_prompt(token_ids: Items[int], spans: tuple[MediaSpan, ...] = ()) -> Prompt:
    """Return a prompt with linear positions."""
    positions = compute_positions(PositionScheme.LINEAR, len(token_ids), spans)
    return Prompt(tuple(token_ids), spans, positions)


def make_sequence(
    seq_id: int,
    token_ids: Items[int],
    max_tokens: int = 8,
    stop: frozenset[int] = frozenset(),
    tenant: str = "",
) -> Sequence:
    """Return a greedy sequence that has no media."""
    sampling = SamplingParams(max_tokens, temperature=0.0, stop_token_ids=stop)
    return Sequence(seq_id, make_prompt(token_ids), sampling, Origin(tenant))


def output_of(sequence: Sequence) -> list[int]:
    """Return the tokens generated so far."""
    return sequence.token_ids[sequence.num_prompt_tokens :]


class EngineParts:
    """An engine on the fake model with its parts at hand."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_running: int = 8,
        max_step_tokens: int = 64,
        observers: Items[StepObserver] = (),
        clock: Callable[[], float] = time.perf_counter,
        chunking: Chunking = CUT_BY_BUDGET,
        begin_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.decoder = FakeDecoder(num_blocks, block_size)
        self.blocks = BlockManager([GroupSize(num_blocks)], block_size)
        limits = SchedulerLimits(max_step_tokens, max_running, chunking)
        self.scheduler = Scheduler(self.blocks, limits)
        runner = ModelRunner(self.decoder, Sampler(), begin_step, chunking.is_fixed)
        self.engine = Engine(self.scheduler, runner, observers, clock)

    def step_to_output(self) -> list[SequenceOutput]:
        """Step until a launched step has run; return what it did."""
        while self.engine.has_work:
            outputs = self.engine.step()
            if outputs:
                return outputs
        return []

    def run(self) -> dict[int, SequenceOutput]:
        """Step until nothing is left to do, checking the invariants each time.

        Returns:
            The last output of each sequence that ended.
        """
        ends = {}
        while self.engine.has_work:
            for output in self.engine.step():
                if output.end is not None:
                    ends[output.seq_id] = output
            self.scheduler.check_invariants()
        return ends
