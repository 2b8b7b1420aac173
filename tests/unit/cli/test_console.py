"""What people see of the services' states and logs, and what is kept of their lines."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest

from chiasm.cli.console import Console, LogLine
from chiasm.cli.service_log import ServiceLog

if TYPE_CHECKING:
    from pathlib import Path


def line(**fields: object) -> LogLine:
    return LogLine.parse(json.dumps(fields))


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        ("Loading weights:  55%|#####     | 3/5 [00:00<00:00]", 55),
        ("Loading checkpoint shards:   0%|", 0),
        ('{"event": "load_progress", "percent": 12.7}', 12),
        ('{"event": "load_progress", "percent": "half"}', None),
        ('{"event": "other", "percent": 5}', None),
        ("{not json", None),
        ("[1]", None),
        ("plain", None),
    ],
)
def test_progress_is_found_in_bars_and_in_our_lines(text: str, percent: int | None) -> None:
    assert LogLine.parse(text).progress_percent == percent


@pytest.mark.parametrize(
    ("shown", "level"), [(False, "debug"), (False, "info"), (True, "warning"), (True, "error")]
)
def test_lines_below_the_level_are_not_shown(shown: bool, level: str) -> None:
    logs = io.StringIO()
    console = Console(io.StringIO(), logs, "warning")

    assert console.log("encoder-0", line(level=level, event="happened")) is shown
    assert ("happened" in logs.getvalue()) is shown


def test_our_line_is_shown_with_name_time_level_event_and_fields() -> None:
    logs = io.StringIO()
    console = Console(io.StringIO(), logs, "info")

    console.log(
        "encoder-0",
        line(time="2026-01-02T03:04:05.678Z", level="info", service="encoder", event="e", n=1),
    )

    assert logs.getvalue() == "encoder-0    | 03:04:05 info e n=1\n"


def test_traceback_follows_its_line_with_the_name_on_every_part() -> None:
    logs = io.StringIO()

    Console(io.StringIO(), logs, "info").log(
        "encoder-0", line(level="error", event="failed", exception="Traceback\n  boom")
    )

    parts = logs.getvalue().splitlines()
    assert [part.partition("| ")[2].strip() for part in parts] == [
        "error failed",
        "Traceback",
        "boom",
    ]
    assert all(part.startswith("encoder-0 ") for part in parts)


def test_state_is_one_line_with_seconds_if_known() -> None:
    states = io.StringIO()
    console = Console(states, io.StringIO(), "info")

    console.state("redis", "unix:/s", "starting")
    console.state("redis", "unix:/s", "ready", 0.123)

    assert [text.split() for text in states.getvalue().splitlines()] == [
        ["redis", "unix:/s", "starting"],
        ["redis", "unix:/s", "ready", "0.1", "s"],
    ]


def test_log_file_is_private_and_never_larger_than_its_bound_twice(tmp_path: Path) -> None:
    path = tmp_path / "encoder.log"
    log = ServiceLog(path, max_bytes=100)
    for number in range(50):
        log.write(f"line {number}")
    log.close()

    newest = path.read_text().splitlines()
    older = (tmp_path / "encoder.log.1").read_text().splitlines()
    assert newest[-1] == "line 49"
    assert older[-1] == f"line {49 - len(newest)}"
    assert path.stat().st_size <= 100
    assert (tmp_path / "encoder.log.1").stat().st_size <= 100
    assert path.stat().st_mode & 0o777 == 0o600
