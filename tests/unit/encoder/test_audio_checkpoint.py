"""The encoder half hears exactly what the whole model hears in the same clip."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.media import Modality, ProcessingOptions
from chiasm.encoder.checkpoint import EncoderCheckpoint
from chiasm.encoder.memory_file import MemoryFile
from tests.fakes import sounds
from tests.fakes.sound_checkpoints import (
    HEARD_SECONDS,
    make_qwen2_5_omni,
    make_qwen2_audio,
    nest_thinker,
)

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.encoder.decode_pool import DecodePool
    from chiasm.encoder.preprocess import TowerInputs

pytestmark = pytest.mark.asyncio(loop_scope="package")

MAKERS = {"qwen2_audio": make_qwen2_audio, "qwen2_5_omni": make_qwen2_5_omni}
# A clip that is not padded to its window has the same frames but for the order of sums in them.
MAX_ERROR = {"qwen2_audio": 0.0, "qwen2_5_omni_thinker": 1e-5}
RATE = 16000
LENGTHS = [321, 640, 1000, 16_000, 33_333, HEARD_SECONDS * RATE]


@pytest.fixture(scope="module", params=list(MAKERS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@functools.cache
def load(path: Path) -> EncoderCheckpoint:
    return EncoderCheckpoint.load(path, device="cpu")


@functools.cache
def whole_of(path: Path) -> tuple[Any, Any]:
    processor: Any = transformers.AutoProcessor
    model: Any = transformers.AutoModelForMultimodalLM.from_pretrained(path)
    return model.eval(), processor.from_pretrained(path)


async def prepare(path: Path, decoder: DecodePool, data: bytes) -> TowerInputs:
    preprocessor = load(path).preprocessors[Modality.AUDIO]
    source = MemoryFile.of_bytes(data)
    item = await preprocessor.plan(decoder, source, ProcessingOptions())
    decoding = item.decoding
    media = await decoder.decode(Modality.AUDIO, source, decoding.task, decoding.num_bytes)
    return preprocessor.run(item, media.memory)


async def encode(path: Path, decoder: DecodePool, data: bytes) -> torch.Tensor:
    return load(path).tower.encode([await prepare(path, decoder, data)])[0]


@torch.inference_mode()
def encode_whole(path: Path, sound: np.ndarray) -> torch.Tensor:
    """Return the rows that the language model of the whole model is given."""
    model, processor = whole_of(path)
    # With text around it: a prompt of one token is taken for a step of decoding.
    text = ["What<|AUDIO|>?"]
    inputs = processor(text=text, audio=[sound], sampling_rate=RATE, return_tensors="pt")
    seen: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen[0][inputs["input_ids"] == model.config.audio_token_id]


def assert_equal(path: Path, rows: torch.Tensor, expected: torch.Tensor) -> None:
    """Check rows against those of the whole model."""
    max_error = MAX_ERROR[str(load(path).tower.config["model_type"])]
    torch.testing.assert_close(rows, expected, rtol=0, atol=max_error)


@pytest.mark.parametrize("num_samples", LENGTHS)
async def test_rows_equal_those_of_the_whole_model(
    path: Path, decoder: DecodePool, num_samples: int
) -> None:
    sound = sounds.tone(num_samples)

    rows = await encode(path, decoder, sounds.write(sound, RATE, "WAV", "FLOAT"))

    assert_equal(path, rows, encode_whole(path, sound[:, 0]))


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(
    ("kind", "num_channels"), [("WAV", 1), ("WAV", 6), ("FLAC", 2), ("MP3", 2), ("OGG", 1)]
)
async def test_any_file_gives_the_rows_of_the_sound_that_librosa_loads(
    path: Path, decoder: DecodePool, kind: str, num_channels: int, rate: int
) -> None:
    data = sounds.write(sounds.tone(rate, num_channels, rate), rate, kind)

    rows = await encode(path, decoder, data)

    assert_equal(path, rows, encode_whole(path, sounds.reference(data, RATE)))


async def test_a_batch_equals_its_clips_alone(path: Path, decoder: DecodePool) -> None:
    clips = [sounds.write(sounds.tone(n, seed=n), RATE) for n in (900, 64_000, 20_000)]
    inputs = [await prepare(path, decoder, clip) for clip in clips]

    batch = load(path).tower.encode(inputs)

    assert all(one.joins(inputs[0]) for one in inputs)
    for clip, rows in zip(clips, batch, strict=True):
        torch.testing.assert_close(rows, await encode(path, decoder, clip), rtol=0, atol=1e-5)


async def test_loud_sound_gives_finite_rows(path: Path, decoder: DecodePool) -> None:
    sound = np.full((30_000, 1), 2.0**31, np.float32)
    sound[::2] *= -1

    rows = await encode(path, decoder, sounds.write(sound, RATE, "WAV", "FLOAT"))

    assert torch.isfinite(rows).all()


async def test_silence_and_the_sample_of_the_warm_up_are_heard(
    path: Path, decoder: DecodePool
) -> None:
    rows = await encode(path, decoder, load(path).preprocessors[Modality.AUDIO].sample)

    assert torch.isfinite(rows).all()
    assert_equal(path, rows, encode_whole(path, np.zeros(RATE // 2, np.float32)))


async def test_a_clip_that_would_be_cut_is_refused_by_its_header(
    path: Path, decoder: DecodePool
) -> None:
    too_long = sounds.write(np.zeros((HEARD_SECONDS * 8000 + 1, 2), np.float32), 8000, "FLAC")

    with pytest.raises(TooLargeError, match=r"allowed duration of 4s: the model does not hear"):
        await prepare(path, decoder, too_long)


async def test_a_file_of_another_kind_is_refused(path: Path, decoder: DecodePool) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await prepare(path, decoder, b"GIF89a, not sound")

    assert caught.value.reason == "INVALID_MEDIA"
    assert caught.value.message == (
        "Failed to load audio: its format is not one of WAV, FLAC, OGG, MP3, M4A, WebM and AAC"
    )


async def test_the_fingerprint_covers_how_clips_are_decoded_and_resampled(path: Path) -> None:
    settings = load(path).preprocessors[Modality.AUDIO].settings

    assert settings["resampling"] == "mean of channels, soxr HQ"
    assert settings["decoding_version"] == 2
    assert settings["sampling_rate"] == RATE


async def test_a_checkpoint_with_a_talker_is_encoded_as_its_thinker_alone(tmp_path: Path) -> None:
    alone = EncoderCheckpoint.load(make_qwen2_5_omni(tmp_path), device="cpu")

    nested = EncoderCheckpoint.load(nest_thinker(tmp_path), device="cpu")

    assert nested.placeholders == alone.placeholders
    assert set(nested.preprocessors) == set(Modality)
    assert nested.fingerprint == alone.fingerprint
