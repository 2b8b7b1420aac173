"""The commands of ``docs/media.md``, pasted: they do what the page says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def paste(stack: Stack, title: str) -> list[str]:
    """Run every block of a section in order; return what each printed."""
    section = (ROOT / "docs" / "media.md").read_text().partition(f"## {title}\n")[2]
    section = section.partition("\n## ")[0]
    outputs = []
    for block in BLOCK.finditer(section):
        code = block["code"].replace("http://127.0.0.1:8000", stack.base_url)
        code = code.replace(".venv/bin/chiasm", f"{sys.executable} -m chiasm.cli.main")
        is_shell = block["language"] == "bash"
        command = ["bash", "-euc", code] if is_shell else [sys.executable, "-c", code]
        ran = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"CHIASM_SERVER": stack.base_url, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        )
        assert ran.returncode == 0, ran.stderr
        outputs.append(ran.stdout)
    return outputs


def documents(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects that stand one after the other in ``text``."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def test_the_curl_sequence_keeps_uses_and_forgets_a_picture(stack: Stack) -> None:
    outputs = [documents(output) for output in paste(stack, "With curl")]

    ((estimate,), (form,), (again,), (answer,), (got, listed, deleted, forgotten)) = outputs
    assert estimate["tokens"] == form["tokens"] == again["tokens"] > 0
    assert (form["uuid"], form["ttl_s"], form["usage"]["cache"]) == ("stars/red", 3600, "miss")
    assert again["usage"]["cache"] == "hit"
    assert "red star" in answer["choices"][0]["message"]["content"].lower()
    assert [one["cache"] for one in answer["usage"]["media"]] == ["hit"]
    assert got["uuid"] == "stars/red"
    assert [one["uuid"] for one in listed["data"]] == ["stars/red"]
    assert deleted["deleted"] is True
    assert forgotten["deleted"] is True


def test_the_openai_package_puts_and_names_a_picture(stack: Stack) -> None:
    (output,) = paste(stack, "With the OpenAI package")

    assert "red" in output.lower()
    assert "'cache': 'hit'" in output


def test_the_command_line_does_the_same(stack: Stack) -> None:
    (output,) = paste(stack, "With the command line")

    assert '"uuid": "stars/red"' in output
    assert re.search(r"^ +\d+ image +\d+ +\d+ stars/red$", output, re.MULTILINE)
