"""Steps replayed from CUDA graphs against the whole model.

Most tests are those of the CPU's decoders; the reference computes there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from chiasm.common.graph_recorder import GraphRecorder, Result
from chiasm.generator.model.graphed_decoder import GraphedDecoder
from chiasm.generator.model.load import replay_steps
from tests.fakes.split_engine import SplitEngine
from tests.fakes.text_models import TEXT_CONFIGS, make_text_model
from tests.fakes.whole_model import WholeModel
from tests.unit.generator.test_decoders import (
    gold,
    prompts,
    test_cancel_storm_beside_them_changes_no_token,
    test_chunks_and_blocks_of_any_size_change_no_token,
    test_deterministic_logits_do_not_depend_on_the_company,
    test_each_alone_equals_the_whole_model,
    test_eight_at_once_equal_the_whole_model,
    test_embeddings_in_reverse_order_change_no_token,
    test_preemption_changes_no_token,
    test_prefix_hits_change_no_token,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch


pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

__all__ = [
    "gold",
    "prompts",
    "test_cancel_storm_beside_them_changes_no_token",
    "test_chunks_and_blocks_of_any_size_change_no_token",
    "test_deterministic_logits_do_not_depend_on_the_company",
    "test_each_alone_equals_the_whole_model",
    "test_eight_at_once_equal_the_whole_model",
    "test_embeddings_in_reverse_order_change_no_token",
    "test_preemption_changes_no_token",
    "test_prefix_hits_change_no_token",
]

NUM_TOKENS = 12


class CountingRecorder:
    """Records graphs and counts their replays."""

    def __init__(self, device: torch.device) -> None:
        self._record = GraphRecorder(device)
        self.num_replays = 0

    def __call__(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """See ``Recorder``."""
        replay = self._record(work)

        def count() -> Result:
            self.num_replays += 1
            return replay()

        return count


@pytest.fixture
def make_split(whole_model: WholeModel, device: torch.device) -> Callable[..., SplitEngine]:
    return partial(SplitEngine, whole_model, device=device, record=GraphRecorder(device))


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_text_models_of_every_kind_are_replayed(
    name: str, tmp_path: Path, device: torch.device
) -> None:
    whole = WholeModel(make_text_model(tmp_path, name), attention="eager")
    asked = [whole.make_prompt(0, seed, NUM_TOKENS) for seed in range(3)]
    recorder = CountingRecorder(device)
    split = SplitEngine(whole, max_tokens=NUM_TOKENS, device=device, record=recorder)

    assert split.generate(asked) == [list(prompt.answer) for prompt in asked]
    assert recorder.num_replays >= NUM_TOKENS - 2


def test_a_gpu_replays_unless_it_is_told_otherwise(
    whole_model: WholeModel, device: torch.device
) -> None:
    fused = SplitEngine(whole_model, device=device).loaded
    modules = SplitEngine(whole_model, device=device, decoder="transformers").loaded

    assert isinstance(replay_steps(fused, 2, 64).decoder, GraphedDecoder)
    assert replay_steps(modules, 2, 64) is modules
