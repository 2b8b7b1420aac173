"""A step whose tensors may still be on their way is not reported as done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.generator.model.runner import ModelRunner
from tests.fakes.split_engine import SplitEngine

if TYPE_CHECKING:
    import pytest

    from tests.fakes.whole_model import WholeModel


def test_steps_that_sample_nothing_wait_for_the_device(
    whole_model: WholeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(ModelRunner, "check_alive", lambda _: waits.append(1))
    prompt = whole_model.make_prompt(0, seed=70)
    split = SplitEngine(whole_model, max_step_tokens=2, max_tokens=3)

    split.generate([prompt])

    num_chunks = -(-len(prompt.token_ids) // 2)
    assert len(waits) == num_chunks - 1 > 0
