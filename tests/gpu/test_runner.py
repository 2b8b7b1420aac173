"""Steps that are launched faster than the GPU computes them do not spoil one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from chiasm.generator.model.step_buffers import StepBuffers
from tests.fakes.split_engine import MAX_TOKENS, SplitEngine

if TYPE_CHECKING:
    from chiasm.generator.model.forward_batch import ForwardBatch
    from tests.fakes.whole_model import WholeModel

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

# Some 20 ms at 2 GHz: longer than the host takes to put two steps together.
DELAY_CYCLES = 40_000_000
NUM_TOKENS = 3


def delay(split: SplitEngine) -> None:
    """Have the device wait before each forward, and the host go on."""
    decoder = split.loaded.decoder
    forward = decoder.forward

    def forward_later(batch: ForwardBatch) -> torch.Tensor:
        torch.cuda._sleep(DELAY_CYCLES)  # type: ignore[no-untyped-call]  # torch's own
        return forward(batch)

    decoder.forward = forward_later  # type: ignore[method-assign]  # to slow it down


@pytest.mark.parametrize("choice", ["fused", "transformers"])
def test_chunks_on_a_slow_device_change_no_token(
    whole_model: WholeModel, device: torch.device, choice: str
) -> None:
    prompts = [whole_model.make_prompt(count, 60 + count, MAX_TOKENS) for count in (3, 2)]
    split = SplitEngine(
        whole_model,
        max_step_tokens=7,
        decoder=choice,  # type: ignore[arg-type]  # one of the choices
        device=device,
        max_tokens=NUM_TOKENS,
    )
    delay(split)

    # One at a time: no step but the last of a prompt has a token that the host waits for.
    tokens = [split.generate([prompt])[0] for prompt in prompts]

    assert tokens == [list(prompt.answer[:NUM_TOKENS]) for prompt in prompts]


def test_values_are_copied_behind_the_work_before_them(device: torch.device) -> None:
    buffers = StepBuffers(4, device)
    seen = []
    for step in range(4):
        buffers.begin()
        torch.cuda._sleep(DELAY_CYCLES)  # type: ignore[no-untyped-call]  # torch's own
        row = buffers.put("row", [step, step])
        rows = buffers.put("rows", np.array([[step], [step + 1]]))
        seen.append((row.clone(), rows.clone(), row.data_ptr()))
        if step % 2:
            torch.cuda.synchronize(device)

    assert [row.tolist() for row, _, _ in seen] == [[step, step] for step in range(4)]
    assert [rows.tolist() for _, rows, _ in seen] == [[[step], [step + 1]] for step in range(4)]
    assert seen[0][2] == seen[2][2] != seen[1][2] == seen[3][2]
