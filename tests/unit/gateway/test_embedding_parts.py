"""Ready-made embeddings in JSON requests, and the digests of sources that are not one file."""

from __future__ import annotations

import struct

import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import DataType, PatchGrid
from chiasm.gateway.chat_request import BytesSource, UrlSource
from chiasm.gateway.media_policy import MediaPolicy
from chiasm.gateway.media_sources import (
    FramesSource,
    TensorFileSource,
    TensorSource,
    contents_of,
    digest_of,
    is_whole,
)
from tests.harness.media_parts import b64, item_of, sent


def test_a_tensor_file_is_passed_on_unread() -> None:
    item = item_of({"type": "image_embeds", "image_embeds": b64(b"PK-file")})

    assert isinstance(item.source, TensorFileSource)
    assert sent(item.source) == [b"PK-file"]
    assert digest_of(item.source) is None


def test_a_tensor_file_may_have_its_grid_in_numbers_or_in_a_file() -> None:
    payload: dict[str, object] = {"image_embeds": b64(b"rows"), "image_grid_thw": [[1, 2, 4]]}
    item = item_of({"type": "image_embeds", "image_embeds": payload})
    assert isinstance(item.source, TensorFileSource)
    assert item.source.grid == PatchGrid(1, 2, 4)

    payload["image_grid_thw"] = b64(b"grid")
    item = item_of({"type": "image_embeds", "image_embeds": payload})
    assert sent(item.source) == [b"rows", b"grid"]


def test_an_array_of_numbers_is_a_float32_tensor() -> None:
    payload = {"video_embeds": [[1, 2.5], [3, 4]], "video_grid_thw": [1, 2, 4]}

    item = item_of({"type": "video_embeds", "video_embeds": payload})

    assert isinstance(item.source, TensorSource)
    assert (item.source.dtype, item.source.shape) == (DataType.FLOAT32, (2, 2))
    assert item.source.grid == PatchGrid(1, 2, 4)
    assert sent(item.source) == [struct.pack("<4f", 1, 2.5, 3, 4)]


def test_a_tensor_may_be_given_by_type_shape_and_bytes() -> None:
    payload = {"dtype": "bfloat16", "shape": [2, 3], "data": b64(bytes(12))}

    item = item_of({"type": "audio_embeds", "audio_embeds": payload})

    assert isinstance(item.source, TensorSource)
    assert (item.source.dtype, item.source.shape) == (DataType.BFLOAT16, (2, 3))


def test_grids_types_and_shapes_of_tensors_make_different_digests() -> None:
    content = bytes(12)
    sources = [
        TensorSource(DataType.FLOAT32, (3, 1), None, BytesSource(content)),
        TensorSource(DataType.FLOAT32, (1, 3), None, BytesSource(content)),
        TensorSource(DataType.FLOAT16, (3, 2), None, BytesSource(content)),
        TensorSource(DataType.FLOAT32, (3, 1), PatchGrid(1, 2, 6), BytesSource(content)),
    ]
    assert len({digest_of(source) for source in sources}) == 4


def test_frames_have_a_digest_if_all_their_bytes_are_here() -> None:
    one, two = BytesSource(b"1"), BytesSource(b"2")
    digest = digest_of(FramesSource((one, two)))
    assert digest is not None
    assert digest != digest_of(FramesSource((two, one)))
    assert digest_of(FramesSource((one, UrlSource("http://a/b")))) is None


def test_a_released_source_is_not_whole() -> None:
    source = FramesSource((BytesSource(b"1"), UrlSource("http://a/b")))
    assert is_whole(source)
    for content in contents_of(source):
        content.release()
    assert not is_whole(source)


WRONG_EMBEDDINGS: list[tuple[object, str]] = [
    (5, "must be base64 of a tensor"),
    ("@@", "The tensor is not valid base64"),
    ([], "must be a dense array"),
    ([[1, 2], [3]], "must be a dense array"),
    ([[1], []], "must be a dense array"),
    ([[1, "x"]], "must hold numbers only"),
    ([[1, True]], "must hold numbers only"),
    ([[1, [2]]], "must hold numbers only"),
    ([[[[[1]]]]], "must have at most 4 dimensions"),
    ([[1] * 17], "68 bytes of a tensor is over the limit of 64"),
    ({"pixels": "x"}, "should contain the fields: {image_embeds}, but only found the following"),
    ({"image_embeds": "YWJj", "audio": "x"}, "Unsupported modality: audio"),
    ({"image_embeds": "YWJj", "image_grid_thw": [1, 2]}, "must be [t, h, w]"),
    ({"image_embeds": "YWJj", "image_grid_thw": [[1, 2, 3], [1, 2, 3]]}, "for one item per part"),
    ({"image_embeds": "YWJj", "image_grid_thw": [1, 0, 2]}, "integers of at least 1"),
    ({"image_embeds": "YWJj", "image_grid_thw": [1, 2.5, 2]}, "integers of at least 1"),
    ({"image_embeds": "YWJj", "image_grid_thw": 3}, "must be an array or base64"),
    ({"image_embeds": [[1]], "image_grid_thw": "YWJj"}, "if the embedding is numbers"),
    ({"image_embeds": "YWJj", "image_grid_thw": b64(bytes(17))}, "over the limit of 16"),
    ({"dtype": "int8", "shape": [1], "data": ""}, "dtype must be one of float32"),
    ({"dtype": "float32", "shape": [], "data": ""}, "1 to 4 dimensions"),
    ({"dtype": "float32", "shape": [1, -8], "data": ""}, "integers of at least 1"),
    ({"dtype": "float32", "shape": [2], "data": b64(bytes(4))}, "must have 8 bytes, got 4"),
    ({"dtype": "float32", "shape": [2**31, 2**31], "data": b64(bytes(4))}, "got 4"),
    (b64(bytes(65)), "65 bytes of media is over the limit of 64"),
]


@pytest.mark.parametrize(("payload", "text"), WRONG_EMBEDDINGS, ids=lambda value: str(value)[:50])
def test_a_wrong_embedding_is_refused_and_named(payload: object, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        item_of({"type": "image_embeds", "image_embeds": payload})

    assert text in caught.value.message
    assert caught.value.param.startswith("messages[0].content[0]")


def test_embeddings_can_be_switched_off() -> None:
    part = {"type": "image_embeds", "image_embeds": "YWJj"}
    assert item_of(part).source is not None
    with pytest.raises(InvalidRequestError, match="--enable-mm-embeds` to input `image_embeds`"):
        item_of(part, policy=MediaPolicy(takes_embeddings=False))
