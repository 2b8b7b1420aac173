"""The page through which services share the cores of a host."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from chiasm.common.cores import CorePage, CorePageError, FixedCores, count_cores, open_cores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOLD_SLOT = """
import sys
from pathlib import Path
from chiasm.common.cores import CorePage
slot = CorePage(Path(sys.argv[1]), cores=8).claim("peer")
slot.set_busy(True)
print("busy", flush=True)
sys.stdin.read()
"""


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def page(tmp_path: Path, clock: Clock) -> Iterator[CorePage]:
    page = CorePage(tmp_path / "cores.page", cores=8, clock=clock)
    yield page
    page.close()


@pytest.fixture
def busy_peer(tmp_path: Path, page: CorePage) -> Iterator[subprocess.Popen[str]]:
    """Run another process that holds a busy slot."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_SLOT, str(tmp_path / "cores.page")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        yield process
        process.kill()


def test_all_cores_are_available_while_no_peer_is_busy(page: CorePage) -> None:
    mine, _peer = page.claim("generator"), page.claim("encoder")

    assert mine.available_threads() == 8


@pytest.mark.parametrize(("num_peers", "share"), [(1, 4), (2, 2), (3, 2), (7, 1), (12, 1)])
def test_cores_are_shared_evenly_with_busy_peers(
    page: CorePage, num_peers: int, share: int
) -> None:
    mine, *peers = (page.claim(f"service-{index}") for index in range(1 + num_peers))
    for peer in peers:
        peer.set_busy(True)

    assert mine.available_threads() == share


def test_own_work_does_not_count(page: CorePage) -> None:
    mine = page.claim("generator")
    mine.set_busy(True)

    assert mine.available_threads() == 8


def test_peer_that_is_done_gives_its_cores_back(page: CorePage) -> None:
    mine, peer = page.claim("generator"), page.claim("encoder")
    peer.set_busy(True)
    assert mine.available_threads() == 4

    peer.set_busy(False)

    assert mine.available_threads() == 8


def test_busy_word_of_another_process_is_seen(
    page: CorePage, busy_peer: subprocess.Popen[str]
) -> None:
    assert busy_peer.poll() is None
    assert page.claim("generator").available_threads() == 4


def test_busy_word_of_a_dead_process_does_not_count(
    page: CorePage, clock: Clock, busy_peer: subprocess.Popen[str]
) -> None:
    mine = page.claim("generator")
    assert mine.available_threads() == 4

    busy_peer.kill()
    os.waitid(os.P_PID, busy_peer.pid, os.WEXITED | os.WNOWAIT)
    clock.now += 1.0

    assert mine.available_threads() == 8


def test_slot_of_a_dead_process_is_claimed_anew(
    page: CorePage, busy_peer: subprocess.Popen[str]
) -> None:
    busy_peer.kill()
    busy_peer.wait()

    slots = [page.claim(f"service-{index}") for index in range(128)]

    assert len(slots) == 128


def test_page_with_every_slot_taken_refuses_another(page: CorePage) -> None:
    slots = [page.claim(f"service-{index}") for index in range(128)]

    with pytest.raises(CorePageError, match="All 128 slots"):
        page.claim("one too many")

    slots[7].release()
    assert page.claim("in time").available_threads() == 8


def test_page_is_private_to_its_user(page: CorePage, tmp_path: Path) -> None:
    assert page.claim("generator").available_threads() == 8
    assert (tmp_path / "cores.page").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"something else", b"CHIASMC1 cut short"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)

    with pytest.raises(CorePageError, match="is not a core page"):
        CorePage(path)

    assert path.read_bytes() == content


def test_page_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorePageError, match=r"absent/cores\.page cannot be opened"):
        CorePage(tmp_path / "absent" / "cores.page")


def test_without_a_page_the_cores_are_fixed() -> None:
    cores = open_cores(None, "encoder", 3)
    cores.set_busy(True)

    assert cores.available_threads() == 3
    assert FixedCores().available_threads() == count_cores()


def test_with_a_page_a_slot_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "cores.page"
    mine, peer = open_cores(path, "encoder", 4), open_cores(path, "generator", 4)
    peer.set_busy(True)

    assert mine.available_threads() == 2


def test_counted_cores_do_not_exceed_the_affinity() -> None:
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))


def test_page_has_room_for_every_process_of_the_largest_stack(page: CorePage) -> None:
    slots = [page.claim(f"encoder-{index}") for index in range(64)]

    slots.append(page.claim("generator"))

    assert len({slot._start for slot in slots}) == 65
