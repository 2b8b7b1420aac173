"""Ask a running stack, and the whole model by transformers, about sound, pictures and texts."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from PIL import Image

from chiasm.common import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

from chiasm.v1 import chat_pb2, generator_pb2, media_pb2  # noqa: E402
from tests.fakes import sounds  # noqa: E402
from tests.fakes.videos import read_video  # noqa: E402

from .reference import ReferenceAnswer  # noqa: E402
from .video_chat import Video  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Part: TypeAlias = "str | bytes | Video"
"""Text, the file of a clip or of a PNG picture, or a video."""
Parts: TypeAlias = "list[Part]"

_MIN_MARGIN = 1e-3
_MAX_ATTEMPTS = 20
_PNG_START = b"\x89PNG"


def chat_request(parts: Sequence[Part], num_tokens: int) -> chat_pb2.ChatCompletionRequest:
    """Return a greedy request for exactly ``num_tokens`` tokens, files as raw bytes."""
    content = [
        chat_pb2.ContentPart(text=part)
        if isinstance(part, str)
        else chat_pb2.ContentPart(media=_media_part(part))
        for part in parts
    ]
    return chat_pb2.ChatCompletionRequest(
        messages=[chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=content)],
        sampling=generator_pb2.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True
        ),
    )


def chat_body(parts: Sequence[Part], num_tokens: int) -> dict[str, Any]:
    """Return the REST body of the same request, clips as ``input_audio``."""
    return {
        "messages": [{"role": "user", "content": [_rest_part(part) for part in parts]}],
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
    }


def _rest_part(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Video):
        url = "data:video/mp4;base64," + base64.b64encode(part.data).decode()
        return {"type": "video_url", "video_url": {"url": url, **part.wishes}}
    data = base64.b64encode(part).decode()
    if part.startswith(_PNG_START):
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def _media_part(part: bytes | Video) -> chat_pb2.MediaPart:
    if isinstance(part, Video):
        options = media_pb2.ProcessingOptions(**part.wishes)
        return chat_pb2.MediaPart(
            modality=media_pb2.MODALITY_VIDEO, data=part.data, options=options
        )
    if part.startswith(_PNG_START):
        return chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, data=part)
    return chat_pb2.MediaPart(modality=media_pb2.MODALITY_AUDIO, data=part)


class AudioReference:
    """The whole checkpoint in float32, loaded as its users load it, fed as librosa feeds it."""

    def __init__(self, path: Path) -> None:
        self._processor = transformers.AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]  # transformers' own
        # Any: transformers' types do not fit how its `generate` is called.
        self._model: Any = transformers.AutoModelForMultimodalLM.from_pretrained(
            path, dtype=torch.float32
        )
        self._model.generation_config.eos_token_id = None

    def answer(self, parts: Parts, num_tokens: int) -> tuple[Parts, ReferenceAnswer]:
        """Return what is asked and ``num_tokens`` greedy tokens for it, none of them a near tie.

        What is asked are ``parts``, the text at their end lengthened until no token was one.
        """
        *before, last = parts
        assert isinstance(last, str)
        for attempt in range(_MAX_ATTEMPTS):
            question = last + " please" * attempt
            found, margin = self._answer([*before, question], question, num_tokens)
            if margin >= _MIN_MARGIN:
                return [*before, question], found
        raise AssertionError(f"all answers to {last!r} have near ties")

    def _answer(
        self, parts: Parts, question: str, num_tokens: int
    ) -> tuple[ReferenceAnswer, float]:
        content, media = self._read(parts)
        prompt = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs: dict[str, Any] = self._processor(text=[prompt], return_tensors="pt", **media)
        with torch.inference_mode():
            output = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=num_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        prompt_ids = inputs["input_ids"][0].tolist()
        token_ids = output.sequences[0, len(prompt_ids) :].tolist()
        best = torch.cat(output.logits).topk(2).values
        text = self._processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        margin = float((best[:, 0] - best[:, 1]).min())
        logprobs = torch.cat(output.logits).float().log_softmax(dim=-1)
        return ReferenceAnswer(question, prompt_ids, token_ids, text, logprobs), margin

    def _read(self, parts: Parts) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Return the content for the template, and the media for the processor."""
        rate = self._processor.feature_extractor.sampling_rate
        content: list[dict[str, str]] = []
        media: dict[str, Any] = {"sampling_rate": rate}
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            elif isinstance(part, Video):
                content.append({"type": "video"})
                frames = read_video(part.data)
                media.setdefault("videos", []).append(frames)
                metadata = {"total_num_frames": len(frames), "fps": part.rate}
                metadata["duration"] = len(frames) / part.rate
                wishes = media.setdefault("videos_kwargs", {"video_metadata": []})
                wishes["video_metadata"].append(metadata)
                wishes.update(do_sample_frames=True, **part.wishes)
            elif part.startswith(_PNG_START):
                content.append({"type": "image"})
                picture = Image.open(io.BytesIO(part)).convert("RGB")
                media.setdefault("images", []).append(picture)
            else:
                content.append({"type": "audio"})
                media.setdefault("audio", []).append(sounds.reference(part, rate))
        return content, media
