"""A picture is encoded once: the same bytes, the same uuid, and many requests at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.checkpoints import make_qwen2_5_vl
from tests.harness import chat
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = make_qwen2_5_vl(tmp_path_factory.mktemp("model"))
    running = Stack(model, ["--dtype", "float32", "--encoders", "2"])
    yield running
    assert running.stop() == 0


def num_encoded(stack: Stack) -> float:
    return sum(
        stack.metric("chiasm_encoder_forward_seconds_count", name)
        for name in ("encoder-0", "encoder-1")
    )


def picture_body(seed: int, uuid: str | None = None) -> dict[str, Any]:
    body = chat.chat_body("Describe the picture.", [chat.picture(seed, 83, 59)], 12)
    if uuid:
        body["messages"][0]["content"][0]["uuid"] = uuid
    return body


def uuid_only_body(uuid: str) -> dict[str, Any]:
    body = picture_body(0, uuid)
    body["messages"][0]["content"][0]["image_url"] = None
    return body


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_a_second_request_with_the_same_picture_encodes_nothing(stack: Stack) -> None:
    before = num_encoded(stack)
    first = chat.post_chat(stack.base_url, picture_body(1))
    once = num_encoded(stack)

    second = chat.post_chat(stack.base_url, picture_body(1))

    assert once == before + 1
    assert num_encoded(stack) == once
    assert text_of(second) == text_of(first)


def test_many_requests_for_one_new_picture_encode_it_once_per_stack(stack: Stack) -> None:
    before = num_encoded(stack)

    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda _: chat.post_chat(stack.base_url, picture_body(2)), range(16))
        )

    assert num_encoded(stack) == before + 1
    assert len({text_of(answer) for answer in answers}) == 1


def test_a_picture_named_by_uuid_need_not_be_sent_again(stack: Stack) -> None:
    first = chat.post_chat(stack.base_url, picture_body(3, uuid="cat-3"))
    before = num_encoded(stack)

    second = chat.post_chat(stack.base_url, uuid_only_body("cat-3"))

    assert text_of(second) == text_of(first)
    assert num_encoded(stack) == before


def test_an_unknown_uuid_is_refused_with_the_position_of_the_item(stack: Stack) -> None:
    refusal = chat.refused_chat(stack.base_url, uuid_only_body("never-seen"))

    assert refusal.status == 400
    assert refusal.error["message"] == "Cache miss for image at index 0 but data is not provided."
    assert refusal.error["param"].startswith("messages[0].content[0]")


def test_a_uuid_never_serves_another_picture(stack: Stack) -> None:
    chat.post_chat(stack.base_url, picture_body(4, uuid="dog-4"))

    refusal = chat.refused_chat(stack.base_url, picture_body(5, uuid="dog-4"))

    assert refusal.status == 409
    assert refusal.error["code"] == "uuid_conflict"


def test_both_encoders_share_the_work(stack: Stack) -> None:
    with ThreadPoolExecutor(12) as pool:
        list(
            pool.map(
                lambda seed: chat.post_chat(stack.base_url, picture_body(seed)), range(100, 124)
            )
        )

    counts = [
        stack.metric("chiasm_encoder_forward_seconds_count", name)
        for name in ("encoder-0", "encoder-1")
    ]
    assert min(counts) > 0
