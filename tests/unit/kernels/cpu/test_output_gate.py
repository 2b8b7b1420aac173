"""The order of weights whose products are gated."""

from __future__ import annotations

import pytest
import torch

from chiasm.kernels.cpu.output_gate import gate_number, interleave_gate


@pytest.mark.parametrize("width", [1, 16, 17, 40])
def test_gates_and_factors_take_turns(width: int) -> None:
    gate_up = torch.arange(1, 2 * width + 1)[:, None].repeat(1, 3)

    turns = interleave_gate(gate_up).view(-1, 2, 16, 3)

    gates, factors = turns[:, 0].flatten(0, 1), turns[:, 1].flatten(0, 1)
    assert torch.equal(gates[:width], gate_up[:width])
    assert torch.equal(factors[:width], gate_up[width:])
    assert not gates[width:].any()
    assert not factors[width:].any()


def test_gates_are_numbered_as_in_the_kernels() -> None:
    assert [gate_number(None), gate_number("silu"), gate_number("gelu_pytorch_tanh")] == [0, 1, 2]
