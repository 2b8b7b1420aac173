"""Replay short forwards instead of launching their kernels one by one."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import structlog
import torch

from chiasm.generator.model.decoder import Decoder
from chiasm.generator.model.graph_inputs import GraphInputs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chiasm.common.graph_recorder import Recorder
    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.generator.model.graph_inputs import GraphLimits, GraphShape
    from chiasm.generator.model.model_spec import ModelSpec

    Forward = Callable[[], torch.Tensor]

log = structlog.get_logger("chiasm.generator")


class ReplayableDecoder(Decoder, Protocol):
    """A decoder whose forwards can be recorded.

    What a forward launches depends on nothing but the shapes of the batch, and it takes padding:
    negative slots, of which nothing is kept, and empty contexts.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and cache."""
        ...

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """Return what enters the first layer. [num_tokens, hidden_size], in new memory."""
        ...


class GraphedDecoder:
    """A decoder whose short forwards are recorded once and replayed.

    A forward of a few hundred launches keeps a GPU waiting for Python; a replay is one launch. It
    computes as many rows as the next larger recorded one. All other forwards go to the decoder.
    """

    def __init__(self, decoder: ReplayableDecoder, limits: GraphLimits, record: Recorder) -> None:
        """Record the forwards of ``decoder``.

        Args:
            decoder: Computes forwards.
            limits: Which forwards are recorded.
            record: Records one.
        """
        started = time.perf_counter()
        self._decoder = decoder
        self._max_chunks = limits.max_chunks
        self._inputs = GraphInputs(decoder, limits)
        with torch.inference_mode():
            replays = {shape: record(self._forward_of(shape)) for shape in limits.shapes}
        # The least first, which is looked for.
        self._replays = dict(reversed(replays.items()))
        log.info(
            "steps_recorded",
            num_shapes=len(replays),
            max_decodes=limits.max_decodes,
            max_rows=max(replays).num_rows,
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

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the tokens of ``batch``; see ``Decoder.forward``."""
        shape = self._find_shape(batch)
        if shape is None:
            return self._decoder.forward(batch)
        if shape.num_chunk_rows:
            batch = replace(batch, hidden=self._decoder.embed(batch))
        self._inputs.fill(batch, shape)
        hidden = self._replays[shape]()
        if batch.num_decodes in (0, shape.num_decodes):
            first = shape.num_decodes - batch.num_decodes
            return hidden[first : first + batch.num_tokens]
        decoded = hidden[: batch.num_decodes]
        num_chunk_rows = batch.num_tokens - batch.num_decodes
        chunks = hidden[shape.num_decodes : shape.num_decodes + num_chunk_rows]
        return torch.cat((decoded, chunks)) if num_chunk_rows else decoded

    def call_before_layers(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called where layers are launched; see ``Decoder``."""
        self._decoder.call_before_layers(callback)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks of the cache; see ``Decoder.copy_blocks``."""
        self._decoder.copy_blocks(copies)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states; see ``Decoder.compute_logits``."""
        return self._decoder.compute_logits(hidden)

    def _forward_of(self, shape: GraphShape) -> Forward:
        batch = self._inputs.batch_of(shape)
        return lambda: self._decoder.forward(batch)

    def _find_shape(self, batch: ForwardBatch) -> GraphShape | None:
        """Return the shape of the forward that is replayed for ``batch``; ``None`` for none."""
        if len(batch.decode_groups) > 1 or len(batch.prefills.segments) > self._max_chunks:
            return None
        has_media = batch.embeddings is not None
        if has_media and self.spec.num_deepstack_levels:
            return None
        widths = [batch.prefills.num_blocks, *(one.num_blocks for one in batch.decode_groups)]
        if max(widths) > self._inputs.num_blocks:
            return None
        num_chunk_rows = batch.num_tokens - batch.num_decodes
        shapes = (one for one in self._replays if one.holds(batch.num_decodes, num_chunk_rows))
        return next(shapes, None)
