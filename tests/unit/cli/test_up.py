"""``chiasm up`` before anything is started: wrong use and the state directory."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from chiasm.cli.up import run_up

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "models/demo"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "--model is required"),
        (["m", "--encodres", "2"], "did you mean --encoders?"),
        (["m", "--encoders", "many"], "--encoders: "),
        ([MODEL, "--trust-remote-code"], "is refused"),
        ([MODEL, "--dtype", "int3"], "--dtype: "),
        (["m", "--config", "/absent.toml"], "cannot be read"),
        (["m"], "m has no config.json"),
        ([MODEL, "--state-dir", "/dev/null/x"], "cannot be used"),
        ([MODEL, "--state-dir", "/tmp/" + "x" * 120], "choose a shorter state directory"),
    ],
)
def test_wrong_use_ends_with_status_2_and_one_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = [] if "--state-dir" in argv or not argv else ["--state-dir", str(tmp_path)]

    assert run_up([*argv, *extra]) == 2

    error = capsys.readouterr().err
    assert error.startswith("chiasm up: ")
    assert error.count("\n") == 1
    assert sentence in error


def test_state_directory_of_a_running_stack_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lock = os.open(tmp_path / "up.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)

    assert run_up([MODEL, "--state-dir", str(tmp_path)]) == 2

    os.close(lock)
    assert "Another stack uses" in capsys.readouterr().err


def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_up(["--help"])

    assert caught.value.code == 0
    assert "--encoders" in capsys.readouterr().out
