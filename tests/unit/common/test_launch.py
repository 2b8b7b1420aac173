"""Services are imported and loaded without a look for garbage among what stays."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest

from chiasm.common.launch import keep_loaded, launch

if TYPE_CHECKING:
    from pathlib import Path

SERVICE = """
import gc
seen = [gc.isenabled()]
kept = [[] for _ in range(1000)]
def main(argv):
    seen.append(gc.isenabled())
    seen.append(any(one is kept[0] for one in gc.get_objects()))
    seen.append(argv)
"""


class Knot:
    """Only a collection frees it: it refers to itself."""

    def __init__(self) -> None:
        self.me = self


def test_a_service_is_imported_without_collections_and_its_modules_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_service.py").write_text(SERVICE)
    monkeypatch.syspath_prepend(tmp_path)

    launch("some_service", ["--flag"])

    from some_service import seen  # type: ignore[import-not-found]

    is_collected_while_imported, is_collected_by_main, is_looked_at, argv = seen
    assert not is_collected_while_imported
    assert is_collected_by_main
    assert not is_looked_at
    assert argv == ["--flag"]


def test_a_service_that_cannot_be_imported_leaves_collections_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_service.py").write_text("raise ValueError('no')")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ValueError, match="no"):
        launch("broken_service")

    assert gc.isenabled()


def test_what_loading_leaves_behind_is_freed_and_the_rest_is_not_looked_at_again() -> None:
    kept, knot = Knot(), Knot()
    left = weakref.ref(knot)
    del knot

    keep_loaded()

    assert left() is None
    assert not any(one is kept for one in gc.get_objects())
