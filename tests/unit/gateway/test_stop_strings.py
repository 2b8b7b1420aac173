"""Stop strings end an answer at the same character however the text was cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chiasm.gateway.stop_strings import StopStrings

ALPHABET = st.text(alphabet="abc", max_size=24)


def run(stops: list[str], pieces: list[str], free: tuple[str, ...] = ()) -> tuple[str, str]:
    watcher = StopStrings(stops)
    text = "".join(watcher.skip(piece) for piece in free)
    assert text == "".join(free)
    text += "".join(watcher.feed(piece) for piece in pieces)
    return (text, watcher.matched) if watcher.matched else (text + watcher.flush(), "")


def reference(stops: list[str], text: str, num_free: int = 0) -> tuple[str, str]:
    """Read character by character; the first end behind what is free wins, then the longest."""
    for end in range(num_free + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: max(num_free, end - len(stop))], stop
    return text, ""


@given(
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(ALPHABET, max_size=6),
)
def test_the_outcome_does_not_depend_on_the_cuts(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == reference(stops, "".join(pieces))


@given(
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(ALPHABET, max_size=3).map(tuple),
    st.lists(ALPHABET, max_size=6),
)
def test_stop_strings_may_begin_but_not_end_in_text_that_was_skipped(
    stops: list[str], free: tuple[str, ...], pieces: list[str]
) -> None:
    text = "".join((*free, *pieces))
    assert run(stops, pieces, free) == reference(stops, text, len("".join(free)))


def test_what_was_skipped_is_shown_even_if_it_was_the_start_of_a_stop_string() -> None:
    assert run(["see no"], [" no", " picture"], ("I", " see")) == ("I see", "see no")


def test_text_that_may_be_the_start_of_a_stop_string_is_held_back() -> None:
    watcher = StopStrings(["STOP"])
    assert watcher.feed("go ST") == "go "
    assert watcher.feed("AND") == "STAND"


def test_a_stop_string_across_pieces_ends_the_answer_before_it() -> None:
    assert run(["STOP"], ["go S", "TO", "P on"]) == ("go ", "STOP")


def test_nothing_comes_after_a_stop_string() -> None:
    watcher = StopStrings(["x"])
    watcher.feed("ax")
    assert watcher.feed("more") == ""


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopStrings([]).feed("anything") == "anything"
