"""Towers on a GPU give what transformers computes on a CPU, and leave their rows on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from chiasm.encoder.fused.fuse_tower import TowerRequest
from chiasm.encoder.tower import Tower
from tests.unit.encoder.fused.test_fused_tower import (
    AXIAL_MAKERS,
    GRID_MAKERS,
    GRIDS,
    PICTURE_MAKERS,
    PICTURES,
    load,
    make_axial_items,
    make_items,
    make_pictures,
    relative_error,
)

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.encoder.preprocess import TowerInputs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

MAKERS = {**GRID_MAKERS, **AXIAL_MAKERS, **PICTURE_MAKERS}
# Sums of a few hundred products in another order; measured: 3e-6.
FLOAT32_TOLERANCE = 2e-5
# Eight bits, some ten roundings in a row.
BFLOAT16_TOLERANCE = 3e-2


@pytest.fixture(scope="module", params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[name](tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def batches(name: str, path: Path) -> list[list[TowerInputs]]:
    if name in GRID_MAKERS:
        return [make_items(path, grids) for grids in GRIDS.values()]
    if name in AXIAL_MAKERS:
        return [make_axial_items(path, grids) for grids in PICTURES.values()]
    item = make_pictures(path)
    return [[item], [item, item]]


@pytest.mark.parametrize("choice", ["fused", "transformers"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE)],
    ids=["float32", "bfloat16"],
)
def test_rows_are_those_of_transformers_on_a_cpu(
    path: Path,
    batches: list[list[TowerInputs]],
    device: torch.device,
    choice: Any,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    tower = Tower.load(path, dtype, device, TowerRequest(choice))

    # From the second time on, forwards of grids are replayed.
    for items in [items for items in batches for _ in range(3)]:
        expected = torch.cat(load(path, "transformers").encode(items))
        rows = torch.cat(tower.encode(items))

        assert (rows.device.type, rows.dtype) == ("cpu", dtype)
        if dtype is torch.float32:
            assert relative_error(rows, expected) <= tolerance
        else:
            assert float((rows - expected).norm() / expected.norm()) <= tolerance
    has_kernels = path.name.startswith(tuple(GRID_MAKERS))
    kind = choice if choice != "fused" else "fused_kernels" if has_kernels else "fused_torch"
    assert (tower.kind, tower.device.type) == (kind, "cuda")
