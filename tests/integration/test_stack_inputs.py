"""One picture and one video give the same answer in whatever form they reach the whole stack."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import urllib.request
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from chiasm.v1 import encoder_pb2, media_pb2
from tests.fakes import checkpoints
from tests.fakes.videos import KINDS, moving_square, read_video, write_video
from tests.harness import chat
from tests.harness.encoder import EncoderClient
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

NUM_TOKENS = 16
RATE = 10
PICTURE = chat.picture(31, 97, 61)
VIDEO = write_video(moving_square(8, 60, 44), KINDS["mpeg4 in mp4"], rate=RATE)
WISHES = {"fps": RATE}


def files_of(video: bytes, kind: str) -> list[bytes]:
    """Return every frame of a video as a picture."""
    files = []
    for frame in read_video(video):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, kind)
        files.append(buffer.getvalue())
    return files


FRAMES = files_of(VIDEO, "PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "picture.png").write_bytes(PICTURE)
    for index, frame in enumerate(FRAMES):
        (folder / f"{index}.png").write_bytes(frame)
    return folder


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Stack]:
    model = checkpoints.make_qwen2_5_vl(tmp_path_factory.mktemp("model"))
    flags = ["--dtype", "float32", "--allowed-local-media-path", str(folder)]
    running = Stack(model, flags)
    yield running
    assert running.stop() == 0


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{b64(data)}"


def body_of(content: object) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
    }


def answer_of(stack: Stack, content: object) -> tuple[str, int]:
    """Return text and prompt tokens of the answer."""
    answer = chat.post_chat(stack.base_url, body_of(content))
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def post_form(stack: Stack, body: dict[str, Any], files: dict[str, bytes]) -> tuple[str, int]:
    edge = uuid.uuid4().hex
    form = b""
    for name, data in {"request": json.dumps(body).encode(), **files}.items():
        form += f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
        form += data + b"\r\n"
    request = urllib.request.Request(
        f"{stack.base_url}/v1/chat/completions",
        data=form + f"--{edge}--\r\n".encode(),
        headers={"content-type": f"multipart/form-data; boundary={edge}"},
    )
    with urllib.request.urlopen(request, timeout=chat.REQUEST_TIMEOUT_S) as response:
        answer = json.load(response)
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def test_a_picture_is_the_same_in_every_form(stack: Stack, folder: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url("image/png", PICTURE)}}
    expected = answer_of(stack, [image, "What is it?"])
    file_url = {"type": "image_url", "image_url": {"url": f"file://{folder}/picture.png"}}
    cid = {"type": "image_url", "image_url": {"url": "cid:cat"}}

    assert answer_of(stack, f"<image>{b64(PICTURE)}</image>What is it?") == expected
    assert answer_of(stack, [file_url, "What is it?"]) == expected
    assert post_form(stack, body_of([cid, "What is it?"]), {"cat": PICTURE}) == expected
    assert stack.metric("chiasm_encoder_encoded_items_total", "encoder-0") == 1


def test_a_video_is_the_same_as_a_file_and_as_its_frames(stack: Stack, folder: Path) -> None:
    url = data_url("video/mp4", VIDEO)
    expected = answer_of(stack, [{"type": "video_url", "video_url": {"url": url, **WISHES}}, "x"])
    urls = [data_url("image/png", frame) for frame in FRAMES]
    paths = [f"file://{folder}/{index}.png" for index in range(len(FRAMES))]
    names = {f"f{index}": frame for index, frame in enumerate(FRAMES)}
    cids = [f"cid:{name}" for name in names]

    mixed = [*urls[:4], *paths[4:]]
    for frames in (urls, paths, mixed):
        part = {"type": "video", "video": frames, **WISHES}
        assert answer_of(stack, [part, "x"]) == expected
    part = {"type": "video", "video": cids, **WISHES}
    assert post_form(stack, body_of([part, "x"]), names) == expected


def test_frames_in_one_data_url_are_the_list_of_them(stack: Stack) -> None:
    files = files_of(VIDEO, "JPEG")
    part = {"type": "video", "video": [data_url("image/jpeg", file) for file in files], **WISHES}
    expected = answer_of(stack, [part, "x"])
    url = "data:video/jpeg;base64," + ",".join(map(b64, files))

    body = body_of([{"type": "video_url", "video_url": {"url": url}}, "x"])
    answer = chat.post_chat(stack.base_url, {**body, "media_io_kwargs": {"video": WISHES}})

    assert answer["choices"][0]["message"]["content"] == expected[0]
    assert answer["usage"]["prompt_tokens"] == expected[1]


def test_the_rows_of_a_video_are_as_good_as_the_video(stack: Stack) -> None:
    async def encode() -> tuple[torch.Tensor, media_pb2.PatchGrid]:
        token = (stack.state_dir / "service_token").read_text().strip()
        client = EncoderClient(stack.address("encoder-0"), token)
        options = media_pb2.ProcessingOptions(fps=RATE)
        video = media_pb2.MODALITY_VIDEO
        answer = await client.encode(VIDEO, modality=video, options=options, inline=True)
        await client.close()
        assert answer.layout is not None
        return torch.from_numpy(answer.rows().copy()), answer.layout.grid

    rows, grid = asyncio.run(encode())
    url = data_url("video/mp4", VIDEO)
    expected = answer_of(stack, [{"type": "video_url", "video_url": {"url": url, **WISHES}}, "x"])
    payload = {"video_embeds": rows.tolist(), "video_grid_thw": [grid.t, grid.h, grid.w]}

    part = {"type": "video_embeds", "video_embeds": payload, **WISHES}

    assert grid.t > 1
    assert answer_of(stack, [part, "x"]) == expected


def test_a_frame_that_is_no_picture_names_the_part(stack: Stack) -> None:
    frames = [data_url("image/png", FRAMES[0]), data_url("image/png", b"junk")]

    refusal = chat.refused_chat(stack.base_url, body_of(["x", {"type": "video", "video": frames}]))

    assert refusal.status == 400
    assert refusal.error["param"] == "messages[0].content[1]"
    assert refusal.error["message"].startswith("Failed to load video")


def test_a_file_outside_the_folder_is_refused(stack: Stack) -> None:
    part = {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}

    refusal = chat.refused_chat(stack.base_url, body_of([part]))

    assert refusal.status == 400
    assert refusal.error["message"] == (
        "The file path must be a subpath of `--allowed-local-media-path`."
    )


def test_an_encoder_refuses_frames_of_a_picture(stack: Stack) -> None:
    async def encode() -> None:
        token = (stack.state_dir / "service_token").read_text().strip()
        client = EncoderClient(stack.address("encoder-0"), token)
        frames = encoder_pb2.FramesSource(frames=[encoder_pb2.FrameSource(num_bytes=1)])
        try:
            await client.encode(b"x", modality=media_pb2.MODALITY_IMAGE, frames=frames)
        finally:
            await client.close()

    with pytest.raises(Exception, match="Only a video is a list of frames"):
        asyncio.run(encode())
