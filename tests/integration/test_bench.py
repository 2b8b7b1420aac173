"""``chiasm bench`` against a real stack."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from chiasm.cli.main import app
from tests.fakes.checkpoints import make_qwen2_vl
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def test_all_workloads_of_a_stack_are_measured(tmp_path: Path) -> None:
    stack = Stack(make_qwen2_vl(tmp_path / "model"), ["--dtype", "float32"])
    report = tmp_path / "rounds.json"
    flags = ["--rounds", "1", "--requests", "2", "--concurrency", "2", "--output-tokens", "8"]
    sizes = [
        "--image-size",
        "112",
        "--json",
        str(report),
        "--pid",
        f"ours={stack.pid('generator')}",
    ]
    result = CliRunner().invoke(
        app, ["bench", f"ours={stack.base_url}", "--model", "model", *flags, *sizes]
    )

    assert result.exit_code == 0, result.output
    assert stack.stop() == 0
    series = json.loads(report.read_text())
    assert [one["workload"] for one in series] == [
        "text",
        "image-new",
        "image-same",
        "image-four",
        "text-under-flood",
    ]
    for one in series:
        assert one["rounds"][0]["errors"] == []
        assert one["rounds"][0]["tokens_per_s"] > 0
        assert one["pss_bytes"] > 1 << 20
    assert "| text-under-flood c2 | ours |" in result.output
