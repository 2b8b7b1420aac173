"""What one step leaves to the next: tensors on their way, and tokens that are not known yet."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.generator.engine.sampler import Sampler
from chiasm.generator.model.step_marks import StepMarks
from tests.fakes.generator_engine import output_of
from tests.fakes.split_engine import SplitEngine

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    import pytest
    import torch

    from chiasm.generator.engine.sampler import SampledRow
    from tests.fakes.whole_model import WholeModel


def test_steps_that_sample_nothing_wait_for_the_device(
    whole_model: WholeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    wait = StepMarks.wait

    def count(marks: StepMarks) -> list[float]:
        waits.append(1)
        return wait(marks)

    monkeypatch.setattr(StepMarks, "wait", count)
    prompt = whole_model.make_prompt(0, seed=70)
    split = SplitEngine(whole_model, max_step_tokens=2, max_tokens=3)

    split.generate([prompt])

    num_chunks = -(-len(prompt.token_ids) // 2)
    # The last chunk brings the first token of three.
    assert len(waits) == num_chunks + 2 > 3


def test_a_drawn_row_that_is_not_finite_ends_no_other_sequence(
    whole_model: WholeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Sampler.choose

    def spoil(sampler: Sampler, logits: torch.Tensor, rows: Items[SampledRow]) -> torch.Tensor:
        for index, row in enumerate(rows):
            if not row.params.is_greedy:
                logits[index] = float("nan")
        return choose(sampler, logits, rows)

    monkeypatch.setattr(Sampler, "choose", spoil)
    prompts = [whole_model.make_prompt(0, seed, 4) for seed in (71, 72)]
    split = SplitEngine(whole_model, max_tokens=4)
    spoilt, other = (split.make_sequence(index, one) for index, one in enumerate(prompts))
    spoilt.sampling = replace(spoilt.sampling, temperature=1.0)
    for sequence in (spoilt, other):
        split.engine.add(sequence)

    split.run()

    assert output_of(other) == list(prompts[1].answer)
    assert output_of(spoilt) == []


def test_logits_of_a_prompt_are_computed_once_for_all_its_forks(
    whole_model: WholeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = whole_model.make_prompt(0, seed=73)
    split = SplitEngine(whole_model, max_tokens=3)
    num_rows = []
    compute = split.loaded.decoder.compute_logits

    def count(hidden: torch.Tensor) -> torch.Tensor:
        num_rows.append(len(hidden))
        return compute(hidden)

    monkeypatch.setattr(split.loaded.decoder, "compute_logits", count)
    first, *forks = (split.make_sequence(index, prompt) for index in range(3))
    first.forks = tuple(forks)
    other = split.make_sequence(3, whole_model.make_prompt(0, seed=74))
    for sequence in (first, other):
        split.engine.add(sequence)

    split.run()

    assert num_rows == [2, 4, 4]
    assert output_of(first) == output_of(forks[0]) == output_of(forks[1]) == list(prompt.answer[:3])
