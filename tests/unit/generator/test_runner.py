"""A step whose tensors may still be on their way is not reported as done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.generator.model.step_marks import StepMarks
from tests.fakes.split_engine import SplitEngine

if TYPE_CHECKING:
    import pytest

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
