"""Greedy tokens about sound, through the whole split stack, equal those of the whole model."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from chiasm.v1 import chat_pb2, chat_pb2_grpc, generator_pb2
from tests.fakes import sound_checkpoints, sounds
from tests.fakes.videos import moving_square, write_video
from tests.harness import audio_chat, chat
from tests.harness.stack import Stack
from tests.harness.video_chat import Video

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.harness.audio_chat import Parts
    from tests.harness.reference import ReferenceAnswer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NUM_TOKENS = 24
MAX_WAVES = 8
MIN_DISTINCT_TOKENS = 12
NUM_LOGPROBS = 20
# Of a log probability in float32, after up to 24 tokens on a cache.
MAX_ERROR = 2e-4
# A clip of two seconds alone takes more.
MAX_STEP_TOKENS = 40


def clip(
    seed: int,
    seconds: float,
    rate: int = 16000,
    num_channels: int = 1,
    kind: str = "WAV",
    subtype: str | None = None,
) -> bytes:
    sound = sounds.tone(int(seconds * rate), num_channels, rate, seed)
    return sounds.write(sound, rate, kind, subtype)


# Every two frames, a second, make one patch.
VIDEO = Video(write_video(moving_square(36, 90, 50, seed=1), rate=9), 9.0, {"fps": 2.0})
PROMPTS: list[Parts] = [
    ["Hello there?"],
    [clip(1, 1.0), "What is that?"],
    ["First", clip(2, 0.7, 8000), "and then", clip(3, 2.1, 44_100, 2), "What is different?"],
    [clip(4, 4.0, 48_000, 2, "FLAC"), "Whole window?"],
    [clip(5, 0.03), clip(6, 1.5, 22_050, 1, "MP3"), clip(7, 0.9, 48_000, 6), "Count them."],
    [clip(8, 2.5, 48_000, 1, "OGG", "OPUS"), "Who speaks?", clip(1, 1.0), "And now?"],
    ["Nothing to hear, is there"],
]
MIXED_PROMPTS: list[Parts] = [
    [chat.picture(1, 97, 61), "What is this?"],
    [chat.picture(2, 64, 90), clip(20, 1.2), "Does it fit?"],
    [
        "Hear",
        clip(21, 0.5, 48_000, 2),
        "then see",
        chat.picture(3, 140, 33),
        clip(22, 2.0),
        "Well?",
    ],
]
FAMILIES: dict[str, tuple[Callable[[Path], Path], list[Parts]]] = {
    "qwen2_audio": (sound_checkpoints.make_qwen2_audio, PROMPTS),
    "qwen2_5_omni": (sound_checkpoints.make_qwen2_5_omni, PROMPTS + MIXED_PROMPTS),
}


class Family:
    """A running stack of one family, with what the whole model says to every prompt."""

    def __init__(
        self, stack: Stack, trace: Path, answered: list[tuple[Parts, ReferenceAnswer]]
    ) -> None:
        self.stack = stack
        self.trace = trace
        self.prompts = [parts for parts, _ in answered]
        self.answers = [answer for _, answer in answered]


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    directory = tmp_path_factory.mktemp(request.param)
    make_checkpoint, prompts = FAMILIES[request.param]
    path = make_checkpoint(directory / "model")
    reference = audio_chat.AudioReference(path)
    answered = [reference.answer(parts, NUM_TOKENS) for parts in prompts]
    if request.param == "qwen2_5_omni":
        sound_checkpoints.nest_thinker(path)
    trace = directory / "steps.jsonl"
    flags = ["--dtype", "float32", "--step-trace", str(trace)]
    flags += ["--max-step-tokens", str(MAX_STEP_TOKENS), "--max-running-sequences", "16"]
    stack = Stack(path, flags)
    yield Family(stack, trace, answered)
    assert stack.stop() == 0


def ask(channel: grpc.Channel, parts: Parts, logprobs: int = 0) -> chat_pb2.ChatCompletionResponse:
    request = audio_chat.chat_request(parts, NUM_TOKENS)
    if logprobs:
        request.sampling.MergeFrom(generator_pb2.SamplingParams(num_logprobs=logprobs))
    stub = chat_pb2_grpc.ChatServiceStub(channel)
    return stub.ChatCompletion(request, timeout=chat.REQUEST_TIMEOUT_S)


def test_the_reference_answers_wander(family: Family) -> None:
    assert all(len(set(answer.token_ids)) >= MIN_DISTINCT_TOKENS for answer in family.answers)
    assert len({tuple(answer.token_ids) for answer in family.answers}) == len(family.answers)


def test_each_prompt_alone_gives_the_tokens_of_the_whole_model(family: Family) -> None:
    with grpc.insecure_channel(family.stack.grpc_address) as channel:
        responses = [ask(channel, parts) for parts in family.prompts]

    assert [list(r.token_ids) for r in responses] == [a.token_ids for a in family.answers]
    assert [r.usage.prompt_tokens for r in responses] == [len(a.prompt_ids) for a in family.answers]
    assert [r.text for r in responses] == [a.text for a in family.answers]


def test_all_at_once_give_the_same_tokens_in_shared_forwards(family: Family) -> None:
    most = 0
    # On a busy machine the answers of the first have ended before the last have come.
    for _ in range(MAX_WAVES):
        with (
            grpc.insecure_channel(family.stack.grpc_address) as channel,
            ThreadPoolExecutor(len(PROMPTS)) as pool,
        ):
            responses = list(pool.map(lambda parts: ask(channel, parts), family.prompts))

        assert [list(r.token_ids) for r in responses] == [a.token_ids for a in family.answers]
        steps = [json.loads(line) for line in family.trace.read_text().splitlines()]
        most = max(step["num_sequences"] for step in steps)
        if most >= 3:
            break
    assert most >= 3


def test_clips_are_prefilled_in_chunks(family: Family) -> None:
    sound = clip(30, 3.9)
    before = len(family.trace.read_text().splitlines())

    with grpc.insecure_channel(family.stack.grpc_address) as channel:
        response = ask(channel, [sound, "Go on."])

    steps = [json.loads(line) for line in family.trace.read_text().splitlines()[before:]]
    prefills = [step["num_prefill_tokens"] for step in steps if step["num_prefill_tokens"]]
    assert max(prefills) <= MAX_STEP_TOKENS < response.usage.prompt_tokens
    assert len(prefills) >= 3


def test_logits_are_those_of_the_whole_model(family: Family) -> None:
    for parts, answer in zip(family.prompts, family.answers, strict=True):
        with grpc.insecure_channel(family.stack.grpc_address) as channel:
            told = ask(channel, parts, NUM_LOGPROBS).logprobs

        assert len(told) == NUM_TOKENS
        for one, token_id, expected in zip(told, answer.token_ids, answer.logprobs, strict=True):
            best = np.array(one.top_logprobs)
            assert one.logprob == pytest.approx(float(expected[token_id]), abs=MAX_ERROR)
            assert np.allclose(best, expected[list(one.top_token_ids)], rtol=0, atol=MAX_ERROR)


def test_rest_gives_the_same_text_for_input_audio_and_audio_url(family: Family) -> None:
    for parts, answer in zip(family.prompts, family.answers, strict=True):
        body = audio_chat.chat_body(parts, NUM_TOKENS)
        plain = chat.post_chat(family.stack.base_url, body)
        for part in body["messages"][0]["content"]:
            if part["type"] == "input_audio":
                part["type"] = "audio_url"
                part["audio_url"] = {
                    "url": f"data:audio/wav;base64,{part.pop('input_audio')['data']}"
                }
        events = chat.stream_chat(family.stack.base_url, body)

        assert plain["choices"][0]["message"]["content"] == answer.text
        assert chat.joined_text(events) == answer.text
        assert plain["usage"]["prompt_tokens"] == len(answer.prompt_ids)


def test_the_sound_of_a_container_is_heard_as_its_samples_are(family: Family) -> None:
    sound = sounds.tone(48_000, 2, 48_000, seed=40)
    as_alac = sounds.mux(sound, 48_000, "ipod", "alac")
    as_wav = sounds.write(sound, 48_000, "WAV", "PCM_16")

    with grpc.insecure_channel(family.stack.grpc_address) as channel:
        container, file = (ask(channel, [data, "What is that?"]) for data in (as_alac, as_wav))

    # The encoder of ALAC rounds samples its own way.
    assert container.usage == file.usage
    assert list(container.token_ids)[:4] == list(file.token_ids)[:4]
