"""Greedy tokens of the split stack about videos equal those of the whole model by transformers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.fakes import checkpoints
from tests.fakes.deepstack_checkpoints import make_qwen3_vl
from tests.fakes.videos import H264, KINDS, moving_square, write_video
from tests.harness import chat
from tests.harness.stack import Stack
from tests.harness.video_chat import Part, Video, VideoAnswer, VideoReference, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NUM_TOKENS = 24
MIN_DISTINCT_TOKENS = 12
# Smaller than the longest expansion, so that videos are prefilled in several steps.
MAX_STEP_TOKENS = 64
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": checkpoints.make_qwen2_vl,
    "qwen2_5_vl": checkpoints.make_qwen2_5_vl,
    "llava_onevision": checkpoints.make_llava_onevision,
    "qwen3_vl": make_qwen3_vl,
}
SHORT = Video(write_video(moving_square(9, 60, 44), KINDS["mpeg4 in mp4"]), 10.0)
LONG = write_video(moving_square(48, 90, 50, seed=1), H264, rate=12)
WEBM = write_video(moving_square(30, 33, 71, seed=2), KINDS["vp9 in webm"])
PROMPTS: list[tuple[Part, ...]] = [
    (SHORT, "What moves?"),
    (Video(LONG, 12.0, {"fps": 2.0}), "Where does it go?"),
    (Video(LONG, 12.0, {"num_frames": 6}), "And now?"),
    (Video(WEBM, 10.0, {"fps": 4.0}), "What colour is the shape?"),
    (
        *("First a picture:", chat.picture(1, 97, 61), "then a video:"),
        *(Video(WEBM, 10.0, {"num_frames": 8}), "then one more picture"),
        *(chat.picture(2, 45, 75), "and the same square in two files"),
        *(Video(LONG, 12.0, {"num_frames": 8}), "What is different?"),
    ),
]


class Family:
    """A running stack of one family, with what the whole model says to every prompt."""

    def __init__(self, stack: Stack, trace: Path, answers: list[VideoAnswer]) -> None:
        self.stack = stack
        self.trace = trace
        self.answers = answers


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    directory = tmp_path_factory.mktemp(request.param)
    path = FAMILIES[request.param](directory / "model")
    reference = VideoReference(path)
    answers = [reference.answer(parts, NUM_TOKENS) for parts in PROMPTS]
    trace = directory / "steps.jsonl"
    flags = ["--dtype", "float32", "--step-trace", str(trace)]
    flags += ["--max-step-tokens", str(MAX_STEP_TOKENS)]
    stack = Stack(path, flags)
    yield Family(stack, trace, answers)
    assert stack.stop() == 0


def test_the_reference_answers_wander(family: Family) -> None:
    assert all(len(set(answer.token_ids)) >= MIN_DISTINCT_TOKENS for answer in family.answers)


def test_each_prompt_alone_gives_the_tokens_of_the_whole_model(family: Family) -> None:
    address = family.stack.grpc_address
    responses = [ask(address, answer.parts, NUM_TOKENS) for answer in family.answers]

    assert [r.usage.prompt_tokens for r in responses] == [len(a.prompt_ids) for a in family.answers]
    assert [list(r.token_ids) for r in responses] == [a.token_ids for a in family.answers]


def test_videos_are_prefilled_in_several_steps(family: Family) -> None:
    steps = [json.loads(line) for line in family.trace.read_text().splitlines()]
    longest = max(len(answer.prompt_ids) for answer in family.answers)

    assert longest > 2 * MAX_STEP_TOKENS
    assert max(step["num_prefill_tokens"] for step in steps) <= MAX_STEP_TOKENS


def test_all_at_once_and_again_from_the_store_give_the_same_tokens(family: Family) -> None:
    address = family.stack.grpc_address
    before = family.stack.metric("chiasm_encoder_encoded_items_total", "encoder-0", 'video"')

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        responses = list(
            pool.map(lambda answer: ask(address, answer.parts, NUM_TOKENS), family.answers)
        )

    assert [list(r.token_ids) for r in responses] == [a.token_ids for a in family.answers]
    after = family.stack.metric("chiasm_encoder_encoded_items_total", "encoder-0", 'video"')
    assert before == after > 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LONG[: len(LONG) // 2], "Failed to load video: it is no MP4"),
        (chat.picture(1, 20, 20), "Failed to load video: it is no MP4"),
        (b"", ""),
    ],
)
def test_a_broken_video_is_the_callers_fault_and_harms_nobody_else(
    family: Family, data: bytes, message: str
) -> None:
    good = family.answers[0]
    with ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(ask, family.stack.grpc_address, good.parts, NUM_TOKENS)
        with pytest.raises(grpc.RpcError) as caught:
            ask(family.stack.grpc_address, (Video(data, 10.0), "What moves?"), NUM_TOKENS)

        assert list(neighbour.result().token_ids) == good.token_ids
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in str(caught.value.details())
