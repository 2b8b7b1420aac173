"""Drive a generator process with prompts of token ids and time what comes back."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.step_trace import Step, read_steps
from tests.harness.generator_client import open_client

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.harness.generator_client import Stream
    from tests.harness.generator_process import GeneratorProcess

# Ids below it may be special tokens of the checkpoint's tokenizer.
FIRST_PLAIN_ID = 20
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class BatchRun:
    """Prompts that were sent together.

    Attributes:
        wall_s: Seconds from the first prompt to the last token.
        period_s: Median seconds between two tokens of one answer while all were decoded, as the
            client saw it.
        steps: Decode steps that held all sequences.
        num_tokens: Tokens generated.
    """

    wall_s: float
    period_s: float
    steps: list[Step]
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated per second, prefill included."""
        return self.num_tokens / self.wall_s

    @property
    def step_s(self) -> float:
        """Median seconds of a step with all sequences."""
        return statistics.median(step.total_s for step in self.steps)

    @property
    def forward_s(self) -> float:
        """Median seconds of the forward of such a step."""
        return statistics.median(step.forward_s for step in self.steps)

    def part_s(self, name: str) -> float | None:
        """Return the median seconds of one part of a step; ``None`` if the trace has no such."""
        values = [step.parts_s[name] for step in self.steps if name in step.parts_s]
        return statistics.median(values) if values else None


class PromptSource:
    """Makes prompts of random token ids, a new one each time."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._random = random.Random(seed)

    def prompt(self, num_tokens: int) -> list[int]:
        """Return ``num_tokens`` random token ids."""
        return [self._random.randrange(FIRST_PLAIN_ID, self._vocab_size) for _ in range(num_tokens)]

    def prompts(self, number: int, mean_tokens: int) -> list[list[int]]:
        """Return prompts of lengths spread evenly from half of the mean to three halves of it."""
        spread = [(i + 0.5) / number - 0.5 for i in range(number)]
        lengths = [round(mean_tokens * (1 + part)) for part in spread]
        self._random.shuffle(lengths)
        return [self.prompt(length) for length in lengths]


def run_batch(
    process: GeneratorProcess, prompts: Sequence[Sequence[int]], num_tokens: int
) -> BatchRun:
    """Send all prompts at once and return how their answers came.

    Raises:
        RuntimeError: No step held them all; there is too little to generate.
    """
    num_before = len(read_steps(process.trace))
    streams = asyncio.run(_send_all(process, prompts, num_tokens))
    last = max(stream.token_times[-1] for stream in streams)
    wall_s = last - min(stream.sent_at for stream in streams)
    new_steps = read_steps(process.trace)[num_before:]
    steps = [step for step in new_steps if step.is_decode and step.num_sequences == len(prompts)]
    if not steps:
        raise RuntimeError(f"No decode step held all {len(prompts)} sequences.")
    return BatchRun(
        wall_s=wall_s,
        period_s=_median_period(streams),
        steps=steps,
        num_tokens=sum(len(stream.token_ids) for stream in streams),
    )


def measure_ttft(process: GeneratorProcess, prompt: Sequence[int]) -> float:
    """Return the seconds from one prompt, alone, to its first token."""
    (stream,) = asyncio.run(_send_all(process, [prompt], 1))
    return stream.ttft_s


async def _send_all(
    process: GeneratorProcess, prompts: Iterable[Sequence[int]], num_tokens: int
) -> list[Stream]:
    async with open_client(process) as client:
        # The connection is made by a first answer, which is not timed.
        await client.generate([FIRST_PLAIN_ID], WARM_UP_TOKENS)
        return await asyncio.gather(*(client.generate(p, num_tokens) for p in prompts))


def _median_period(streams: Sequence[Stream]) -> float:
    all_run_from = max(stream.token_times[0] for stream in streams)
    periods = [
        later - earlier
        for stream in streams
        for earlier, later in itertools.pairwise(stream.token_times)
        if earlier >= all_run_from
    ]
    return statistics.median(periods)
