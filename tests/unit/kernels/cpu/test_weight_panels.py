"""Panels of weights, and the memory that they lie in."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch

from chiasm.kernels.cpu.weight_panels import HALF, WeightMemory, pack_panels, pad_outputs

MEBI = 1 << 20


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (63, 33), (64, 64), (65, 130), (200, 257)])
def test_panel_holds_words_of_neighbouring_inputs(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    matrix = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    num_outputs, num_inputs = shape

    packed = pack_panels(matrix, WeightMemory())

    num_halves, num_words, half, depth = packed.shape
    assert (half, depth * packed.element_size()) == (HALF, 4)
    assert (num_halves % 2, num_words % 16) == (0, 0)
    unpacked = packed.transpose(1, 2).reshape(num_halves * HALF, num_words * depth)
    assert torch.equal(unpacked[:num_outputs, :num_inputs], matrix)
    unpacked[:num_outputs, :num_inputs] = 0
    assert not unpacked.any()


def test_what_is_taken_is_nobody_elses_and_begins_with_a_cache_line() -> None:
    memory = WeightMemory()
    sizes = [1, 64, 65, 40 * MEBI, 70 * MEBI, 100, 30 * MEBI]

    taken = [memory.take(size) for size in sizes]

    ranges = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in taken)
    assert [part.nbytes for part in taken] == sizes
    assert all(start % 64 == 0 for start, _ in ranges)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_memory_comes_back_when_no_weight_refers_to_it() -> None:
    memory = WeightMemory()
    kept, dropped = memory.take(10 * MEBI), memory.take(100 * MEBI)
    dropped.fill_(1)
    address = dropped.data_ptr()
    assert _is_mapped(address)

    memory = WeightMemory()
    del dropped
    gc.collect()

    assert not _is_mapped(address)
    assert _is_mapped(kept.data_ptr())


def test_weights_lie_in_huge_pages_where_the_system_has_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no huge pages")

    taken = WeightMemory().take(64 * MEBI)

    assert "hg" in _flags_of(taken.data_ptr())


def test_outputs_are_filled_up_to_whole_panels() -> None:
    assert torch.equal(pad_outputs(torch.ones(65))[65:], torch.zeros(63))
    assert len(pad_outputs(torch.ones(64))) == 64


def _is_mapped(address: int) -> bool:
    return bool(_mapping_of(address))


def _flags_of(address: int) -> list[str]:
    (flags,) = (line for line in _mapping_of(address) if line.startswith("VmFlags"))
    return flags.split()[1:]


def _mapping_of(address: int) -> list[str]:
    """Return the lines about the mapping of an address, or none."""
    found: list[str] = []
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split(maxsplit=1)[0].split("-")
        if len(bounds) == 2:
            is_inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
        if is_inside:
            found.append(line)
    return found
