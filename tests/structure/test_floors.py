"""No library is older than the version in which a known hole was closed."""

from __future__ import annotations

import importlib.metadata
import re

import av
import pytest

from tests.structure.tree import ROOT

FLOORS = {
    "jinja2": ((3, 1, 6), "CVE-2025-27516: out of the sandbox by attr"),
    "pillow": ((12, 3), "CVE-2026-59199 and others: codecs and the check for bombs"),
    "starlette": ((1, 3, 1), "CVE-2026-48710: a Host header changes the path"),
}
# FFmpeg 8.1 has libavformat 62.12.
FFMPEG_FLOOR = ("libavformat", (62, 12), "CVE-2026-40962: encrypted MP4")


@pytest.mark.parametrize("name", FLOORS)
def test_installed_library_is_not_below_its_floor(name: str) -> None:
    floor, reason = FLOORS[name]
    installed = tuple(map(int, re.findall(r"\d+", importlib.metadata.version(name))))

    assert installed >= floor, reason


def test_ffmpeg_is_not_below_its_floor() -> None:
    library, floor, reason = FFMPEG_FLOOR

    assert av.library_versions[library] >= floor, reason


@pytest.mark.parametrize("name", FLOORS)
def test_floor_is_declared_and_locked(name: str) -> None:
    floor, _ = FLOORS[name]
    project = (ROOT / "pyproject.toml").read_text()
    declared = re.search(rf'"{name}(?:\[\w+\])?>=([0-9.]+)', project)
    locked = re.search(rf"^{name}==([0-9.]+)", read_lock("cpu"), re.MULTILINE)

    for found in (declared, locked):
        assert found is not None
        assert tuple(map(int, found[1].split("."))) >= floor


def read_lock(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.lock").read_text()
