"""The whole stack on one GPU that encoder and generator share: tokens, pictures, samples."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.fakes.checkpoints import make_qwen2_5_vl
from tests.fakes.deepstack_checkpoints import make_qwen3_vl
from tests.fakes.gemma_checkpoints import make_gemma3
from tests.harness import chat
from tests.harness.reference import ReferenceModel
from tests.harness.stack import Stack
from tests.integration.test_stack_tokens import (
    NUM_TOKENS,
    PROMPTS,
    Family,
    test_answers_look_as_they_were_asked_to,
    test_each_prompt_alone_gives_the_tokens_of_the_whole_model,
    test_eight_at_once_give_the_same_tokens_in_shared_forwards,
    test_logits_of_prefill_and_decode_are_those_of_the_whole_model,
    test_several_answers_are_those_of_their_seeds_and_share_the_prompt,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.gpu, pytest.mark.integration, pytest.mark.timeout(300)]

__all__ = [
    "test_answers_look_as_they_were_asked_to",
    "test_each_prompt_alone_gives_the_tokens_of_the_whole_model",
    "test_eight_at_once_give_the_same_tokens_in_shared_forwards",
    "test_logits_of_prefill_and_decode_are_those_of_the_whole_model",
    "test_several_answers_are_those_of_their_seeds_and_share_the_prompt",
]

FAMILIES = {"qwen2_5_vl": make_qwen2_5_vl, "qwen3_vl": make_qwen3_vl, "gemma3": make_gemma3}
# That of the tiny models; one token of it is output.
MAX_MODEL_LEN = 2048
# Matrix units round the inputs of float32 convolutions to 10 bits unless they are told not to.
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    directory = tmp_path_factory.mktemp(request.param)
    path = FAMILIES[request.param](directory / "model")
    trace = directory / "steps.jsonl"
    flags = ["--device", "cuda", "--dtype", "float32", "--step-trace", str(trace)]
    stack = Stack(path, flags, EXACT)
    reference = ReferenceModel(path)
    answers = [reference.answer(question, pictures, NUM_TOKENS) for question, pictures in PROMPTS]
    yield Family(stack, trace, answers)
    assert stack.stop() == 0


def test_the_openai_client_gets_the_tokens_of_the_whole_model(family: Family) -> None:
    question, pictures = family.prompts[2]
    url = "data:image/png;base64,"
    # Any: plain dictionaries, for which the client's types want classes.
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": url + base64.b64encode(data).decode()}}
        for data in pictures
    ]
    with openai.OpenAI(base_url=f"{family.stack.base_url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
            temperature=0,
            max_tokens=NUM_TOKENS,
            extra_body={"ignore_eos": True},
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    assert text == family.answers[2].text


def test_both_services_are_asked_for_the_gpu(family: Family) -> None:
    for name in ("encoder-0", "generator"):
        command = family.stack.command_line(name)
        assert command[command.index("--device") + 1] == "cuda"


def test_memory_for_the_largest_step_is_proven_at_the_start(family: Family) -> None:
    first = json.loads(family.trace.read_text().splitlines()[0])

    assert first["num_prefill_tokens"] == MAX_MODEL_LEN - 1


def test_a_sampled_answer_is_that_of_its_seed(family: Family) -> None:
    body = chat.chat_body("Which?", [chat.picture(50, 64, 64)], NUM_TOKENS)
    body |= {"temperature": 1.0, "seed": 7, "top_p": 0.95, "top_k": 50}

    first, again = (chat.post_chat(family.stack.base_url, body) for _ in range(2))
    other = chat.post_chat(family.stack.base_url, body | {"seed": 8})

    texts = [answer["choices"][0]["message"]["content"] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
