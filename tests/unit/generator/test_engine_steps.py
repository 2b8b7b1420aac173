"""Steps that overlap, forks, prefix hits and rules, on a model that costs nothing."""

from __future__ import annotations

from chiasm.generator.engine.outputs import Finished
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sequence import Sequence
from tests.fakes.generator_engine import (
    EngineParts,
    expected_tokens,
    make_prompt,
    make_sequence,
    output_of,
)

PROMPTS = ([1, 2, 3], [9], list(range(20, 37)), [5] * 8, [7, 8, 9, 10])


def _group(first_id: int, size: int, max_tokens: int = 6) -> list[Sequence]:
    group = [make_sequence(first_id + index, [1, 2, 3, 4, 5], max_tokens) for index in range(size)]
    group[0].forks = tuple(group[1:])
    return group


def test_forks_generate_what_they_generate_alone() -> None:
    parts = EngineParts(block_size=4)
    group = _group(1, 3)
    parts.engine.add(group[0])

    parts.run()

    assert [output_of(one) for one in group] == [expected_tokens([1, 2, 3, 4, 5], 6)] * 3
    assert parts.decoder.num_computed_tokens == 5 + 3 * 5


def test_forks_go_on_when_the_one_that_computes_their_prompt_is_cancelled() -> None:
    parts = EngineParts()
    group = _group(1, 3)
    parts.engine.add(group[0])

    parts.engine.cancel(1)
    parts.run()

    assert [len(output_of(one)) for one in group] == [0, 6, 6]
    assert parts.engine.num_sequences == 0


def test_cancelled_fork_is_never_born() -> None:
    parts = EngineParts()
    group = _group(1, 3)
    parts.engine.add(group[0])

    parts.engine.cancel(2)
    parts.run()

    assert [len(output_of(one)) for one in group] == [6, 0, 6]
    assert parts.blocks.num_used_blocks == 0


def test_second_prompt_computes_only_what_is_new() -> None:
    parts = EngineParts(block_size=4)
    parts.engine.add(make_sequence(1, range(1, 14), 2))
    parts.run()
    before = parts.decoder.num_computed_tokens
    again = make_sequence(2, [*range(1, 14), 99], 1)
    parts.engine.add(again)

    last = parts.run()[2]

    assert parts.decoder.num_computed_tokens - before == 2
    assert isinstance(last.end, Finished)
    assert last.end.num_cached_tokens == last.num_cached_tokens == 12
    assert output_of(again) == expected_tokens([*range(1, 14), 99], 1)


def test_step_is_launched_before_the_one_before_has_run() -> None:
    parts = EngineParts()
    sequence = make_sequence(1, [1, 2, 3], 3)
    parts.engine.add(sequence)

    assert parts.engine.step() == []
    assert sequence.num_pending_tokens == 1
    outputs = parts.engine.step()

    assert [output.token_ids for output in outputs] == [(expected_tokens([1, 2, 3], 1)[0],)]
    assert sequence.num_pending_tokens == 1
    parts.run()
    assert parts.decoder.num_computed_tokens == 3 + 2


def test_token_behind_the_stop_token_is_thrown_away() -> None:
    parts = EngineParts()
    stop = expected_tokens([1, 2, 3], 2)[1]
    sequence = make_sequence(1, [1, 2, 3], 50, stop=frozenset({stop}))
    parts.engine.add(sequence)

    parts.run()

    assert output_of(sequence) == expected_tokens([1, 2, 3], 2)
    # The prompt, the two tokens, and the one that was on its way when the stop token came.
    assert parts.decoder.num_computed_tokens == 3 + 2


def test_engine_is_done_when_its_last_step_is() -> None:
    parts = EngineParts()
    parts.engine.add(make_sequence(1, [1, 2, 3], 1))

    assert parts.engine.step() == []
    assert parts.engine.has_work
    assert len(parts.engine.step()) == 1
    assert not parts.engine.has_work


def test_rules_see_tokens_that_the_engine_does_not_know_yet() -> None:
    parts = EngineParts()
    first, second = expected_tokens([1, 2, 3], 2)
    sampling = SamplingParams(6, temperature=0.0, bad_words=((first, second),))
    sequence = Sequence(1, make_prompt([1, 2, 3]), sampling)
    parts.engine.add(sequence)

    parts.run()

    assert output_of(sequence)[0] == first
    assert output_of(sequence)[1] != second


def test_preemption_does_not_change_what_rules_depend_on() -> None:
    def outputs(num_blocks: int) -> list[list[int]]:
        parts = EngineParts(num_blocks=num_blocks, block_size=4)
        sequences = [
            Sequence(
                index,
                make_prompt(prompt),
                SamplingParams(14, seed=index, temperature=30.0, presence_penalty=2.0),
            )
            for index, prompt in enumerate(PROMPTS)
        ]
        for sequence in sequences:
            parts.engine.add(sequence)
        parts.run()
        return [output_of(sequence) for sequence in sequences]

    assert outputs(num_blocks=8) == outputs(num_blocks=64)


def test_logprobs_come_with_the_tokens() -> None:
    parts = EngineParts()
    sampling = SamplingParams(3, temperature=0.0, num_logprobs=2)
    parts.engine.add(Sequence(1, make_prompt([1, 2, 3]), sampling))

    seen = []
    while parts.engine.has_work:
        seen += parts.engine.step()

    assert [len(output.logprobs) for output in seen] == [1, 1, 1]
    assert all(output.logprobs[0].top_token_ids[0] == output.token_ids[0] for output in seen)
