"""Replay forwards in which every sequence decodes, instead of launching their kernels one by one.

Source: CUDA Graphs, CUDA C++ Programming Guide, section 4.2; padded batch sizes as in vLLM.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import structlog
import torch

from chiasm.generator.model.attention_plan import DecodeGroup, PrefillGroup
from chiasm.generator.model.forward_batch import ForwardBatch
from chiasm.generator.model.positions import count_position_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.model.decoder import Decoder
    from chiasm.generator.model.model_spec import ModelSpec

    Forward = Callable[[], torch.Tensor]

# Of how many sequences there are graphs, beyond 4: padding costs little, while every graph takes
# memory and time at the start.
_MULTIPLE = 8
# What stands for no slot and for no context.
_NO_SLOT = -1
_NO_CONTEXT = 0

log = structlog.get_logger("chiasm.generator")


class Recorder(Protocol):
    """Makes a forward that can be repeated."""

    def __call__(self, forward: Forward) -> Forward:
        """Return what repeats the work of ``forward`` on whatever its inputs hold by then.

        What it returns lies in the same memory each time.
        """
        ...


class GraphRecorder:
    """Records forwards as CUDA graphs, which share the memory of what they compute on the way."""

    def __init__(self, device: torch.device) -> None:
        """Record on a stream of ``device`` of its own."""
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward) -> Forward:
        """See ``Recorder``."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        # Once before: kernels are compiled and libraries take their memory, which no graph can.
        with torch.cuda.stream(self._stream):
            forward()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = forward()
        current.wait_stream(self._stream)

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """For which forwards there are graphs.

    Attributes:
        max_sequences: Most sequences.
        max_context: Longest context, in tokens.
    """

    max_sequences: int
    max_context: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sequences of each graph, the most first: smaller ones fit into memory of larger ones."""
        multiples = range(_MULTIPLE, self.max_sequences, _MULTIPLE)
        sizes = {1, 2, 4, *multiples, self.max_sequences}
        return tuple(sorted((one for one in sizes if one <= self.max_sequences), reverse=True))


class _Inputs:
    """What a recorded forward reads, at fixed addresses; rows without a sequence are padding.

    Padding has a context of no position and no slot, so that it is neither kept nor attended to.
    """

    def __init__(self, decoder: Decoder, limits: GraphLimits) -> None:
        device, rows = decoder.device, limits.max_sequences
        num_groups = len(decoder.spec.cache_groups)
        num_blocks = -(-limits.max_context // decoder.block_size)
        self._block_size = decoder.block_size
        self._device = device
        self.num_blocks = num_blocks

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._token_ids = zeros(rows)
        self._positions = zeros(count_position_rows(decoder.spec.positions), rows)
        self._slots = zeros(num_groups, rows)
        self._tables = zeros(num_groups, rows, num_blocks)
        self._lengths = zeros(rows)
        self._nothing = zeros(0)
        self._slots.fill_(_NO_SLOT)

    def batch_of(self, size: int) -> ForwardBatch:
        """Return a batch of ``size`` sequences, all of whose tensors are these."""
        contexts = {
            group: (tables[:size], self._lengths[:size])
            for group, tables in enumerate(self._tables)
        }
        decodes = DecodeGroup(
            start=0,
            context_lengths=np.zeros(size, dtype=np.int64),
            block_tables=(),
            block_size=self._block_size,
            device=self._device,
            contexts=contexts,
        )
        return ForwardBatch(
            token_ids=self._token_ids[:size],
            unknown_rows=self._nothing,
            unknown_sources=self._nothing,
            positions=self._positions[:, :size],
            slot_mappings=tuple(slots[:size] for slots in self._slots),
            embedding_rows=self._nothing,
            embeddings=None,
            logit_rows=self._nothing,
            decode_groups=(decodes,),
            prefills=PrefillGroup(size, (), (), self._device),
            sequences=(),
            sampled=(),
            scored=(),
        )

    def fill(self, batch: ForwardBatch, size: int) -> None:
        """Copy what ``batch`` holds into the first of ``size`` rows."""
        num_rows, decodes = batch.num_tokens, batch.decode_groups[0]
        used, padding = slice(0, num_rows), slice(num_rows, size)
        self._token_ids[used] = batch.token_ids
        self._positions[:, used] = batch.positions
        for group, slots in enumerate(batch.slot_mappings):
            tables, lengths = decodes.context(group)
            self._slots[group, used] = slots
            self._tables[group, used, : tables.shape[1]] = tables
            if not group:
                self._lengths[used] = lengths
        if num_rows < size:
            # Frequencies may depend on the largest position of a batch.
            self._positions[:, padding] = 0
            self._slots[:, padding] = _NO_SLOT
            self._lengths[padding] = _NO_CONTEXT


class GraphedDecoder:
    """A decoder whose forwards of decodes alone are recorded once and replayed.

    A forward of a few hundred launches keeps a GPU waiting for Python; a replay is one launch. It
    computes as many rows as the next larger recorded one. All other forwards go to the decoder.
    """

    def __init__(self, decoder: Decoder, limits: GraphLimits, record: Recorder) -> None:
        """Record the forwards of ``decoder``.

        Args:
            decoder: Computes forwards; ``is_replayable``.
            limits: Which forwards are recorded.
            record: Records one.
        """
        started = time.perf_counter()
        self._decoder = decoder
        self._inputs = _Inputs(decoder, limits)
        self._replays: dict[int, Forward] = {}
        with torch.inference_mode():
            for size in limits.sizes:
                self._replays[size] = record(self._forward_of(size))
        # Dictionaries keep the order: the least first, which is looked for.
        self._replays = dict(reversed(self._replays.items()))
        log.info(
            "decodes_recorded",
            sizes=list(self._replays),
            max_context=limits.max_context,
            seconds=round(time.perf_counter() - started, 2),
        )

    @property
    def spec(self) -> ModelSpec:
        """Facts about the model."""
        return self._decoder.spec

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._decoder.device

    @property
    def block_size(self) -> int:
        """Tokens per block of its KV cache."""
        return self._decoder.block_size

    @property
    def gathers_contexts(self) -> bool:
        """Whether torch attends; see ``Decoder.gathers_contexts``."""
        return self._decoder.gathers_contexts

    @property
    def is_replayable(self) -> bool:
        """Whether forwards can be recorded; see ``Decoder.is_replayable``."""
        return False

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the tokens of ``batch``; see ``Decoder.forward``."""
        size = self._find_size(batch)
        if size is None:
            return self._decoder.forward(batch)
        self._inputs.fill(batch, size)
        return self._replays[size]()[: batch.num_tokens]

    def call_before_layers(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called where layers are launched; see ``Decoder``."""
        self._decoder.call_before_layers(callback)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks of the cache; see ``Decoder.copy_blocks``."""
        self._decoder.copy_blocks(copies)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states; see ``Decoder.compute_logits``."""
        return self._decoder.compute_logits(hidden)

    def _forward_of(self, size: int) -> Forward:
        batch = self._inputs.batch_of(size)
        return lambda: self._decoder.forward(batch)

    def _find_size(self, batch: ForwardBatch) -> int | None:
        """Return the rows of the forward that is replayed for ``batch``; ``None`` for none."""
        if batch.prefills.segments or len(batch.decode_groups) != 1:
            return None
        if batch.decode_groups[0].num_blocks > self._inputs.num_blocks:
            return None
        return next((size for size in self._replays if size >= batch.num_tokens), None)
