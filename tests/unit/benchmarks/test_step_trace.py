"""Traces with and without the parts of a forward."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.step_trace import read_steps

if TYPE_CHECKING:
    from pathlib import Path

COARSE = {
    "num_sequences": 2,
    "num_prefill_tokens": 0,
    "schedule_s": 0.1,
    "execute_s": 0.7,
    "update_s": 0.2,
}
FINE = {**COARSE, "num_prefill_tokens": 5, "build_s": 0.1, "forward_s": 0.5, "sample_s": 0.1}


def test_parts_are_told_apart_where_the_trace_does(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (COARSE, FINE)))

    coarse, fine = read_steps(path)

    assert (coarse.is_decode, fine.is_decode) == (True, False)
    assert (coarse.forward_s, fine.forward_s) == (0.7, 0.5)
    assert coarse.total_s == pytest.approx(1.0)
    assert fine.total_s == pytest.approx(1.0)
    assert set(fine.parts_s) - set(coarse.parts_s) == {"build_s", "sample_s"}
