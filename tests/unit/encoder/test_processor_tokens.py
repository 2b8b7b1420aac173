"""Tokens that only the processor's configuration names are found in every layout of the hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from chiasm.common.families import UnsupportedModelError, family_of
from chiasm.encoder.checkpoint import EncoderCheckpoint
from chiasm.encoder.processor_tokens import find_processor_tokens
from tests.fakes.checkpoints import make_llava
from tests.fakes.pixtral_checkpoints import make_pixtral

if TYPE_CHECKING:
    from pathlib import Path

PIXTRAL = family_of({"model_type": "llava", "vision_config": {"model_type": "pixtral"}})
EXPECTED = {"image_break_token_id": 7, "image_end_token_id": 8}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_pixtral(tmp_path)


def name_tokens(path: Path, names: dict[str, str]) -> None:
    """Write a processor's configuration as checkpoints of the hub have it, without the rest."""
    content = {"processor_class": "PixtralProcessor", "patch_size": 14, **names}
    (path / "processor_config.json").write_text(json.dumps(content))


def test_ids_are_those_of_the_named_tokens(path: Path) -> None:
    assert find_processor_tokens(PIXTRAL, path) == EXPECTED

    name_tokens(path, {"image_break_token": "[INST]"})

    assert find_processor_tokens(PIXTRAL, path) == {**EXPECTED, "image_break_token_id": 4}


def test_without_names_the_tokens_are_those_of_the_processors_class(path: Path) -> None:
    (path / "processor_config.json").unlink()

    assert find_processor_tokens(PIXTRAL, path) == EXPECTED


def test_unknown_tokens_and_a_missing_tokenizer_are_named(path: Path) -> None:
    name_tokens(path, {"image_break_token": "[ROW]", "image_end_token": "[STOP]"})
    with pytest.raises(UnsupportedModelError, match=r"no token \[ROW\] or \[STOP\]"):
        find_processor_tokens(PIXTRAL, path)

    (path / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"has no tokenizer\.json"):
        find_processor_tokens(PIXTRAL, path)


def test_other_families_need_none(tmp_path: Path) -> None:
    llava = json.loads((make_llava(tmp_path) / "config.json").read_text())

    assert find_processor_tokens(family_of(llava), tmp_path) == {}


def test_other_breaks_make_another_fingerprint(path: Path) -> None:
    before = EncoderCheckpoint.load(path, device="cpu").fingerprint
    settings = json.loads((path / "processor_config.json").read_text())
    name_tokens(path, settings)
    assert EncoderCheckpoint.load(path, device="cpu").fingerprint == before

    name_tokens(path, {**settings, "image_break_token": "[INST]"})

    assert EncoderCheckpoint.load(path, device="cpu").fingerprint != before
