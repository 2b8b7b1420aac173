"""The whole model of a checkpoint: the reference for what the split stack generates."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from chiasm.common import torchvision_shim
from chiasm.common.media import (
    DataType,
    Embedding,
    EmbeddingRef,
    MediaLayout,
    MediaSpan,
    Modality,
    PatchGrid,
    TensorRole,
    TensorSpec,
    TokenRun,
)

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_MERGE_SIZE = 2
_FIRST_TEXT_TOKEN = 20
_MIN_MARGIN = 1e-3
_MAX_ATTEMPTS = 50


@dataclass(frozen=True)
class MediaPrompt:
    """A prompt with random images.

    Attributes:
        token_ids: Tokens, placeholders expanded.
        spans: Media spans, ready.
        embeddings: What the tower makes of each image.
        inputs: Arguments by which the whole model gets the same prompt.
        answer: Greedy tokens of the whole model, the end token included.
    """

    token_ids: tuple[int, ...]
    spans: tuple[MediaSpan, ...]
    embeddings: tuple[Embedding, ...]
    inputs: dict[str, torch.Tensor]
    answer: tuple[int, ...] = ()


class WholeModel:
    """A checkpoint loaded by transformers in float32.

    ``attention`` names transformers' implementation; only ``eager`` caps scores.
    """

    def __init__(self, path: Path, attention: str = "sdpa") -> None:
        self.path = path
        # Any: transformers' types do not fit how its `generate` is called.
        self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention
        )
        config = self.model.config
        self._image_token_id: int = config.image_token_id
        self._has_grid = hasattr(config.vision_config, "spatial_merge_size")
        self._attends_both_ways = config.model_type == "gemma3"
        self._patch_values = 3 * 2 * config.vision_config.patch_size**2

    def make_prompt(self, num_images: int, seed: int, max_tokens: int = 32) -> MediaPrompt:
        """Return a prompt of random text around ``num_images`` random images of odd sizes.

        No token of its answer is a near tie: two correct ways to sum floats agree on all of them.
        """
        return self._find_clear(
            lambda attempt: self._make_random_prompt(num_images, attempt), seed, max_tokens
        )

    def change_text(
        self, prompt: MediaPrompt, start: int, seed: int, max_tokens: int = 32
    ) -> MediaPrompt:
        """Return ``prompt`` with other text from ``start`` on, which is behind its images.

        No token of its answer is a near tie, as with ``make_prompt``.
        """

        def change(attempt: int) -> MediaPrompt:
            token_ids = (*prompt.token_ids[:start], *_random_text(random.Random(attempt)))
            inputs = {**prompt.inputs, **self._text_inputs(torch.tensor([token_ids]))}
            return replace(prompt, token_ids=token_ids, inputs=inputs)

        return self._find_clear(change, seed, max_tokens)

    def _find_clear(
        self, make: Callable[[int], MediaPrompt], seed: int, max_tokens: int
    ) -> MediaPrompt:
        for attempt in range(seed * _MAX_ATTEMPTS, (seed + 1) * _MAX_ATTEMPTS):
            prompt = make(attempt)
            answer, margin = self._answer(prompt, max_tokens)
            if margin >= _MIN_MARGIN:
                return replace(prompt, answer=tuple(answer))
        raise AssertionError(f"All answers of seed {seed} have near ties.")

    @torch.inference_mode()
    def prefill_logits(self, prompt: MediaPrompt) -> torch.Tensor:
        """Return the logits of every token of the prompt. [num_tokens, vocab_size]."""
        self.model.model.rope_deltas = None
        logits = self.model(**prompt.inputs).logits
        assert isinstance(logits, torch.Tensor)
        return logits[0]

    @torch.inference_mode()
    def _make_random_prompt(self, num_images: int, seed: int) -> MediaPrompt:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        token_ids = _random_text(rng)
        spans, embeddings, pixels, grids = [], [], [], []
        for _ in range(num_images):
            image, grid = self._random_image(rng, generator)
            tensors = self._encode(image, grid)
            num_rows = len(tensors[0])
            runs = (TokenRun(self._image_token_id, num_rows, is_embedding=True),)
            layout = MediaLayout(
                runs, grid, _MERGE_SIZE if grid else 0, attends_both_ways=self._attends_both_ways
            )
            ref = _make_ref(tensors, rng)
            spans.append(MediaSpan(len(token_ids), ref, layout, is_ready=True))
            buffers = [memoryview(tensor.numpy().tobytes()) for tensor in tensors]
            embeddings.append(Embedding(ref, buffers))
            pixels.append(image)
            if grid:
                grids.append((grid.t, grid.h, grid.w))
            token_ids += [self._image_token_id] * num_rows + _random_text(rng)
        ids = torch.tensor([token_ids])
        inputs = self._text_inputs(ids)
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels)
        if grids:
            inputs["image_grid_thw"] = torch.tensor(grids)
            inputs["mm_token_type_ids"] = (ids == self._image_token_id).int()
        return MediaPrompt(tuple(token_ids), tuple(spans), tuple(embeddings), inputs)

    def _text_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._attends_both_ways:
            inputs["token_type_ids"] = (ids == self._image_token_id).int()
        return inputs

    @torch.inference_mode()
    def _answer(self, prompt: MediaPrompt, max_tokens: int) -> tuple[list[int], float]:
        """Return the greedy tokens and the least distance of a best logit to the next one."""
        output = self.model.generate(
            **prompt.inputs,
            do_sample=False,
            max_new_tokens=max_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).topk(2).values
        tokens: list[int] = output.sequences[0, len(prompt.token_ids) :].tolist()
        return tokens, float((best[:, 0] - best[:, 1]).min())

    def _random_image(
        self, rng: random.Random, generator: torch.Generator
    ) -> tuple[torch.Tensor, PatchGrid | None]:
        if not self._has_grid:
            side = self.model.config.vision_config.image_size
            shape = (1, 3, side, side)
            return torch.randn(shape, generator=generator), None
        height, width = (_MERGE_SIZE * rng.randint(1, 5) for _ in range(2))
        pixels = torch.randn(height * width, self._patch_values, generator=generator)
        return pixels, PatchGrid(1, height, width)

    def _encode(self, image: torch.Tensor, grid: PatchGrid | None) -> list[torch.Tensor]:
        """Return the spliced rows, then those of the deepstack levels."""
        if grid is None:
            output = self.model.model.get_image_features(image)
        else:
            sizes = torch.tensor([[grid.t, grid.h, grid.w]])
            output = self.model.model.get_image_features(image, sizes)
        levels = getattr(output, "deepstack_features", ())
        return [output.pooler_output[0], *(level[0] for level in levels)]


def _make_ref(tensors: Sequence[torch.Tensor], rng: random.Random) -> EmbeddingRef:
    shape = tuple(tensors[0].shape)
    spliced = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, shape)
    levels = [
        TensorSpec(TensorRole.DEEPSTACK, DataType.FLOAT32, shape, level)
        for level in range(len(tensors) - 1)
    ]
    return EmbeddingRef(rng.randbytes(32), b"f" * 32, Modality.IMAGE, (spliced, *levels))


def _random_text(rng: random.Random) -> list[int]:
    return [rng.randrange(_FIRST_TEXT_TOKEN, 300) for _ in range(rng.randint(2, 9))]
