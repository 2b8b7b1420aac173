"""What an encoder says when it starts, or cannot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.fakes.checkpoints import make_llava
from tests.fakes.sound_checkpoints import make_qwen2_audio
from tests.harness.encoder import EncoderProcess

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]


async def test_flags_choose_the_kernels_and_the_weights_of_the_tower(
    redis_url: str, tmp_path: Path
) -> None:
    flags = ["--cpu-kernels", "off", "--tower-quantization", "w8a8"]
    process = EncoderProcess(make_llava(tmp_path / "model"), redis_url, tmp_path, flags)

    await process.start()

    assert await process.stop() == 0
    (line,) = (line for line in process.lines if "cpu_kernels_chosen" in line)
    chosen = json.loads(line)
    assert (chosen["kernels"], chosen["reason"]) == ("torch", "asked for")
    (line,) = (line for line in process.lines if "tower_chosen" in line)
    assert json.loads(line)["quantization"] == "w8a8"


async def test_a_model_that_cannot_be_fused_as_asked_for_ends_the_start_with_a_reason(
    redis_url: str, tmp_path: Path
) -> None:
    process = EncoderProcess(
        make_qwen2_audio(tmp_path / "model"), redis_url, tmp_path, ["--tower", "fused"]
    )

    with pytest.raises(RuntimeError):
        await process.start()

    assert await process.stop() == 1
    (line,) = (line for line in process.lines if "start_failed" in line)
    assert "not among those whose parity is tested" in json.loads(line)["reason"]
    assert not any("Traceback" in line for line in process.lines)
