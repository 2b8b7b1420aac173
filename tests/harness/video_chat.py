"""Ask a stack about videos, and the whole model by transformers about the same frames."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import torch
from PIL import Image

from chiasm.common import torchvision_shim
from chiasm.v1 import chat_pb2, chat_pb2_grpc, generator_pb2, media_pb2
from tests.fakes.videos import read_video
from tests.harness.chat import REQUEST_TIMEOUT_S

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

_MIN_MARGIN = 1e-3
_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class Video:
    """A video file, its rate, and how its frames are to be chosen (empty: all of them)."""

    data: bytes
    rate: float
    wishes: Mapping[str, Any] = field(default_factory=dict)


Part = str | bytes | Video
"""Text, the file of a picture, or a video."""


@dataclass(frozen=True)
class VideoAnswer:
    """What the whole model says to ``parts``: expanded prompt and greedy tokens."""

    parts: tuple[Part, ...]
    prompt_ids: list[int]
    token_ids: list[int]


def video_request(parts: Sequence[Part], num_tokens: int) -> chat_pb2.ChatCompletionRequest:
    """Return a greedy request for exactly ``num_tokens`` tokens, media as raw bytes."""
    return chat_pb2.ChatCompletionRequest(
        messages=[
            chat_pb2.ChatMessage(
                role=chat_pb2.CHAT_ROLE_USER, content=[_content(part) for part in parts]
            )
        ],
        sampling=generator_pb2.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True
        ),
    )


def ask(address: str, parts: Sequence[Part], num_tokens: int) -> chat_pb2.ChatCompletionResponse:
    """Return the answer of the stack at ``address`` (gRPC); raise ``RpcError`` if it refuses."""
    with grpc.insecure_channel(address) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        return stub.ChatCompletion(video_request(parts, num_tokens), timeout=REQUEST_TIMEOUT_S)


class VideoReference:
    """The whole checkpoint in float32, fed by its own processor."""

    def __init__(self, path: Path) -> None:
        # Any: transformers' types do not fit how its `generate` is called.
        self._processor: Any = transformers.AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]  # transformers' own
        self._model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32
        )
        self._model.generation_config.eos_token_id = None

    def answer(self, parts: Sequence[Part], num_tokens: int) -> VideoAnswer:
        """Return ``num_tokens`` greedy tokens, none of which is a near tie.

        The last part must be text; it is lengthened until there is no near tie.
        """
        for attempt in range(_MAX_ATTEMPTS):
            asked = (*parts[:-1], str(parts[-1]) + " please" * attempt)
            prompt_ids, token_ids, margin = self._answer(asked, num_tokens)
            if margin >= _MIN_MARGIN:
                return VideoAnswer(asked, prompt_ids, token_ids)
        raise AssertionError(f"all answers to {parts[-1]!r} have near ties")

    def _answer(self, parts: Sequence[Part], num_tokens: int) -> tuple[list[int], list[int], float]:
        prompt = self._processor.apply_chat_template(
            [{"role": "user", "content": [_template_part(part) for part in parts]}],
            add_generation_prompt=True,
        )
        pictures = [
            Image.open(io.BytesIO(part)).convert("RGB") for part in parts if isinstance(part, bytes)
        ]
        videos = [part for part in parts if isinstance(part, Video)]
        arguments: dict[str, Any] = {"images": pictures or None}
        if videos:
            frames = [read_video(video.data) for video in videos]
            (wishes,) = {tuple(video.wishes.items()) for video in videos}
            arguments["videos"] = frames
            arguments["videos_kwargs"] = {
                "video_metadata": [
                    _metadata(video, pixels) for video, pixels in zip(videos, frames, strict=True)
                ],
                **({"do_sample_frames": True, "fps": None, "num_frames": None} if wishes else {}),
                **dict(wishes),
            }
        inputs = self._processor(text=[prompt], return_tensors="pt", **arguments)
        with torch.inference_mode():
            output = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=num_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        prompt_ids = inputs["input_ids"][0].tolist()
        best = torch.cat(output.logits).topk(2).values
        margin = float((best[:, 0] - best[:, 1]).min())
        return prompt_ids, output.sequences[0, len(prompt_ids) :].tolist(), margin


def _content(part: Part) -> chat_pb2.ContentPart:
    if isinstance(part, str):
        return chat_pb2.ContentPart(text=part)
    if isinstance(part, bytes):
        media = chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, data=part)
    else:
        media = chat_pb2.MediaPart(
            modality=media_pb2.MODALITY_VIDEO,
            data=part.data,
            options=media_pb2.ProcessingOptions(**part.wishes),
        )
    return chat_pb2.ContentPart(media=media)


def _template_part(part: Part) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image" if isinstance(part, bytes) else "video"}


def _metadata(video: Video, frames: np.ndarray) -> dict[str, Any]:
    return {
        "total_num_frames": len(frames),
        "fps": video.rate,
        "duration": len(frames) / video.rate,
    }
