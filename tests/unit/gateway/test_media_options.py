"""Wishes for the processing of media: where they may stand, which wins, what bounds them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from chiasm.common.config import ConfigError, load_settings
from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import Limits
from chiasm.common.media import Modality, ProcessingOptions
from chiasm.gateway.config import GatewaySettings
from chiasm.gateway.convert import chat_request_from_proto
from chiasm.gateway.media_policy import MediaPolicy
from chiasm.gateway.rest.chat_json import ParsedChat, parse_chat
from chiasm.gateway.rest.multipart import ChatBody
from chiasm.v1 import chat_pb2, media_pb2

REQUIRED = ["--model", "m", "--service-token-file", "t", "--store-secret-file", "s"]


def policy_of(*flags: str) -> MediaPolicy:
    settings = load_settings(GatewaySettings, "gateway", [*REQUIRED, *flags], {})
    return settings.models.media_policy


def parse(
    kind: str, policy: MediaPolicy, inner: dict[str, Any] | None = None, **fields: Any
) -> ParsedChat:
    part = {"type": kind, kind: {"url": "http://a/b", **(inner or {})}, **fields.pop("part", {})}
    document = orjson.dumps({"messages": [{"role": "user", "content": [part]}], **fields})
    return parse_chat(ChatBody(document), "r", Limits(), policy)


def image(*flags: str, **fields: Any) -> ProcessingOptions:
    return parse("image_url", policy_of(*flags), **fields).request.media_items[0].options


def video(*flags: str, **fields: Any) -> ProcessingOptions:
    return parse("video_url", policy_of(*flags), **fields).request.media_items[0].options


def test_without_wishes_nothing_is_set() -> None:
    assert image() == ProcessingOptions()
    assert video() == ProcessingOptions()


def test_a_part_wins_over_its_request() -> None:
    whole = {"max_pixels": 500, "min_pixels": 5}
    assert image(mm_processor_kwargs=whole) == ProcessingOptions(5, 500)
    assert image(mm_processor_kwargs=whole, part={"max_pixels": 900}).max_pixels == 900
    assert image(mm_processor_kwargs=whole, inner={"max_pixels": 90}).max_pixels == 90


def test_wishes_of_one_modality_do_not_reach_another() -> None:
    kwargs = {"images_kwargs": {"max_pixels": 7}, "videos_kwargs": {"fps": 1}}
    assert image(mm_processor_kwargs=kwargs) == ProcessingOptions(max_pixels=7)
    assert video(mm_processor_kwargs=kwargs) == ProcessingOptions(fps=1.0)
    assert image(mm_processor_kwargs={"fps": 2, "num_frames": 3}) == ProcessingOptions()


def test_media_io_kwargs_say_how_media_are_decoded() -> None:
    kwargs = {
        "video": {"num_frames": 8, "fps": 0.5},
        "image": {"rgba_background_color": [1, 2, 3]},
    }
    assert video(media_io_kwargs=kwargs) == ProcessingOptions(fps=0.5, num_frames=8)
    assert image(media_io_kwargs=kwargs) == ProcessingOptions(background_rgb=0x010203)
    assert video(media_io_kwargs={"video": {"num_frames": -1}}) == ProcessingOptions()


def test_fields_without_effect_are_told() -> None:
    parsed = parse(
        "image_url",
        MediaPolicy(),
        mm_processor_kwargs={"num_crops": 4, "videos_kwargs": {"size": 1}},
        media_io_kwargs={"video": {"frame_recovery": True}, "smell": {}},
    )
    assert set(parsed.ignored) == {
        "mm_processor_kwargs.num_crops",
        "mm_processor_kwargs.videos_kwargs.size",
        "media_io_kwargs.video.frame_recovery",
        "media_io_kwargs.smell",
    }


@pytest.mark.parametrize(
    ("detail", "inner", "max_pixels"),
    [
        ("auto", {}, None),
        ("high", {}, None),
        ("low", {}, 512 * 512),
        ("low", {"max_pixels": 1000}, 1000),
        ("low", {"max_pixels": 10**6}, 512 * 512),
    ],
)
def test_low_detail_bounds_the_pixels(
    detail: str, inner: dict[str, int], max_pixels: int | None
) -> None:
    assert image(inner={"detail": detail, **inner}).max_pixels == max_pixels


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("image_url", {"detail": "finest"}, "detail", "detail must be one of auto, low"),
    ("image_url", {"max_pixels": 0}, "max_pixels", "max_pixels must be between 1 and"),
    ("image_url", {"max_pixels": 2**32}, "max_pixels", "max_pixels must be between 1 and"),
    ("image_url", {"rgba_background_color": [1, 2]}, "rgba_background_color", "3 integers"),
    ("image_url", {"rgba_background_color": [1, 2, 256]}, "rgba_background_color", "and 255"),
    ("image_url", {"rgba_background_color": [1, 2, 3, 0]}, "rgba_background_color", "3 integers"),
    ("video_url", {"fps": "fast"}, "fps", "must be a number"),
    ("video_url", {"num_frames": 0}, "num_frames", "num_frames must be at least 1, or -1"),
    ("video_url", {"num_frames": -2}, "num_frames", "must be between -1 and"),
]


@pytest.mark.parametrize(("kind", "inner", "name", "text"), WRONG, ids=str)
def test_a_wrong_wish_is_named(kind: str, inner: dict[str, Any], name: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text) as caught:
        parse(kind, MediaPolicy(), inner=inner)
    assert caught.value.param == f"messages[0].content[0].{kind}.{name}"


@pytest.mark.parametrize("fps", [0, -1, 241])
def test_frames_per_second_are_bounded(fps: float) -> None:
    assert video(inner={"fps": 240}).fps == 240
    with pytest.raises(InvalidRequestError, match="fps must be above 0 and at most 240"):
        video(inner={"fps": fps})


SPELLINGS = [
    ("--mm-processor-kwargs", '{"max_pixels": 100, "videos_kwargs": {"fps": 2}}'),
    ("--mm-processor-kwargs.max_pixels", "100", "--mm-processor-kwargs.videos_kwargs.fps=2"),
    ("--mm-processor-kwargs", "max_pixels=100", "--media-io-kwargs.video.fps", "2"),
    ("--mm-processor-kwargs", "max_pixels=100", "--media-io-kwargs", '{"video": {"fps": 2}}'),
]


@pytest.mark.parametrize("flags", SPELLINGS, ids=str)
def test_the_operators_options_are_read_in_every_spelling(flags: tuple[str, ...]) -> None:
    policy = policy_of(*flags)

    assert policy.options[Modality.IMAGE] == ProcessingOptions(max_pixels=100)
    assert policy.options[Modality.VIDEO] == ProcessingOptions(max_pixels=100, fps=2.0)
    assert policy.options[Modality.AUDIO] == ProcessingOptions()


def test_the_operators_background_is_read_from_a_nested_flag() -> None:
    options = image("--media-io-kwargs.image.rgba_background_color", "[0,0,255]")
    assert options.background_rgb == 0x0000FF


@pytest.mark.parametrize(
    "flags",
    [
        ("--mm-processor-kwargs", "num_crops=4"),
        ("--mm-processor-kwargs", "max_pixels=0"),
        ("--mm-processor-kwargs", "max_pixels=many"),
        ("--media-io-kwargs", '{"smell": {}}'),
        ("--media-io-kwargs", '{"video": {"num_frames": 0}}'),
        ("--media-io-kwargs", "video=5"),
    ],
    ids=str,
)
def test_a_wrong_option_of_the_operator_stops_the_start(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"(mm_processor|media_io|mm.processor|media.io)"):
        policy_of(*flags)


def test_clients_lower_the_operators_limits_and_never_raise_them() -> None:
    flags = (
        *("--mm-processor-kwargs", '{"max_pixels": 100, "videos_kwargs": {"fps": 2}}'),
        *("--media-io-kwargs.video.num_frames", "16"),
    )

    assert image(*flags) == ProcessingOptions(max_pixels=100)
    assert image(*flags, inner={"max_pixels": 99}).max_pixels == 99
    assert image(*flags, inner={"max_pixels": 101}).max_pixels == 100
    assert video(*flags, inner={"fps": 1, "num_frames": 15}) == ProcessingOptions(
        max_pixels=100, fps=1.0, num_frames=15
    )
    assert video(*flags, inner={"fps": 3, "num_frames": 17}) == ProcessingOptions(
        max_pixels=100, fps=2.0, num_frames=16
    )


def test_the_operators_limits_hold_for_grpc_too() -> None:
    media = chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, url="http://a/b")
    media.options.max_pixels = 5000
    part = chat_pb2.ContentPart(media=media)
    message = chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=[part])
    request = chat_pb2.ChatCompletionRequest(messages=[message])
    policy = policy_of("--mm-processor-kwargs", "max_pixels=100")

    (item,) = chat_request_from_proto(request, Limits(), policy).media_items

    assert item.options.max_pixels == 100


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_pixels": 2, "max_pixels": 1}, "min_pixels must not be above"),
        ({"max_pixels": 0}, "max_pixels must be at least 1"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"fps": float("nan")}, "fps must be above 0"),
        ({"fps": float("inf")}, "fps must be above 0"),
        ({"background_rgb": 1 << 24}, "background_rgb must be at most"),
    ],
    ids=str,
)
def test_wishes_without_a_meaning_are_refused_over_grpc(options: dict[str, Any], text: str) -> None:
    media = chat_pb2.MediaPart(
        modality=media_pb2.MODALITY_VIDEO,
        url="http://a/b",
        options=media_pb2.ProcessingOptions(**options),
    )
    part = chat_pb2.ContentPart(media=media)
    message = chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=[part])
    request = chat_pb2.ChatCompletionRequest(messages=[message])
    with pytest.raises(InvalidRequestError, match=text):
        chat_request_from_proto(request, Limits(), MediaPolicy())
