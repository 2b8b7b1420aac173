"""Videos and sound: too many frames, odd wishes, playlists, and clips that unpack to gigabytes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.fakes import bombs, sounds
from tests.fakes.pictures import encode, noise
from tests.fakes.videos import moving_square, still_video, write_video
from tests.harness.attack import ANSWERED, GRPC, REST, Attack, Part, Site, attack, file, frames

INVALID_MEDIA, INVALID_REQUEST, TOO_LARGE = "invalid_media", "invalid_request", "too_large"
MIB = 1 << 20
RATE = 16000
JPEG = encode(Image.new("L", (28, 28), 50), "JPEG")
CLIP = write_video(moving_square(8, 60, 44))
SOUND = sounds.write(sounds.tone(RATE), RATE)
FLAC = sounds.write(sounds.tone(RATE), RATE, "FLAC")

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


def wish_rows(name: str, value: object, code: str) -> list[Attack]:
    fields = {"media_io_kwargs": {"video": {"num_frames": value}}}
    return [
        attack(
            f"num_frames {name}", lambda _: file(CLIP, "video"), code, fields=fields, entries=[REST]
        )
    ]


def playlist_rows(name: str, script: str) -> list[Attack]:
    def data(site: Site) -> bytes:
        address = f"http://127.0.0.1:{site.port}/picture.png"
        return script.format(url=address, secret=site.secret, port=site.port).encode()

    return [
        attack(
            f"playlist as {modality}: {name}",
            lambda site, modality=modality: file(data(site), modality),
            INVALID_MEDIA,
        )
        for modality in ("video", "audio")
    ]


def mov_that_refers(site: Site) -> Part:
    """Return a QuickTime file whose data reference names another file."""
    path = str(site.secret).encode()
    alias = b"alis" + bytes(4) + path
    return file(CLIP.replace(b"url \0\0\0\1", alias[:8]) + path, "video")


def many_frames(_: Site) -> Part:
    return frames([JPEG] * 5000)


def many_frames_and_a_wish(_: Site) -> Part:
    return frames([JPEG] * 5000, num_frames=(1 << 32) - 1)


ROWS = [
    attack("5000 frames", many_frames, TOO_LARGE, INVALID_REQUEST),
    attack("5000 frames and a wish for all", many_frames_and_a_wish, TOO_LARGE, INVALID_REQUEST),
    attack("257 frames", lambda _: frames([JPEG] * 257), TOO_LARGE, INVALID_REQUEST),
    attack(
        "frames of different sizes",
        lambda _: frames([JPEG, encode(noise(9, 9), "JPEG")]),
        INVALID_MEDIA,
    ),
    attack(
        "a frame that is a bomb",
        lambda _: frames([bombs.solid_webp(16383, 10000)] * 2),
        TOO_LARGE,
        INVALID_MEDIA,
    ),
    *(row for name, (value, code) in WISHES.items() for row in wish_rows(name, value, code)),
    attack(
        "num_frames 0 in the part", lambda _: file(CLIP, "video", num_frames=0), INVALID_REQUEST
    ),
    attack(
        "num_frames 2^32 - 1 in the part",
        lambda _: file(CLIP, "video", num_frames=(1 << 32) - 1),
        ANSWERED,
    ),
    attack("fps 2000000", lambda _: file(CLIP, "video", fps=2e6), INVALID_REQUEST),
    attack("fps -1", lambda _: file(CLIP, "video", fps=-1.0), INVALID_REQUEST),
    attack(
        "fps NaN", lambda _: file(CLIP, "video", fps=float("nan")), INVALID_REQUEST, entries=[GRPC]
    ),
    *(row for name, script in PLAYLISTS.items() for row in playlist_rows(name, script)),
    attack("a QuickTime file that refers to another", mov_that_refers, INVALID_MEDIA, ANSWERED),
    attack("a truncated video", lambda _: file(CLIP[: len(CLIP) // 2], "video"), INVALID_MEDIA),
    attack("a picture as video", lambda _: file(JPEG, "video"), INVALID_MEDIA),
    attack(
        "sound with a forged rate",
        lambda _: file(bombs.flac_with_rate(FLAC, 655_350), "audio"),
        INVALID_MEDIA,
    ),
    attack(
        "sound with a rate of 0",
        lambda _: file(bombs.flac_with_rate(FLAC, 0), "audio"),
        INVALID_MEDIA,
    ),
    attack(
        "sound of 2^36 samples by its header",
        lambda _: file(sounds.with_flac_length(FLAC, (1 << 36) - 1), "audio"),
        TOO_LARGE,
    ),
    attack("a truncated FLAC", lambda _: file(FLAC[: len(FLAC) // 2], "audio"), INVALID_MEDIA),
    attack("a picture as sound", lambda _: file(JPEG, "audio"), INVALID_MEDIA),
    attack(
        "9 channels",
        lambda _: file(sounds.write(sounds.tone(RATE, 9), RATE), "audio"),
        INVALID_MEDIA,
    ),
    attack(
        "samples that are no numbers",
        lambda _: file(sounds.write(np.full((RATE, 1), np.nan), RATE, "WAV", "FLOAT"), "audio"),
        INVALID_MEDIA,
    ),
]
SLOW_ROWS = [
    attack(
        "20000 still frames",
        lambda _: file(still_video(20_000, 480), "video", num_frames=4),
        ANSWERED,
    ),
    attack(
        "10 minutes of silence as FLAC",
        lambda _: file(sounds.silence(600, 2, 48_000, "FLAC", "PCM_16"), "audio"),
        TOO_LARGE,
    ),
    attack(
        "an hour of silence as Opus",
        lambda _: file(sounds.silence(3600, 1, 8_000, "OGG", "OPUS"), "audio"),
        TOO_LARGE,
    ),
    attack(
        "8 channels at a forged rate",
        lambda _: file(
            bombs.flac_with_rate(sounds.silence(300, 8, 44_100, "FLAC", "PCM_16"), 655_350), "audio"
        ),
        INVALID_MEDIA,
        TOO_LARGE,
    ),
]
