"""What all attacks of this package together came to; the file runs last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness.attack_target import AttackTarget

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def test_nobody_died_nothing_forbidden_was_reached_and_no_cache_lied(target: AttackTarget) -> None:
    totals = target.totals
    print(
        f"\ncells {totals.num_cells}, deaths {target.num_deaths},"
        f" forbidden connections {target.num_forbidden}, leaks {totals.num_leaks},"
        f" wrong-content hits {totals.num_wrong_content_hits},"
        f" cross-tenant hits {totals.num_foreign_hits},"
        f" peak over baseline {totals.peak_bytes >> 20} MiB ({totals.peak_name})"
        f"\n{dict(totals.codes)}"
    )

    assert target.num_deaths == 0
    assert target.num_forbidden == 0
    assert totals.num_leaks == 0
    assert totals.num_wrong_content_hits == 0
    assert totals.num_foreign_hits == 0
