"""What Gemma 3 makes of pictures: a fixed number of tokens that attend both ways."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from chiasm.common import torchvision_shim
from chiasm.common.errors import InvalidRequestError
from chiasm.common.families import UnsupportedModelError, family_of
from chiasm.common.families.rows import RowPlanner
from chiasm.common.media import (
    MediaLayout,
    MediaSpan,
    Modality,
    Placeholder,
    ProcessingOptions,
    TokenRun,
)
from tests.fakes.embeddings import make_ref
from tests.fakes.gemma_checkpoints import IMAGE_SIDE, NUM_IMAGE_TOKENS, make_gemma3

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.common.families import ImagePlanner

SIZE = {"size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gemma3(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def config(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "config.json").read_text())
    return loaded


def _planner(config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> ImagePlanner:
    make = family_of(config).make_image_planner
    assert make is not None
    return make(config, preprocessor or SIZE)


def test_expansion_is_that_of_the_processor(path: Path, config: dict[str, Any]) -> None:
    processor: Any = transformers.AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]  # transformers' own
    picture = Image.new("RGB", (50, 40), (200, 10, 30))
    text = f"a {processor.tokenizer.boi_token} b"
    inputs = processor(text=[text], images=[[picture]], return_tensors="pt")
    expected = inputs["input_ids"][0].tolist()

    layout = _planner(config).plan(40, 50, ProcessingOptions()).layout
    placeholder = family_of(config).placeholder(config, Modality.IMAGE)

    before, behind = text.split(processor.tokenizer.boi_token)
    encode = processor.tokenizer.encode
    assert (
        encode(before + placeholder.margin) + layout.expand() + encode(placeholder.margin + behind)
        == expected
    )
    is_embedding = [run.is_embedding for run in layout.runs for _ in range(run.count)]
    types = inputs["token_type_ids"][0].tolist()
    assert is_embedding == [bool(kind) for kind in types[expected.index(4) :][: len(is_embedding)]]
    assert layout.attends_both_ways


def test_placeholder_is_the_begin_token_with_blank_lines(config: dict[str, Any]) -> None:
    placeholder = family_of(config).placeholder(config, Modality.IMAGE)

    assert placeholder == Placeholder(config["boi_token_index"], "\n\n")


def test_pictures_of_all_sizes_become_the_same(config: dict[str, Any]) -> None:
    planner = _planner(config)
    plans = [planner.plan(*size, ProcessingOptions()) for size in ((1, 1), (3000, 20), (40, 50))]

    assert plans[0] == plans[1] == plans[2]
    assert plans[0].num_pixels == IMAGE_SIDE**2
    assert plans[0].layout.num_embedding_tokens == NUM_IMAGE_TOKENS
    assert not planner.processor_arguments(9, 9, ProcessingOptions(max_pixels=5))
    with pytest.raises(InvalidRequestError, match="aspect ratio"):
        planner.plan(201, 1, ProcessingOptions())


def test_crops_and_other_sizes_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="do_pan_and_scan"):
        _planner(config, {**SIZE, "do_pan_and_scan": True})
    with pytest.raises(UnsupportedModelError, match="disagree on the size"):
        _planner(config, {"size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE - 14}})


def test_ready_made_rows_stand_as_encoded_ones_do(config: dict[str, Any]) -> None:
    planner = RowPlanner.of(family_of(config), config)

    encoded = _planner(config).plan(9, 9, ProcessingOptions()).layout
    assert planner.plan(Modality.IMAGE, NUM_IMAGE_TOKENS, None) == encoded


def test_ready_made_rows_must_be_as_many_as_an_image_has(config: dict[str, Any]) -> None:
    planner = RowPlanner.of(family_of(config), config)

    with pytest.raises(InvalidRequestError, match="has 16 embeddings, but there are 15 rows") as e:
        planner.plan(Modality.IMAGE, NUM_IMAGE_TOKENS - 1, None)
    assert e.value.reason == "INVALID_EMBEDDING"


def test_only_rows_attend_both_ways() -> None:
    runs = (
        TokenRun(1, 2, is_embedding=False),
        TokenRun(3, 5, is_embedding=True),
        TokenRun(2, 1, is_embedding=False),
    )
    ref = make_ref(num_rows=5)

    assert MediaSpan(10, ref, MediaLayout(runs), is_ready=True).both_ways is None
    both_ways = MediaLayout(runs, attends_both_ways=True)
    assert MediaSpan(10, ref, both_ways, is_ready=True).both_ways == (12, 17)
    alone = MediaLayout(runs[1:2], attends_both_ways=True)
    assert MediaSpan(10, ref, alone, is_ready=True).both_ways == (10, 15)
