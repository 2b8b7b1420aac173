"""How the settings of the generator become a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.common.config import load_settings
from chiasm.generator import service
from chiasm.generator.config import GeneratorSettings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("flags", "is_recorded"),
    [((), True), (("--enforce-eager", "false"), True), (("--enforce-eager", "true"), False)],
)
def test_steps_are_recorded_unless_every_launch_is_asked_for(
    flags: tuple[str, ...], is_recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = object()
    asked: list[tuple[object, int, int]] = []
    monkeypatch.setattr(service, "load_model", lambda *_: loaded)
    monkeypatch.setattr(service, "replay_steps", lambda *arguments: asked.append(arguments))
    settings = load_settings(
        GeneratorSettings,
        "generator",
        [
            *("--model", str(tmp_path), "--service-token-file", str(tmp_path)),
            *("--store-secret-file", str(tmp_path), "--max-num-seqs", "5"),
            *("--max-num-batched-tokens", "77", *flags),
        ],
    )

    found = service._load(settings)

    assert asked == ([(loaded, 5, 77)] if is_recorded else [])
    assert found is (None if is_recorded else loaded)
