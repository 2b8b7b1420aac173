"""A prompt with the rows that the tower made of a picture is as good as one with the picture."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch
from safetensors.torch import save as save_safetensors

from chiasm.v1 import chat_pb2, chat_pb2_grpc, media_pb2
from tests.fakes import checkpoints
from tests.fakes.pixtral_checkpoints import make_mistral3, make_pixtral
from tests.harness import chat
from tests.harness.encoder import EncoderClient
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

NUM_TOKENS = 24
QUESTION = "Describe the picture."
PICTURE = chat.picture(21, 97, 61)
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": checkpoints.make_qwen2_5_vl,
    "llava": checkpoints.make_llava,
    "pixtral": make_pixtral,
    "mistral3": make_mistral3,
}


@pytest.fixture(scope="module", params=FAMILIES)
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    model = FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model")
    running = Stack(model, ["--dtype", "float32"])
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def named(stack: Stack) -> dict[str, torch.Tensor]:
    """Return what the tower makes of the picture, under the names that clients use."""

    async def encode() -> dict[str, torch.Tensor]:
        token = (stack.state_dir / "service_token").read_text().strip()
        client = EncoderClient(stack.address("encoder-0"), token)
        answer = await client.encode(PICTURE, inline=True)
        await client.close()
        tensors = {"image_embeds": torch.from_numpy(answer.rows().copy())}
        if answer.layout is not None and answer.layout.HasField("grid"):
            grid = answer.layout.grid
            tensors["image_grid_thw"] = torch.tensor([[grid.t, grid.h, grid.w]])
        return tensors

    return asyncio.run(encode())


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def tokens_of(stack: Stack, media: chat_pb2.MediaPart) -> list[int]:
    request = chat.chat_request(QUESTION, [PICTURE], NUM_TOKENS)
    request.messages[0].content[0].media.CopyFrom(media)
    with grpc.insecure_channel(stack.grpc_address) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        answer = stub.ChatCompletion(request, timeout=chat.REQUEST_TIMEOUT_S)
    return list(answer.token_ids)


def test_rows_give_the_tokens_of_the_picture_over_grpc(
    stack: Stack, named: dict[str, torch.Tensor]
) -> None:
    image = media_pb2.MODALITY_IMAGE
    rows = named["image_embeds"]
    tensor = chat_pb2.MediaTensor(
        dtype=media_pb2.DATA_TYPE_FLOAT32,
        shape=list(rows.shape),
        data=rows.view(torch.uint8).numpy().tobytes(),
    )
    if "image_grid_thw" in named:
        t, h, w = named["image_grid_thw"][0].tolist()
        tensor.grid.CopyFrom(media_pb2.PatchGrid(t=t, h=h, w=w))
    files = [chat_pb2.TensorFile(data=file(named)) for file in (torch_file, save_safetensors)]

    expected = tokens_of(stack, chat_pb2.MediaPart(modality=image, data=PICTURE))

    assert len(set(expected)) > NUM_TOKENS // 2
    assert tokens_of(stack, chat_pb2.MediaPart(modality=image, tensor=tensor)) == expected
    for file in files:
        assert tokens_of(stack, chat_pb2.MediaPart(modality=image, tensor_file=file)) == expected
    other = chat_pb2.TensorFile(data=torch_file({**named, "image_embeds": rows * -50}))
    assert tokens_of(stack, chat_pb2.MediaPart(modality=image, tensor_file=other)) != expected


def test_rows_give_the_text_of_the_picture_over_rest(
    stack: Stack, named: dict[str, torch.Tensor]
) -> None:
    expected = chat.post_chat(stack.base_url, chat.chat_body(QUESTION, [PICTURE], NUM_TOKENS))
    forms: list[Any] = [
        {name: b64(torch_file(tensor)) for name, tensor in named.items()},
        {name: tensor.tolist() for name, tensor in named.items()},
        b64(torch_file(named)),
    ]

    for form in forms:
        body = chat.chat_body(QUESTION, [PICTURE], NUM_TOKENS)
        body["messages"][0]["content"][0] = {"type": "image_embeds", "image_embeds": form}
        answer = chat.post_chat(stack.base_url, body)

        assert answer["choices"] == expected["choices"]
        assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_rows_mix_with_a_picture_and_a_name(stack: Stack, named: dict[str, torch.Tensor]) -> None:
    other = chat.picture(22, 50, 70)
    pictures = chat.chat_body(QUESTION, [other, PICTURE, PICTURE], NUM_TOKENS)
    expected = chat.post_chat(stack.base_url, pictures)
    mixed = chat.chat_body(QUESTION, [other, PICTURE, PICTURE], NUM_TOKENS)
    content = mixed["messages"][0]["content"]
    payload = b64(torch_file(named))
    content[1] = {"type": "image_embeds", "image_embeds": payload, "uuid": "rows"}

    assert chat.post_chat(stack.base_url, mixed)["choices"] == expected["choices"]
    content[1] = {"type": "image_embeds", "image_embeds": None, "uuid": "rows"}
    assert chat.post_chat(stack.base_url, mixed)["choices"] == expected["choices"]


def test_a_wrong_tensor_is_named_by_its_part(stack: Stack) -> None:
    body = chat.chat_body(QUESTION, [PICTURE, PICTURE], NUM_TOKENS)
    payload = b64(torch_file(torch.ones(2, 3)))
    body["messages"][0]["content"][1] = {"type": "image_embeds", "image_embeds": payload}

    refusal = chat.refused_chat(stack.base_url, body)

    assert refusal.status == 400
    assert refusal.error["param"] == "messages[0].content[1]"
    assert refusal.error["code"] == "invalid_embedding"
    assert "hidden dimension mismatch: got 3" in refusal.error["message"]
