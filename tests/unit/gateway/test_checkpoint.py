"""What the gateway reads of a checkpoint, in the order of transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

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
