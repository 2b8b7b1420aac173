"""Videos and sound: too many frames, odd wishes, playlists, and clips that unpack to gigabytes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tests.fakes import bombs, sounds
from tests.fakes.pictures import encode, noise
from tests.fakes.videos import H264, moving_square, still_video, write_video
from tests.harness.attack import ANSWERED, GRPC, REST, Attack, Part, Site, attack, file, frames

if TYPE_CHECKING:
    from collections.abc import Callable

INVALID_MEDIA, INVALID_REQUEST, TOO_LARGE = "invalid_media", "invalid_request", "too_large"
RATE, FORGED_RATE = 16000, 655_350
JPEG = encode(Image.new("L", (28, 28), 50), "JPEG")
CLIP = write_video(moving_square(8, 60, 44))
FLAC = sounds.write(sounds.tone(RATE), RATE, "FLAC")
# The start of an IAMF stream.
IMMERSIVE = b"\xf8\x06iamf\x01\x01" + bytes(600)

WISHES: dict[str, tuple[object, str]] = {
    "-1": (-1, ANSWERED),
    "0": (0, INVALID_REQUEST),
    "-2": (-2, INVALID_REQUEST),
    "2^32 - 1": ((1 << 32) - 1, ANSWERED),
    "2^63": (1 << 63, INVALID_REQUEST),
    "NaN": (float("nan"), INVALID_REQUEST),
    "1e308": (1e308, INVALID_REQUEST),
    "a string": ("9", INVALID_REQUEST),
    "true": (True, INVALID_REQUEST),
}
PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "m3u8 of a file": "#EXTM3U\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n",
    "concat script": "ffconcat version 1.0\nfile {secret}\n",
    "concat script of a URL": "ffconcat version 1.0\nfile {url}\n",
    "concat protocol": "concat:{secret}|{secret}",
    "subfile protocol": "subfile,,start,0,end,99,,:{secret}",
    "DASH manifest": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'>"
    "<BaseURL>{url}</BaseURL></MPD>",
    "SDP": "v=0\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n",
    "an image sequence": "{secret}%03d.png",
}


def video(name: str, make: Callable[[], bytes], *codes: str, **wishes: object) -> Attack:
    return attack(name, lambda _: file(make(), "video", **wishes), *codes)


def sound(name: str, make: Callable[[], bytes], *codes: str) -> Attack:
    return attack(name, lambda _: file(make(), "audio"), *codes)


def wish_row(name: str, value: object, code: str) -> Attack:
    fields = {"media_io_kwargs": {"video": {"num_frames": value}}}
    clip = file(CLIP, "video")
    return attack(f"num_frames {name}", clip, code, fields=fields, entries=[REST])


def playlist_row(name: str, script: str, modality: str) -> Attack:
    def make(site: Site) -> Part:
        address = f"http://127.0.0.1:{site.port}/picture.png"
        content = script.format(url=address, secret=site.secret, port=site.port)
        return file(content.encode(), modality)

    return attack(f"playlist as {modality}: {name}", make, INVALID_MEDIA)


def fps_of_no_number(_: Site) -> Part:
    # JSON cannot spell it; the REST body would be no JSON at all.
    return file(CLIP, "video", fps=float("nan"))


def encrypted() -> bytes:
    return write_video(moving_square(8, 60, 44), H264, key="00112233445566778899aabbccddeeff")


def samples_of_no_number() -> bytes:
    return sounds.write(np.full((RATE, 1), np.nan, np.float32), RATE, "WAV", "FLOAT")


def forged_bomb() -> bytes:
    return bombs.flac_with_rate(sounds.silence(300, 8, 44_100, "FLAC", "PCM_16"), FORGED_RATE)


def sizes_that_differ() -> list[bytes]:
    return [JPEG, encode(noise(9, 9), "JPEG")]


TOO_MANY = (TOO_LARGE, INVALID_REQUEST)
ALL_FRAMES = (1 << 32) - 1
ROWS = [
    attack("8 frames", frames([JPEG] * 8), ANSWERED),
    sound("a second of sound", lambda: sounds.write(sounds.tone(RATE), RATE), ANSWERED),
    attack("5000 frames", frames([JPEG] * 5000), *TOO_MANY),
    attack("5000 frames, all wished", frames([JPEG] * 5000, num_frames=ALL_FRAMES), *TOO_MANY),
    attack("257 frames", frames([JPEG] * 257), *TOO_MANY),
    attack("frames of different sizes", frames(sizes_that_differ()), INVALID_MEDIA),
    attack("a frame that is a bomb", frames([bombs.solid_webp(16383, 10000)] * 2), TOO_LARGE),
    *(wish_row(name, value, code) for name, (value, code) in WISHES.items()),
    video("num_frames 0 in the part", lambda: CLIP, INVALID_REQUEST, num_frames=0),
    video("num_frames 2^32 - 1 in the part", lambda: CLIP, ANSWERED, num_frames=ALL_FRAMES),
    video("fps 2000000", lambda: CLIP, INVALID_REQUEST, fps=2e6),
    video("fps -1", lambda: CLIP, INVALID_REQUEST, fps=-1.0),
    attack("fps NaN", fps_of_no_number, INVALID_REQUEST, entries=[GRPC]),
    *(
        playlist_row(name, script, modality)
        for name, script in PLAYLISTS.items()
        for modality in ("video", "audio")
    ),
    video("a truncated video", lambda: CLIP[: len(CLIP) // 2], INVALID_MEDIA),
    video("an encrypted video", encrypted, INVALID_MEDIA),
    video("immersive sound as video", lambda: IMMERSIVE, INVALID_MEDIA),
    sound("immersive sound", lambda: IMMERSIVE, INVALID_MEDIA),
    video("a picture as video", lambda: JPEG, INVALID_MEDIA),
    sound("a forged rate", partial(bombs.flac_with_rate, FLAC, FORGED_RATE), INVALID_MEDIA),
    sound("a rate of 0", partial(bombs.flac_with_rate, FLAC, 0), INVALID_MEDIA),
    sound("2^36 samples", partial(sounds.with_flac_length, FLAC, (1 << 36) - 1), TOO_LARGE),
    sound("a truncated FLAC", lambda: FLAC[: len(FLAC) // 2], INVALID_MEDIA),
    sound("a picture as sound", lambda: JPEG, INVALID_MEDIA),
    sound("9 channels", lambda: sounds.write(sounds.tone(RATE, 9), RATE), INVALID_MEDIA),
    sound("samples that are no numbers", samples_of_no_number, INVALID_MEDIA),
]
SLOW_ROWS = [
    video("20000 still frames", partial(still_video, 20_000, 480), ANSWERED, num_frames=4),
    sound(
        "10 minutes of silence as FLAC",
        partial(sounds.silence, 600, 2, 48_000, "FLAC", "PCM_16"),
        TOO_LARGE,
    ),
    sound(
        "an hour of silence as Opus",
        partial(sounds.silence, 3600, 1, 8_000, "OGG", "OPUS"),
        TOO_LARGE,
    ),
    sound("8 channels at a forged rate", forged_bomb, INVALID_MEDIA),
]
