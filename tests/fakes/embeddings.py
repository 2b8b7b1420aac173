"""Embeddings with random content for tests of what carries them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from chiasm.common.embedding_store import DEFAULT_TTL_S, EmbeddingStore
from chiasm.common.guarded_redis import CallBudget
from chiasm.common.media import (
    DataType,
    Embedding,
    EmbeddingRef,
    MediaLayout,
    Modality,
    PatchGrid,
    TensorRole,
    TensorSpec,
    TokenRun,
)

if TYPE_CHECKING:
    from chiasm.common.secrets import StoreSecrets

_PATIENCE_S = 1.0


def make_ref(
    num_rows: int = 6, width: int = 8, num_deepstack: int = 0, seed: int = 0
) -> EmbeddingRef:
    """Return a ref of an image with random ids and ``num_deepstack`` more tensors."""
    rng = random.Random(seed)
    shape = (num_rows, width)
    levels = range(1, num_deepstack + 1)
    return EmbeddingRef(
        embedding_id=rng.randbytes(32),
        fingerprint=rng.randbytes(32),
        modality=Modality.IMAGE,
        tensors=(
            TensorSpec(TensorRole.SPLICE, DataType.BFLOAT16, shape),
            *(TensorSpec(TensorRole.DEEPSTACK, DataType.FLOAT32, shape, level) for level in levels),
        ),
    )


def make_embedding(ref: EmbeddingRef, seed: int = 0) -> Embedding:
    """Return an embedding for ``ref`` with random bytes."""
    rng = random.Random(seed)
    return Embedding(ref, [memoryview(rng.randbytes(spec.num_bytes)) for spec in ref.tensors])


def make_layout(ref: EmbeddingRef) -> MediaLayout:
    """Return a layout with a start token, the rows of ``ref`` and an end token."""
    return MediaLayout(
        runs=(
            TokenRun(1, 1, is_embedding=False),
            TokenRun(3, ref.num_splice_rows, is_embedding=True),
            TokenRun(2, 1, is_embedding=False),
        ),
        grid=PatchGrid(1, 2, 2 * ref.num_splice_rows),
        spatial_merge_size=2,
        timestamps_s=(0.0, 0.5),
    )


def patient_store(
    redis_url: str,
    secrets: StoreSecrets,
    ttl_s: float = DEFAULT_TTL_S,
    tenant_bytes: int | None = None,
) -> EmbeddingStore:
    """Return a store that waits for a Redis which is well, however busy the machine is."""
    return EmbeddingStore.connect(
        redis_url, secrets, ttl_s, CallBudget.of(_PATIENCE_S), tenant_bytes
    )
