"""Hold one stream of tokens being generated and all that the engine knows about it."""

from __future__ import annotations

import enum
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chiasm.generator.engine.block_group import BlockTable
from chiasm.generator.engine.sampling_state import SamplingState

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    import torch

    from chiasm.common.media import MediaSpan, RequestContext
    from chiasm.generator.engine.sampling_params import SamplingParams
    from chiasm.generator.model.positions import PromptPositions


class SequenceStatus(enum.Enum):
    """Queue state of a sequence.

    ``BLOCKED`` waits for embeddings without holding blocks, ``WAITING`` for room, ``PREEMPTED`` for
    room to recompute, ``FORK`` for the prompt that another sequence computes for it.
    """

    FORK = "fork"

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


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose sequence it is: what it may share KV with, and its place in the queue.

    Attributes:
        tenant: Tenant; nothing is shared between tenants, and each gets its part of the steps.
        cache_salt: Narrows what is shared within the tenant.
        adapter: Adapter that changes the weights; empty for none.
        priority: Lower comes first.
    """

    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""
    priority: int = 0

    @classmethod
    def of(cls, context: RequestContext) -> Origin:
        """Return the origin of a request's sequences."""
        return cls(context.tenant, context.cache_salt, context.adapter, context.priority)


NO_ORIGIN = Origin()


class Sequence:
    """A prompt and the tokens generated for it so far.

    The engine thread owns it. Steps are launched before the tokens of the step before are known, so
    its positions fall into these ranges::

        0 .... num_scheduled_tokens .... num_tokens .............. num_total_tokens
        | KV of launched steps | to be computed | sampled by a launched step, unknown |

    Attributes:
        seq_id: Number in order of arrival; smaller is older.
        prompt: What it started from.
        sampling: How its tokens are chosen.
        origin: Whose it is.
        sampling_state: What its rules depend on; owned by the sampler's thread, ``None`` without
            rules.
        forks: Sequences of the same prompt that share its blocks once the prompt is computed; empty
            from then on.
        token_ids: Tokens of the prompt, then the generated ones that are known.
        embeddings: Rows of each span as ``EmbeddingLoader.load`` returns them, on the host;
            ``None`` until they arrive. They stay until the end, so that a preempted sequence can
            be recomputed without the embedding store. Shared with the forks.
        tables: Its blocks by group of cache layers; written by ``BlockManager`` only, like
            ``block_hashes``.
        block_hashes: Hashes of its full blocks, as far as they were asked for.
        num_scheduled_tokens: Tokens whose KV is in the cache once all launched steps have run.
        num_pending_tokens: Tokens that launched steps sample and that are not known yet.
        num_cached_tokens: Prompt tokens found in the prefix cache when it first ran.
        num_scored_tokens: Prompt tokens whose log probabilities were told, the first one included,
            which has none; written by ``Engine`` only.
        num_preemptions: Times that its blocks were taken.
        status: Queue state; written by ``Scheduler`` only.
        added_at: Engine's clock when it was queued; the three times are written by ``Engine`` only.
        first_step_at: Engine's clock when its first step began; ``None`` before.
        first_token_at: Engine's clock when it got its first token; ``None`` before.
    """

    def __init__(
        self,
        seq_id: int,
        prompt: Prompt,
        sampling: SamplingParams,
        origin: Origin = NO_ORIGIN,
    ) -> None:
        self.seq_id = seq_id
        self.prompt = prompt
        self.sampling = sampling
        self.origin = origin
        self.sampling_state = (
            SamplingState(sampling, prompt.token_ids) if sampling.has_rules else None
        )
        self.forks: tuple[Sequence, ...] = ()
        self.token_ids = list(prompt.token_ids)
        self.embeddings: list[torch.Tensor | None] = [None] * len(prompt.spans)
        self.tables: defaultdict[int, BlockTable] = defaultdict(BlockTable)
        self.block_hashes: list[bytes] = []
        self.num_scheduled_tokens = 0
        self.num_pending_tokens = 0
        self.num_cached_tokens = 0
        self.num_scored_tokens = 1
        self.num_preemptions = 0
        self.status = SequenceStatus.WAITING
        self.added_at = 0.0
        self.first_step_at: float | None = None
        self.first_token_at: float | None = None

    @property
    def num_tokens(self) -> int:
        """Known tokens of prompt and output together."""
        return len(self.token_ids)

    @property
    def num_total_tokens(self) -> int:
        """Tokens of prompt and output, those that are not known yet included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Known tokens generated so far."""
        return len(self.token_ids) - len(self.prompt.token_ids)

    @property
    def max_num_tokens(self) -> int:
        """Tokens that prompt and output may reach."""
        return len(self.prompt.token_ids) + self.sampling.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of its prompt are still to be told."""
        wanted = self.sampling.num_prompt_logprobs is not None
        return wanted and self.num_scored_tokens < len(self.prompt.token_ids)

    @property
    def num_ready_tokens(self) -> int:
        """Tokens before the first span without an embedding.

        Also where the prefix cache has the span: a preempted sequence must be able to compute it.
        """
        if self.num_scheduled_tokens < len(self.prompt.token_ids):
            for span, embedding in zip(self.prompt.spans, self.embeddings, strict=True):
                if embedding is None:
                    return span.offset
        return self.num_total_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether it goes on by its newest token: all others are scheduled."""
        num_scheduled = self.num_scheduled_tokens
        is_behind_prompt = num_scheduled >= len(self.prompt.token_ids)
        return is_behind_prompt and num_scheduled + 1 == self.num_total_tokens

    @property
    def will_be_full(self) -> bool:
        """Whether the launched steps bring it to its most tokens."""
        return self.num_total_tokens >= self.max_num_tokens


def find_embedding_positions(span: MediaSpan) -> np.ndarray:
    """Return the prompt positions of ``span`` that take a row of its embedding.

    Returns:
        Positions in order. [num_embedding_tokens], int64.
    """
    counts = [run.count for run in span.layout.runs]
    is_embedding = np.repeat([run.is_embedding for run in span.layout.runs], counts)
    return np.flatnonzero(is_embedding) + span.offset
