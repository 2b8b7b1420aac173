"""The tensors of one step, built from the scheduled sequences."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from chiasm.generator.engine.sequence import find_embedding_positions
from chiasm.generator.model.attention_plan import group_chunks, group_decodes, slots_of
from chiasm.generator.model.step_buffers import StepBuffers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Items

    from chiasm.generator.engine.scheduled_step import ScheduledSequence
    from chiasm.generator.model.attention_plan import CacheShape, DecodeGroup, PrefillGroup


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
        slot_mappings: Slot of every token, by cache group. [num_tokens], int64.
        embedding_rows: Rows whose token embedding is overwritten. [num_spliced], int64.
        embeddings: What stands there and, behind it, what deepstack levels add.
            [num_spliced, (1 + num_levels) * hidden_size], dtype of the model; ``None`` if
            there are none.
        logit_rows: Rows to sample from, without those of forks. [num_logits], int64.
        decode_groups: Rows that decode.
        prefills: Rows of chunks.
        sequences: Scheduled sequences with rows, in the order of their rows.
        sampled: Those that get a token, forks included.
        scored: Rows of prompts whose log probabilities are asked for.
        logits_of_sampled: Which of the logits each of ``sampled`` gets. [num_sampled], int64;
            ``None``: each gets its own.
        hidden: What enters the first layer, embeddings included; ``None``: to be computed.
            [num_tokens, hidden_size], dtype of the model.
    """

    token_ids: torch.Tensor
    unknown_rows: torch.Tensor
    unknown_sources: torch.Tensor
    positions: torch.Tensor
    slot_mappings: tuple[torch.Tensor, ...]
    embedding_rows: torch.Tensor
    embeddings: torch.Tensor | None
    logit_rows: torch.Tensor
    decode_groups: tuple[DecodeGroup, ...]
    prefills: PrefillGroup
    sequences: tuple[ScheduledSequence, ...]
    sampled: tuple[ScheduledSequence, ...]
    scored: tuple[ScoredRows, ...]
    logits_of_sampled: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return self.positions.shape[1]

    @property
    def num_decodes(self) -> int:
        """Rows that decode."""
        return sum(group.num_sequences for group in self.decode_groups)

    def fill_in(self, last_tokens: torch.Tensor) -> None:
        """Put in the tokens that the step before has sampled. [num_sampled], int64."""
        if len(self.unknown_rows):
            self.token_ids[self.unknown_rows] = last_tokens[self.unknown_sources]


def build_forward_batch(
    scheduled: Items[ScheduledSequence],
    shape: CacheShape,
    row_of: Mapping[int, int] = MappingProxyType({}),
    buffers: StepBuffers | None = None,
) -> ForwardBatch:
    """Build the tensors of one step.

    Args:
        scheduled: Sequences of the step, at least one; their block tables hold the new tokens.
        shape: What their block tables mean, and where the forward runs.
        row_of: By ``seq_id``, which token of the step before is the newest of a sequence.
        buffers: Where the tensors of rows are put; ``None`` for new memory.
    """
    buffers = buffers or StepBuffers(0, shape.device)
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
    embedding_rows, embeddings = _collect_embeddings(chunks, starts[len(decodes) :])
    sampled, logit_rows = _find_sampled(ordered, ends)
    forks = _forks_of(scheduled)
    return ForwardBatch(
        token_ids=buffers.put("token_ids", _tokens_of(ordered)),
        unknown_rows=buffers.put("unknown_rows", [row for row, _ in unknown]),
        unknown_sources=buffers.put("unknown_sources", [source for _, source in unknown]),
        positions=buffers.put("positions", _positions_of(decodes, chunks)),
        slot_mappings=tuple(
            buffers.put(f"slots {group}", _slots_of_new(decodes, chunks, group, shape.block_size))
            for group in range(len(shape.windows))
        ),
        embedding_rows=buffers.put("embedding_rows", embedding_rows),
        embeddings=_to_device(embeddings, shape.device),
        logit_rows=buffers.put("logit_rows", logit_rows),
        decode_groups=tuple(group_decodes(decodes, shape)),
        prefills=group_chunks(chunks, len(decodes), shape),
        sequences=ordered,
        sampled=(*sampled, *forks),
        scored=tuple(_find_scored(chunks, starts[len(decodes) :])),
        logits_of_sampled=(
            buffers.put("logits_of_sampled", _find_logits(sampled, forks)) if forks else None
        ),
    )


def _to_device(embeddings: list[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    if not embeddings:
        return None
    # A copy that waited would wait for the step that runs; the driver keeps pageable memory.
    return torch.cat(embeddings).to(device, non_blocking=True)


def _positions_of(
    decodes: Items[ScheduledSequence], chunks: Items[ScheduledSequence]
) -> np.ndarray:
    """Return the positions of all tokens of the step. [num_rows, num_tokens], int64."""
    found = [item.sequence.prompt.positions.of(item.start, item.end) for item in chunks]
    if decodes:
        # Those of output are alike in all rows; one array for all, as each costs microseconds.
        row = [item.start + item.sequence.prompt.positions.delta for item in decodes]
        num_rows = decodes[0].sequence.prompt.positions.num_rows
        found.insert(0, np.broadcast_to(np.array(row), (num_rows, len(row))))
    return np.concatenate(found, axis=1)


def _slots_of_new(
    decodes: Items[ScheduledSequence],
    chunks: Items[ScheduledSequence],
    group: int,
    block_size: int,
) -> np.ndarray:
    """Return the slots of all tokens of the step in one cache group. [num_tokens], int64."""
    slots = [
        item.sequence.tables[group].blocks[item.start // block_size] * block_size
        + item.start % block_size
        for item in decodes
    ]
    found = [
        slots_of(item.sequence.tables[group].blocks, (item.start, item.end), block_size)
        for item in chunks
    ]
    return np.concatenate([np.array(slots, dtype=np.int64), *found])


def _tokens_of(ordered: Items[ScheduledSequence]) -> list[int]:
    tokens: list[int] = []
    for item in ordered:
        known = item.sequence.token_ids[item.start : item.end]
        tokens += known or [0]
    return tokens


def _find_sampled(
    ordered: Items[ScheduledSequence], ends: np.ndarray
) -> tuple[list[ScheduledSequence], list[int]]:
    """Return the sequences with rows that get a token, and the row of each one's logits."""
    found = [(item, int(end) - 1) for item, end in zip(ordered, ends, strict=True) if item.samples]
    return [item for item, _ in found], [row for _, row in found]


def _find_logits(sampled: Items[ScheduledSequence], forks: Items[ScheduledSequence]) -> list[int]:
    """Return the place of each one's logits: those of forks are their parents'."""
    places = {item.sequence.seq_id: place for place, item in enumerate(sampled)}
    parents = [item.forked_from.seq_id for item in forks if item.forked_from]
    return [*places.values(), *(places[parent] for parent in parents)]


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
