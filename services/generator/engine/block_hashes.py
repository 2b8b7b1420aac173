"""Name full blocks by all that their keys and values depend on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from chiasm.common.media import MediaSpan
    from chiasm.generator.engine.sequence import Sequence

_DIGEST_BYTES = 32


def extend_block_hashes(sequence: Sequence, block_size: int, num_blocks: int) -> list[bytes]:
    """Return the hashes of at least the first ``num_blocks`` blocks of ``sequence``.

    A hash covers tenant, salt and adapter, all tokens up to the end of the block, and each media
    item that reaches into it: placeholders look alike, their embeddings and grids do not.

    Args:
        sequence: Its ``block_hashes`` are extended in place.
        block_size: Tokens per block.
        num_blocks: Full blocks of known tokens.

    Source: vLLM, "Automatic prefix caching"; keyed by media and tenant as ``DESIGN.md`` 7 says.
    """
    hashes = sequence.block_hashes
    for index in range(len(hashes), num_blocks):
        start = index * block_size
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        digest.update(hashes[-1] if hashes else _root(sequence))
        tokens = np.array(sequence.token_ids[start : start + block_size], dtype=np.int64)
        digest.update(tokens.tobytes())
        for span in sequence.prompt.spans:
            if span.offset < start + block_size and span.end > start:
                digest.update(_span_key(span, span.offset - start))
        hashes.append(digest.digest())
    return hashes


def _root(sequence: Sequence) -> bytes:
    origin = sequence.origin
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in (origin.tenant, origin.cache_salt, origin.adapter):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def _span_key(span: MediaSpan, offset: int) -> bytes:
    """Return what tells one media item at ``offset`` of a block from another; a fixed length."""
    layout = span.layout
    grid = (layout.grid.t, layout.grid.h, layout.grid.w) if layout.grid else (0, 0, 0)
    numbers = (offset, *grid, layout.spatial_merge_size, int(layout.attends_both_ways))
    key = np.array(numbers, dtype=np.int64).tobytes()
    return span.ref.embedding_id + span.ref.fingerprint + key
