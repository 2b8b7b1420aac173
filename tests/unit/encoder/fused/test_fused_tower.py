"""The fused tower gives what transformers computes, within one rounding, and holds no more."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from structlog.testing import capture_logs

from chiasm.common.half_load import load_half
from chiasm.common.media import Modality
from chiasm.encoder.checkpoint import EncoderCheckpoint
from chiasm.encoder.fused.description import UnsupportedTowerError
from chiasm.encoder.fused.fuse_tower import count_packed_bytes, fuse_tower
from chiasm.encoder.fused.grid_tower import GridTower
from chiasm.encoder.fused.picture_tower import PictureTower
from chiasm.encoder.preprocess import TowerInputs
from chiasm.encoder.tower import Tower
from tests.fakes.checkpoints import (
    make_llava,
    make_llava_onevision,
    make_qwen2_5_vl,
    make_qwen2_vl,
)
from tests.fakes.deepstack_checkpoints import make_qwen3_vl
from tests.fakes.sound_checkpoints import make_qwen2_audio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chiasm.kernels.cpu.native import KernelChoice

GRID_MAKERS = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
}
PICTURE_MAKERS = {"llava": make_llava, "llava_onevision": make_llava_onevision}
# Frames, rows and columns of patches: whole windows, rests of windows on one side and on both,
# fewer patches than a window has, several items, and videos.
GRIDS = {
    "one_block": [(1, 2, 2)],
    "whole_windows": [(1, 8, 8)],
    "rests": [(1, 6, 10)],
    "narrow": [(1, 2, 26)],
    "items": [(1, 4, 6), (1, 8, 8), (1, 2, 2), (1, 4, 6)],
    "video": [(3, 6, 4)],
    "videos": [(2, 8, 8), (3, 4, 6)],
}
# A rounding to 24 bits after sums of a few hundred terms, in another order.
FLOAT32_TOLERANCE = 1e-5
# How much farther from float32 than transformers' own bfloat16 the fused one may be.
BFLOAT16_RATIO = 1.2


@pytest.fixture(scope="module", params=list(GRID_MAKERS))
def grid_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GRID_MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=list(PICTURE_MAKERS))
def picture_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PICTURE_MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@functools.cache
def load(
    path: Path,
    choice: Any,
    dtype: torch.dtype = torch.float32,
    kernels: KernelChoice = "off",
) -> Tower:
    return Tower.load(path, dtype, torch.device("cpu"), choice, kernels)


def make_items(path: Path, grids: Sequence[tuple[int, int, int]]) -> list[TowerInputs]:
    """Return random patches of items with these grids; several frames make a video."""
    config: Any = load(path, "transformers").config["vision_config"]
    width = 3 * config["temporal_patch_size"] * config["patch_size"] ** 2
    generator = torch.Generator().manual_seed(0)
    is_video = grids[0][0] > 1
    items = []
    for grid in grids:
        num_patches = grid[0] * grid[1] * grid[2]
        names = ("pixel_values_videos", "video_grid_thw")
        if not is_video:
            names = ("pixel_values", "image_grid_thw")
        patches = torch.randn(num_patches, width, generator=generator)
        tensors = dict(zip(names, (patches, torch.tensor([grid])), strict=True))
        modality = Modality.VIDEO if is_video else Modality.IMAGE
        items.append(TowerInputs(modality, tensors, 1, num_patches // 4))
    return items


def make_pictures(path: Path) -> TowerInputs:
    """Return what transformers wants of one picture of the checkpoint's kind."""
    generator = torch.Generator().manual_seed(0)
    if load(path, "transformers").config["model_type"] == "llava":
        pixels = torch.randn(1, 3, 56, 56, generator=generator)
        return TowerInputs(Modality.IMAGE, {"pixel_values": pixels}, 1, 16)
    pixels = torch.randn(1, 3, 3, 56, 56, generator=generator)
    sizes = torch.tensor([[56, 112]])
    # 16 of the whole, and 4 rows of 8 and a newline.
    tensors = {"pixel_values": pixels, "image_sizes": sizes}
    return TowerInputs(Modality.IMAGE, tensors, 1, 16 + 4 * 9)


def make_clip(num_frames: int) -> TowerInputs:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, num_frames, 3, 56, 56, generator=generator)
    return TowerInputs(Modality.VIDEO, {"pixel_values_videos": pixels}, 1, num_frames * 4 + 1)


def relative_error(rows: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference in units of the largest expected value."""
    difference = (rows.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


def check_parity(path: Path, items: list[TowerInputs], kernels: KernelChoice) -> None:
    expected = load(path, "transformers").encode(items)
    rows = load(path, "fused", kernels=kernels).encode(items)

    for one, want in zip(rows, expected, strict=True):
        assert relative_error(one, want) < FLOAT32_TOLERANCE


def check_bfloat16(path: Path, items: list[TowerInputs], kernels: KernelChoice) -> None:
    expected = torch.cat(load(path, "transformers").encode(items))
    ours, theirs = (
        torch.cat(load(path, choice, torch.bfloat16, kernels).encode(items))
        for choice in ("fused", "transformers")
    )

    ratio = (ours - expected).norm() / (theirs - expected).norm()
    assert ratio <= BFLOAT16_RATIO


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_grids_equal_transformers(
    grid_path: Path, kernels: KernelChoice, grids: list[tuple[int, int, int]]
) -> None:
    check_parity(grid_path, make_items(grid_path, grids), kernels)


@pytest.mark.parametrize("grids", [[(1, 38, 26)], [(4, 20, 12)]], ids=["picture", "video"])
def test_grids_in_bfloat16_are_as_near(
    grid_path: Path, kernels: KernelChoice, grids: list[tuple[int, int, int]]
) -> None:
    check_bfloat16(grid_path, make_items(grid_path, grids), kernels)


def test_pictures_in_bfloat16_are_as_near(picture_path: Path, kernels: KernelChoice) -> None:
    item = make_pictures(picture_path)
    generator = torch.Generator().manual_seed(1)
    pixels = item.tensors["pixel_values"]
    check_bfloat16(
        picture_path,
        [
            replace(
                item,
                tensors={
                    **item.tensors,
                    "pixel_values": torch.randn(pixels.shape, generator=generator),
                },
            )
            for _ in range(16)
        ],
        kernels,
    )


def test_pictures_equal_transformers(picture_path: Path, kernels: KernelChoice) -> None:
    item = make_pictures(picture_path)

    check_parity(picture_path, [item], kernels)


@pytest.mark.parametrize("num_frames", [1, 3])
def test_clips_equal_transformers(tmp_path: Path, kernels: KernelChoice, num_frames: int) -> None:
    check_parity(make_llava_onevision(tmp_path), [make_clip(num_frames)], kernels)


def test_several_pictures_equal_transformers(tmp_path: Path, kernels: KernelChoice) -> None:
    path = make_llava(tmp_path)
    item = make_pictures(path)
    other = replace(item, tensors={"pixel_values": item.tensors["pixel_values"].flip(3)})

    check_parity(path, [item, other], kernels)


@pytest.mark.parametrize(("layer", "num_blocks"), [(-2, 2), (-1, 3), (1, 1), ([-3, 2], 2)], ids=str)
@torch.inference_mode()
def test_blocks_behind_the_last_that_is_read_are_dropped(
    tmp_path: Path, layer: int | list[int], num_blocks: int
) -> None:
    model: Any = load_half(make_llava(tmp_path), "encoder")
    model.config.vision_feature_layer = layer
    pixels = make_pictures(tmp_path).tensors["pixel_values"]
    if isinstance(layer, list):
        projector = model.model.multi_modal_projector
        projector.linear_1 = torch.nn.Linear(32 * len(layer), 64)
    expected = model.get_image_features(pixels).pooler_output[0]

    fuse_tower("fused", model)

    rows = model.get_image_features(pixels).pooler_output[0]
    assert relative_error(rows, expected) < FLOAT32_TOLERANCE
    assert len(model.model.vision_tower._blocks) == num_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_weight_is_held_twice(grid_path: Path, dtype: torch.dtype) -> None:
    before = load(grid_path, "transformers", dtype).num_parameter_bytes
    tower = load(grid_path, "fused", dtype)

    assert count_packed_bytes(tower._model) > 0.5 * before
    # A layout may pad rows and columns to whole blocks.
    assert before <= tower.num_parameter_bytes <= 1.5 * before


def test_the_implementation_is_part_of_the_fingerprint(grid_path: Path) -> None:
    fused, auto, plain = (
        EncoderCheckpoint.load(grid_path, device="cpu", choice=choice)
        for choice in ("fused", "auto", "transformers")
    )

    assert fused.fingerprint == auto.fingerprint != plain.fingerprint
    assert fused.tower.weights_digest == plain.tower.weights_digest


def test_kernels_are_part_of_the_fingerprint_and_their_instructions_are_not(
    grid_path: Path, kernels: KernelChoice
) -> None:
    off, plain, other = (
        EncoderCheckpoint.load(grid_path, device="cpu", kernels=choice)
        for choice in ("off", "plain", kernels)
    )

    assert off.fingerprint != plain.fingerprint
    assert other.fingerprint == (off if kernels == "off" else plain).fingerprint


@pytest.mark.parametrize("choice", ["off", "plain"])
def test_kernels_that_are_chosen_are_logged(picture_path: Path, choice: KernelChoice) -> None:
    model = load_half(picture_path, "encoder")

    with capture_logs() as logs:
        kind = fuse_tower("fused", model, choice)

    (log,) = (log for log in logs if log["event"] == "cpu_kernels_chosen")
    assert (log["kernels"], kind) == {
        "off": ("torch", "fused_torch"),
        "plain": ("plain", "fused_kernels"),
    }[choice]


def test_elements_without_kernels_are_left_to_torch(picture_path: Path) -> None:
    model = load_half(picture_path, "encoder", torch.float16)

    assert fuse_tower("fused", model, "plain") == "fused_torch"


def test_auto_fuses_what_is_tested_and_says_so(grid_path: Path, picture_path: Path) -> None:
    for path, kind in ((grid_path, GridTower), (picture_path, PictureTower)):
        model = load_half(path, "encoder")
        with capture_logs() as logs:
            assert fuse_tower("auto", model) != "transformers"

        assert [log["tower"] for log in logs if log["event"] == "tower_chosen"] == ["fused"]
        assert any(isinstance(module, kind) for module in model.modules())


def test_auto_leaves_other_models_to_transformers_and_says_why(tmp_path: Path) -> None:
    model = load_half(make_qwen2_audio(tmp_path), "encoder")

    with capture_logs() as logs:
        assert fuse_tower("auto", model) == "transformers"

    (log,) = (log for log in logs if log["event"] == "tower_chosen")
    assert "not among those" in log["reason"]
    with pytest.raises(UnsupportedTowerError, match="not among those"):
        fuse_tower("fused", model)


@pytest.mark.parametrize("name", ["mlp.gate_proj", "norm1"])
def test_a_tower_with_other_modules_stays_as_it_is(tmp_path: Path, name: str) -> None:
    model = load_half(make_qwen2_5_vl(tmp_path), "encoder")
    block = model.model.visual.blocks[1]
    block.set_submodule(name, torch.nn.Linear(32, 64, bias=False))
    names = [name for name, _ in model.named_parameters()]

    with pytest.raises(UnsupportedTowerError):
        fuse_tower("fused", model)

    assert [name for name, _ in model.named_parameters()] == names


def test_a_tower_of_transformers_looks_for_no_kernels(grid_path: Path) -> None:
    model = load_half(grid_path, "encoder")

    with capture_logs() as logs:
        fuse_tower("transformers", model, "plain")

    assert "cpu_kernels_chosen" not in [log["event"] for log in logs]


@pytest.mark.parametrize("choice", ["fused", "transformers"])
def test_a_callback_runs_before_each_block(grid_path: Path, choice: Any) -> None:
    tower = Tower.load(grid_path, torch.float32, torch.device("cpu"), choice)
    calls: list[int] = []
    tower.call_before_layers(functools.partial(calls.append, 1))

    tower.encode(make_items(grid_path, [(1, 4, 4)]))

    assert len(calls) >= tower.config["vision_config"]["depth"]  # type: ignore[index]  # JSON
