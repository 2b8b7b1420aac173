"""Describe a generator to its callers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GeneratorInfo:
    """What the generator is and what it can hold; see ``GetGeneratorInfoResponse``."""

    model: str
    max_model_len: int
    vocab_size: int
    hidden_size: int
    block_size: int
    num_blocks: int
    num_used_blocks: int
    eos_token_ids: tuple[int, ...]
    version: str
