"""Values of a step stay until the step behind the next one, at addresses that do not change."""

from __future__ import annotations

import numpy as np
import torch

from chiasm.generator.model.step_buffers import StepBuffers

CPU = torch.device("cpu")


def test_values_of_a_step_outlive_the_building_of_the_next_one() -> None:
    buffers = StepBuffers(4, CPU)

    buffers.begin()
    first = buffers.put("a", [1, 2, 3])
    buffers.begin()
    second = buffers.put("a", [4, 5])

    assert (first.tolist(), second.tolist()) == ([1, 2, 3], [4, 5])
    buffers.begin()
    third = buffers.put("a", [6])
    assert first.tolist() == [6, 2, 3]
    assert third.data_ptr() == first.data_ptr() != second.data_ptr()


def test_rows_are_kept_apart_and_names_too() -> None:
    buffers = StepBuffers(4, CPU)
    buffers.begin()

    positions = buffers.put("positions", np.array([[1, 2], [3, 4], [5, 6]]))
    slots = buffers.put("slots", np.array([7]))

    assert positions.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert (slots.tolist(), slots.dtype) == ([7], torch.int64)


def test_what_is_longer_than_reserved_gets_memory_of_its_own() -> None:
    buffers = StepBuffers(2, CPU)
    buffers.begin()

    fits, longer = buffers.put("a", [1, 2]), buffers.put("b", [1, 2, 3])
    buffers.begin()
    buffers.begin()
    buffers.put("a", [8, 9])
    buffers.put("b", [7, 8, 9])

    assert fits.tolist() == [8, 9]
    assert longer.tolist() == [1, 2, 3]


def test_nothing_is_a_tensor_too() -> None:
    buffers = StepBuffers(2, CPU)
    buffers.begin()

    assert buffers.put("a", []).shape == (0,)
