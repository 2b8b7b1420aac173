"""Read what the gateway needs of a checkpoint: template, special tokens, sampling defaults.

Source: file names and their order are those of huggingface/transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class CheckpointError(Exception):
    """A checkpoint lacks a file that the gateway needs, or has a malformed one."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling of requests that do not say; ``None`` is no limit.

    Attributes:
        temperature: 0 if the checkpoint asks for greedy decoding.
        top_p: Smallest probability mass kept.
        top_k: Most tokens kept; 0 for all.
        max_tokens: Most tokens of an answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None


def read_chat_template(model_path: Path) -> str:
    """Return the source of a checkpoint's chat template, the processor's before the tokenizer's.

    Raises:
        CheckpointError: There is none.
    """
    path = model_path / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = _read_json(model_path / name).get("chat_template")
        if isinstance(template, list):
            template = _default_of(template)
        if isinstance(template, str):
            return template
    raise CheckpointError(f"{model_path} has no chat template; give one with --chat-template.")


def read_special_tokens(model_path: Path) -> dict[str, str]:
    """Return the spellings of a checkpoint's named special tokens, as templates see them."""
    found = {
        **_read_json(model_path / "special_tokens_map.json"),
        **_read_json(model_path / "tokenizer_config.json"),
    }
    tokens = {}
    for name in _SPECIAL_TOKEN_NAMES:
        token = found.get(name)
        spelling = token.get("content") if isinstance(token, dict) else token
        if isinstance(spelling, str):
            tokens[name] = spelling
    return tokens


def read_sampling_defaults(model_path: Path) -> SamplingDefaults:
    """Return the sampling that ``generation_config.json`` asks for.

    Raises:
        CheckpointError: A value is not a number.
    """
    config = _read_json(model_path / "generation_config.json")
    temperature = _number(config, "temperature", 1.0)
    max_tokens = config.get("max_new_tokens")
    return SamplingDefaults(
        temperature=0.0 if config.get("do_sample") is False else temperature,
        top_p=_number(config, "top_p", 1.0),
        top_k=int(_number(config, "top_k", 0)),
        max_tokens=max_tokens if isinstance(max_tokens, int) else None,
    )


def _default_of(templates: list[object]) -> object:
    named = {
        entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)
    }
    return named.get("default")


def _number(config: Mapping[str, object], name: str, default: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"generation_config.json: {name} must be a number, got {value!r}.")
    return float(value)


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return document
