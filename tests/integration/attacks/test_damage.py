"""Files of every kind, damaged at random places: each is answered or refused, and harms nobody."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from tests.fakes import bombs, sounds
from tests.fakes.pictures import encode, noise, png_with_late_exif
from tests.fakes.videos import KINDS, moving_square, write_video
from tests.harness.attack import ANSWERED, ENTRIES, Part, file, frames, tensor_file
from tests.integration.attacks.identity_attacks import DATA, WIDTH, torch_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.harness.attack_target import AttackTarget

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_DAMAGED = 60
RATE = 16000
REFUSALS = ("invalid_media", "too_large", "invalid_embedding", "invalid_request", "prompt_too_long")
SQUARES = moving_square(8, 60, 44)


def as_video(data: bytes) -> Part:
    return file(data, "video")


def as_sound(data: bytes) -> Part:
    return file(data, "audio")


def as_frame(data: bytes) -> Part:
    return frames([data, data])


PICTURES = {
    kind: encode(noise(40, 30), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
}
SOUND = sounds.tone(RATE // 2)
SEEDS: dict[str, tuple[bytes, Callable[[bytes], Part]]] = {
    **{f"picture {kind}": (data, file) for kind, data in PICTURES.items()},
    "picture with Exif behind": (png_with_late_exif(noise(40, 30), 6), file),
    "a frame": (PICTURES["JPEG"], as_frame),
    **{f"video {name}": (write_video(SQUARES, kind), as_video) for name, kind in KINDS.items()},
    **{
        f"sound {kind}": (sounds.write(SOUND, RATE, kind), as_sound)
        for kind in ("WAV", "FLAC", "OGG", "MP3")
    },
    "sound in MP4": (sounds.mux(SOUND, RATE, "ipod", "aac"), as_sound),
    "tensor of torch": (torch_file(torch.ones(6, WIDTH)), tensor_file),
    "tensor of safetensors": (bombs.safetensor_of((6, WIDTH), DATA), tensor_file),
}


def damage(data: bytes, chance: random.Random) -> bytes:
    """Return ``data`` with a few pieces changed, cut out or repeated, mostly near its start."""
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        reach = len(damaged) if chance.random() < 0.5 else min(len(damaged), 200)
        start = chance.randrange(max(1, reach))
        length = chance.choice([1, 1, 1, 2, 4, 8, 64])
        kind = chance.random()
        if kind < 0.6:
            damaged[start : start + length] = chance.randbytes(length)
        elif kind < 0.7:
            damaged[start : start + length] = b"\xff" * length
        elif kind < 0.8:
            damaged[start : start + length] = bytes(length)
        elif kind < 0.9:
            del damaged[start : start + length]
        else:
            damaged[start:start] = damaged[start : start + length]
    return bytes(damaged)


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_files_are_answered_or_refused(target: AttackTarget, name: str) -> None:
    whole, make = SEEDS[name]
    chance = random.Random(name)
    assert target.send(ENTRIES[0], [make(whole)], salt="whole").code == ANSWERED

    with target.unharmed(f"damaged: {name}", budget_bytes=512 << 20):
        for number in range(NUM_DAMAGED):
            entry = ENTRIES[number % len(ENTRIES)]
            reply = target.send(entry, [make(damage(whole, chance))])
            target.check_reply(reply, [ANSWERED, *REFUSALS], "")
