"""Every picture that Pillow tests itself with, through a running encoder.

The corpus holds hundreds of formats, modes and malformed files that nobody here wrote. Each file is
answered or refused, no process of the encoder dies, and what is encoded is what the whole model
makes of the picture as a person sees it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from chiasm.common.errors import InvalidRequestError
from tests.fakes.checkpoints import load_whole, make_qwen2_vl
from tests.fakes.pillow_corpus import CorpusError, fetch_corpus, read_corpus
from tests.harness.encoder import EncoderProcess
from tests.harness.process_usage import family_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

MIN_FILES = 1000
MIN_ENCODED = 500
# Of the largest value of an item: the fused tower sums in another order.
TOLERANCE = 1e-5
LEAK = re.compile(r"\b0x[0-9a-f]{6,}|Traceback|<[a-zA-Z_.]+ |(/[\w.-]+){2,}", re.IGNORECASE)


@dataclass(slots=True)
class Findings:
    """What came of the files."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    largest_difference: float = 0.0


@torch.inference_mode()
def rows_of(whole: tuple[Any, Any], picture: Image.Image) -> np.ndarray:
    """Return the embedding that the whole model makes of an RGB picture."""
    model, processor = whole
    inputs = processor.image_processor(images=[picture], return_tensors="pt")
    features = model.get_image_features(**inputs)
    rows: np.ndarray = torch.cat(list(features.pooler_output)).numpy()
    return rows


def seen_by_a_person(data: bytes) -> Image.Image:
    """Return a file's picture upright, with 8 bits a channel, on a white page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = upright(Image.open(io.BytesIO(data)))
        if picture.mode.startswith("I;16"):
            picture = narrow(picture)
        has_alpha = picture.mode in ("LA", "RGBA", "PA", "La", "RGBa")
        if not has_alpha and "transparency" not in picture.info:
            return picture.convert("RGB")
        page = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, picture.convert("RGBA")).convert("RGB")


def upright(picture: Image.Image) -> Image.Image:
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        # Broken Exif raises anything; such a picture is shown as it lies.
        return picture


def narrow(picture: Image.Image) -> Image.Image:
    """Return the high bytes of 16-bit greys; the transparent grey, if any, becomes clear."""
    greys = np.asarray(picture.convert("I"))
    key = picture.info.get("transparency")
    alpha = np.where(greys == key, 0, 255) if key is not None else np.full_like(greys, 255)
    return Image.fromarray(np.stack([greys >> 8, alpha], axis=2).astype(np.uint8), "LA")


async def test_every_file_is_encoded_as_it_is_seen_or_refused(
    redis_url: str, tmp_path: Path
) -> None:
    try:
        archive = fetch_corpus()
    except CorpusError as error:
        pytest.fail(str(error))
    model = make_qwen2_vl(tmp_path / "model")
    whole = load_whole(model)
    process = EncoderProcess(model, redis_url, tmp_path, [])
    await process.start()
    client = process.client()
    findings = Findings()
    members = family_of(process.pid)
    try:
        for name, data in read_corpus(archive):
            try:
                answer = await client.encode(data, inline=True)
            except InvalidRequestError as error:
                findings.outcomes[error.reason] += 1
                if LEAK.search(error.message):
                    findings.wrong.append(f"{name}: {error.message}")
                continue
            findings.outcomes["encoded"] += 1
            try:
                expected = rows_of(whole, seen_by_a_person(data))
            except Exception as error:
                findings.wrong.append(f"{name}: encoded, but Pillow says {error!r}")
                continue
            compare(findings, name, answer.rows(), expected)
        assert family_of(process.pid) == members, "a process of the encoder has died"
    finally:
        await client.close()
        status = await process.stop()
    print(findings)
    assert status == 0
    assert findings.wrong == []
    assert findings.outcomes.total() >= MIN_FILES
    assert findings.outcomes["encoded"] >= MIN_ENCODED


def compare(findings: Findings, name: str, found: np.ndarray, expected: np.ndarray) -> None:
    if found.shape != expected.shape:
        findings.wrong.append(f"{name}: {found.shape} rows instead of {expected.shape}")
        return
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    findings.largest_difference = max(findings.largest_difference, difference)
    if not difference <= TOLERANCE:
        findings.wrong.append(f"{name}: differs by {difference}")
