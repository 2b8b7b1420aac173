"""Steps of a trace as the benchmarks read them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks.step_trace import read_steps

if TYPE_CHECKING:
    from pathlib import Path

RECORD = {
    "num_sequences": 2,
    "num_prefill_tokens": 5,
    "schedule_s": 0.1,
    "build_s": 0.2,
    "forward_s": 0.5,
    "sample_s": 0.1,
    "update_s": 0.3,
    "step_s": 0.9,
}


def test_steps_tell_the_forward_from_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    records = (RECORD, {**RECORD, "num_prefill_tokens": 0})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    prefill, decode = read_steps(path)

    assert (prefill.is_decode, decode.is_decode) == (False, True)
    assert (decode.forward_s, decode.total_s) == (0.5, 0.9)
    assert set(decode.parts_s) == {"schedule_s", "build_s", "sample_s", "update_s"}
