"""Say what is reported about sequences and steps: tokens, needs, ends, statistics."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.generator.engine.logprobs import TokenLogprobs
    from chiasm.generator.engine.sampler import SampledToken


class FinishReason(enum.Enum):
    """Why a sequence ended without an error."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """Tokens added to a sequence since its stream was last read, in order.

    Attributes:
        token_ids: The tokens.
        logprobs: How likely each was, if that was asked for; else empty.
        index: Which sequence of its group they belong to.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """How likely consecutive tokens of the prompt were; the first of them is at ``start``."""

    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class NeedEmbedding:
    """An embedding that is not, or no longer, in the store; its sequence waits for it."""

    embedding_id: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a sequence.

    Attributes:
        reason: Why it ended.
        stop_token_id: Token that ended it; ``None`` unless the reason is ``STOP``.
        num_prompt_tokens: Tokens of the prompt, placeholders expanded.
        num_output_tokens: Tokens generated, the stop token included.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache.
        index: Which sequence of its group ended.
    """

    reason: FinishReason
    stop_token_id: int | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a sequence by an error; ``error`` is what its caller sees."""

    error: Exception


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one step did to one sequence: what was learned of its prompt, new tokens, its end.

    ``num_cached_tokens`` comes with tokens: prompt tokens whose KV came from the prefix cache.
    """

    seq_id: int
    token_ids: tuple[int, ...] = ()
    end: Finished | Failed | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SequenceTimes:
    """Where the time of a finished sequence went.

    Attributes:
        queue_s: Seconds from its arrival to its first step.
        prefill_s: Seconds from its first step to its first token.
        decode_s: Seconds from its first token to its last.
    """

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class ExecutionTimes:
    """Where the time of a step went that has run.

    Attributes:
        build_s: Seconds to build the tensors, beside the step before.
        forward_s: Seconds of the forward, logits included.
        sample_s: Seconds to sample.
    """

    build_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed.

    Attributes:
        tokens: The sampled token by ``seq_id``, ``None`` where the logits were not finite.
        times: Where the time went.
        prompt_logprobs: What was learned of prompts, by ``seq_id``, where that was asked for.
    """

    tokens: Mapping[int, SampledToken | None]
    times: ExecutionTimes
    prompt_logprobs: Mapping[int, PromptLogprobs]


@dataclass(frozen=True, slots=True)
class EngineState:
    """What the engine holds between two steps.

    Attributes:
        num_running: Running sequences.
        num_waiting: Sequences that wait for room or for embeddings.
        num_used_blocks: Blocks in block tables.
        num_blocks: Blocks of the KV cache.
    """

    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """Figures of one step, for metrics and the step trace.

    Attributes:
        step: Number of the step, from 1.
        num_sequences: Sequences in the forward.
        num_prefill_tokens: Tokens of prompts, recomputed ones included.
        num_decode_tokens: Sequences that added one token to a computed context.
        num_output_tokens: Tokens sampled, without those of sequences that had ended.
        num_queried_tokens: Tokens looked up in the prefix cache.
        num_cached_tokens: Tokens found there.
        num_running: Running sequences after the step.
        num_waiting: Sequences that wait for room or for embeddings after the step.
        num_used_blocks: Blocks in block tables after the step.
        num_blocks: Blocks of the KV cache.
        num_preemptions: Sequences preempted by this step.
        schedule_s: Seconds to choose the sequences, beside the step before.
        build_s: Seconds to build the tensors, beside the step before.
        forward_s: Seconds of the forward, logits included.
        sample_s: Seconds to sample.
        update_s: Seconds to append tokens and finish sequences, beside the step behind.
        step_s: Seconds from the end of the step before, or from the beginning of this one if there
            was none on its way, to its end.
        finished: Times of the sequences that finished in this step.
    """

    step: int
    num_sequences: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_output_tokens: int
    num_queried_tokens: int
    num_cached_tokens: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_preemptions: int
    schedule_s: float
    build_s: float
    forward_s: float
    sample_s: float
    update_s: float
    step_s: float
    finished: tuple[SequenceTimes, ...] = ()

    @property
    def state(self) -> EngineState:
        """What the engine holds after the step."""
        return EngineState(
            self.num_running, self.num_waiting, self.num_used_blocks, self.num_blocks
        )
