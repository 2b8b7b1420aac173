"""The encoder half gives exactly what the whole model computes for the same picture.

Where transformers computes the tower; ``fused/test_fused_tower.py`` has what our own is held to.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from chiasm.common.families import UnsupportedModelError
from chiasm.common.half_load import load_half
from chiasm.common.media import DataType, Modality, ProcessingOptions
from chiasm.encoder.checkpoint import EncoderCheckpoint
from chiasm.encoder.fused.fuse_tower import TowerRequest
from chiasm.encoder.image_preprocessor import ImagePreprocessor
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.preprocess import plain
from chiasm.encoder.tower import RowCountError, bytes_of
from chiasm.encoder.wire_image import ImageHeader
from tests.fakes.checkpoints import (
    load_whole,
    make_llava,
    make_llava_onevision,
    make_qwen2_5_vl,
    make_qwen2_vl,
)
from tests.fakes.deepstack_checkpoints import make_qwen3_vl
from tests.fakes.pictures import noise
from tests.fakes.pixtral_checkpoints import LONGEST_EDGE, PATCH_SIZE, make_mistral3, make_pixtral
from tests.harness.mapped_pages import num_mapped_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL import Image

    from chiasm.encoder.preprocess import TowerInputs

MAKERS = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "llava": make_llava,
    "llava_onevision": make_llava_onevision,
    "qwen3_vl": make_qwen3_vl,
    "pixtral": make_pixtral,
    "mistral3": make_mistral3,
}
# Arguments of `get_image_features` that processors of these families give.
FEATURES = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")
SIZES = [
    (1, 1),
    (1, 3),
    (3, 1),
    (3, 4),
    (13, 14),
    (28, 29),
    (1, 200),
    (97, 131),
    (300, 20),
    (641, 479),
]


@pytest.fixture(scope="module", params=list(MAKERS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@functools.cache
def load(path: Path) -> EncoderCheckpoint:
    return EncoderCheckpoint.load(path, device="cpu", request=TowerRequest("transformers"))


@functools.cache
def whole_of(path: Path) -> tuple[Any, Any]:
    return load_whole(path)


def prepare(checkpoint: EncoderCheckpoint, image: Image.Image, **options: int) -> TowerInputs:
    preprocessor = checkpoint.preprocessors[Modality.IMAGE]
    assert isinstance(preprocessor, ImagePreprocessor)
    data = image.tobytes("raw", "RGBX")
    item = preprocessor.plan_header(
        MemoryFile(1), ImageHeader(image.width, image.height), ProcessingOptions(**options)
    )
    assert item.decoding.num_bytes == len(data)
    media = MemoryFile(len(data)).map()
    media[:] = data
    return preprocessor.run(item, memoryview(media))


def encode(checkpoint: EncoderCheckpoint, image: Image.Image, **options: int) -> torch.Tensor:
    return checkpoint.tower.encode([prepare(checkpoint, image, **options)])[0]


@torch.inference_mode()
def encode_whole(path: Path, image: Image.Image, **kwargs: object) -> torch.Tensor:
    model, processor = whole_of(path)
    text = processor.image_token
    inputs = processor(text=[text], images=[image], return_tensors="pt", **kwargs)
    features = {name: inputs[name] for name in FEATURES if name in inputs}
    if model.config.model_type == "mistral3" and max(image.size) <= 2 * PATCH_SIZE:
        return encode_one_token(model, **features)
    output = model.get_image_features(**features)
    tensors = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    rows = torch.cat([torch.cat(list(tensor)) for tensor in tensors], dim=1)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == len(rows)
    return rows


def encode_one_token(
    model: Any, pixel_values: torch.Tensor, image_sizes: torch.Tensor
) -> torch.Tensor:
    """Return what Mistral 3 makes of a picture of one token, whose row its own method loses."""
    with pytest.raises(RuntimeError, match="split_sizes"):
        model.get_image_features(pixel_values, image_sizes)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    states = tower(pixel_values, image_sizes, output_hidden_states=True).hidden_states[-1]
    rows = projector(states[0], image_sizes)
    assert isinstance(rows, torch.Tensor)
    return rows


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_embeddings_equal_the_whole_model(path: Path, width: int, height: int) -> None:
    image = noise(width, height)

    rows = encode(load(path), image)

    assert torch.equal(rows, encode_whole(path, image))


def test_a_batch_equals_its_items_alone(path: Path) -> None:
    checkpoint = load(path)
    images = [noise(40, 60), noise(52, 70, seed=1), noise(41, 61, seed=2)]
    inputs = [prepare(checkpoint, i) for i in images]
    assert all(inputs[0].joins(one) for one in inputs)

    batch = checkpoint.tower.encode(inputs)

    for image, rows in zip(images, batch, strict=True):
        alone = encode(checkpoint, image)
        torch.testing.assert_close(rows, alone, rtol=1e-5, atol=1e-6 * float(alone.abs().max()))


def test_options_reach_the_tower(tmp_path: Path) -> None:
    path = make_qwen2_vl(tmp_path)
    image = noise(97, 131)
    size = {"shortest_edge": 28 * 28, "longest_edge": 5000}

    rows = encode(load(path), image, max_pixels=5000)

    assert torch.equal(rows, encode_whole(path, image, images_kwargs={"size": size}))
    assert len(rows) < len(encode(load(path), image))


@pytest.mark.parametrize(("make", "token_side"), [(make_pixtral, 14), (make_mistral3, 28)])
@pytest.mark.parametrize("size", [(97, 131), (300, 20), (300, 255)])
def test_an_area_reaches_towers_that_are_told_an_edge(
    make: Callable[[Path], Path], token_side: int, size: tuple[int, int], tmp_path: Path
) -> None:
    from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size

    path, image = make(tmp_path), noise(*size)
    areas = {
        edge: math.prod(get_resize_output_image_size(np.asarray(image), edge, token_side))
        for edge in range(token_side, LONGEST_EDGE)
    }
    edge = max(edge for edge, area in areas.items() if area <= 5000)
    wish = {"size": {"longest_edge": edge}}

    rows = encode(load(path), image, max_pixels=5000)

    assert torch.equal(rows, encode_whole(path, image, images_kwargs=wish))
    assert len(rows) < len(encode(load(path), image))


@pytest.mark.parametrize("make", [make_pixtral, make_mistral3])
def test_the_files_of_older_checkpoints_give_the_same(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    """As on the hub: the image processor in a file of its own, other names for the rotation."""
    path, image = make(tmp_path), noise(97, 131)
    expected = encode(load(path), image)
    processor = json.loads((path / "processor_config.json").read_text())
    settings = processor.pop("image_processor")
    side = settings["patch_size"]
    settings |= {"patch_size": {"height": side, "width": side}}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    (path / "processor_config.json").write_text(json.dumps(processor))
    config = json.loads((path / "config.json").read_text())
    rotation = config["vision_config"].pop("rope_parameters")
    config["vision_config"] |= {"rope_theta": rotation["rope_theta"], "is_composition": True}
    (path / "config.json").write_text(json.dumps(config))

    again = EncoderCheckpoint.load(path, device="cpu", request=TowerRequest("transformers"))

    assert torch.equal(encode(again, image), expected)


def test_no_weight_of_the_language_model_is_held(path: Path) -> None:
    checkpoint = load(path)
    whole, _ = whole_of(path)
    language = load_half(path, "generator")

    def num_bytes(model: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters())

    held = checkpoint.tower.num_parameter_bytes
    names = [name for name, _ in load_half(path, "encoder").named_parameters()]

    # Bare parameters of the base model, such as a newline row, are held by both.
    shared = sum(
        p.numel() * p.element_size() for _, p in whole.model.named_parameters(recurse=False)
    )
    assert held + num_bytes(language) == num_bytes(whole) + shared
    assert not [name for name in names if "language_model" in name or "lm_head" in name]


def test_no_page_of_the_file_is_held_after_loading(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "copy")
    image = noise(56, 56)

    checkpoint = EncoderCheckpoint.load(copy, device="cpu", request=TowerRequest("transformers"))

    assert num_mapped_bytes(copy / "model.safetensors") == 0
    assert torch.equal(encode(checkpoint, image), encode_whole(path, image))
    assert num_mapped_bytes(copy / "model.safetensors") > 0


def test_rows_are_finite_float32_of_the_language_models_width(path: Path) -> None:
    checkpoint = load(path)
    rows = encode(checkpoint, noise(30, 30))

    assert rows.dtype == torch.float32
    assert checkpoint.tower.data_type is DataType.FLOAT32
    assert checkpoint.tower.hidden_size == 64
    assert rows.shape[1] == 64 * (1 + checkpoint.tower.num_deepstack_levels)
    assert torch.isfinite(rows).all()
    assert bytes_of(rows).nbytes == rows.numel() * 4
    assert np.array_equal(np.frombuffer(bytes_of(rows), np.float32), rows.numpy().reshape(-1))


def test_another_dtype_can_be_chosen(path: Path) -> None:
    checkpoint = EncoderCheckpoint.load(
        path, dtype="bfloat16", device="cpu", request=TowerRequest("transformers")
    )

    rows = encode(checkpoint, noise(30, 30))

    assert rows.dtype == torch.bfloat16
    assert bytes_of(rows).nbytes == rows.numel() * 2
    assert checkpoint.fingerprint != load(path).fingerprint


def test_a_wrong_number_of_rows_is_found(path: Path) -> None:
    checkpoint = load(path)
    inputs = prepare(checkpoint, noise(30, 30))
    wrong = dataclasses.replace(inputs, num_rows=inputs.num_rows + 1)

    with pytest.raises(RowCountError, match="planned"):
        checkpoint.tower.encode([wrong])


def test_placeholders_come_from_the_configuration(path: Path) -> None:
    whole, _ = whole_of(path)

    assert load(path).placeholders[Modality.IMAGE].token_id == whole.config.image_token_id


def test_the_fingerprint_does_not_depend_on_the_place(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "copy")

    assert len(load(path).fingerprint) == 32
    again = EncoderCheckpoint.load(copy, device="cpu", request=TowerRequest("transformers"))
    assert again.fingerprint == load(path).fingerprint


def change_preprocessor(path: Path) -> None:
    file = path / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(config))


def change_tower(path: Path) -> None:
    make_qwen2_vl(path, seed=1)


@pytest.mark.parametrize("change", [change_preprocessor, change_tower])
def test_the_fingerprint_tells_checkpoints_apart(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    before = EncoderCheckpoint.load(make_qwen2_vl(tmp_path), device="cpu").fingerprint

    change(tmp_path)

    assert EncoderCheckpoint.load(tmp_path, device="cpu").fingerprint != before


def test_the_fingerprint_ignores_the_language_model(tmp_path: Path) -> None:
    path = make_qwen2_vl(tmp_path)
    before = load(path).fingerprint
    model, _ = load_whole(path)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(path)

    after = EncoderCheckpoint.load(path, device="cpu", request=TowerRequest("transformers"))
    assert after.fingerprint == before


@pytest.mark.parametrize("content", ["[]", '{"model_type": "bert"}', "{}"])
def test_models_that_are_not_served_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(UnsupportedModelError):
        EncoderCheckpoint.load(tmp_path)


def test_settings_of_pictures_are_those_of_the_checkpoints_own_processor(path: Path) -> None:
    own: Any = transformers.AutoImageProcessor
    own = own.from_pretrained(path, backend="torchvision")

    settings = load(path).preprocessors[Modality.IMAGE].settings

    assert settings == {**plain(own.to_dict()), "backend": "torchvision"}
