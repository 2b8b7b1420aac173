"""Which tower computes a checkpoint, who computes it, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from structlog.testing import capture_logs

from chiasm.common.half_load import load_half
from chiasm.encoder.fused.axial_tower import AxialTower
from chiasm.encoder.fused.description import UnsupportedTowerError
from chiasm.encoder.fused.fuse_tower import TowerRequest, fuse_tower
from chiasm.encoder.fused.grid_tower import GridTower
from chiasm.encoder.fused.picture_tower import PictureTower
from tests.fakes.checkpoints import (
    make_llava,
    make_llava_onevision,
    make_qwen2_5_vl,
    make_qwen2_vl,
)
from tests.fakes.deepstack_checkpoints import make_qwen3_vl
from tests.fakes.pixtral_checkpoints import make_mistral3, make_pixtral
from tests.fakes.sound_checkpoints import make_qwen2_audio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chiasm.encoder.fused.fuse_tower import TowerChoice
    from chiasm.kernels.cpu.native import KernelChoice


@pytest.mark.parametrize("choice", ["off", "plain"])
def test_kernels_that_are_chosen_are_logged(tmp_path: Path, choice: KernelChoice) -> None:
    model = load_half(make_llava(tmp_path), "encoder")

    with capture_logs() as logs:
        kind = fuse_tower(TowerRequest("fused", choice), model)

    (log,) = (log for log in logs if log["event"] == "cpu_kernels_chosen")
    assert (log["kernels"], kind) == {
        "off": ("torch", "fused_torch"),
        "plain": ("plain", "fused_kernels"),
    }[choice]


@pytest.mark.parametrize(
    ("kernels", "kind"), [("off", "quantized_torch"), ("plain", "quantized_kernels")]
)
def test_a_quantized_tower_says_so(tmp_path: Path, kernels: KernelChoice, kind: str) -> None:
    model = load_half(make_qwen2_5_vl(tmp_path), "encoder")

    with capture_logs() as logs:
        assert fuse_tower(TowerRequest("auto", kernels, "w8a8"), model) == kind

    (log,) = (log for log in logs if log["event"] == "tower_chosen")
    assert (log["tower"], log["quantization"]) == ("fused", "w8a8")


@pytest.mark.parametrize("choice", ["auto", "transformers"])
def test_a_tower_of_transformers_is_not_quantized(tmp_path: Path, choice: TowerChoice) -> None:
    model = load_half(make_qwen2_audio(tmp_path), "encoder")
    reason = "not among those" if choice == "auto" else "needs the fused tower: leave out"

    with pytest.raises(UnsupportedTowerError, match=reason):
        fuse_tower(TowerRequest(choice, "off", "w8a8"), model)


def test_where_nothing_multiplies_integers_a_tower_is_not_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_half(make_llava(tmp_path), "encoder")
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)

    with pytest.raises(UnsupportedTowerError, match="needs a CPU"):
        fuse_tower(TowerRequest("auto", "off", "w8a8"), model)

    assert fuse_tower(TowerRequest("auto", "plain", "w8a8"), model) == "quantized_kernels"


def test_elements_without_kernels_are_left_to_torch(tmp_path: Path) -> None:
    model = load_half(make_llava(tmp_path), "encoder", torch.float16)

    assert fuse_tower(TowerRequest("fused", "plain"), model) == "fused_torch"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_qwen2_vl, GridTower),
        (make_qwen2_5_vl, GridTower),
        (make_qwen3_vl, GridTower),
        (make_llava, PictureTower),
        (make_llava_onevision, PictureTower),
        (make_pixtral, AxialTower),
        (make_mistral3, AxialTower),
    ],
)
def test_auto_fuses_what_is_tested_and_says_so(
    make: Callable[[Path], Path], kind: type[torch.nn.Module], tmp_path: Path
) -> None:
    model = load_half(make(tmp_path), "encoder")

    with capture_logs() as logs:
        assert fuse_tower(TowerRequest("auto"), model) != "transformers"

    assert [log["tower"] for log in logs if log["event"] == "tower_chosen"] == ["fused"]
    assert any(isinstance(module, kind) for module in model.modules())


def test_auto_leaves_other_models_to_transformers_and_says_why(tmp_path: Path) -> None:
    model = load_half(make_qwen2_audio(tmp_path), "encoder")

    with capture_logs() as logs:
        assert fuse_tower(TowerRequest("auto"), model) == "transformers"

    (log,) = (log for log in logs if log["event"] == "tower_chosen")
    assert "not among those" in log["reason"]
    with pytest.raises(UnsupportedTowerError, match="not among those"):
        fuse_tower(TowerRequest("fused"), model)


@pytest.mark.parametrize(
    ("make", "path_of_blocks", "name"),
    [
        (make_qwen2_5_vl, "visual.blocks", "mlp.gate_proj"),
        (make_qwen2_5_vl, "visual.blocks", "norm1"),
        (make_mistral3, "vision_tower.transformer.layers", "attention.q_proj"),
        (make_mistral3, "multi_modal_projector", "linear_2"),
        (make_pixtral, "multi_modal_projector", "linear_3"),
    ],
)
def test_a_tower_with_other_modules_stays_as_it_is(
    make: Callable[[Path], Path], path_of_blocks: str, name: str, tmp_path: Path
) -> None:
    model = load_half(make(tmp_path), "encoder")
    owner = model.model.get_submodule(path_of_blocks)
    if isinstance(owner, torch.nn.ModuleList):
        owner = owner[1]
    # Of Qwen it has a bias too few, of Mistral 3 one too many.
    has_bias = make is not make_qwen2_5_vl
    owner.set_submodule(name, torch.nn.Linear(32, 64, bias=has_bias))
    names = [name for name, _ in model.named_parameters()]

    with pytest.raises(UnsupportedTowerError):
        fuse_tower(TowerRequest("fused"), model)

    assert [name for name, _ in model.named_parameters()] == names


def test_a_tower_of_transformers_looks_for_no_kernels(tmp_path: Path) -> None:
    model = load_half(make_qwen2_5_vl(tmp_path), "encoder")

    with capture_logs() as logs:
        fuse_tower(TowerRequest("transformers", "plain"), model)

    assert "cpu_kernels_chosen" not in [log["event"] for log in logs]
