"""The tensors of one step, built from the scheduled sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from chiasm.generator.engine.sequence import find_embedding_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.generator.engine.scheduler import ScheduledSequence

# Sequences that decode share one gather if the longest context is at most this many times the
# shortest; short contexts always share.
_MAX_LENGTH_RATIO = 2
_SHORT_CONTEXT = 256


@dataclass(slots=True, eq=False)
class PrefillSegment:
    """Consecutive rows of the batch that hold one whole prompt.

    Attributes:
        start: First row.
        length: Number of rows.
        masks: Masks by sliding window, made on first use and shared by all layers.
    """

    start: int
    length: int
    masks: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        """Rows of the segment."""
        return slice(self.start, self.start + self.length)


@dataclass(slots=True, eq=False)
class GatherPlan:
    """Where the context of each sequence of a decode group lies.

    Attributes:
        slots: Slots, padded with the newest slot of the same sequence, so that no other
            sequence's values (NaN, say) can leak in. [num_sequences * width], int64.
        mask: Added to the scores: 0, or minus infinity for padding; ``None`` without padding.
            [num_sequences, 1, 1, width], dtype of the model.
    """

    slots: torch.Tensor
    mask: torch.Tensor | None


@dataclass(slots=True, eq=False)
class DecodeGroup:
    """Consecutive rows of the batch that decode, of similar context lengths.

    Attributes:
        start: First row.
        context_lengths: Context length of each sequence, this step's token included.
            [num_sequences], int64.
        block_tables: Block tables, padded. [num_sequences, max_blocks], int64.
        block_size: Tokens per block.
        plans: Gathers by sliding window (0: none), made on first use, shared by all layers.
    """

    start: int
    context_lengths: np.ndarray
    block_tables: np.ndarray
    block_size: int
    plans: dict[int, GatherPlan] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        """Rows of the group."""
        return len(self.context_lengths)

    @property
    def rows(self) -> slice:
        """Rows of the group."""
        return slice(self.start, self.start + self.num_sequences)

    def plan(self, window: int, dtype: torch.dtype, device: torch.device) -> GatherPlan:
        """Return the gather of the last ``window`` positions; 0 is the whole context."""
        if window not in self.plans:
            self.plans[window] = self._make_plan(window, dtype, device)
        return self.plans[window]

    def _make_plan(self, window: int, dtype: torch.dtype, device: torch.device) -> GatherPlan:
        lengths = self.context_lengths[:, None]
        width = int(lengths.max())
        if window:
            width = min(width, window)
        positions = np.maximum(lengths - width, 0) + np.arange(width)
        is_padding = positions >= lengths
        positions = np.minimum(positions, lengths - 1)
        blocks = np.take_along_axis(self.block_tables, positions // self.block_size, axis=1)
        slots = blocks * self.block_size + positions % self.block_size
        mask = None
        if is_padding.any():
            mask = torch.zeros(is_padding.shape, dtype=dtype)
            mask.masked_fill_(torch.from_numpy(is_padding), float("-inf"))
            mask = mask[:, None, None].to(device)
        return GatherPlan(torch.from_numpy(slots.reshape(-1)).to(device), mask)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """All that a forward reads; tokens of all sequences are packed one behind the other.

    ::

        rows    | decode, by context length | prompt a ........ | prompt b ... |

    Attributes:
        token_ids: [num_tokens], int64.
        positions: [num_rows, num_tokens], int64; see ``PromptPositions``.
        slot_mapping: Slot of every token. [num_tokens], int64.
        embedding_rows: Rows whose token embedding is overwritten. [num_spliced], int64.
        embeddings: What stands there. [num_spliced, hidden_size], dtype of the model; ``None`` if
            there are none.
        logit_rows: Last row of each sequence, as ``sequences``. [num_sequences], int64.
        decode_groups: Rows that decode.
        prefill_segments: Rows of prompts.
        sequences: Scheduled sequences, in the order of their rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    embedding_rows: torch.Tensor
    embeddings: torch.Tensor | None
    logit_rows: torch.Tensor
    decode_groups: tuple[DecodeGroup, ...]
    prefill_segments: tuple[PrefillSegment, ...]
    sequences: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return len(self.token_ids)


def build_forward_batch(
    scheduled: Sequence[ScheduledSequence], block_size: int, device: torch.device
) -> ForwardBatch:
    """Build the tensors of one step.

    Args:
        scheduled: Sequences of the step, at least one; their block tables hold the new tokens.
        block_size: Tokens per block.
        device: Where the forward runs.
    """
    decodes = sorted((item for item in scheduled if item.is_decode), key=lambda item: item.start)
    prefills = [item for item in scheduled if not item.is_decode]
    assert all(item.start == 0 for item in prefills), "prompts are computed whole"
    ordered = (*decodes, *prefills)
    lengths = np.array([item.num_tokens for item in ordered])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    token_ids = [
        item.sequence.token_ids[item.start : item.start + item.num_tokens] for item in ordered
    ]
    positions = [
        item.sequence.prompt.positions.of(item.start, item.start + item.num_tokens)
        for item in ordered
    ]
    slots = [_slots_of(item, block_size) for item in ordered]
    embedding_rows, embeddings = _collect_embeddings(prefills, starts[len(decodes) :])
    return ForwardBatch(
        token_ids=torch.tensor([token for part in token_ids for token in part], device=device),
        positions=torch.from_numpy(np.concatenate(positions, axis=1)).to(device),
        slot_mapping=torch.from_numpy(np.concatenate(slots)).to(device),
        embedding_rows=torch.from_numpy(embedding_rows).to(device),
        embeddings=torch.cat(embeddings).to(device) if embeddings else None,
        logit_rows=torch.from_numpy(ends - 1).to(device),
        decode_groups=tuple(_group_decodes(decodes, block_size)),
        prefill_segments=tuple(
            PrefillSegment(int(start), item.num_tokens)
            for item, start in zip(prefills, starts[len(decodes) :], strict=True)
        ),
        sequences=ordered,
    )


def _slots_of(item: ScheduledSequence, block_size: int) -> np.ndarray:
    positions = np.arange(item.start, item.start + item.num_tokens)
    first_block = item.start // block_size
    blocks = np.array(item.sequence.block_table[first_block:])
    return blocks[positions // block_size - first_block] * block_size + positions % block_size


def _collect_embeddings(
    prefills: Sequence[ScheduledSequence], starts: np.ndarray
) -> tuple[np.ndarray, list[torch.Tensor]]:
    rows = [np.empty(0, dtype=np.int64)]
    embeddings: list[torch.Tensor] = []
    for item, start in zip(prefills, starts, strict=True):
        spans = item.sequence.prompt.spans
        for span, embedding in zip(spans, item.sequence.embeddings, strict=True):
            assert embedding is not None, "a sequence is scheduled when all embeddings are there"
            rows.append(find_embedding_positions(span) + start)
            embeddings.append(embedding)
    return np.concatenate(rows), embeddings


def _group_decodes(decodes: Sequence[ScheduledSequence], block_size: int) -> list[DecodeGroup]:
    """Cut ``decodes``, sorted by context length, where padding would waste too much."""
    groups: list[DecodeGroup] = []
    first = 0
    for index in range(1, len(decodes) + 1):
        if index < len(decodes):
            bound = max(_SHORT_CONTEXT, _MAX_LENGTH_RATIO * (decodes[first].start + 1))
            if decodes[index].start < bound:
                continue
        groups.append(_make_group(decodes[first:index], first, block_size))
        first = index
    return groups


def _make_group(members: Sequence[ScheduledSequence], start: int, block_size: int) -> DecodeGroup:
    tables = [item.sequence.block_table for item in members]
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    context_lengths = np.array([item.start + 1 for item in members])
    return DecodeGroup(start, context_lengths, padded, block_size)
