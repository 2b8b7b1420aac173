"""Where in the KV cache the sequences of a step find what they attend to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from chiasm.common.device import send

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    from chiasm.generator.engine.scheduled_step import ScheduledSequence
    from chiasm.generator.model.decoder import Decoder

# Sequences that decode share one gather if the longest context is at most this many times the
# shortest; short contexts always share.
_MAX_LENGTH_RATIO = 2
_SHORT_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What the tables of a sequence mean.

    Attributes:
        block_size: Tokens per block.
        windows: Positions that a token sees, by cache group; 0 is all before it.
        device: Where the tensors go.
        gathers: Whether contexts are copied, so that similar lengths go together.
    """

    block_size: int
    windows: tuple[int, ...]
    device: torch.device
    gathers: bool = True

    @classmethod
    def of(cls, decoder: Decoder) -> CacheShape:
        """Return the shape of a decoder's cache."""
        windows = tuple(group.window for group in decoder.spec.cache_groups)
        return cls(decoder.block_size, windows, decoder.device, decoder.gathers_contexts)


@dataclass(frozen=True, slots=True, eq=False)
class PrefillContext:
    """Positions that a chunk sees in one cache group, its own included.

    Attributes:
        first: The first of them; those before are seen by no token of the chunk.
        slots: Their slots, in order. [num_positions], int64.
    """

    first: int
    slots: torch.Tensor


@dataclass(slots=True, eq=False)
class PrefillSegment:
    """Consecutive rows of the batch that hold one chunk of a prompt.

    Attributes:
        start: First row.
        length: Number of rows.
        position: Position of the first row's token.
        block_tables: Blocks of the sequence by cache group. [num_blocks], int64.
        shape: What they mean.
        both_ways: Ranges of positions, each within which all see each other.
        contexts: What the chunk sees, by cache group, made on first use, shared by all layers.
        masks: Masks by cache group and sliding window, made and shared likewise.
    """

    start: int
    length: int
    position: int
    block_tables: tuple[np.ndarray, ...]
    shape: CacheShape
    both_ways: tuple[tuple[int, int], ...] = ()
    contexts: dict[int, PrefillContext] = field(default_factory=dict)
    masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        """Rows of the segment."""
        return slice(self.start, self.start + self.length)

    @property
    def end(self) -> int:
        """Position behind the last row's token."""
        return self.position + self.length

    @property
    def begins_prompt(self) -> bool:
        """Whether all that it sees is new."""
        return self.position == 0

    def is_causal(self, window: int) -> bool:
        """Return whether a plain causal mask over the new tokens is all that is needed."""
        is_cut = 0 < window < self.length
        return self.begins_prompt and not self.both_ways and not is_cut

    def context(self, group: int) -> PrefillContext:
        """Return the positions that the chunk sees in one cache group."""
        if group not in self.contexts:
            window, block_size = self.shape.windows[group], self.shape.block_size
            first = max(0, self.position - window + 1) if window else 0
            slots = slots_of(self.block_tables[group], (first, self.end), block_size)
            context = PrefillContext(first, torch.from_numpy(slots).to(self.shape.device))
            self.contexts[group] = context
        return self.contexts[group]

    def seen(self, window: int) -> np.ndarray:
        """Return the first position that each row sees and the one behind its last.

        Returns:
            [length, 2], int64.
        """
        query = np.arange(self.position, self.end)
        seen = np.stack((np.zeros_like(query), query + 1), axis=1)
        for begin, stop in self.both_ways:
            rows = slice(max(0, begin - self.position), max(0, stop - self.position))
            seen[rows, 1] = min(stop, self.end)
        if window:
            seen[:, 0] = np.maximum(query - window + 1, 0)
        return seen

    def mask(
        self, group: int, window: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return what is added to the scores: 0, or minus infinity for what a row does not see.

        Args:
            group: Cache group of the layer.
            window: Positions that a token sees in the layer; 0 is all before it.
            dtype: Of the scores.
            device: Of the scores.

        Returns:
            [length, context_length], ``dtype``.
        """
        key = (group, window)
        if key not in self.masks:
            mask = self._make_mask(group, window, device)
            zeros = torch.zeros(mask.shape, dtype=dtype, device=device)
            self.masks[key] = zeros.masked_fill_(mask, float("-inf"))
        return self.masks[key]

    def _make_mask(self, group: int, window: int, device: torch.device) -> torch.Tensor:
        """Return what is hidden. [length, context_length], bool."""
        first = 0 if self.begins_prompt else self.context(group).first
        query = torch.arange(self.position, self.end, device=device)[:, None]
        key = torch.arange(first, self.end, device=device)
        # Bytes, not differences: a long context times a large chunk is many of them.
        is_hidden = key > query
        for begin, stop in self.both_ways:
            rows = slice(max(0, begin - self.position), max(0, stop - self.position))
            is_hidden[rows, max(0, begin - first) : max(0, stop - first)] = False
        if window:
            is_hidden |= key <= query - window
        return is_hidden


@dataclass(slots=True, eq=False)
class PrefillGroup:
    """The rows of the batch that hold chunks of prompts, behind those that decode.

    Attributes:
        start: First row.
        segments: The chunks, in the order of their rows.
        block_tables: Block tables by cache group, padded. [num_segments, max_blocks], int64.
        device: Where kernels read them.
        contexts: What kernels read, by cache group and sliding window, made on first use, shared
            by all layers.
    """

    start: int
    segments: tuple[PrefillSegment, ...]
    block_tables: tuple[np.ndarray, ...]
    device: torch.device
    contexts: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )

    @property
    def rows(self) -> slice:
        """Rows of the group."""
        return slice(self.start, None)

    @property
    def is_empty(self) -> bool:
        """Whether there are no chunks."""
        return not self.segments and not self.contexts

    @property
    def num_blocks(self) -> int:
        """Blocks of the longest block table."""
        return _count_blocks(self.block_tables)

    def context(self, group: int, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the chunks attend to in one cache group, on the device.

        Args:
            group: Cache group of the layer.
            window: Positions that a token sees in the layer; 0 is all before it.

        Returns:
            First row, counted from ``start``, and length of each segment, [num_segments, 2]; their
            block tables, [num_segments, max_blocks]; and the range of positions that each row
            sees, [num_rows, 2], see ``PrefillSegment.seen``. All int64.
        """
        key = (group, window)
        if key not in self.contexts:
            bounds = np.array([(one.start - self.start, one.length) for one in self.segments])
            seen = np.concatenate([one.seen(window) for one in self.segments])
            sent = (send(one, self.device) for one in (bounds, self.block_tables[group], seen))
            self.contexts[key] = (next(sent), next(sent), next(sent))
        return self.contexts[key]


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
        block_tables: Block tables by cache group, padded. [num_sequences, max_blocks], int64.
        block_size: Tokens per block.
        device: Where kernels read them.
        contexts: Block tables and context lengths on the device by cache group, made on first use,
            shared by all layers.
        plans: Gathers by cache group and sliding window, made and shared likewise.
    """

    start: int
    context_lengths: np.ndarray
    block_tables: tuple[np.ndarray, ...]
    block_size: int
    device: torch.device
    contexts: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    plans: dict[tuple[int, int], GatherPlan] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        """Rows of the group."""
        return len(self.context_lengths)

    @property
    def num_blocks(self) -> int:
        """Blocks of the longest block table."""
        return _count_blocks(self.block_tables)

    @property
    def rows(self) -> slice:
        """Rows of the group."""
        return slice(self.start, self.start + self.num_sequences)

    def context(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return block tables and context lengths of one cache group, on the device."""
        if group not in self.contexts:
            tables = send(self.block_tables[group], self.device)
            self.contexts[group] = (tables, send(self.context_lengths, self.device))
        return self.contexts[group]

    def plan(self, group: int, window: int, dtype: torch.dtype, device: torch.device) -> GatherPlan:
        """Return the gather of the last ``window`` positions; 0 is the whole context."""
        key = (group, window)
        if key not in self.plans:
            self.plans[key] = self._make_plan(group, window, dtype, device)
        return self.plans[key]

    def _make_plan(
        self, group: int, window: int, dtype: torch.dtype, device: torch.device
    ) -> GatherPlan:
        lengths = self.context_lengths[:, None]
        width = int(lengths.max())
        if window:
            width = min(width, window)
        positions = np.maximum(lengths - width, 0) + np.arange(width)
        is_padding = positions >= lengths
        positions = np.minimum(positions, lengths - 1)
        table = self.block_tables[group]
        blocks = np.take_along_axis(table, positions // self.block_size, axis=1)
        slots = blocks * self.block_size + positions % self.block_size
        mask = None
        if is_padding.any():
            mask = torch.zeros(is_padding.shape, dtype=dtype)
            mask.masked_fill_(torch.from_numpy(is_padding), float("-inf"))
            mask = mask[:, None, None].to(device)
        return GatherPlan(torch.from_numpy(slots.reshape(-1)).to(device), mask)


def group_chunks(chunks: Items[ScheduledSequence], start: int, shape: CacheShape) -> PrefillGroup:
    """Return the rows of ``chunks``, of which ``start`` is the first."""
    segments = []
    row = start
    for item in chunks:
        segments.append(_make_segment(item, row, shape))
        row += item.num_tokens
    tables = tuple(
        _pad([segment.block_tables[group] for segment in segments])
        for group in range(len(shape.windows))
    )
    return PrefillGroup(start, tuple(segments), tables, shape.device)


def slots_of(
    blocks: Items[int] | np.ndarray, positions: tuple[int, int], block_size: int
) -> np.ndarray:
    """Return the slots of consecutive positions, from the first to before the last.

    Args:
        blocks: Block table of the sequence.
        positions: The first of them and the one behind the last.
        block_size: Tokens per block.

    Returns:
        [num_positions], int64.
    """
    start, end = positions
    offsets = np.arange(start, end)
    first_block = start // block_size
    read = np.asarray(blocks[first_block : -(-end // block_size)])
    return read[offsets // block_size - first_block] * block_size + offsets % block_size


def group_decodes(decodes: Items[ScheduledSequence], shape: CacheShape) -> list[DecodeGroup]:
    """Cut ``decodes``, sorted by context length, where padding of a gather would waste too much."""
    groups: list[DecodeGroup] = []
    first = 0
    for index in range(1, len(decodes) + 1):
        if index < len(decodes):
            if not shape.gathers:
                continue
            bound = max(_SHORT_CONTEXT, _MAX_LENGTH_RATIO * (decodes[first].start + 1))
            if decodes[index].start < bound:
                continue
        groups.append(_make_group(decodes[first:index], first, shape))
        first = index
    return groups


def _make_segment(item: ScheduledSequence, row: int, shape: CacheShape) -> PrefillSegment:
    groups = (span.both_ways for span in item.sequence.prompt.spans)
    both_ways = tuple(
        group for group in groups if group and item.start < group[1] and group[0] < item.end
    )
    num_blocks = -(-item.end // shape.block_size)
    tables = tuple(
        np.array(item.sequence.tables[group].blocks[:num_blocks])
        for group in range(len(shape.windows))
    )
    return PrefillSegment(row, item.num_tokens, item.start, tables, shape, both_ways)


def _make_group(members: Items[ScheduledSequence], start: int, shape: CacheShape) -> DecodeGroup:
    context_lengths = np.array([item.start + 1 for item in members])
    tables = tuple(
        _pad([item.sequence.tables[group].blocks for item in members])
        for group in range(len(shape.windows))
    )
    return DecodeGroup(start, context_lengths, tables, shape.block_size, shape.device)


def _count_blocks(tables: Items[np.ndarray]) -> int:
    """Return the columns of the widest of ``tables``, [num_sequences, max_blocks] each."""
    return max((int(table.shape[1]) for table in tables), default=0)


def _pad(tables: Items[Items[int] | np.ndarray]) -> np.ndarray:
    padded = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded
