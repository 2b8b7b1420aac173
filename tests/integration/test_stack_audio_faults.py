"""Bad sound through the whole stack: a 4xx each, other requests untouched, no process lost."""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from chiasm.v1 import chat_pb2_grpc
from tests.fakes import pictures, sounds
from tests.fakes.sound_checkpoints import HEARD_SECONDS, make_qwen2_audio
from tests.harness import audio_chat, chat
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

SERVICES = ("redis", "encoder-0", "generator", "gateway")
RATE = 16000
PARAM = "messages[0].content[0]"
GOOD_CLIP = sounds.write(sounds.tone(RATE), RATE)
CORRUPTED = "Invalid or corrupted audio data."
TOO_LONG = "Audio exceeds maximum allowed duration of"


def with_rate(rate: int) -> bytes:
    """Return a WAV file whose header tells ``rate``."""
    return GOOD_CLIP[:24] + rate.to_bytes(4, "little") + GOOD_CLIP[28:]


def with_sample(value: float) -> bytes:
    sound = sounds.tone(RATE)
    sound[RATE // 2] = value
    return sounds.write(sound, RATE, "WAV", "FLOAT")


@dataclass(frozen=True, slots=True)
class BadClip:
    """A file and what must come back for it."""

    name: str
    data: bytes
    message: str
    status: int = 400


PICTURE = pictures.encode(pictures.noise(64, 64), "JPEG")
FLAC = sounds.write(sounds.tone(RATE), RATE, "FLAC")
BAD_CLIPS = [
    BadClip("junk", b"no sound at all " * 9, "its format is not one of WAV, FLAC"),
    BadClip(
        "picture",
        pictures.encode(pictures.noise(64, 64), "JPEG"),
        "its format is not one of WAV, FLAC",
    ),
    BadClip("header only", GOOD_CLIP[:44], "it holds no sound"),
    BadClip("no header", GOOD_CLIP[:12], CORRUPTED),
    BadClip("no samples", sounds.write(np.zeros((0, 1), np.float32), RATE), "it holds no sound"),
    BadClip("20 ms", sounds.write(sounds.tone(320), RATE), "0.020s are too short to be heard."),
    BadClip("truncated flac", FLAC[: len(FLAC) // 2], CORRUPTED),
    BadClip("truncated mp3", sounds.write(sounds.tone(RATE), RATE, "MP3")[:3000], "it ends after"),
    BadClip("truncated m4a", sounds.mux(sounds.tone(RATE), RATE, "ipod", "aac")[:5000], CORRUPTED),
    BadClip("NaN", with_sample(np.nan), "it has samples that are not finite numbers"),
    BadClip("infinite", with_sample(np.inf), "it has samples that are not finite numbers"),
    BadClip("forged rate", with_rate(655_350), "its sampling rate of 655350 Hz is not between"),
    BadClip("forged low rate", with_rate(1), "its sampling rate of 1 Hz is not between"),
    BadClip("forged frames", sounds.with_flac_length(FLAC, (1 << 36) - 1), f"{TOO_LONG} 600s", 413),
    BadClip("channels", sounds.write(sounds.tone(RATE, 9), RATE), "it has 9 channels"),
    BadClip("silent video", sounds.silent_video(), "No audio stream found."),
    BadClip("flac bomb", sounds.silence(600, 2, 48_000, "FLAC", "PCM_16"), f"{TOO_LONG} 4s", 413),
    BadClip("opus bomb", sounds.silence(601, 1, 48_000, "OGG", "OPUS"), f"{TOO_LONG} 600s", 413),
    BadClip(
        "a bit long", sounds.silence(HEARD_SECONDS + 1, 1, 8000, "WAV", "PCM_U8"), "5.00s", 413
    ),
]


@dataclass(slots=True)
class Watched:
    """A stack, and its process ids at the start."""

    stack: Stack
    pids: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    model = make_qwen2_audio(tmp_path_factory.mktemp("model"))
    stack = Stack(model, ["--dtype", "float32", "--limit-mm-per-prompt", "audio=2"])
    yield Watched(stack, {name: stack.pid(name) for name in SERVICES})
    assert stack.stop() == 0


@pytest.mark.parametrize("bad", BAD_CLIPS, ids=lambda bad: bad.name)
def test_a_bad_clip_over_rest_is_refused_with_message_and_param(
    watched: Watched, bad: BadClip
) -> None:
    refusal = chat.refused_chat(
        watched.stack.base_url, audio_chat.chat_body([bad.data, "What?"], 4)
    )

    assert refusal.status == bad.status, refusal.error
    assert bad.message in refusal.error["message"]
    assert "0x" not in refusal.error["message"]
    assert refusal.error["param"].startswith(PARAM)


@pytest.mark.parametrize("bad", BAD_CLIPS, ids=lambda bad: bad.name)
def test_a_bad_clip_over_grpc_is_an_invalid_argument(watched: Watched, bad: BadClip) -> None:
    with grpc.insecure_channel(watched.stack.grpc_address) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.ChatCompletion(
                audio_chat.chat_request([bad.data, "What?"], 4), timeout=chat.REQUEST_TIMEOUT_S
            )

    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert bad.message in (raised.value.details() or "")


@pytest.mark.parametrize(
    ("seconds", "kind", "subtype", "max_s"), [(600, "FLAC", "PCM_16", 4), (601, "OGG", "OPUS", 600)]
)
def test_a_bomb_is_refused_by_its_header(
    watched: Watched, seconds: int, kind: str, subtype: str, max_s: int
) -> None:
    bomb = sounds.silence(seconds, 2, 48_000, kind, subtype)

    refusal = chat.refused_chat(watched.stack.base_url, audio_chat.chat_body([bomb, "What?"], 4))

    assert len(bomb) < 200_000
    assert refusal.status == 413
    assert refusal.error["message"].startswith(f"{TOO_LONG} {max_s}s")


def test_other_modalities_and_too_many_clips_are_refused(watched: Watched) -> None:
    url = watched.stack.base_url

    picture = chat.refused_chat(url, chat.chat_body("What?", [chat.picture(1, 32, 32)], 4))
    many = chat.refused_chat(url, audio_chat.chat_body([GOOD_CLIP, GOOD_CLIP, GOOD_CLIP, "?"], 4))

    assert picture.status == many.status == 400
    assert picture.error["message"] == "At most 0 image(s) may be provided in one prompt."
    assert many.error["message"].startswith("At most 2 audio(s) may be provided in one prompt.")


def test_a_clip_known_by_uuid_needs_no_data_again(watched: Watched) -> None:
    body = audio_chat.chat_body([GOOD_CLIP, "What?"], 8)
    body["messages"][0]["content"][0]["uuid"] = "horn"
    first = chat.post_chat(watched.stack.base_url, body)
    body["messages"][0]["content"][0] |= {"input_audio": None}

    again = chat.post_chat(watched.stack.base_url, body)

    assert again["choices"][0]["message"] == first["choices"][0]["message"]
    body["messages"][0]["content"][0]["uuid"] = "unknown"
    refusal = chat.refused_chat(watched.stack.base_url, body)
    assert refusal.status == 400
    assert refusal.error["message"] == ("Cache miss for audio at index 0 but data is not provided.")


def test_the_answer_of_a_neighbour_is_right_while_bad_clips_come(watched: Watched) -> None:
    url = watched.stack.base_url
    clip = sounds.write(sounds.tone(2 * RATE, seed=9), RATE)
    body = audio_chat.chat_body([clip, "What is this?"], 300)
    alone = chat.joined_text(chat.stream_chat(url, body))
    statuses: list[int] = []

    def refuse_all() -> None:
        for bad in BAD_CLIPS:
            bad_body = audio_chat.chat_body([bad.data, "Really?"], 4)
            statuses.append(chat.refused_chat(url, bad_body).status)

    beside = threading.Thread(target=refuse_all)
    beside.start()
    answers = []
    for seed in range(3):
        other = sounds.write(sounds.tone(RATE, seed=100 + seed), RATE)
        chat.post_chat(url, audio_chat.chat_body([other, "Hm?"], 4))
        answers.append(chat.joined_text(chat.stream_chat(url, body)))
    beside.join()

    assert answers == [alone] * 3
    assert statuses == [bad.status for bad in BAD_CLIPS]


def test_sound_behind_a_data_url_of_any_type_is_told_by_its_bytes(watched: Watched) -> None:
    text = base64.b64encode(FLAC).decode()
    bodies = []
    for kind in ("audio/wav", "application/octet-stream", "video/mp4"):
        body = audio_chat.chat_body([FLAC, "What?"], 8)
        url = {"url": f"data:{kind};base64,{text}"}
        body["messages"][0]["content"][0] = {"type": "audio_url", "audio_url": url}
        bodies.append(body)

    answers = [chat.post_chat(watched.stack.base_url, body) for body in bodies]

    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_every_process_outlived_the_bad_clips(watched: Watched) -> None:
    assert {name: watched.stack.pid(name) for name in SERVICES} == watched.pids
