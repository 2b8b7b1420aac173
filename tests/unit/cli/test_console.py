"""What people see of the services' states and logs, and what is kept of their lines."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from chiasm.cli.console import Console, LogLine
from chiasm.cli.service_log import ServiceLog


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


class FullDisk(io.StringIO):
    """A stream that takes nothing, like a closed terminal or a full disk."""

    def write(self, text: str) -> int:
        """Refuse."""
        raise OSError(28, "No space left on device")


def test_stream_that_takes_nothing_is_no_error() -> None:
    console = Console(FullDisk(), FullDisk(), "debug")
    closed = io.StringIO()
    closed.close()

    console.state("redis", "here", "ready")
    assert console.log("redis", line(level="error", event="happened"))
    Console(closed, closed, "debug").line("text")


def test_line_of_endless_brackets_is_text() -> None:
    text = '{"a":' * 100_000

    assert LogLine.parse(text).fields == {}


def test_log_that_could_not_move_on_takes_later_lines(tmp_path: Path) -> None:
    log = ServiceLog(tmp_path / "redis.log", max_bytes=8)
    log.write("first")
    (tmp_path / "redis.log.1").mkdir()

    with pytest.raises(IsADirectoryError):
        log.write("second")
    (tmp_path / "redis.log.1").rmdir()
    log.write("third")
    log.close()

    assert (tmp_path / "redis.log").read_text() == "third\n"
    assert (tmp_path / "redis.log.1").read_text() == "first\n"


def test_line_that_found_no_room_is_not_kept_for_later() -> None:
    log = ServiceLog(Path("/dev/full"))

    with pytest.raises(OSError, match="No space"):
        log.write("lost")
    log.close()
