"""Services started one by one have threads that wait as those of a whole stack do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from chiasm.cli.main import _run_service
from chiasm.cli.thread_env import THREAD_ENV

ROOT = Path(__file__).parents[3]


def test_spin_is_bounded_before_the_service_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    seen: list[tuple[str | None, str | None]] = []
    module = ModuleType("chiasm.encoder.service")
    vars(module)["main"] = lambda _argv: seen.append(
        (os.environ.get("GOMP_SPINCOUNT"), os.environ.get("TOKENIZERS_PARALLELISM"))
    )
    monkeypatch.setitem(sys.modules, "chiasm.encoder.service", module)

    _run_service("encoder", [])
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")

    assert seen == [("7", "false")]


@pytest.mark.parametrize("service", ["encoder", "generator"])
def test_containers_have_the_same_defaults(service: str) -> None:
    lines = (ROOT / f"services/{service}/Dockerfile").read_text(encoding="utf-8").split()

    assert {f"{key}={value}" for key, value in THREAD_ENV.items()} <= set(lines)
