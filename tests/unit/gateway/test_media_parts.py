"""Media parts of JSON requests and of gRPC messages: what each form means, what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.media import Modality, PatchGrid
from chiasm.gateway.chat_request import BytesSource, MediaItem, TextPart, UrlSource
from chiasm.gateway.convert import chat_request_from_proto
from chiasm.gateway.media_policy import MediaPolicy
from chiasm.gateway.media_sources import (
    FramesSource,
    TensorSource,
    num_bytes_of,
)
from chiasm.gateway.rest.chat_json import parse_chat
from chiasm.gateway.rest.multipart import ChatBody
from chiasm.v1 import chat_pb2, media_pb2
from tests.harness.media_parts import SMALL, b64, item_of, parts_of, sent

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMS: list[tuple[dict[str, Any], Modality, bytes | str]] = [
    ({"type": "image_url", "image_url": {"url": "http://a/b"}}, Modality.IMAGE, "http://a/b"),
    ({"type": "image_url", "image_url": {"url": "file:///a"}}, Modality.IMAGE, "file:///a"),
    ({"image_url": "https://a/b"}, Modality.IMAGE, "https://a/b"),
    ({"type": "input_image", "image_url": "http://a/b"}, Modality.IMAGE, "http://a/b"),
    ({"type": "video_url", "video_url": {"url": "http://a/v"}}, Modality.VIDEO, "http://a/v"),
    ({"type": "video", "video": "http://a/v"}, Modality.VIDEO, "http://a/v"),
    ({"type": "audio_url", "audio_url": {"url": "http://a/s"}}, Modality.AUDIO, "http://a/s"),
    (
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(b'pic')}"}},
        Modality.IMAGE,
        b"pic",
    ),
    (
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{b64(b'film')}"}},
        Modality.VIDEO,
        b"film",
    ),
    (
        {"type": "input_audio", "input_audio": {"data": b64(b"song"), "format": "mp3"}},
        Modality.AUDIO,
        b"song",
    ),
    ({"type": "input_audio", "input_audio": {"data": b64(b"song")}}, Modality.AUDIO, b"song"),
]


@pytest.mark.parametrize(("part", "modality", "source"), FORMS, ids=lambda value: str(value)[:50])
def test_each_form_of_a_part_names_its_source(
    part: Mapping[str, Any], modality: Modality, source: bytes | str
) -> None:
    item = item_of(part)

    assert item.modality is modality
    if isinstance(source, str):
        assert item.source == UrlSource(source)
    else:
        assert sent(item.source) == [source]


@pytest.mark.parametrize(
    "kind",
    [
        *("image_url", "input_image", "video_url", "video", "audio_url", "input_audio"),
        *("image_embeds", "video_embeds", "audio_embeds"),
    ],
)
@pytest.mark.parametrize("value", [None, {}, "absent"])
def test_a_part_without_media_needs_its_uuid(kind: str, value: object) -> None:
    key = "image_url" if kind == "input_image" else kind
    part: dict[str, object] = {"type": kind, "uuid": "u"}
    if value != "absent":
        part[key] = value

    item = item_of(part)
    assert (item.source, item.uuid) == (None, "u")

    del part["uuid"]
    with pytest.raises(InvalidRequestError, match=r"\[0\] is missing"):
        item_of(part)


def test_items_of_all_modalities_keep_their_order_and_count_by_modality() -> None:
    content = [
        {"type": "image_url", "image_url": {"url": "http://a/1"}},
        "between",
        {"type": "audio_url", "audio_url": {"url": "http://a/2"}},
        {"type": "image_embeds", "image_embeds": b64(b"file")},
        {"type": "text", "text": "end"},
    ]

    parts = parts_of(content)

    kinds = [
        (part.modality, part.index, part.param) if isinstance(part, MediaItem) else part.text
        for part in parts
    ]
    assert kinds == [
        (Modality.IMAGE, 0, "messages[0].content[0]"),
        "between",
        (Modality.AUDIO, 0, "messages[0].content[2]"),
        (Modality.IMAGE, 1, "messages[0].content[3]"),
        "end",
    ]


def test_frames_in_one_data_url_are_a_list_of_pictures() -> None:
    url = f"data:video/jpeg;base64,{b64(b'one')},{b64(b'two')}"

    item = item_of({"type": "video_url", "video_url": {"url": url, "fps": 2}})

    assert isinstance(item.source, FramesSource)
    assert sent(item.source) == [b"one", b"two"]
    assert item.options.fps == 2


def test_a_list_of_frames_takes_every_form_of_a_picture() -> None:
    frames = [{"type": "image_url", "image_url": {"url": "cid:f"}}, "http://a/2"]

    item = item_of({"type": "video", "video": frames}, files={"f": b"one"})

    assert isinstance(item.source, FramesSource)
    first, second = item.source.frames
    assert isinstance(first, BytesSource)
    assert first.data == b"one"
    assert second == UrlSource("http://a/2")


def test_the_number_of_frames_is_bounded_from_both_sides() -> None:
    frame = "http://a/1"
    assert item_of({"type": "video", "video": [frame] * 2}).source is not None
    with pytest.raises(TooLargeError, match="3 frames of a video is over the limit of 2"):
        item_of({"type": "video", "video": [frame] * 3})
    url = "data:video/jpeg;base64," + ",".join([b64(b"x")] * 9)
    with pytest.raises(TooLargeError, match="3 frames of a video"):
        item_of({"type": "video_url", "video_url": {"url": url}})


def test_the_bytes_of_all_frames_together_are_bounded() -> None:
    half = {"url": f"data:image/png;base64,{b64(bytes(32))}"}
    assert num_bytes_of(item_of({"type": "video", "video": [half, half]}).source) == 64
    more = {"url": f"data:image/png;base64,{b64(bytes(33))}"}
    with pytest.raises(TooLargeError, match="65 bytes of media is over the limit of 64"):
        item_of({"type": "video", "video": [half, more]})


def test_a_file_part_of_a_form_is_named_by_a_cid_url() -> None:
    part = {"type": "image_url", "image_url": {"url": "cid:cat"}}
    assert sent(item_of(part, files={"cat": b"pic"}).source) == [b"pic"]

    with pytest.raises(InvalidRequestError, match="there is none named 'cat'") as caught:
        item_of(part)
    assert caught.value.param == "messages[0].content[0].image_url.url"


PICTURE = b"a picture of twenty-six by"


def test_an_embedding_may_be_a_file_part_of_a_form() -> None:
    payload = {"image_embeds": "cid:rows%20of%20it", "image_grid_thw": "cid:grid"}
    files = {"rows of it": b"rows", "grid": b"grid"}

    item = item_of({"type": "image_embeds", "image_embeds": payload}, files=files)

    assert sent(item.source) == [b"rows", b"grid"]


def test_a_picture_in_the_text_of_a_string_message_becomes_an_item() -> None:
    text = f"Look: <image>{b64(PICTURE)}</image> and <image>\n{b64(PICTURE[::-1])}\n</image>"

    parts = parts_of(text)

    shown = [part.text if isinstance(part, TextPart) else sent(part.source)[0] for part in parts]
    assert shown == ["Look: ", PICTURE, " and ", PICTURE[::-1]]


@pytest.mark.parametrize(
    "text",
    [
        *("", "plain", "<image>", "</image><image>", "<image>a cat</image>", "<image>YWJj</image>"),
        *(f"<image>{b64(PICTURE)}", f"<image>{b64(PICTURE)}!</image>"),
    ],
)
def test_marks_around_anything_else_stay_text(text: str) -> None:
    assert parts_of(text) == (TextPart(text),)


def test_the_innermost_marks_count() -> None:
    parts = parts_of(f"<image>no <image>{b64(PICTURE)}</image> rest")

    assert parts[0] == TextPart("<image>no ")
    assert isinstance(parts[1], MediaItem)
    assert parts[2] == TextPart(" rest")


def test_only_users_messages_have_pictures_in_their_text() -> None:
    text = f"<image>{b64(PICTURE)}</image>"
    document = orjson.dumps({"messages": [{"role": "assistant", "content": text}]})

    request = parse_chat(ChatBody(document), "r", SMALL, MediaPolicy()).request

    assert request.messages[0].content == (TextPart(text),)


def read(media: chat_pb2.MediaPart) -> MediaItem:
    part = chat_pb2.ContentPart(media=media)
    message = chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=[part])
    request = chat_pb2.ChatCompletionRequest(messages=[message])
    (item,) = chat_request_from_proto(request, SMALL, MediaPolicy()).media_items
    return item


def test_grpc_parts_say_the_same_without_base64() -> None:
    tensor = chat_pb2.MediaTensor(dtype=media_pb2.DATA_TYPE_FLOAT16, shape=[2, 1], data=bytes(4))
    tensor.grid.CopyFrom(media_pb2.PatchGrid(t=1, h=2, w=4))
    item = read(chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, tensor=tensor))
    assert isinstance(item.source, TensorSource)
    assert (item.source.shape, item.source.grid) == ((2, 1), PatchGrid(1, 2, 4))

    file = chat_pb2.TensorFile(data=b"rows", grid_data=b"grid")
    item = read(chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, tensor_file=file))
    assert sent(item.source) == [b"rows", b"grid"]

    frames = chat_pb2.FrameList(frames=[chat_pb2.Frame(data=b"1"), chat_pb2.Frame(url="http://a")])
    item = read(chat_pb2.MediaPart(modality=media_pb2.MODALITY_VIDEO, frames=frames))
    assert isinstance(item.source, FramesSource)
    assert item.source.frames[1] == UrlSource("http://a")


WRONG_MESSAGES = [
    (chat_pb2.MediaPart(frames=chat_pb2.FrameList()), "The video has no frames."),
    (
        chat_pb2.MediaPart(frames=chat_pb2.FrameList(frames=[chat_pb2.Frame()])),
        "The frame is empty.",
    ),
    (chat_pb2.MediaPart(tensor=chat_pb2.MediaTensor(shape=[1])), "Unknown tensor dtype 0."),
    (
        chat_pb2.MediaPart(
            tensor=chat_pb2.MediaTensor(dtype=media_pb2.DATA_TYPE_FLOAT32, shape=[0])
        ),
        "dimensions of at least 1.",
    ),
    (chat_pb2.MediaPart(tensor_file=chat_pb2.TensorFile()), "The embedding has no bytes."),
    (
        chat_pb2.MediaPart(
            tensor_file=chat_pb2.TensorFile(data=b"x", grid=media_pb2.PatchGrid(t=1))
        ),
        "sides of a grid must be at least 1.",
    ),
    (
        chat_pb2.MediaPart(
            tensor_file=chat_pb2.TensorFile(data=b"x", grid_data=b"x", grid=media_pb2.PatchGrid())
        ),
        "given twice",
    ),
]


@pytest.mark.parametrize(("media", "text"), WRONG_MESSAGES, ids=lambda value: str(value)[:50])
def test_a_wrong_message_is_refused(media: chat_pb2.MediaPart, text: str) -> None:
    media.modality = media_pb2.MODALITY_VIDEO
    with pytest.raises(InvalidRequestError, match=text):
        read(media)


def test_only_a_video_has_frames() -> None:
    frames = chat_pb2.FrameList(frames=[chat_pb2.Frame(data=b"1")])
    with pytest.raises(InvalidRequestError, match="Only a video is a list of frames"):
        read(chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, frames=frames))
