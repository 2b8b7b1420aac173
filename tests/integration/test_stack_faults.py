"""What a client sees when a process of the stack dies; stated in ``docs/operations.md``.

Real processes under the supervisor, killed with SIGKILL.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.checkpoints import make_qwen2_vl
from tests.harness import chat
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

LONG_ANSWER_TOKENS = 1500
STORE_RETURN_S = 10.0
TEXT = chat.chat_body("Count to five.", [], 8)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = make_qwen2_vl(tmp_path_factory.mktemp("model"))
    running = Stack(model, ["--dtype", "float32"])
    yield running
    assert running.stop() == 0


def picture_body(seed: int) -> dict[str, Any]:
    return chat.chat_body("Describe the picture.", [chat.picture(seed, 60, 60)], 8)


def answer_text(stack: Stack, body: dict[str, Any]) -> str:
    text: str = chat.post_chat(stack.base_url, body)["choices"][0]["message"]["content"]
    return text


def stored_answer(stack: Stack, seed: int) -> str:
    """Return the answer to a picture when the store has it; Redis may just have come back."""
    body = {**picture_body(seed), "include_media_usage": True}
    deadline = time.monotonic() + STORE_RETURN_S
    while time.monotonic() < deadline:
        answer = chat.post_chat(stack.base_url, body)
        if answer["usage"]["media"][0]["cache"] == "hit":
            text: str = answer["choices"][0]["message"]["content"]
            return text
    raise AssertionError("the picture is not stored")


def test_text_and_pictures_go_on_without_redis(stack: Stack) -> None:
    known = answer_text(stack, picture_body(1))
    stack.kill("redis")

    assert answer_text(stack, TEXT)
    assert answer_text(stack, picture_body(1)) == known
    assert answer_text(stack, picture_body(2))

    stack.wait_until_ready("redis")
    assert answer_text(stack, picture_body(2))


def test_text_and_known_pictures_go_on_without_the_encoder(stack: Stack) -> None:
    known = stored_answer(stack, 3)
    stack.kill("encoder-0")

    # At once, before the supervisor has started another.
    refusal = chat.refused_chat(stack.base_url, picture_body(4))
    assert refusal.status == 503
    assert refusal.retry_after
    assert refusal.error["message"]
    assert answer_text(stack, TEXT)
    assert answer_text(stack, picture_body(3)) == known

    stack.wait_until_ready("encoder-0")
    assert stack.metric("chiasm_encoder_encoded_items_total", "encoder-0") == 0
    assert answer_text(stack, picture_body(4))


def test_a_dead_generator_ends_the_stream_with_an_error_event(stack: Stack) -> None:
    events = chat.iterate_chat(stack.base_url, chat.chat_body("Go on.", [], LONG_ANSWER_TOKENS))
    first = [next(events), next(events)]
    assert chat.joined_text(first) or first[0]["choices"]

    stack.kill("generator")
    rest = list(events)

    assert rest[-1]["error"]["message"]
    assert not any(
        choice.get("finish_reason") for event in rest for choice in event.get("choices", [])
    )
    stack.wait_until_ready("generator")
    assert answer_text(stack, TEXT)
    assert answer_text(stack, picture_body(1))


def test_an_unready_stack_says_what_is_missing(stack: Stack) -> None:
    stack.kill("generator")

    assert chat.refused_chat(stack.base_url, TEXT).status == 503
    stack.wait_until_ready("generator")
    assert answer_text(stack, TEXT)
