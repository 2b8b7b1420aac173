"""Look up tokens that a checkpoint names in its processor's configuration, not in its own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from chiasm.common.families import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chiasm.common.families import Family

_PROCESSOR_FILE = "processor_config.json"
_TOKENIZER_FILE = "tokenizer.json"


def find_processor_tokens(family: Family, model_path: Path) -> Mapping[str, int]:
    """Return the ids of ``family.processor_tokens``, under their names with ``_id``.

    Args:
        family: Family of the checkpoint.
        model_path: Directory of the checkpoint.

    Raises:
        UnsupportedModelError: There is no tokenizer, or it does not know a token.
    """
    if not family.processor_tokens:
        return {}
    file = model_path / _TOKENIZER_FILE
    if not file.is_file():
        raise UnsupportedModelError(f"The checkpoint has no {_TOKENIZER_FILE}.")
    tokenizer = Tokenizer.from_file(str(file))
    named = {**family.processor_tokens, **_read_named(family, model_path)}
    found = {f"{name}_id": tokenizer.token_to_id(text) for name, text in named.items()}
    if unknown := [named[name.removesuffix("_id")] for name, one in found.items() if one is None]:
        raise UnsupportedModelError(f"The tokenizer has no token {' or '.join(unknown)}.")
    return {name: token_id for name, token_id in found.items() if token_id is not None}


def _read_named(family: Family, model_path: Path) -> Mapping[str, str]:
    """Return the tokens that the processor's configuration names, if there is one."""
    file = model_path / _PROCESSOR_FILE
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: str(settings[name]) for name in family.processor_tokens if name in settings}
