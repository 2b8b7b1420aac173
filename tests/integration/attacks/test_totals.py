"""What all attacks of this package together came to; the file runs last."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.attack import ENTRIES
from tests.harness.process_usage import family_of

if TYPE_CHECKING:
    from tests.harness.attack_target import AttackTarget

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def test_nobody_died_nothing_forbidden_was_reached_and_no_cache_lied(target: AttackTarget) -> None:
    totals = target.totals
    print(
        f"\ncells {totals.num_cells}, deaths {target.num_deaths},"
        f" deaths of decode workers {target.num_worker_deaths:.0f},"
        f" forbidden connections {target.num_forbidden}, leaks {totals.num_leaks},"
        f" wrong-content hits {totals.num_wrong_content_hits},"
        f" cross-tenant hits {totals.num_foreign_hits},"
        f" peak over baseline {totals.peak_bytes >> 20} MiB ({totals.peak_name})"
        f"\n{dict(totals.codes)}"
    )

    assert target.num_deaths == target.num_worker_deaths == 0
    assert target.num_forbidden == 0
    assert totals.num_leaks == 0
    assert totals.num_wrong_content_hits == 0
    assert totals.num_foreign_hits == 0


def test_a_worker_that_dies_is_counted_and_nobody_notices(target: AttackTarget) -> None:
    """Without this the count of dead workers above could be one of something else."""
    for pid in family_of(target.pids["encoder-0"]):
        if b"decode_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            end_of_process = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            assert select.select([end_of_process], [], [], 10)[0] == [end_of_process]
            os.close(end_of_process)

    answers = {target.ask_good(entry) for entry in ENTRIES}

    assert answers == {target.good_answer}
    assert target.num_worker_deaths >= 2
    assert target.num_deaths == 0
