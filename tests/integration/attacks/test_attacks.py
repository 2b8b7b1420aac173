"""Every attack over both entry points of a running stack; see ``docs/security.md`` for the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.attacks import (
    identity_attacks,
    image_attacks,
    stream_attacks,
    url_attacks,
)

if TYPE_CHECKING:
    from tests.harness.attack import Attack
    from tests.harness.attack_target import AttackTarget

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

ROWS = [*url_attacks.ROWS, *image_attacks.ROWS, *stream_attacks.ROWS, *identity_attacks.ROWS]
SLOW_ROWS = [*image_attacks.SLOW_ROWS, *stream_attacks.SLOW_ROWS]


def cells(rows: list[Attack]) -> list[object]:
    return [
        pytest.param(row, entry, id=f"{row.name}-{entry}") for row in rows for entry in row.entries
    ]


@pytest.mark.parametrize(("attack", "entry"), cells(ROWS))
def test_an_attack_harms_nobody(target: AttackTarget, attack: Attack, entry: str) -> None:
    target.check_attack(attack, entry)


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "entry"), cells(SLOW_ROWS))
def test_a_heavy_attack_harms_nobody(target: AttackTarget, attack: Attack, entry: str) -> None:
    target.check_attack(attack, entry)
