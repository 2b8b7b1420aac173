"""Tests of ``chiasm.common.identity``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chiasm.common.errors import InvalidRequestError
from chiasm.common.identity import (
    AliasName,
    EmbeddingSource,
    Value,
    alias_hash,
    embedding_id,
    encode_value,
    source_digest,
    tensor_digest,
    url_digest,
    validate_cache_salt,
    validate_uuid,
)
from chiasm.common.media import DataType, Modality, ProcessingOptions

if TYPE_CHECKING:
    from collections.abc import Callable
from chiasm.common.secrets import StoreSecrets

_SECRETS = StoreSecrets((bytes(32),))
_SOURCE = EmbeddingSource(
    fingerprint=bytes(32),
    modality=Modality.IMAGE,
    options=ProcessingOptions(),
    cache_salt="",
    source_digest=source_digest(b"picture"),
)

_values: st.SearchStrategy[Value] = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
)
_options = st.builds(
    ProcessingOptions,
    min_pixels=st.none() | st.integers(0, 4),
    max_pixels=st.none() | st.integers(0, 4),
    fps=st.none() | st.sampled_from([0.5, 1.0, 2.0]),
    num_frames=st.none() | st.integers(0, 4),
    background_rgb=st.none() | st.integers(0, 4),
)
_sources = st.builds(
    EmbeddingSource,
    fingerprint=st.binary(max_size=3),
    modality=st.sampled_from(Modality),
    options=_options,
    cache_salt=st.text(max_size=3),
    source_digest=st.binary(max_size=3),
)
_shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def _same(left: Value, right: Value) -> bool:
    """Compare with types and the sign of zero, which ``==`` ignores."""
    return repr(left) == repr(right)


@given(_values, _values)
def test_different_values_have_different_forms(left: Value, right: Value) -> None:
    assert (encode_value(left) == encode_value(right)) == _same(left, right)


def test_values_that_join_to_the_same_bytes_have_different_forms() -> None:
    values: list[Value] = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        "abc",
        b"abc",
        (b"ab", b"c"),
        (("ab",), "c"),
        1,
        1.0,
        "1",
        b"1",
        None,
        "",
        b"",
        (),
        0,
    ]
    assert len({encode_value(value) for value in values}) == len(values)


def test_a_truth_value_is_refused_because_it_would_equal_a_number() -> None:
    with pytest.raises(TypeError):
        encode_value((True,))


@given(_sources, _sources)
def test_different_sources_have_different_ids(
    left: EmbeddingSource, right: EmbeddingSource
) -> None:
    keys = _SECRETS.keys("a")
    assert (embedding_id(keys, left) == embedding_id(keys, right)) == (left == right)


@given(_shapes, _shapes, st.sampled_from(DataType), st.sampled_from(DataType))
def test_the_same_bytes_in_another_shape_or_type_have_another_digest(
    left: tuple[int, ...], right: tuple[int, ...], left_type: DataType, right_type: DataType
) -> None:
    assume((left, left_type) != (right, right_type))
    data = bytes(64)
    assert tensor_digest(left_type, left, data) != tensor_digest(right_type, right, data)


@given(st.text(max_size=8), st.text(max_size=8))
def test_another_tenant_has_another_id_and_alias(left: str, right: str) -> None:
    assume(left != right)
    name = AliasName(Modality.IMAGE, "", "cat")
    assert embedding_id(_SECRETS.keys(left), _SOURCE) != embedding_id(_SECRETS.keys(right), _SOURCE)
    assert alias_hash(_SECRETS.keys(left), name) != alias_hash(_SECRETS.keys(right), name)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": bytes([1] * 32)},
        {"modality": Modality.VIDEO},
        {"options": ProcessingOptions(max_pixels=1000)},
        {"options": ProcessingOptions(min_pixels=1000)},
        {"options": ProcessingOptions(num_frames=0)},
        {"cache_salt": "salt"},
        {"source_digest": source_digest(b"other")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_part_of_a_source_changes_the_id(change: dict[str, object]) -> None:
    keys = _SECRETS.keys("a")
    other = dataclasses.replace(_SOURCE, **change)  # type: ignore[arg-type]  # values vary by name
    assert embedding_id(keys, other) != embedding_id(keys, _SOURCE)


def test_the_same_source_has_the_same_id_and_another_secret_another() -> None:
    keys = _SECRETS.keys("a")
    assert embedding_id(keys, _SOURCE) == embedding_id(keys, dataclasses.replace(_SOURCE))
    assert embedding_id(StoreSecrets.generate().keys("a"), _SOURCE) != embedding_id(keys, _SOURCE)


def test_ids_stay_the_same_from_version_to_version() -> None:
    keys = _SECRETS.keys("a")
    name = AliasName(Modality.IMAGE, "", "cat")
    assert embedding_id(keys, _SOURCE).hex() == (
        "a37d1e46cef2afb902d236045bbdf2cb6426263b4806c92fe8cca1a58150139b"
    )
    assert alias_hash(keys, name).hex() == (
        "3d8c18ae3b3267168faa6d6d65d7a891d85d30c374817eaab3ceee7f7fa919bc"
    )


def test_a_whole_number_of_frames_per_second_is_the_same_however_it_is_written() -> None:
    keys = _SECRETS.keys("a")
    ids = {
        embedding_id(keys, dataclasses.replace(_SOURCE, options=ProcessingOptions(fps=fps)))
        for fps in (2, 2.0)
    }
    assert len(ids) == 1


@given(
    st.builds(AliasName, st.sampled_from(Modality), st.text(max_size=3), st.text(max_size=3)),
    st.builds(AliasName, st.sampled_from(Modality), st.text(max_size=3), st.text(max_size=3)),
)
def test_different_names_have_different_hashes(left: AliasName, right: AliasName) -> None:
    keys = _SECRETS.keys("a")
    assert (alias_hash(keys, left) == alias_hash(keys, right)) == (left == right)


def test_digests_of_one_content_differ_by_what_it_is() -> None:
    digests = {
        source_digest(b"x"),
        url_digest("x"),
        tensor_digest(DataType.FLOAT16, (1,), b"x"),
    }
    assert len(digests) == 3
    assert all(len(digest) == 32 for digest in digests)


@pytest.mark.parametrize(
    "uuid", ["a", "x" * 512, "550e8400-e29b-41d4-a716-446655440000", "https://h/p?q=1#f", "a%20b"]
)
def test_a_uuid_of_uri_characters_is_accepted(uuid: str) -> None:
    assert not is_refused(validate_uuid, uuid, "param")


@pytest.mark.parametrize(
    "uuid",
    ["", "x" * 513, "x" * (4 << 20), "a b", "a\r\nb", "a\0", "é", "\U0001f600", "\u202e", "a\\b"],
    ids=["empty", "513", "4MB", "space", "crlf", "nul", "accent", "emoji", "rtl", "backslash"],
)
def test_any_other_uuid_is_refused_and_the_part_named(uuid: str) -> None:
    with pytest.raises(InvalidRequestError, match="1 to 512 characters") as caught:
        validate_uuid(uuid, "messages[0].content[1]")
    assert caught.value.param == "messages[0].content[1]"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("salt", ["a", "x" * 128, "user 7", "grün"])
def test_a_printable_cache_salt_is_accepted(salt: str) -> None:
    assert not is_refused(validate_cache_salt, salt)


def is_refused(validate: Callable[..., None], *arguments: str) -> bool:
    try:
        validate(*arguments)
    except InvalidRequestError:
        return True
    return False


@pytest.mark.parametrize("salt", ["x" * 129, "a@b", "a/b", "a\\b", "a\0", "a\n", "\ud800"])
def test_any_other_cache_salt_is_refused(salt: str) -> None:
    with pytest.raises(InvalidRequestError, match="at most 128 characters") as caught:
        validate_cache_salt(salt)
    assert caught.value.param == "cache_salt"


def test_an_empty_cache_salt_is_refused_where_one_was_given() -> None:
    with pytest.raises(InvalidRequestError, match="must be a non-empty string if provided"):
        validate_cache_salt("")
