"""What the gateway reads of a checkpoint, in the order of transformers."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest

from chiasm.common.sampling import SamplingWishes
from chiasm.gateway.checkpoint import (
    CheckpointError,
    SamplingDefaults,
    read_chat_template,
    read_sampling_defaults,
    read_special_tokens,
)

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, name: str, document: object) -> None:
    (path / name).write_text(json.dumps(document), encoding="utf-8")


def test_the_template_file_wins_then_the_processor_s_then_the_tokenizer_s(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": "tokenizer"})
    assert read_chat_template(tmp_path) == "tokenizer"
    write(tmp_path, "chat_template.json", {"chat_template": "processor"})
    assert read_chat_template(tmp_path) == "processor"
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert read_chat_template(tmp_path) == "file"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": templates})
    assert read_chat_template(tmp_path) == "d"


def test_a_checkpoint_without_template_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--chat-template"):
        read_chat_template(tmp_path)


def test_special_tokens_are_strings_or_objects(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    write(tmp_path, "tokenizer_config.json", config)
    assert read_special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingDefaults()),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 5},
            SamplingDefaults(temperature=0.6, top_p=0.9, top_k=5),
        ),
        ({"do_sample": False, "temperature": 0.6}, SamplingDefaults(temperature=0.0)),
        ({"max_new_tokens": 9}, SamplingDefaults(max_tokens=9)),
        (
            {"repetition_penalty": 1.05, "min_p": 0.1},
            SamplingDefaults(repetition_penalty=1.05, min_p=0.1),
        ),
        (
            {"do_sample": False, "repetition_penalty": 1.05},
            SamplingDefaults(temperature=0.0, repetition_penalty=1.05),
        ),
        ({"top_k": -1}, SamplingDefaults(top_k=0)),
        ({"top_k": None, "min_p": None, "repetition_penalty": None}, SamplingDefaults()),
    ],
)
def test_sampling_defaults_come_from_the_generation_config(
    tmp_path: Path, config: object, expected: SamplingDefaults
) -> None:
    write(tmp_path, "generation_config.json", config)
    assert read_sampling_defaults(tmp_path) == expected


@pytest.mark.parametrize("text", ["[]", "{", '{"temperature": "hot"}'])
def test_a_malformed_configuration_names_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="generation_config"):
        read_sampling_defaults(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1 << 32),
        ("top_k", math.nan),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e300),
        ("max_new_tokens", 0),
    ],
)
def test_a_value_that_every_request_would_be_refused_for_ends_the_start(
    tmp_path: Path, name: str, value: float
) -> None:
    write(tmp_path, "generation_config.json", {name: value})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name} must be"):
        read_sampling_defaults(tmp_path)


def test_defaults_stand_where_a_request_says_nothing_and_only_there() -> None:
    defaults = SamplingDefaults(0.5, 0.9, 7, 0.1, 1.2, 30)
    own = SamplingWishes(
        max_tokens=9, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0
    )
    filled = SamplingWishes(
        max_tokens=30, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2
    )

    assert defaults.fill_in(SamplingWishes(), room=40) == filled
    assert defaults.fill_in(own, room=40) == own


@pytest.mark.parametrize(("wished", "room", "most"), [(None, 20, 20), (9, 5, 5), (9, 20, 9)])
def test_answers_are_no_longer_than_there_is_room(wished: int | None, room: int, most: int) -> None:
    wishes = SamplingWishes(max_tokens=wished)
    assert SamplingDefaults(max_tokens=30).fill_in(wishes, room).max_tokens == most


def test_without_a_default_an_answer_may_take_all_the_room() -> None:
    assert SamplingDefaults().fill_in(SamplingWishes(), 20).max_tokens == 20
