"""What recorded forwards read: tensors at fixed addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from chiasm.generator.model.attention_plan import DecodeGroup, PrefillGroup
from chiasm.generator.model.forward_batch import ForwardBatch
from chiasm.generator.model.positions import count_position_rows

if TYPE_CHECKING:
    from chiasm.generator.model.graphed_decoder import ReplayableDecoder

# Rows of graphs, the most last.
_DECODES = (1, 2, 4)
_ROWS = (64, 128, 192, 256, 384, 512, 768, 1024)
# Sequences that decode in half of the graphs with chunks.
_FEW_DECODES = 8
# What stands for no slot.
_NO_SLOT = -1


@dataclass(frozen=True, slots=True, order=True)
class GraphShape:
    """Rows of a recorded forward: first those that decode, then those of chunks of prompts.

    Attributes:
        num_rows: All of them.
        num_decodes: Those that decode.
    """

    num_rows: int
    num_decodes: int

    @property
    def num_chunk_rows(self) -> int:
        """Rows of chunks of prompts."""
        return self.num_rows - self.num_decodes

    def holds(self, num_decodes: int, num_chunk_rows: int) -> bool:
        """Return whether so many rows of each kind fit."""
        return num_decodes <= self.num_decodes and num_chunk_rows <= self.num_chunk_rows


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """For which forwards there are graphs.

    Attributes:
        max_decodes: Most sequences that decode.
        max_context: Longest context, in tokens.
        max_chunks: Most chunks of prompts.
        max_rows: Most rows of a forward with chunks.
    """

    max_decodes: int
    max_context: int
    max_chunks: int = 16
    max_rows: int = _ROWS[-1]

    @classmethod
    def of(cls, max_decodes: int, max_step_tokens: int, max_context: int) -> GraphLimits:
        """Return the limits for steps of so many sequences and tokens."""
        max_rows = min(max_step_tokens + _FEW_DECODES, _ROWS[-1])
        return cls(max_decodes, max_context, max_rows=max_rows)

    @property
    def shapes(self) -> list[GraphShape]:
        """Shapes of graphs, the largest first: smaller ones fit into memory of larger ones.

        Padding costs little while a forward is bound by its weights, but every graph takes memory
        and time at the start.
        """
        most = self.max_decodes
        shapes = {GraphShape(one, one) for one in (*_DECODES, *range(8, most, 8)) if one < most}
        shapes.add(GraphShape(most, most))
        for num_rows in (*(one for one in _ROWS if one < self.max_rows), self.max_rows):
            rooms = (min(_FEW_DECODES, most), most)
            shapes |= {GraphShape(num_rows, one) for one in rooms if one < num_rows}
        return sorted(shapes, reverse=True)


class GraphInputs:
    """Memory that all recorded forwards read; rows without a token are padding.

    Padding has a context of no position and no slot, so that it is neither kept nor attended to.
    """

    def __init__(self, decoder: ReplayableDecoder, limits: GraphLimits) -> None:
        """Reserve it for ``decoder``."""
        self._device, self._block_size = decoder.device, decoder.block_size
        self.num_blocks = -(-limits.max_context // decoder.block_size)
        most = max(limits.shapes).num_rows
        num_groups = len(decoder.spec.cache_groups)
        self._hidden = torch.zeros(
            most, decoder.spec.hidden_size, dtype=decoder.dtype, device=decoder.device
        )
        self._token_ids = self._zeros(limits.max_decodes)
        self._positions = self._zeros(count_position_rows(decoder.spec.positions), most)
        self._slots = self._zeros(num_groups, most)
        self._tables = self._zeros(num_groups, limits.max_decodes, self.num_blocks)
        self._lengths = self._zeros(limits.max_decodes)
        self._chunks = self._zeros(limits.max_chunks, 2)
        self._chunk_tables = self._zeros(num_groups, limits.max_chunks, self.num_blocks)
        self._seen = {
            (index, group.window): self._zeros(most, 2)
            for index, group in enumerate(decoder.spec.cache_groups)
        }
        self._nothing = self._zeros(0)
        self._slots.fill_(_NO_SLOT)

    def batch_of(self, shape: GraphShape) -> ForwardBatch:
        """Return a batch of ``shape``, all of whose tensors are here."""
        decodes, rows = slice(0, shape.num_decodes), slice(0, shape.num_rows)
        has_chunks = shape.num_chunk_rows > 0
        group = DecodeGroup(
            start=0,
            context_lengths=np.zeros(shape.num_decodes, dtype=np.int64),
            block_tables=(),
            block_size=self._block_size,
            device=self._device,
            contexts={
                group: (tables[decodes], self._lengths[decodes])
                for group, tables in enumerate(self._tables)
            },
        )
        prefills = PrefillGroup(shape.num_decodes, (), (), self._device)
        if has_chunks:
            for key, seen in self._seen.items():
                tables = self._chunk_tables[key[0]]
                prefills.contexts[key] = (self._chunks, tables, seen[: shape.num_chunk_rows])
        return ForwardBatch(
            token_ids=self._token_ids[decodes],
            unknown_rows=self._nothing,
            unknown_sources=self._nothing,
            positions=self._positions[:, rows],
            slot_mappings=tuple(slots[rows] for slots in self._slots),
            embedding_rows=self._nothing,
            embeddings=None,
            logit_rows=self._nothing,
            decode_groups=(group,),
            prefills=prefills,
            sequences=(),
            sampled=(),
            scored=(),
            hidden=self._hidden[rows] if has_chunks else None,
        )

    def fill(self, batch: ForwardBatch, shape: GraphShape) -> None:
        """Copy what ``batch`` holds to where the forward of ``shape`` reads it.

        Args:
            batch: A batch without embeddings; ``shape`` holds it. Its hidden states are there if
                it has chunks.
            shape: Of the forward.
        """
        count, first = batch.num_decodes, shape.num_decodes
        places = [(slice(0, count), slice(0, count))]
        if shape.num_chunk_rows:
            num_chunk_rows = batch.num_tokens - count
            places.append((slice(count, None), slice(first, first + num_chunk_rows)))
        if batch.num_tokens < shape.num_rows:
            rows = slice(0, shape.num_rows)
            # Frequencies may depend on the largest position of a batch.
            self._positions[:, rows] = 0
            self._slots[:, rows] = _NO_SLOT
            self._lengths[:first] = 0
        for source, target in places:
            self._positions[:, target] = batch.positions[:, source]
            for group, slots in enumerate(batch.slot_mappings):
                self._slots[group, target] = slots[source]
            if batch.hidden is not None:
                self._hidden[target] = batch.hidden[source]
        if batch.hidden is None:
            self._token_ids[:count] = batch.token_ids
        self._fill_decodes(batch)
        if shape.num_chunk_rows:
            self._fill_chunks(batch)

    def _fill_decodes(self, batch: ForwardBatch) -> None:
        count = batch.num_decodes
        for decodes in batch.decode_groups:
            for group in range(len(self._tables)):
                tables, lengths = decodes.context(group)
                self._tables[group, :count, : tables.shape[1]] = tables
                if not group:
                    self._lengths[:count] = lengths

    def _fill_chunks(self, batch: ForwardBatch) -> None:
        self._chunks.zero_()
        for (group, window), seen in self._seen.items():
            chunks, tables, ranges = batch.prefills.context(group, window)
            count, num_blocks = tables.shape
            self._chunks[:count] = chunks
            self._chunk_tables[group, :count, :num_blocks] = tables
            seen[: len(ranges)] = ranges

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)
