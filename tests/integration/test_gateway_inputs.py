"""Every way in which media reach the gateway: what the encoder is sent for each."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio

from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import Modality
from chiasm.v1 import chat_pb2, chat_pb2_grpc, media_pb2
from tests.fakes.encoder_service import NUM_IMAGE_TOKENS
from tests.fakes.generator_service import Script
from tests.harness.gateway import MODEL, image_part, run_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.v1.chat_pb2_grpc import ChatServiceAsyncStub
    from tests.harness.gateway import Gateway

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

FLAGS = [
    *("--limit-mm-per-prompt", "image=3,video=1"),
    *("--mm-processor-kwargs", "max_pixels=5000", "--max-body-bytes", "300000"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    path = tmp_path_factory.mktemp("gateway")
    async with run_gateway(path, FLAGS, has_videos=True) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.forget()
    shared_gateway.say("fine")
    return shared_gateway


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def form_request(*content: object) -> bytes:
    messages = [{"role": "user", "content": list(content)}]
    return json.dumps({"model": MODEL, "messages": messages}).encode()


async def test_images_and_a_video_between_texts_keep_their_places(gateway: Gateway) -> None:
    frames = f"data:video/jpeg;base64,{b64(b'f1')},{b64(b'f2')}"
    content = [
        "one",
        image_part(b"picture"),
        "two",
        {"type": "video_url", "video_url": {"url": frames}},
        "three",
        image_part(b"last"),
    ]

    reply = await gateway.ask(content)

    assert reply.status == 200, reply.body
    assert sorted(gateway.encoder.sources) == [b"f1f2", b"last", b"picture"]
    start = gateway.generator.starts[0]
    modalities = [span.ref.modality for span in start.spans]
    assert modalities == [
        media_pb2.MODALITY_IMAGE,
        media_pb2.MODALITY_VIDEO,
        media_pb2.MODALITY_IMAGE,
    ]
    offset = start.spans[1].offset
    expansion = gateway.encoder.layout(Modality.VIDEO).expand()
    assert list(start.token_ids[offset : offset + NUM_IMAGE_TOKENS]) == expansion


async def test_frames_are_announced_one_by_one(gateway: Gateway) -> None:
    frames = ["http://example.com/1.jpg", f"data:image/png;base64,{b64(b'12345')}"]

    reply = await gateway.ask([{"type": "video", "video": frames, "fps": 2}])

    assert reply.status == 200, reply.body
    (header,) = gateway.encoder.headers
    first, second = header.frames.frames
    assert (first.url, second.num_bytes) == (frames[0], 5)
    assert header.options.fps == 2
    assert gateway.encoder.sources == [b"12345"]


async def test_a_form_brings_files_as_they_are(gateway: Gateway) -> None:
    binary = bytes(range(256)) * 400
    picture = {"type": "image_url", "image_url": {"url": "cid:cat%2F1"}}

    reply = await gateway.post_form({"request": form_request("what?", picture), "cat%2F1": binary})

    assert reply.status == 200, reply.body
    assert gateway.encoder.sources == [binary]


@pytest.mark.parametrize(
    ("parts", "status", "text"),
    [
        ({"cat": b"x"}, 400, "one part named 'request' or 'payload'"),
        ({"request": b"{"}, 400, "is not valid JSON"),
        ({"request": b"{}", "cat": bytes(300_000)}, 413, "must have at most 300000 bytes"),
        (
            {"request": form_request({"type": "image_url", "image_url": {"url": "cid:dog"}})},
            400,
            "none named 'dog'",
        ),
    ],
    ids=["no request", "json", "large", "unknown file"],
)
async def test_a_wrong_form_is_refused(
    gateway: Gateway, parts: dict[str, bytes], status: int, text: str
) -> None:
    reply = await gateway.post_form(parts)

    assert reply.status == status, reply.body
    assert text in reply.error["message"]
    assert gateway.encoder.headers == []


async def test_a_picture_in_the_text_is_encoded(gateway: Gateway) -> None:
    picture = b"the bytes of some tiny picture"

    reply = await gateway.ask(f"What is <image>{b64(picture)}</image>?")

    assert reply.status == 200, reply.body
    assert gateway.encoder.sources == [picture]


async def test_a_tensor_file_is_announced_with_its_grid(gateway: Gateway) -> None:
    payload = {"image_embeds": b64(b"rows"), "image_grid_thw": b64(b"grid!")}

    reply = await gateway.ask([{"type": "image_embeds", "image_embeds": payload, "uuid": "t-1"}])

    assert reply.status == 200, reply.body
    (header,) = gateway.encoder.headers
    assert (header.tensor_file.num_bytes, header.tensor_file.num_grid_bytes) == (4, 5)
    assert header.uuid == "t-1"
    assert gateway.encoder.sources == [b"rowsgrid!"]


async def test_numbers_are_announced_as_a_tensor(gateway: Gateway) -> None:
    payload = {"image_embeds": [[0.5, 1.5]], "image_grid_thw": [1, 2, 4]}

    reply = await gateway.ask([{"type": "image_embeds", "image_embeds": payload}])

    assert reply.status == 200, reply.body
    (header,) = gateway.encoder.headers
    assert header.tensor.spec.dtype == media_pb2.DATA_TYPE_FLOAT32
    assert list(header.tensor.spec.shape) == [1, 2]
    assert (header.tensor.grid.h, header.tensor.grid.w) == (2, 4)
    assert len(gateway.encoder.sources[0]) == 8


async def test_pictures_and_embeddings_mix_and_count_together(gateway: Gateway) -> None:
    embedding = {"type": "image_embeds", "image_embeds": b64(b"rows")}
    three = [image_part(b"a"), embedding, {"type": "image_embeds", "image_embeds": [[1.0]]}]

    assert (await gateway.ask(three)).status == 200
    reply = await gateway.ask([*three, image_part(b"d")])

    assert reply.status == 400
    assert reply.error["param"] == "messages[0].content[3]"
    assert reply.error["message"].startswith("At most 3 image(s) may be provided in one prompt.")


async def test_the_limit_of_videos_is_its_own(gateway: Gateway) -> None:
    video = {"type": "video", "video": ["http://example.com/1.jpg"]}

    assert (await gateway.ask([video])).status == 200
    reply = await gateway.ask([video, video])

    assert reply.status == 400
    assert reply.error["message"].startswith("At most 1 video(s) may be provided in one prompt.")


@pytest.mark.parametrize(("wish", "sent"), [(4000, 4000), (6000, 5000), (None, 5000)])
async def test_the_operators_limit_bounds_the_wish(
    gateway: Gateway, wish: int | None, sent: int
) -> None:
    fields = {} if wish is None else {"mm_processor_kwargs": {"max_pixels": wish}}

    reply = await gateway.ask([image_part(b"picture")], **fields)

    assert reply.status == 200, reply.body
    assert gateway.encoder.headers[0].options.max_pixels == sent


async def test_kwargs_without_effect_are_told(gateway: Gateway) -> None:
    reply = await gateway.ask("hi", media_io_kwargs={"image": {"image_mode": "RGB"}})

    assert reply.headers["x-ignored-fields"] == "media_io_kwargs.image.image_mode"


async def test_refusal_of_a_guide_by_the_generator_names_the_client_s_field(
    gateway: Gateway,
) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    refusal = InvalidRequestError("The guide is not valid.", param="structured_outputs")
    gateway.say(script=Script(error=refusal))

    named = await gateway.ask("hi", response_format=schema)
    older = await gateway.ask("hi", guided_regex="((")
    usual = await gateway.ask("hi", structured_outputs={"regex": "(("})

    assert {reply.status for reply in (named, older, usual)} == {400}
    assert named.error["param"] == "response_format"
    assert older.error["param"] == "guided_regex"
    assert usual.error["param"] == "structured_outputs"


async def test_grpc_parts_reach_the_encoder_like_those_of_rest(gateway: Gateway) -> None:
    tensor = chat_pb2.MediaTensor(dtype=media_pb2.DATA_TYPE_BFLOAT16, shape=[1, 2], data=b"1234")
    frames = chat_pb2.FrameList(frames=[chat_pb2.Frame(data=b"f1"), chat_pb2.Frame(data=b"f2")])
    file = chat_pb2.TensorFile(data=b"rows", grid=media_pb2.PatchGrid(t=1, h=2, w=2))
    media = [
        chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, tensor=tensor),
        chat_pb2.MediaPart(modality=media_pb2.MODALITY_VIDEO, frames=frames),
        chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, tensor_file=file),
    ]
    content = [chat_pb2.ContentPart(media=part) for part in media]
    message = chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=content)
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        stub: ChatServiceAsyncStub = chat_pb2_grpc.ChatServiceStub(channel)

        answer = await stub.ChatCompletion(
            chat_pb2.ChatCompletionRequest(messages=[message]), timeout=10
        )

    assert answer.text == "fine"
    kinds = {header.WhichOneof("source") for header in gateway.encoder.headers}
    assert kinds == {"tensor", "frames", "tensor_file"}
    assert sorted(gateway.encoder.sources) == [b"1234", b"f1f2", b"rows"]
