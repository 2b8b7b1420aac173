"""The whole engine under random work: no block is lost, no token depends on the company."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chiasm.common.media import (
    DataType,
    EmbeddingRef,
    MediaLayout,
    MediaSpan,
    Modality,
    TensorRole,
    TensorSpec,
    TokenRun,
)
from chiasm.generator.engine.chunking import Chunking
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sequence import Origin, Sequence
from tests.fakes.generator_engine import EngineParts, expected_tokens, make_prompt

NUM_ROWS = 3
# More than a step takes; they attend to one another both ways.
MANY_ROWS = 8
PLACEHOLDER = 250
RULES = ("admit", "provide", "step", "cancel", "finished")


@dataclass
class _Live:
    """A sequence, the values that the fake model should see, and whether a row is missing."""

    sequence: Sequence
    values: list[int]
    picture: torch.Tensor | None = None
    is_provided: bool = True


class EngineMachine(RuleBasedStateMachine):
    """Admits, forks, provides, steps and cancels at random on a cache of a few blocks."""

    chunking = Chunking()
    num_rules: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.parts = EngineParts(
            num_blocks=8, block_size=3, max_running=4, max_step_tokens=6, chunking=self.chunking
        )
        self.live: dict[int, _Live] = {}
        self.next_id = 1

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=9),
        max_tokens=st.integers(1, 8),
        num_forks=st.integers(0, 2),
        origin=st.builds(Origin, tenant=st.sampled_from("ab"), priority=st.integers(0, 1)),
    )
    def admit(self, prompt: list[int], max_tokens: int, num_forks: int, origin: Origin) -> None:
        """Add a text with few different beginnings, so that prefixes are found."""
        sampling = SamplingParams(max_tokens, temperature=0.0)
        group = [
            Sequence(self.next_id + index, make_prompt(prompt), sampling, origin)
            for index in range(1 + num_forks)
        ]
        self._add(group, [_Live(one, list(prompt)) for one in group])

    @rule(
        offset=st.integers(0, 4),
        picture=st.integers(1, 2),
        max_tokens=st.integers(1, 6),
        num_rows=st.sampled_from([NUM_ROWS, MANY_ROWS]),
    )
    def admit_picture(self, offset: int, picture: int, max_tokens: int, num_rows: int) -> None:
        """Add a prompt with one of two pictures, whose embedding comes later."""
        spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (num_rows, 1))
        ref = EmbeddingRef(bytes([picture, num_rows]) * 16, b"f" * 32, Modality.IMAGE, (spec,))
        layout = MediaLayout(
            (TokenRun(PLACEHOLDER, num_rows, is_embedding=True),),
            attends_both_ways=num_rows == MANY_ROWS,
        )
        text = [1] * offset
        tokens = [*text, *layout.expand(), 2]
        prompt = make_prompt(tokens, (MediaSpan(offset, ref, layout, is_ready=False),))
        sequence = Sequence(self.next_id, prompt, SamplingParams(max_tokens, temperature=0.0))
        rows = [100 + 10 * picture + index for index in range(num_rows)]
        tensor = torch.tensor([[float(row)] for row in rows])
        self._add([sequence], [_Live(sequence, [*text, *rows, 2], tensor, is_provided=False)])

    def _add(self, group: list[Sequence], records: list[_Live]) -> None:
        for one in group[1:]:
            one.embeddings = group[0].embeddings
        group[0].forks = tuple(group[1:])
        self.next_id += len(group)
        self.num_rules["admit"] += len(group)
        self.live |= {record.sequence.seq_id: record for record in records}
        self.parts.engine.add(group[0])

    @rule()
    def step(self) -> None:
        """Advance the engine and take note of what ended."""
        self.num_rules["step"] += 1
        for output in self.parts.engine.step():
            if output.end is not None:
                del self.live[output.seq_id]
                self.num_rules["finished"] += 1

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def provide(self, pick: int) -> None:
        """Hand over embeddings in any order."""
        waiting = [seq_id for seq_id, record in self.live.items() if not record.is_provided]
        if waiting:
            self._provide(waiting[pick % len(waiting)])

    def _provide(self, seq_id: int) -> None:
        record = self.live[seq_id]
        assert record.picture is not None
        self.parts.engine.provide(seq_id, 0, record.picture)
        record.is_provided = True
        self.num_rules["provide"] += 1

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def cancel(self, pick: int) -> None:
        """End any sequence."""
        self.num_rules["cancel"] += 1
        seq_id = list(self.live)[pick % len(self.live)]
        del self.live[seq_id]
        self.parts.engine.cancel(seq_id)

    @invariant()
    def blocks_and_queues_agree(self) -> None:
        """Check what the scheduler and the blocks promise."""
        self.parts.scheduler.check_invariants()

    @invariant()
    def no_group_is_computed_in_part(self) -> None:
        """Check where the scheduled tokens of every sequence end."""
        for record in self.live.values():
            scheduled = record.sequence.num_scheduled_tokens
            for span in record.sequence.prompt.spans:
                group = span.both_ways or (0, 0)
                assert not group[0] < scheduled < group[1]

    @invariant()
    def tokens_do_not_depend_on_the_company(self) -> None:
        """Check every token so far."""
        for record in self.live.values():
            sequence = record.sequence
            output = sequence.token_ids[sequence.num_prompt_tokens :]
            assert output == expected_tokens(record.values, len(output))

    def teardown(self) -> None:
        """Finish what is left: everybody ends and every block comes back."""
        for seq_id, record in list(self.live.items()):
            if not record.is_provided:
                self._provide(seq_id)
        for _ in range(2000):
            if not self.parts.engine.has_work:
                break
            self.step()
            self.blocks_and_queues_agree()
            self.tokens_do_not_depend_on_the_company()
        assert not self.live, "a sequence was never finished"
        assert self.parts.blocks.num_used_blocks == 0
        self.parts.engine.close()


class FixedChunkMachine(EngineMachine):
    """The same in deterministic mode."""

    chunking = Chunking(fixed_tokens=3)


@pytest.mark.parametrize("machine", [EngineMachine, FixedChunkMachine])
def test_random_work_loses_no_block_and_changes_no_token(machine: type[EngineMachine]) -> None:
    few = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
    )
    machine.num_rules.clear()

    run_state_machine_as_test(machine, settings=few)

    assert min(machine.num_rules[name] for name in RULES) > 10


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_thousand_random_steps() -> None:
    many = settings(max_examples=2000, stateful_step_count=100, deadline=None)
    EngineMachine.num_rules.clear()

    run_state_machine_as_test(EngineMachine, settings=many)

    assert sum(EngineMachine.num_rules[name] for name in RULES) >= 100_000
