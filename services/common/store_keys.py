"""Name the keys of an embedding in Redis; ``embedding_store`` draws what they hold."""

from __future__ import annotations

from dataclasses import dataclass

from chiasm.common.secrets import tenant_tag


@dataclass(frozen=True, slots=True)
class Written:
    """One write of an embedding; names its chunks."""

    embedding_id: bytes
    write_id: bytes
    num_chunks: int

    def chunk_keys(self, tenant: str) -> list[str]:
        """Return the keys of its chunks, in order."""
        prefix = f"chiasm:{tenant_tag(tenant)}:{self.embedding_id.hex()}:{self.write_id.hex()}"
        return [f"{prefix}:{index}" for index in range(self.num_chunks)]


def manifest_key(tenant: str, embedding_id: bytes) -> str:
    """Return the key of an embedding's manifest, which any write of it may replace."""
    return f"chiasm:{tenant_tag(tenant)}:{embedding_id.hex()}:m"
