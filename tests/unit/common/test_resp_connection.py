"""Tests of ``chiasm.common.resp_connection`` on a wire that cuts answers where a test says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError

from chiasm.common.resp_connection import KeyedChunk, RespConnection

if TYPE_CHECKING:
    from collections.abc import Sequence

_CONTENTS = [b"\r\n:1\r\n", b"$-1\r\n-ERR", b"x"]
_READ_ANSWERS = b"".join(b":1\r\n$%d\r\n%b\r\n" % (len(c), c) for c in _CONTENTS)
_ERROR = b"-NOPERM this user has no permissions\r\n"


class _CutWire:
    """A wire on which ``answers`` have come up to ``cut`` when the first piece is received."""

    def __init__(self, answers: bytes, cut: int) -> None:
        self._pieces = [answers[:cut], answers[cut:]]
        self.sent = bytearray()

    def send(self, parts: Sequence[memoryview]) -> None:
        for part in parts:
            self.sent += part

    def receive(self, parts: Sequence[memoryview]) -> int:
        self._pieces = [piece for piece in self._pieces if piece]
        if not self._pieces:
            raise RedisConnectionError("Nothing more comes.")
        num_bytes = 0
        for part in parts:
            taken, self._pieces[0] = self._pieces[0][: len(part)], self._pieces[0][len(part) :]
            part[: len(taken)] = taken
            num_bytes += len(taken)
        return num_bytes

    def fill(self, target: memoryview) -> None:
        while target.nbytes:
            target = target[self.receive([target]) :]

    def is_quiet(self) -> bool:
        return not any(self._pieces)

    def abort(self) -> None:
        self._pieces = []

    def close(self) -> None:
        self._pieces = []


def _targets() -> list[KeyedChunk]:
    return [
        KeyedChunk(f"k:{index}", memoryview(bytearray(len(content))))
        for index, content in enumerate(_CONTENTS)
    ]


def _read(answers: bytes, cut: int) -> tuple[bool, list[bytes], RespConnection]:
    targets, connection = _targets(), RespConnection(_CutWire(answers, cut))
    is_whole = connection.read(targets, 5000, lambda index: True)
    return is_whole, [bytes(target.memory) for target in targets], connection


@pytest.mark.parametrize("cut", range(len(_READ_ANSWERS)))
def test_read_takes_its_answers_wherever_they_are_cut(cut: int) -> None:
    is_whole, contents, connection = _read(_READ_ANSWERS, cut)

    assert is_whole
    assert contents == _CONTENTS
    assert connection.is_usable


@pytest.mark.parametrize("num_bytes", range(len(_READ_ANSWERS)))
def test_read_that_breaks_off_anywhere_fails(num_bytes: int) -> None:
    with pytest.raises(RedisConnectionError):
        _read(_READ_ANSWERS[:num_bytes], cut=0)


@pytest.mark.parametrize("index", range(len(_CONTENTS)))
@pytest.mark.parametrize("is_renewed", [True, False])
def test_error_is_read_wherever_it_is_cut(index: int, *, is_renewed: bool) -> None:
    before = b"".join(b":1\r\n$%d\r\n%b\r\n" % (len(c), c) for c in _CONTENTS[:index])
    answers = before + (b":1\r\n" if is_renewed else _ERROR) + _ERROR
    for cut in range(len(answers)):
        with pytest.raises(NoPermissionError, match=r"^NOPERM this user has no permissions$"):
            _read(answers, cut)


@pytest.mark.parametrize("position", range(len(_READ_ANSWERS)))
@pytest.mark.parametrize("byte", [b"\x00", b"-", b":", b"$", b"\r", b"0"])
def test_answer_with_a_wrong_byte_is_never_taken_for_more_than_content(
    position: int, byte: bytes
) -> None:
    answers = _READ_ANSWERS[:position] + byte + _READ_ANSWERS[position + 1 :]
    try:
        is_whole, contents, connection = _read(answers, cut=position)
    except RedisError:
        return
    # Only a changed content is whole; its digest tells.
    assert not is_whole or (contents != _CONTENTS) == (answers != _READ_ANSWERS)
    assert is_whole or not connection.is_usable


@pytest.mark.parametrize("cut", range(16))
def test_write_takes_its_answers_wherever_they_are_cut(cut: int) -> None:
    wire = _CutWire(b"+OK\r\n" * 3, cut)
    connection = RespConnection(wire)
    chunks = [KeyedChunk(f"k:{i}", memoryview(content)) for i, content in enumerate(_CONTENTS)]

    connection.write(chunks, 5000, lambda index: None)

    assert connection.is_usable
    assert bytes(wire.sent) == b"".join(
        b"*5\r\n$3\r\nSET\r\n$3\r\nk:%d\r\n$%d\r\n%b\r\n$2\r\nPX\r\n$4\r\n5000\r\n"
        % (index, len(content), content)
        for index, content in enumerate(_CONTENTS)
    )


def test_requests_of_a_read_renew_and_ask_for_one_byte_too_many() -> None:
    wire = _CutWire(_READ_ANSWERS, 0)
    RespConnection(wire).read(_targets(), 5000, lambda index: True)

    assert bytes(wire.sent) == b"".join(
        b"*3\r\n$7\r\nPEXPIRE\r\n$3\r\nk:%d\r\n$4\r\n5000\r\n"
        b"*4\r\n$8\r\nGETRANGE\r\n$3\r\nk:%d\r\n$1\r\n0\r\n$%d\r\n%d\r\n"
        % (index, index, len(str(len(content))), len(content))
        for index, content in enumerate(_CONTENTS)
    )


def test_an_aborted_or_closed_connection_is_not_usable() -> None:
    connection = RespConnection(_CutWire(b"", 0))
    assert connection.is_usable

    connection.close()
    connection.abort()
    connection.close()

    assert not connection.is_usable
