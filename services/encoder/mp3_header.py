"""Tell what an MP3 says of its own length, which may be nothing.

Tags may come first. The first frame may then hold, in place of sound, what the encoder tells; all
numbers are big-endian::

    "ID3" 2  flags 1  size 4  ...   any number of tags; each byte of the size has 7 bits
    frame header 4  [checksum 2]    it tells version, channels and whether there is a checksum
    zeros 9, 17 or 32               the place of what the version says about a frame's sound
    "Xing" or "Info" 4  flags 4     "Info" where all frames are of one size
    [number of frames 4]  [bytes 4] each is there if its flag is

Source: FFmpeg, libavformat/mp3dec.c, which doubts a header in the same way.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mmap

_TAG = struct.Struct(">3s2xB4B")
_FOOTER_FLAG = 0x10
_COUNTS = struct.Struct(">4sIII")
_HAS_BOTH_COUNTS = 3
_CHECKSUM_BYTES = 2
# A file may be this share longer than its header says, for the tags behind its frames.
_TOLERANCE = 16


def is_frame(start: bytes) -> bool:
    """Return whether a frame of MPEG audio may start like this."""
    return len(start) > 1 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0


def tells_length(source: mmap.mmap | bytes) -> bool:
    """Return whether an MP3 tells how many frames it has, and has no more than it tells.

    Where it does not, its length can only be guessed from the size of its first frames.
    """
    at = _skip_tags(source)
    header = source[at : at + 4]
    if not is_frame(header) or len(header) < 4:
        return False
    counts_at = at + len(header) + _num_zeros(header)
    for offset in (counts_at, counts_at + _CHECKSUM_BYTES):
        counts = source[offset : offset + _COUNTS.size]
        if len(counts) == _COUNTS.size and counts[:4] in (b"Xing", b"Info"):
            _, flags, num_frames, num_bytes = _COUNTS.unpack(counts)
            has_both = flags & _HAS_BOTH_COUNTS == _HAS_BOTH_COUNTS
            is_whole = len(source) - at <= num_bytes + num_bytes // _TOLERANCE
            return bool(has_both and num_frames and is_whole)
    return False


def _skip_tags(source: mmap.mmap | bytes) -> int:
    """Return where the first byte behind the tags is."""
    at = 0
    while source[at : at + 3] == b"ID3" and at + _TAG.size <= len(source):
        _, flags, *digits = _TAG.unpack(source[at : at + _TAG.size])
        size = sum(
            (digit & 0x7F) << shift for digit, shift in zip(digits, (21, 14, 7, 0), strict=True)
        )
        at += size + _TAG.size * (2 if flags & _FOOTER_FLAG else 1)
    return at


def _num_zeros(header: bytes) -> int:
    is_mono = header[3] >> 6 == 3
    if header[1] >> 3 & 3 == 3:  # MPEG 1; the others have half its frames
        return 17 if is_mono else 32
    return 9 if is_mono else 17
