"""The README's quick start, pasted: each request gets the right answer from the demo model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    running = Stack(ROOT / "models/demo")
    yield running
    assert running.stop() == 0


def paste(stack: Stack, language: str, marker: str) -> str:
    """Run the one block that holds ``marker`` against the stack; return what it printed."""
    quick_start = (ROOT / "README.md").read_text().partition("## Quick start")[2]
    (code,) = [
        found["code"]
        for found in BLOCK.finditer(quick_start)
        if found["language"] == language and marker in found["code"]
    ]
    code = code.replace("http://127.0.0.1:8000", stack.base_url)
    code = code.replace("127.0.0.1:8001", stack.grpc_address)
    code = code.replace(".venv/bin/python", sys.executable)
    command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_curl_command_streams_the_right_answer(stack: Stack) -> None:
    output = paste(stack, "bash", "curl -sN")

    pieces = re.findall(r'"content":"(.*?)"', output)
    assert "red star" in "".join(pieces).lower()
    assert len(pieces) > 2
    assert output.rstrip().endswith("data: [DONE]")


def test_the_openai_package_gets_the_right_answer(stack: Stack) -> None:
    assert "red" in paste(stack, "python", "OpenAI(").lower()


def test_the_grpc_client_gets_the_right_answer(stack: Stack) -> None:
    assert "red" in paste(stack, "bash", "examples/grpc_client.py").lower()
