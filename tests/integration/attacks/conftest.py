"""One stack that sees and hears, for all attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fakes.sound_checkpoints import make_qwen2_5_omni
from tests.harness.attack_target import AttackTarget

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackTarget]:
    model = make_qwen2_5_omni(tmp_path_factory.mktemp("model"))
    with AttackTarget(model, tmp_path_factory.mktemp("attacks")) as running:
        yield running
