"""Forwards of shapes that come again are recorded, and replayed with what is new."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.encoder.fused import replays
from chiasm.encoder.fused.fuse_tower import TowerRequest
from chiasm.encoder.fused.grid_tower import GridTower
from chiasm.encoder.fused.replays import Replays
from chiasm.encoder.tower import Tower
from tests.fakes.repeater import Repeater
from tests.unit.encoder.fused.test_fused_tower import GRID_MAKERS, GRIDS, make_items

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.encoder.preprocess import TowerInputs

MAX_SHAPES = 32


def double(rows: torch.Tensor) -> list[torch.Tensor]:
    """Stand for a forward."""
    return [2 * rows, rows + 1]


def rows_of(value: float, num_rows: int = 3) -> torch.Tensor:
    return torch.full((num_rows, 2), value)


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    repeater = Repeater()
    kept = Replays(repeater)

    for value in (1.0, 2.0, 3.0):
        doubled, increased = kept.run("key", rows_of(value), double)
        assert torch.equal(doubled, rows_of(2 * value))
        assert torch.equal(increased, rows_of(value + 1))

    assert repeater.num_repeats[3] == 2


def test_shapes_do_not_disturb_one_another() -> None:
    kept = Replays(Repeater())

    for value in (1.0, 2.0, 3.0):
        for key in ("one", "other"):
            factor = len(key)
            found = kept.run(key, rows_of(value), lambda rows, factor=factor: [rows * factor])  # type: ignore[misc]  # a lambda
            assert torch.equal(found[0], rows_of(value * factor))


def test_only_the_last_shapes_are_kept() -> None:
    repeater = Repeater()
    kept = Replays(repeater)
    for _ in range(2):
        for key in range(MAX_SHAPES + 1):
            kept.run(key, rows_of(1.0), double)
    assert not repeater.num_repeats

    for _ in range(2):
        for key in range(MAX_SHAPES):
            kept.run(key, rows_of(1.0), double)
    assert repeater.num_repeats[3] >= MAX_SHAPES - 1


@pytest.mark.parametrize(("num_rows", "num_repeats"), [(4, 1), (5, 0)])
def test_long_forwards_are_not_recorded(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_repeats: int
) -> None:
    monkeypatch.setattr(replays, "_MAX_ROWS", 4)
    repeater = Repeater()
    kept = Replays(repeater)

    for _ in range(2):
        kept.run("key", rows_of(1.0, num_rows), double)

    assert repeater.num_repeats[num_rows] == num_repeats


def test_without_a_recorder_all_are_computed() -> None:
    kept = Replays(None)

    first, again = (kept.run("key", rows_of(1.0), double)[0] for _ in range(2))

    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()


@pytest.mark.parametrize("make", GRID_MAKERS.values(), ids=GRID_MAKERS)
def test_replayed_towers_give_the_rows_of_others(make: object, tmp_path: Path) -> None:
    assert callable(make)
    path = make(tmp_path)
    plain, recorded = (
        Tower.load(path, torch.float32, torch.device("cpu"), TowerRequest("fused", "off"))
        for _ in range(2)
    )
    repeater = Repeater()
    for module in recorded._model.modules():
        if isinstance(module, GridTower):
            module._replays = Replays(repeater)

    for grids in GRIDS.values():
        for factor in (1.0, 0.5, 2.0):
            items = [scale(item, factor) for item in make_items(path, grids)]
            for rows, expected in zip(recorded.encode(items), plain.encode(items), strict=True):
                assert torch.equal(rows, expected)

    assert repeater.num_repeats.total() == 2 * len(GRIDS)


def scale(item: TowerInputs, factor: float) -> TowerInputs:
    """Return ``item`` with other pixels."""
    tensors = {
        name: tensor * factor if tensor.is_floating_point() else tensor
        for name, tensor in item.tensors.items()
    }
    return replace(item, tensors=tensors)
