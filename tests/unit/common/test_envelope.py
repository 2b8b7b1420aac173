"""Tests of ``chiasm.common.envelope``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.common.envelope import (
    MAX_BODY_BYTES,
    MAX_ENVELOPE_BYTES,
    EnvelopeError,
    EnvelopeKind,
    seal,
    unseal,
)
from chiasm.common.secrets import StoreSecrets

_OLD = bytes(range(32))
_NEW = bytes(range(1, 33))
_SECRETS = StoreSecrets((_OLD,))
_SUBJECT = bytes([7] * 32)
_BODY = b"body of the entry"
_ENVELOPE = seal(_SECRETS.keys("a"), EnvelopeKind.MANIFEST, _SUBJECT, _BODY)


def _open(envelope: bytes, secrets: StoreSecrets = _SECRETS) -> bytes:
    return unseal(secrets, "a", EnvelopeKind.MANIFEST, _SUBJECT, envelope)


def test_the_form_is_the_documented_one() -> None:
    key_id = _SECRETS.keys("a").key_id.hex()
    assert _ENVELOPE[:-32].hex() == (
        f"4348534d01010000{key_id}{_SUBJECT.hex()}{len(_BODY):08x}{_BODY.hex()}"
    )


@given(st.binary(max_size=200))
def test_a_body_comes_back_as_it_was(body: bytes) -> None:
    assert _open(seal(_SECRETS.keys("a"), EnvelopeKind.MANIFEST, _SUBJECT, body)) == body


@given(st.integers(0, len(_ENVELOPE) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, change: int) -> None:
    tampered = bytearray(_ENVELOPE)
    tampered[position] ^= change
    with pytest.raises(EnvelopeError):
        _open(bytes(tampered))


@given(st.integers(0, len(_ENVELOPE) - 1), st.binary(min_size=1, max_size=8))
def test_a_shorter_or_longer_envelope_is_noticed(length: int, tail: bytes) -> None:
    for tampered in (_ENVELOPE[:length], _ENVELOPE + tail, _ENVELOPE[:length] + tail):
        if tampered != _ENVELOPE:
            with pytest.raises(EnvelopeError):
                _open(tampered)


@given(st.binary(max_size=300))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        _open(data)


def test_an_envelope_holds_only_for_its_tenant_kind_and_subject() -> None:
    kind = EnvelopeKind.MANIFEST
    with pytest.raises(EnvelopeError, match="mac"):
        unseal(_SECRETS, "b", kind, _SUBJECT, _ENVELOPE)
    with pytest.raises(EnvelopeError, match="subject"):
        unseal(_SECRETS, "a", EnvelopeKind.ALIAS, _SUBJECT, _ENVELOPE)
    with pytest.raises(EnvelopeError, match="subject"):
        unseal(_SECRETS, "a", kind, bytes(32), _ENVELOPE)


def test_an_old_generation_opens_until_it_is_retired() -> None:
    assert _open(_ENVELOPE, StoreSecrets((_NEW, _OLD))) == _BODY
    with pytest.raises(EnvelopeError, match="key_id"):
        _open(_ENVELOPE, StoreSecrets((_NEW,)))


def test_a_body_has_a_bound_in_both_directions() -> None:
    keys = _SECRETS.keys("a")
    largest = seal(keys, EnvelopeKind.MANIFEST, _SUBJECT, bytes(MAX_BODY_BYTES))
    assert len(largest) == MAX_ENVELOPE_BYTES
    assert len(_open(largest)) == MAX_BODY_BYTES
    with pytest.raises(EnvelopeError, match="length"):
        _open(largest + b"x")
    with pytest.raises(ValueError, match="holds"):
        seal(keys, EnvelopeKind.MANIFEST, _SUBJECT, bytes(MAX_BODY_BYTES + 1))
