"""The fused tower gives what transformers computes, within one rounding, and holds no more."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from chiasm.common.half_load import load_half
from chiasm.common.media import Modality
from chiasm.encoder.checkpoint import EncoderCheckpoint
from chiasm.encoder.fused.fuse_tower import (
    FUSED_TOWERS,
    TowerRequest,
    count_packed_bytes,
    fuse_tower,
)
from chiasm.encoder.preprocess import TowerInputs
from chiasm.encoder.tower import Tower
from tests.fakes.checkpoints import (
    make_llava,
    make_llava_onevision,
    make_qwen2_5_vl,
    make_qwen2_vl,
)
from tests.fakes.deepstack_checkpoints import make_qwen3_vl
from tests.fakes.pixtral_checkpoints import PATCH_SIZE, make_mistral3, make_pixtral

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chiasm.kernels.cpu.native import KernelChoice
    from chiasm.kernels.cpu.quantized_layer import Quantization

GRID_MAKERS = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
}
AXIAL_MAKERS = {"pixtral": make_pixtral, "mistral3": make_mistral3}
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
# Rows and columns of patches of pictures: one token, lone rows and columns, several of all sizes.
PICTURES = {
    "one_token": [(2, 2)],
    "row": [(2, 18)],
    "column": [(16, 2)],
    "picture": [(8, 10)],
    "pictures": [(4, 6), (2, 2), (10, 2), (4, 6), (2, 10)],
}
# A rounding to 24 bits after sums of a few hundred terms, in another order.
FLOAT32_TOLERANCE = 1e-5
# Rounding to 1/127 of the largest value, several times one after the other; relative to the norm.
QUANTIZED_ERROR = (1e-3, 5e-2)
# How much farther from float32 than transformers' own bfloat16 the fused one may be.
BFLOAT16_RATIO = 1.2


@pytest.fixture(scope="module", params=list(GRID_MAKERS))
def grid_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GRID_MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=list(PICTURE_MAKERS))
def picture_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PICTURE_MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=list(AXIAL_MAKERS))
def axial_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return AXIAL_MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=[*GRID_MAKERS, *AXIAL_MAKERS])
def any_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose pictures are of any size."""
    make = {**GRID_MAKERS, **AXIAL_MAKERS}[request.param]
    return make(tmp_path_factory.mktemp(request.param))


@functools.cache
def load(
    path: Path,
    choice: Any,
    dtype: torch.dtype = torch.float32,
    kernels: KernelChoice = "off",
    quantization: Quantization = "none",
) -> Tower:
    request = TowerRequest(choice, kernels, quantization)
    return Tower.load(path, dtype, torch.device("cpu"), request)


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


def make_axial_items(path: Path, grids: Sequence[tuple[int, int]]) -> list[TowerInputs]:
    """Return random pictures of so many rows and columns of patches."""
    merge_size: Any = load(path, "transformers").config.get("spatial_merge_size", 1)
    generator = torch.Generator().manual_seed(0)
    items = []
    for rows, columns in grids:
        size = (rows * PATCH_SIZE, columns * PATCH_SIZE)
        pixels = torch.randn(3, *size, generator=generator)
        tensors = {"pixel_values": pixels.flatten(), "image_sizes": torch.tensor([size])}
        items.append(TowerInputs(Modality.IMAGE, tensors, 1, rows * columns // merge_size**2))
    return items


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


def num_block_bytes(tower: Tower) -> int:
    (fused,) = (module for module in tower._model.modules() if isinstance(module, FUSED_TOWERS))
    blocks: Any = fused._blocks
    return sum(block.num_bytes for block in getattr(blocks, "_blocks", blocks))


def check_quantized(path: Path, items: list[TowerInputs], kernels: KernelChoice) -> None:
    expected = torch.cat(load(path, "transformers").encode(items))
    tower = load(path, "auto", kernels=kernels, quantization="w8a8")

    rows = torch.cat(tower.encode(items))

    least, most = QUANTIZED_ERROR
    assert least <= float((rows - expected).norm() / expected.norm()) <= most


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


@pytest.mark.parametrize("grids", PICTURES.values(), ids=PICTURES)
def test_pictures_of_any_size_equal_transformers(
    axial_path: Path, kernels: KernelChoice, grids: list[tuple[int, int]]
) -> None:
    check_parity(axial_path, make_axial_items(axial_path, grids), kernels)


def test_pictures_of_any_size_in_bfloat16_are_as_near(
    axial_path: Path, kernels: KernelChoice
) -> None:
    check_bfloat16(axial_path, make_axial_items(axial_path, [(18, 14), (6, 20)]), kernels)


def test_pictures_do_not_see_each_other(axial_path: Path, kernels: KernelChoice) -> None:
    first, second = make_axial_items(axial_path, [(4, 6), (6, 2)])
    other = replace(second, tensors={**second.tensors, "pixel_values": torch.zeros(3 * 84 * 28)})
    tower = load(axial_path, "fused", kernels=kernels)

    rows, changed = tower.encode([first, second]), tower.encode([first, other])

    assert torch.equal(rows[0], changed[0])
    assert not torch.equal(rows[1], changed[1])


def test_grids_of_a_quantized_tower_are_near(grid_path: Path, kernels: KernelChoice) -> None:
    check_quantized(grid_path, make_items(grid_path, GRIDS["items"]), kernels)


def test_pictures_of_a_quantized_tower_are_near(picture_path: Path, kernels: KernelChoice) -> None:
    check_quantized(picture_path, [make_pictures(picture_path)], kernels)


def test_pictures_of_any_size_of_a_quantized_tower_are_near(
    axial_path: Path, kernels: KernelChoice
) -> None:
    check_quantized(axial_path, make_axial_items(axial_path, PICTURES["pictures"]), kernels)


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

    fuse_tower(TowerRequest("fused"), model)

    rows = model.get_image_features(pixels).pooler_output[0]
    assert relative_error(rows, expected) < FLOAT32_TOLERANCE
    assert len(model.model.vision_tower._blocks) == num_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_weight_is_held_twice(any_path: Path, dtype: torch.dtype) -> None:
    before = load(any_path, "transformers", dtype).num_parameter_bytes
    tower = load(any_path, "fused", dtype)

    assert count_packed_bytes(tower._model) > 0.5 * before
    # A layout may pad rows and columns to whole blocks.
    assert before <= tower.num_parameter_bytes <= 1.5 * before


def test_weights_of_a_quantized_tower_are_held_as_bytes(any_path: Path) -> None:
    plain, quantized = (
        load(any_path, "fused", quantization=quantization) for quantization in ("none", "w8a8")
    )

    # Scales and biases, of outputs few as those of a test are, and norms are held besides.
    assert num_block_bytes(quantized) < 0.4 * num_block_bytes(plain)


def test_quantization_is_part_of_the_fingerprint(any_path: Path, kernels: KernelChoice) -> None:
    plain, quantized = (
        EncoderCheckpoint.load(any_path, device="cpu", request=TowerRequest("auto", kernels, how))
        for how in ("none", "w8a8")
    )

    assert plain.fingerprint != quantized.fingerprint
    assert plain.tower.weights_digest == quantized.tower.weights_digest


def test_the_implementation_is_part_of_the_fingerprint(any_path: Path) -> None:
    fused, auto, plain = (
        EncoderCheckpoint.load(any_path, device="cpu", request=TowerRequest(choice))
        for choice in ("fused", "auto", "transformers")
    )

    assert fused.fingerprint == auto.fingerprint != plain.fingerprint
    assert fused.tower.weights_digest == plain.tower.weights_digest


def test_kernels_are_part_of_the_fingerprint_and_their_instructions_are_not(
    grid_path: Path, kernels: KernelChoice
) -> None:
    off, plain, other = (
        EncoderCheckpoint.load(grid_path, device="cpu", request=TowerRequest(kernels=choice))
        for choice in ("off", "plain", kernels)
    )

    assert off.fingerprint != plain.fingerprint
    assert other.fingerprint == (off if kernels == "off" else plain).fingerprint


@pytest.mark.parametrize("choice", ["fused", "transformers"])
def test_a_callback_runs_before_each_block(any_path: Path, choice: Any) -> None:
    tower = Tower.load(any_path, torch.float32, torch.device("cpu"), TowerRequest(choice))
    config: Any = tower.config["vision_config"]
    calls: list[int] = []
    tower.call_before_layers(functools.partial(calls.append, 1))
    is_axial = config["model_type"] == "pixtral"
    depth = config["num_hidden_layers" if is_axial else "depth"]

    if is_axial:
        tower.encode(make_axial_items(any_path, [(4, 4)]))
    else:
        tower.encode(make_items(any_path, [(1, 4, 4)]))

    assert len(calls) >= depth
