"""Domain types of media items: identity, layout and tensors, free of protobuf and torch."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

DIGEST_BYTES = 32


class Modality(enum.Enum):
    """Kind of a media item; the value is the word used in messages and cache keys."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"


class DataType(enum.Enum):
    """Element type of a tensor; elements are little-endian."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Bytes of one element."""
        return 4 if self is DataType.FLOAT32 else 2


class TensorRole(enum.Enum):
    """What the generator does with one tensor of an embedding."""

    SPLICE = "splice"
    DEEPSTACK = "deepstack"
    CROSS_ATTENTION = "cross_attention"


class CacheStatus(enum.Enum):
    """How an embedding came to be available for a request."""

    HIT = "hit"
    MISS = "miss"
    INLINE = "inline"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Type and shape of one tensor of an embedding; ``level`` is the decoder layer of deepstack."""

    role: TensorRole
    dtype: DataType
    shape: tuple[int, ...]
    level: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * self.dtype.num_bytes


@dataclass(frozen=True, slots=True)
class EmbeddingRef:
    """Names an embedding and tells its shapes; this is what travels instead of tensors.

    Attributes:
        embedding_id: Keyed digest of tenant, fingerprint, options and source; 32 bytes.
        fingerprint: Digest of all that makes the embedding except the source; 32 bytes.
        modality: Kind of the item.
        tensors: Specs in storage order.
    """

    embedding_id: bytes
    fingerprint: bytes
    modality: Modality
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.num_bytes for spec in self.tensors)

    @property
    def num_splice_rows(self) -> int:
        """Rows of the spliced tensor; 0 if nothing is spliced."""
        return sum(spec.shape[0] for spec in self.tensors if spec.role is TensorRole.SPLICE)


@dataclass(frozen=True, slots=True)
class TokenRun:
    """A run of ``count`` equal tokens; ``is_embedding`` if each takes a row of the embedding."""

    token_id: int
    count: int
    is_embedding: bool


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """Patches of an item by time, height and width, before merging."""

    t: int
    h: int
    w: int


@dataclass(frozen=True, slots=True)
class Placeholder:
    """The token that stands for one item before its expansion is spliced in.

    Attributes:
        token_id: The token, which a chat template spells.
        margin: Text that is put before and behind the token in the rendered prompt.
    """

    token_id: int
    margin: str = ""


@dataclass(frozen=True, slots=True)
class MediaLayout:
    """How one media item stands in the prompt; see ``MediaLayout`` in ``media.proto``."""

    runs: tuple[TokenRun, ...]
    grid: PatchGrid | None = None
    spatial_merge_size: int = 0
    tile_ids: tuple[int, ...] = ()
    aspect_ratio_id: int = 0
    timestamps_s: tuple[float, ...] = ()
    audio_lengths: tuple[int, ...] = ()
    attends_both_ways: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole expansion."""
        return sum(run.count for run in self.runs)

    @property
    def num_embedding_tokens(self) -> int:
        """Tokens of the expansion that take a row of the embedding."""
        return sum(run.count for run in self.runs if run.is_embedding)

    def expand(self) -> list[int]:
        """Return the token ids that replace the item's placeholder token."""
        return [run.token_id for run in self.runs for _ in range(run.count)]


@dataclass(frozen=True, slots=True)
class ProcessingOptions:
    """Client's wishes for preprocessing one item; ``None`` takes the checkpoint's own value."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    background_rgb: int | None = None


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """A media item at ``offset`` of an expanded prompt; ``is_ready`` if its embedding is stored."""

    offset: int
    ref: EmbeddingRef
    layout: MediaLayout
    is_ready: bool

    @property
    def end(self) -> int:
        """Position after the last token of the expansion."""
        return self.offset + self.layout.num_tokens

    @property
    def both_ways(self) -> tuple[int, int] | None:
        """Positions, from the first to before the last, that attend to one another both ways."""
        if not self.layout.attends_both_ways:
            return None
        runs = [run.is_embedding for run in self.layout.runs]
        before = sum(run.count for run in self.layout.runs[: runs.index(True)])
        behind = sum(run.count for run in self.layout.runs[len(runs) - runs[::-1].index(True) :])
        return self.offset + before, self.end - behind


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Who asks and how urgent it is; see ``RequestContext`` in ``media.proto``."""

    request_id: str
    attempt_id: str
    tenant: str
    model: str = ""
    adapter: str = ""
    cache_salt: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Embedding:
    """The tensors of one media item with their ref; each buffer holds one tensor's bytes."""

    ref: EmbeddingRef
    buffers: Sequence[memoryview]
