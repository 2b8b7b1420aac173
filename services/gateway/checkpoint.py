"""Read what the gateway needs of a checkpoint: template, special tokens, sampling defaults.

Source: file names and their order are those of huggingface/transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import Limits
from chiasm.common.sampling import SamplingWishes, check_wishes, wishes_from_proto, wishes_to_proto

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
_GENERATION_CONFIG = "generation_config.json"
_MAX_TOP_K = (1 << 32) - 1

Value = TypeVar("Value", int, float)


class CheckpointError(Exception):
    """A checkpoint lacks a file that the gateway needs, or has a malformed one."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling of requests that do not say; ``None`` is no limit.

    Attributes:
        temperature: 0 if the checkpoint asks for greedy decoding.
        top_p: Smallest probability mass kept.
        top_k: Most tokens kept; 0 for all.
        min_p: Least probability kept, as a part of the best token's.
        repetition_penalty: Divides logits of tokens that were there before; 1 does nothing.
        max_tokens: Most tokens of an answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None

    def fill_in(self, wishes: SamplingWishes, room: int) -> SamplingWishes:
        """Return ``wishes`` with these values where they say nothing.

        Args:
            wishes: Wishes of a request.
            room: Most tokens that can be generated.
        """
        own_max_tokens = room if self.max_tokens is None else self.max_tokens
        return replace(
            wishes,
            max_tokens=min(_given(wishes.max_tokens, own_max_tokens), room),
            temperature=_given(wishes.temperature, self.temperature),
            top_p=_given(wishes.top_p, self.top_p),
            top_k=_given(wishes.top_k, self.top_k),
            min_p=_given(wishes.min_p, self.min_p),
            repetition_penalty=_given(wishes.repetition_penalty, self.repetition_penalty),
        )


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
    """Return the sampling that ``generation_config.json`` asks for; a ``top_k`` of -1 is 0.

    Raises:
        CheckpointError: A value is not a number, or no request may have it.
    """
    config = _read_json(model_path / _GENERATION_CONFIG)
    temperature = _number(config, "temperature", 1.0)
    max_tokens = config.get("max_new_tokens")
    defaults = SamplingDefaults(
        temperature=0.0 if config.get("do_sample") is False else temperature,
        top_p=_number(config, "top_p", 1.0),
        top_k=_top_k(config),
        min_p=_number(config, "min_p", 0.0),
        repetition_penalty=_number(config, "repetition_penalty", 1.0),
        max_tokens=max_tokens if isinstance(max_tokens, int) else None,
    )
    _check(defaults)
    return defaults


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _top_k(config: Mapping[str, object]) -> int:
    value = _number(config, "top_k", 0)
    if not -1 <= value <= _MAX_TOP_K:
        raise CheckpointError(f"{_GENERATION_CONFIG}: top_k must be at least 1, 0 or -1 for all.")
    return max(int(value), 0)


def _check(defaults: SamplingDefaults) -> None:
    """Refuse what the generator would refuse of every request; it sees numbers of 32 bits."""
    max_tokens = defaults.max_tokens
    if max_tokens is not None and max_tokens < 1:
        raise CheckpointError(
            f"{_GENERATION_CONFIG}: max_new_tokens must be at least 1, got {max_tokens}."
        )
    wishes = defaults.fill_in(SamplingWishes(), room=1)
    try:
        check_wishes(wishes_from_proto(wishes_to_proto(wishes)), Limits())
    except InvalidRequestError as error:
        raise CheckpointError(f"{_GENERATION_CONFIG}: {error.message}") from error


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
        raise CheckpointError(f"{_GENERATION_CONFIG}: {name} must be a number, got {value!r}.")
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
