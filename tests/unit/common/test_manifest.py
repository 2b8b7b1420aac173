"""Tests of ``chiasm.common.manifest``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.common.chunks import CHUNK_BYTES, chunk_spans
from chiasm.common.envelope import EnvelopeError, EnvelopeKind, seal
from chiasm.common.manifest import (
    MAX_EMBEDDING_BYTES,
    Manifest,
    seal_manifest,
    unseal_manifest,
)
from chiasm.common.media import DataType, EmbeddingRef, TensorRole, TensorSpec
from chiasm.common.secrets import StoreSecrets
from tests.fakes.embeddings import make_layout, make_ref

_SECRETS = StoreSecrets((bytes(32),))
_KEYS = _SECRETS.keys("a")


def _manifest(ref: EmbeddingRef, chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    spans = chunk_spans(ref, chunk_bytes)
    digests = tuple(index.to_bytes(32, "big") for index in range(len(spans)))
    return Manifest(ref, make_layout(ref), bytes(16), chunk_bytes, digests)


def _unseal(manifest: Manifest) -> Manifest:
    envelope = seal_manifest(_KEYS, manifest)
    return unseal_manifest(_SECRETS, "a", manifest.ref.embedding_id, envelope)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.integers(1, 300))
def test_a_manifest_comes_back_as_it_was(
    num_rows: int, width: int, num_deepstack: int, chunk_bytes: int
) -> None:
    manifest = _manifest(make_ref(num_rows, width, num_deepstack), chunk_bytes)
    assert _unseal(manifest) == manifest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chunk_bytes": 0}, "size"),
        ({"chunk_bytes": CHUNK_BYTES + 1}, "size"),
        ({"chunk_digests": ()}, "chunks"),
        ({"chunk_digests": (bytes(32),) * 2}, "chunks"),
        ({"layout": make_layout(make_ref(num_rows=7))}, "layout"),
        ({"ref": make_ref(num_rows=0)}, "body"),
        ({"ref": dataclasses.replace(make_ref(), tensors=())}, "body"),
        ({"ref": dataclasses.replace(make_ref(), fingerprint=b"short")}, "body"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    change: dict[str, object], reason: str
) -> None:
    manifest = dataclasses.replace(_manifest(make_ref()), **change)  # type: ignore[arg-type]  # by name
    with pytest.raises(EnvelopeError, match=reason):
        _unseal(manifest)


def test_the_form_is_that_of_the_golden_file() -> None:
    manifest = _manifest(make_ref(num_deepstack=1), chunk_bytes=100)
    golden = bytes.fromhex((Path(__file__).parent / "golden" / "manifest_v1.hex").read_text())

    assert seal_manifest(_KEYS, manifest) == golden
    assert unseal_manifest(_SECRETS, "a", manifest.ref.embedding_id, golden) == manifest


def test_an_embedding_over_the_bound_is_refused_before_anything_is_allocated() -> None:
    spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (6, MAX_EMBEDDING_BYTES // 16))
    ref = dataclasses.replace(make_ref(), tensors=(spec,))
    with pytest.raises(EnvelopeError, match="size"):
        _unseal(dataclasses.replace(_manifest(make_ref()), ref=ref))


@given(st.binary(max_size=200))
def test_a_body_of_our_own_that_is_no_manifest_is_refused(body: bytes) -> None:
    envelope = seal(_KEYS, EnvelopeKind.MANIFEST, bytes(32), body)
    with pytest.raises(EnvelopeError):
        unseal_manifest(_SECRETS, "a", bytes(32), envelope)
