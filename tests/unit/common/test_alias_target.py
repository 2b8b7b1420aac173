"""Tests of ``chiasm.common.alias_target``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.common.alias_target import AliasRecord, AliasTarget, pack_target, unpack_target
from chiasm.common.envelope import EnvelopeError
from chiasm.common.media import Modality
from chiasm.common.secrets import StoreSecrets

_KEYS = StoreSecrets((bytes(32),)).keys("a")
_SUBJECT = bytes([7] * 32)
_RECORD = AliasRecord(
    uuid="cats/1%20a",
    modality=Modality.IMAGE,
    cache_salt="sälz",
    embedding_id=bytes([1] * 32),
    fingerprint=bytes([2] * 32),
    num_bytes=12345,
    num_tokens=64,
    created_s=1_700_000_000,
    ttl_s=60,
)
_TARGET = AliasTarget(bytes([3] * 32), bytes([4] * 32), _RECORD)


def _round_trip(target: AliasTarget) -> AliasTarget:
    return unpack_target(_KEYS, _SUBJECT, pack_target(_KEYS, _SUBJECT, target))


@pytest.mark.parametrize("url_digest", [b"", bytes([4] * 32)], ids=["no URL", "URL"])
@pytest.mark.parametrize("record", [None, _RECORD], ids=["no record", "record"])
def test_a_target_comes_back_as_it_was(url_digest: bytes, record: AliasRecord | None) -> None:
    target = AliasTarget(bytes(32), url_digest, record)
    assert _round_trip(target) == target


@given(st.text(max_size=128), st.text(max_size=512), st.sampled_from(Modality))
def test_any_texts_come_back_as_they_were(salt: str, uuid: str, modality: Modality) -> None:
    record = dataclasses.replace(_RECORD, cache_salt=salt, uuid=uuid, modality=modality)
    assert _round_trip(dataclasses.replace(_TARGET, record=record)).record == record


def test_names_are_not_to_be_read_in_the_body() -> None:
    body = pack_target(_KEYS, _SUBJECT, _TARGET)
    assert b"cats" not in body
    assert b"image" not in body


def test_names_are_hidden_differently_under_another_hash_and_another_key() -> None:
    other_keys = StoreSecrets((bytes([1] * 32),)).keys("a")
    tails = {
        pack_target(keys, subject, _TARGET)[-20:]
        for keys in (_KEYS, other_keys)
        for subject in (_SUBJECT, bytes(32))
    }
    assert len(tails) == 4


def test_the_form_is_that_of_the_golden_file() -> None:
    golden = bytes.fromhex((Path(__file__).parent / "golden" / "alias_v1.hex").read_text())

    assert pack_target(_KEYS, _SUBJECT, _TARGET) == golden
    assert unpack_target(_KEYS, _SUBJECT, golden) == _TARGET


@given(st.binary(max_size=400))
def test_a_body_that_is_no_alias_is_refused_or_read_in_bounds(body: bytes) -> None:
    try:
        target = unpack_target(_KEYS, _SUBJECT, body)
    except EnvelopeError:
        return
    assert len(target.source_digest) == 32


@pytest.mark.parametrize("length", [0, 31, 33, 63, 65, 151, 160])
def test_a_body_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(EnvelopeError):
        unpack_target(_KEYS, _SUBJECT, pack_target(_KEYS, _SUBJECT, _TARGET)[:length])
