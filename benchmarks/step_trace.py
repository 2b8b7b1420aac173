"""Read the generator's step trace: how long each step took, and how much of it was the forward."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PARTS = ("schedule_s", "build_s", "sample_s", "update_s")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine.

    Attributes:
        num_sequences: Sequences in it.
        is_decode: Whether no prompt token was in it.
        forward_s: Seconds of the model's forward.
        total_s: Seconds from the end of the step before to its end, gaps and messages included.
        parts_s: Seconds of the other parts, by field name; some run beside a forward.
    """

    num_sequences: int
    is_decode: bool
    forward_s: float
    total_s: float
    parts_s: Mapping[str, float]


def read_steps(path: Path) -> list[Step]:
    """Return the steps that the trace at ``path`` holds so far."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_parse_step(json.loads(line)) for line in lines]


def _parse_step(record: Mapping[str, float]) -> Step:
    return Step(
        num_sequences=int(record["num_sequences"]),
        is_decode=not record["num_prefill_tokens"],
        forward_s=record["forward_s"],
        total_s=record["step_s"],
        parts_s={name: record[name] for name in _PARTS},
    )
