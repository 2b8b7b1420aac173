"""Make the random Qwen2.5-VL checkpoint on which servers are compared.

About 494 million weights of language model and 97 million of vision tower, in bfloat16, of the
proportions of Qwen2.5-0.5B. Its tokenizer spells every token, so that servers stream text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from chiasm.cli.bench_load import WORDS
from tests.fakes.checkpoints import TextSizes, make_sized_qwen2_5_vl

if TYPE_CHECKING:
    from pathlib import Path

TEXT = TextSizes(24, 896, 4864, 2, 151_936, max_positions=32_768)
VISION: dict[str, object] = {
    "depth": 12,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_heads": 12,
    "out_hidden_size": TEXT.hidden_size,
    "fullatt_block_indexes": [2, 5, 8, 11],
    "window_size": 112,
}
MAX_PIXELS = 1024 * 1024


def make_bench_model(path: Path) -> Path:
    """Write the checkpoint to ``path``, unless it is there, and return it."""
    if not (path / "model.safetensors").exists():
        make_sized_qwen2_5_vl(path, TEXT, VISION, MAX_PIXELS)
        _widen_tokenizer(path / "tokenizer.json")
    return path


def _widen_tokenizer(file: Path) -> None:
    """Give the tokens that no text has a spelling; a word of the workloads is one token."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["ignore_merges"] = True
    vocabulary = tokenizer["model"]["vocab"]
    words = [f"Ġ{word}" for word in WORDS if f"Ġ{word}" not in vocabulary]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    for token_id in range(TEXT.vocab_size):
        if token_id not in taken:
            vocabulary[words.pop() if words else f"Ġx{token_id}"] = token_id
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
