"""The tensors of one step, built from the scheduled sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from chiasm.generator.engine.sequence import find_embedding_positions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Items

    from chiasm.generator.engine.scheduled_step import ScheduledSequence
    from chiasm.generator.engine.sequence import Sequence

# Sequences that decode share one gather if the longest context is at most this many times the
# shortest; short contexts always share.
_MAX_LENGTH_RATIO = 2
_SHORT_CONTEXT = 256


@dataclass(slots=True, eq=False)
class PrefillSegment:
    """Consecutive rows of the batch that hold one chunk of a prompt.

    Attributes:
        start: First row.
        length: Number of rows.
        context_slots: Slots of all positions up to the chunk's end, in order; ``None`` if the chunk
            begins the prompt, whose keys and values are then all new. [num_context_tokens], int64.
        both_ways: Ranges of positions, each within which all see each other.
        masks: Masks by sliding window, made on first use and shared by all layers.
    """

    start: int
    length: int
    context_slots: torch.Tensor | None = None
    both_ways: tuple[tuple[int, int], ...] = ()
    masks: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        """Rows of the segment."""
        return slice(self.start, self.start + self.length)

    @property
    def context_length(self) -> int:
        """Positions that the last row sees."""
        return self.length if self.context_slots is None else len(self.context_slots)

    def is_causal(self, window: int) -> bool:
        """Return whether a plain causal mask over the new tokens is all that is needed."""
        is_cut = 0 < window < self.length
        return self.context_slots is None and not self.both_ways and not is_cut

    def mask(self, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return what is added to the scores: 0, or minus infinity for what a row does not see.

        Returns:
            [length, context_length], ``dtype``.
        """
        if window not in self.masks:
            first = self.context_length - self.length
            query = torch.arange(first, self.context_length, device=device)[:, None]
            key = torch.arange(self.context_length, device=device)
            # Bytes, not differences: a long context times a large chunk is many of them.
            is_hidden = key > query
            if window:
                is_hidden |= key <= query - window
            for start, end in self.both_ways:
                is_hidden[max(0, start - first) : max(0, end - first), start:end] = False
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=device)
            self.masks[window] = mask.masked_fill_(is_hidden, float("-inf"))
        return self.masks[window]


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


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Consecutive rows of a chunk whose logits tell how likely the tokens behind them were.

    Attributes:
        seq_id: Whose prompt it is.
        row: First row.
        start: Position of the first token that is told of: one behind that of ``row``.
        token_ids: The tokens that are told of, one per row.
        num_alternatives: Alternatives to tell with each.
    """

    seq_id: int
    row: int
    start: int
    token_ids: Items[int]
    num_alternatives: int


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """All that a forward reads; tokens of all sequences are packed one behind the other.

    ::

        rows    | decode, by context length | chunk of a ........ | chunk of b ... |

    Attributes:
        token_ids: [num_tokens], int64.
        unknown_rows: Rows of tokens that the step before samples. [num_unknown], int64.
        unknown_sources: Which of its tokens stand there. [num_unknown], int64.
        positions: [num_rows, num_tokens], int64; see ``PromptPositions``.
        slot_mapping: Slot of every token. [num_tokens], int64.
        embedding_rows: Rows whose token embedding is overwritten. [num_spliced], int64.
        embeddings: What stands there. [num_spliced, hidden_size], dtype of the model; ``None`` if
            there are none.
        logit_rows: Rows to sample from, as ``sampled``. [num_sampled], int64.
        decode_groups: Rows that decode.
        prefill_segments: Rows of chunks.
        sequences: Scheduled sequences with rows, in the order of their rows.
        sampled: Those that get a token, forks included.
        scored: Rows of prompts whose log probabilities are asked for.
    """

    token_ids: torch.Tensor
    unknown_rows: torch.Tensor
    unknown_sources: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    embedding_rows: torch.Tensor
    embeddings: torch.Tensor | None
    logit_rows: torch.Tensor
    decode_groups: tuple[DecodeGroup, ...]
    prefill_segments: tuple[PrefillSegment, ...]
    sequences: tuple[ScheduledSequence, ...]
    sampled: tuple[ScheduledSequence, ...]
    scored: tuple[ScoredRows, ...]

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return len(self.token_ids)

    def fill_in(self, last_tokens: torch.Tensor) -> None:
        """Put in the tokens that the step before has sampled. [num_sampled], int64."""
        if len(self.unknown_rows):
            self.token_ids[self.unknown_rows] = last_tokens[self.unknown_sources]


def build_forward_batch(
    scheduled: Items[ScheduledSequence],
    block_size: int,
    device: torch.device,
    row_of: Mapping[int, int] = MappingProxyType({}),
) -> ForwardBatch:
    """Build the tensors of one step.

    Args:
        scheduled: Sequences of the step, at least one; their block tables hold the new tokens.
        block_size: Tokens per block.
        device: Where the forward runs.
        row_of: By ``seq_id``, which token of the step before is the newest of a sequence.
    """
    decodes = sorted((item for item in scheduled if item.is_decode), key=lambda item: item.start)
    chunks = [item for item in scheduled if item.num_tokens and not item.is_decode]
    ordered = (*decodes, *chunks)
    ends = np.cumsum([item.num_tokens for item in ordered])
    starts = ends - [item.num_tokens for item in ordered]
    unknown = [
        (row, row_of[item.sequence.seq_id])
        for row, item in enumerate(decodes)
        if item.start >= item.sequence.num_tokens
    ]
    positions = [item.sequence.prompt.positions.of(item.start, item.end) for item in ordered]
    slots = [_slots_of(item.sequence, item.start, item.end, block_size) for item in ordered]
    embedding_rows, embeddings = _collect_embeddings(chunks, starts[len(decodes) :])
    sampled, logit_rows = _find_sampled(scheduled, ordered, ends)
    unknown_pairs = torch.tensor(unknown, dtype=torch.int64, device=device).reshape(-1, 2)
    return ForwardBatch(
        token_ids=torch.tensor(_tokens_of(ordered), device=device),
        unknown_rows=unknown_pairs[:, 0],
        unknown_sources=unknown_pairs[:, 1],
        positions=torch.from_numpy(np.concatenate(positions, axis=1)).to(device),
        slot_mapping=torch.from_numpy(np.concatenate(slots)).to(device),
        embedding_rows=torch.from_numpy(embedding_rows).to(device),
        embeddings=torch.cat(embeddings).to(device) if embeddings else None,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        decode_groups=tuple(_group_decodes(decodes, block_size)),
        prefill_segments=tuple(
            _make_segment(item, int(start), block_size, device)
            for item, start in zip(chunks, starts[len(decodes) :], strict=True)
        ),
        sequences=ordered,
        sampled=tuple(sampled),
        scored=tuple(_find_scored(chunks, starts[len(decodes) :])),
    )


def _tokens_of(ordered: Items[ScheduledSequence]) -> list[int]:
    tokens: list[int] = []
    for item in ordered:
        known = item.sequence.token_ids[item.start : item.end]
        tokens += known or [0]
    return tokens


def _find_sampled(
    scheduled: Items[ScheduledSequence], ordered: Items[ScheduledSequence], ends: np.ndarray
) -> tuple[list[ScheduledSequence], list[int]]:
    """Return the sequences that get a token, and the row of each one's logits."""
    last_rows = {
        item.sequence.seq_id: int(end) - 1 for item, end in zip(ordered, ends, strict=True)
    }
    sampled = [item for item in (*ordered, *_forks_of(scheduled)) if item.samples]
    rows = [last_rows[(item.forked_from or item.sequence).seq_id] for item in sampled]
    return sampled, rows


def _find_scored(chunks: Items[ScheduledSequence], rows: np.ndarray) -> list[ScoredRows]:
    scored = []
    for item, row in zip(chunks, rows, strict=True):
        sequence = item.sequence
        num_alternatives = sequence.sampling.num_prompt_logprobs
        token_ids = sequence.prompt.token_ids[item.start + 1 : item.end + 1]
        if num_alternatives is not None and sequence.scores_prompt and token_ids:
            scored.append(
                ScoredRows(sequence.seq_id, int(row), item.start + 1, token_ids, num_alternatives)
            )
    return scored


def _forks_of(scheduled: Items[ScheduledSequence]) -> list[ScheduledSequence]:
    return [item for item in scheduled if item.forked_from is not None]


def _make_segment(
    item: ScheduledSequence, row: int, block_size: int, device: torch.device
) -> PrefillSegment:
    both_ways = tuple(
        (span.offset, span.end)
        for span in item.sequence.prompt.spans
        if span.layout.attends_both_ways and item.start < span.end and span.offset < item.end
    )
    context_slots = None
    if item.start:
        slots = _slots_of(item.sequence, 0, item.end, block_size)
        context_slots = torch.from_numpy(slots).to(device)
    return PrefillSegment(row, item.num_tokens, context_slots, both_ways)


def _slots_of(sequence: Sequence, start: int, end: int, block_size: int) -> np.ndarray:
    positions = np.arange(start, end)
    first_block = start // block_size
    blocks = np.array(sequence.block_table[first_block : -(-end // block_size)])
    return blocks[positions // block_size - first_block] * block_size + positions % block_size


def _collect_embeddings(
    chunks: Items[ScheduledSequence], starts: np.ndarray
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Return the rows of the batch that take a row of an embedding, and those rows."""
    rows = [np.empty(0, dtype=np.int64)]
    embeddings: list[torch.Tensor] = []
    for item, first_row in zip(chunks, starts, strict=True):
        sequence = item.sequence
        for span, embedding in zip(sequence.prompt.spans, sequence.embeddings, strict=True):
            if span.end <= item.start or span.offset >= item.end:
                continue
            assert embedding is not None, "a chunk ends before a span that is not ready"
            positions = find_embedding_positions(span)
            first, last = np.searchsorted(positions, (item.start, item.end))
            rows.append(positions[first:last] - item.start + first_row)
            embeddings.append(embedding[first:last])
    return np.concatenate(rows), embeddings


def _group_decodes(decodes: Items[ScheduledSequence], block_size: int) -> list[DecodeGroup]:
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


def _make_group(members: Items[ScheduledSequence], start: int, block_size: int) -> DecodeGroup:
    tables = [item.sequence.block_table for item in members]
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    context_lengths = np.array([item.start + 1 for item in members])
    return DecodeGroup(start, context_lengths, padded, block_size)
