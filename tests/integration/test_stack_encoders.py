"""Several encoders: they share the pictures of one request, and one may die meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.fakes.checkpoints import TowerSizes, make_qwen2_vl
from tests.harness import chat
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

NAMES = ("encoder-0", "encoder-1")
SIDE = 448
# One forward takes long enough for the encoder to be killed meanwhile.
TOWER = TowerSizes(depth=8, embed_dim=256, num_heads=4, max_pixels=SIDE * SIDE)
POLL_PAUSE_S = 0.02


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = make_qwen2_vl(tmp_path_factory.mktemp("model"), tower=TOWER)
    running = Stack(model, ["--dtype", "float32", "--encoders", "2"])
    yield running
    assert running.stop() == 0


def ask(stack: Stack, seeds: range) -> str:
    pictures = [chat.picture(seed, SIDE, SIDE) for seed in seeds]
    body = chat.chat_body("Describe the pictures.", pictures, 4)
    text: str = chat.post_chat(stack.base_url, body)["choices"][0]["message"]["content"]
    return text


def num_forwards(stack: Stack, name: str) -> float:
    return stack.metric("chiasm_encoder_forward_seconds_count", name)


def test_the_pictures_of_one_request_go_to_both_encoders(stack: Stack) -> None:
    before = [num_forwards(stack, name) for name in NAMES]

    ask(stack, range(4))

    after = [num_forwards(stack, name) for name in NAMES]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 2]


def test_the_pictures_of_an_encoder_that_dies_are_encoded_by_the_other(stack: Stack) -> None:
    before = num_forwards(stack, NAMES[1])
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, stack, range(10, 14))
        while not asking.done() and not stack.metric("chiasm_encoder_queue_pixels", NAMES[0]):
            threading.Event().wait(POLL_PAUSE_S)
        stack.kill(NAMES[0])
        answer = asking.result()

    assert num_forwards(stack, NAMES[1]) - before > 2
    stack.wait_until_ready(NAMES[0])
    assert ask(stack, range(10, 14)) == answer
