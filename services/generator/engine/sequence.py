"""Hold one stream of tokens being generated and all that the engine knows about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    import torch

    from chiasm.common.media import MediaSpan
    from chiasm.generator.engine.sampling_params import SamplingParams
    from chiasm.generator.model.positions import PromptPositions


class SequenceStatus(enum.Enum):
    """Queue state of a sequence.

    ``BLOCKED`` waits for embeddings, ``WAITING`` for room, ``PREEMPTED`` for room to recompute.
    """

    BLOCKED = "blocked"
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Validated token ids with their media spans and positions.

    Attributes:
        token_ids: Tokens with all placeholders expanded; at least one.
        spans: Media items by ascending offset.
        positions: Positions of the tokens and of those that will follow.
    """

    token_ids: Items[int]
    spans: tuple[MediaSpan, ...]
    positions: PromptPositions


class Sequence:
    """A prompt and the tokens generated for it so far.

    The engine thread owns it. Its token positions fall into three ranges::

        0 ........ num_computed_tokens ........ num_tokens ........ capacity of block_table
        | KV in the cache | to be computed       | room in the last block |

    Attributes:
        seq_id: Number in order of arrival; smaller is older.
        prompt: What it started from.
        sampling: How its tokens are chosen.
        token_ids: Tokens of the prompt, then the generated ones.
        embeddings: SPLICE rows of each span, ``[num_embedding_tokens, hidden_size]`` on the host;
            ``None`` until they arrive. They stay until the end, so that a preempted sequence can
            be recomputed without the embedding store.
        block_table: Ids of its blocks, in position order; written by ``BlockManager`` only.
        num_computed_tokens: Tokens whose KV is in the cache.
        status: Queue state; written by ``Scheduler`` only.
        added_at: Engine's clock when it was queued; the three times are written by ``Engine`` only.
        first_step_at: Engine's clock when its first step began; ``None`` before.
        first_token_at: Engine's clock when it got its first token; ``None`` before.
    """

    def __init__(self, seq_id: int, prompt: Prompt, sampling: SamplingParams) -> None:
        self.seq_id = seq_id
        self.prompt = prompt
        self.sampling = sampling
        self.token_ids = list(prompt.token_ids)
        self.embeddings: list[torch.Tensor | None] = [None] * len(prompt.spans)
        self.block_table: list[int] = []
        self.num_computed_tokens = 0
        self.status = SequenceStatus.BLOCKED
        self.added_at = 0.0
        self.first_step_at: float | None = None
        self.first_token_at: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output together."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.prompt.token_ids)

    @property
    def max_num_tokens(self) -> int:
        """Tokens that prompt and output may reach."""
        return len(self.prompt.token_ids) + self.sampling.max_tokens

    @property
    def has_all_embeddings(self) -> bool:
        """Whether every span can be spliced."""
        return all(embedding is not None for embedding in self.embeddings)


def find_embedding_positions(span: MediaSpan) -> np.ndarray:
    """Return the prompt positions of ``span`` that take a row of its embedding.

    Returns:
        Positions in order. [num_embedding_tokens], int64.
    """
    counts = [run.count for run in span.layout.runs]
    is_embedding = np.repeat([run.is_embedding for run in span.layout.runs], counts)
    return np.flatnonzero(is_embedding) + span.offset
