"""Media items as things of their own: what is kept, what it took, what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chiasm.common.media import CacheStatus, Modality
    from chiasm.common.tenant_scan import ScanCursor

    from .chat_request import MediaItem


@dataclass(frozen=True, slots=True)
class MediaReceipt:
    """How a media item of a request came to be available, and what it took.

    Attributes:
        uuid: Client's own name for the item; empty: none.
        modality: Kind of the item.
        num_tokens: Tokens that stand for it in the prompt.
        cache_status: Found in the store, encoded and stored, or encoded and not stored.
        fetch_s: Seconds that fetching took; 0 if nothing was fetched.
        decode_s: Seconds that decoding took; 0 if nothing was decoded for this request.
        encode_s: Seconds of preprocessing and tower, their waits included; 0 without them.
    """

    uuid: str
    modality: Modality
    num_tokens: int
    cache_status: CacheStatus
    fetch_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MediaObject:
    """A media item that is kept under a name; see ``MediaObject`` in ``chat.proto``."""

    uuid: str
    modality: Modality
    num_tokens: int
    num_bytes: int
    created_s: int
    expires_s: int
    ttl_s: int


@dataclass(frozen=True, slots=True)
class MediaName:
    """What names a kept item; without a modality the first kind that has the uuid is meant."""

    uuid: str
    modality: Modality | None
    cache_salt: str


@dataclass(frozen=True, slots=True)
class MediaRequest:
    """A media item to put or to estimate.

    Attributes:
        request_id: Id of the call.
        model: Served model name; empty: the only one.
        cache_salt: Client's salt; empty: none.
        item: The item.
        ttl_s: Seconds to keep it after each use; ``None``: the server's own time.
    """

    request_id: str
    model: str
    cache_salt: str
    item: MediaItem
    ttl_s: int | None = None


@dataclass(frozen=True, slots=True)
class PutMedia:
    """A media item that is kept now, and what that took."""

    media: MediaObject
    receipt: MediaReceipt


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which page of the kept items with a salt is wanted."""

    cache_salt: str
    start: ScanCursor
    max_items: int


@dataclass(frozen=True, slots=True)
class MediaPage:
    """A page of kept items, and where the next one begins; empty after the last one."""

    media: tuple[MediaObject, ...]
    last_id: str


@dataclass(frozen=True, slots=True)
class MediaEstimate:
    """What an item would cost; see ``EstimateMediaResponse`` in ``chat.proto``."""

    num_tokens: int
    num_pixels: int
    num_queue_pixels: int
    cache_status: CacheStatus
