"""Ready-made rows give the answer of the medium where positions are aligned in time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

from chiasm.v1 import chat_pb2, chat_pb2_grpc, media_pb2
from tests.fakes.sound_checkpoints import make_qwen2_5_omni
from tests.fakes.videos import moving_square, write_video
from tests.harness import chat
from tests.harness.encoder import EncoderClient
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

NUM_TOKENS = 16
FPS = 5.0
SOURCES = {
    media_pb2.MODALITY_IMAGE: chat.picture(5, 97, 61),
    media_pb2.MODALITY_VIDEO: write_video(moving_square(10, 112, 84), rate=5),
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = make_qwen2_5_omni(tmp_path_factory.mktemp("model"))
    running = Stack(model, ["--dtype", "float32"])
    yield running
    assert running.stop() == 0


def encode(stack: Stack, medium: chat_pb2.MediaPart) -> chat_pb2.MediaTensor:
    """Return what the stack's encoder makes of a medium."""

    async def call() -> chat_pb2.MediaTensor:
        token = (stack.state_dir / "service_token").read_text().strip()
        client = EncoderClient(stack.address("encoder-0"), token)
        try:
            answer = await client.encode(
                medium.data, modality=medium.modality, options=medium.options, inline=True
            )
        finally:
            await client.close()
        assert answer.layout is not None
        return chat_pb2.MediaTensor(
            dtype=media_pb2.DATA_TYPE_FLOAT32,
            shape=list(answer.ref.tensors[0].shape),
            data=bytes(answer.data),
            grid=answer.layout.grid,
        )

    return asyncio.run(call())


def ask(stack: Stack, medium: chat_pb2.MediaPart) -> tuple[list[int], int]:
    """Return the tokens of the answer and the number of those of the prompt."""
    request = chat.chat_request("What happens here?", [], NUM_TOKENS)
    request.messages[0].content.insert(0, chat_pb2.ContentPart(media=medium))
    with grpc.insecure_channel(stack.grpc_address) as channel:
        answer = chat_pb2_grpc.ChatServiceStub(channel).ChatCompletion(
            request, timeout=chat.REQUEST_TIMEOUT_S
        )
    return list(answer.token_ids), answer.usage.prompt_tokens


@pytest.mark.parametrize("modality", SOURCES, ids=media_pb2.Modality.Name)
def test_rows_are_as_good_as_the_medium(
    stack: Stack, modality: media_pb2.Modality.ValueType
) -> None:
    is_video = modality == media_pb2.MODALITY_VIDEO
    options = media_pb2.ProcessingOptions(fps=FPS) if is_video else None
    medium = chat_pb2.MediaPart(modality=modality, options=options, data=SOURCES[modality])
    rows = encode(stack, medium)

    expected = ask(stack, medium)
    found = ask(stack, chat_pb2.MediaPart(modality=modality, options=options, tensor=rows))

    assert (rows.grid.t > 1) == is_video
    assert found == expected
