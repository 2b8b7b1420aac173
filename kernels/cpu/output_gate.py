"""Gates that the kernels for products apply to their outputs; see ``outputs.h``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.kernels.cpu.elementwise import ACTIVATIONS

if TYPE_CHECKING:
    import torch

    from chiasm.kernels.cpu.elementwise import Activation

# As in outputs.h: gates that lie before their factors.
_BLOCK = 16


def gate_number(activation: Activation | None) -> int:
    """Return what native.cpp calls the gate with ``activation``; ``None`` is no gate."""
    return 0 if activation is None else 1 + ACTIVATIONS.index(activation)


def interleave_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """Return gates and their factors in turns, 16 of each; the last are filled up with zeros.

    Args:
        gate_up: What belongs to every gate, and then what belongs to every factor.
            [2 * width, ...].

    Returns:
        [num_blocks * 2 * 16, ...], a copy.
    """
    width = len(gate_up) // 2
    num_blocks = -(-width // _BLOCK)
    padded = gate_up.new_zeros(2, num_blocks * _BLOCK, *gate_up.shape[1:])
    padded[:, :width] = gate_up.view(2, width, *gate_up.shape[1:])
    blocks = padded.view(2, num_blocks, _BLOCK, *gate_up.shape[1:])
    return blocks.transpose(0, 1).flatten(0, 2)
