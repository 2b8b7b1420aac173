"""The oracle: greedy tokens of the whole model by transformers, one conversation at a time."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from chiasm.common import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MIN_MARGIN = 1e-3
_MAX_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class ReferenceAnswer:
    """What the whole model says: prompt ids with expanded placeholders, output ids, and text.

    ``question`` is the one that was asked: the given one, lengthened until no token was a near tie.
    ``logprobs`` are those of the whole vocabulary for every output token, float32;
    ``prompt_logprobs`` those for every prompt token but the first, where that was looked at.
    """

    question: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: torch.Tensor
    prompt_logprobs: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


class ReferenceModel:
    """The whole checkpoint in float32, loaded as its users load it."""

    def __init__(self, path: Path) -> None:
        self._processor = transformers.AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]  # transformers' own
        # Any: transformers' types do not fit how its `generate` is called.
        self._model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32
        )
        # Without one no token ends an answer, and none is suppressed to reach the length.
        self._model.generation_config.eos_token_id = None

    def answer(self, question: str, pictures: Sequence[bytes], num_tokens: int) -> ReferenceAnswer:
        """Return ``num_tokens`` greedy tokens for a question after ``pictures`` (files' bytes).

        The end-of-sequence token does not end the answer, so that every answer has the same length.
        No token is a near tie: two correct ways to sum floats agree on all of them.
        """
        for attempt in range(_MAX_ATTEMPTS):
            found, margin = self._answer(question + " please" * attempt, pictures, num_tokens)
            if margin >= _MIN_MARGIN:
                return found
        raise AssertionError(f"all answers to {question!r} have near ties")

    def _answer(
        self, question: str, pictures: Sequence[bytes], num_tokens: int
    ) -> tuple[ReferenceAnswer, float]:
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
        prompt = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
        inputs: dict[str, Any] = self._processor(
            text=[prompt], images=images or None, return_tensors="pt"
        )
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
        of_prompt = self._score(inputs)
        answer = ReferenceAnswer(question, prompt_ids, token_ids, text, logprobs, of_prompt)
        return answer, margin

    @torch.inference_mode()
    def _score(self, inputs: dict[str, Any]) -> torch.Tensor:
        # Some models keep the offset of their positions between calls.
        self._model.model.rope_deltas = None
        logits = self._model(**inputs).logits[0, :-1]
        assert isinstance(logits, torch.Tensor)
        return logits.float().log_softmax(dim=-1)
