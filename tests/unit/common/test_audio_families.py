"""Plans of audio clips, made from their length, equal what the checkpoint's processor makes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.families import PositionScheme, UnsupportedModelError, family_of
from chiasm.common.families.resampling import resampled_length
from chiasm.common.media import Modality, TokenRun
from tests.fakes.sound_checkpoints import HEARD_SECONDS, make_qwen2_audio

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chiasm.common.families import AudioPlanner

RATE = 16000
EXTRACTOR = {"n_samples": 64000, "hop_length": 160, "n_fft": 400, "sampling_rate": RATE}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_audio(tmp_path_factory.mktemp("qwen2_audio"))


@pytest.fixture(scope="module")
def processor(path: Path) -> Any:
    return transformers.AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]


def load_config(path: Path) -> Mapping[str, object]:
    config: Mapping[str, object] = json.loads((path / "config.json").read_text())
    return config


def make_planner(config: Mapping[str, object], settings: Mapping[str, object]) -> AudioPlanner:
    maker = family_of(config).make_audio_planner
    assert maker is not None
    return maker(config, settings)


@pytest.mark.parametrize(
    "num_samples",
    [321, 479, 480, 481, 640, 641, 799, 800, 1119, 1121, 5000, 15_999, 16_000, 63_999, 64_000],
)
def test_the_layout_equals_that_of_the_processor(
    path: Path, processor: Any, num_samples: int
) -> None:
    planner = make_planner(load_config(path), processor.feature_extractor.to_dict())
    sound = np.zeros(num_samples, np.float32)

    plan = planner.plan(num_samples)

    inputs = processor(text=["<|AUDIO|>"], audio=[sound], sampling_rate=RATE)
    assert plan.layout.expand() == inputs["input_ids"][0]
    assert plan.layout.num_embedding_tokens == plan.layout.num_tokens
    assert plan.layout.audio_lengths == (num_samples,)


@pytest.mark.parametrize("num_samples", [1, 160, 161, 320])
def test_clips_that_become_no_token_are_refused(
    path: Path, processor: Any, num_samples: int
) -> None:
    planner = make_planner(load_config(path), processor.feature_extractor.to_dict())
    sound = np.zeros(num_samples, np.float32)
    inputs = processor(text=["<|AUDIO|>"], audio=[sound], sampling_rate=RATE)
    assert inputs["input_ids"][0] == []

    with pytest.raises(InvalidRequestError, match=r"0\.0\d\ds are too short to be heard\.$"):
        planner.plan(num_samples)


def test_a_clip_that_would_be_cut_is_refused(path: Path, processor: Any) -> None:
    planner = make_planner(load_config(path), processor.feature_extractor.to_dict())

    with pytest.raises(TooLargeError) as caught:
        planner.plan(HEARD_SECONDS * RATE + 1600)

    assert caught.value.message == (
        "Audio exceeds maximum allowed duration of 4s: the model does not hear more of a clip, and"
        " this one has 4.10s. Send it as several clips."
    )


def test_every_clip_costs_the_whole_window(path: Path, processor: Any) -> None:
    planner = make_planner(load_config(path), processor.feature_extractor.to_dict())

    assert planner.plan(1000).num_positions == planner.plan(60_000).num_positions == 200


def test_the_family_knows_its_positions_and_placeholder(path: Path) -> None:
    config = load_config(path)
    family = family_of(config)

    assert family.modalities == (Modality.AUDIO,)
    assert family.positions is PositionScheme.LINEAR
    assert family.placeholder_token_id(config, Modality.AUDIO) == config["audio_token_index"]
    planner = make_planner(config, EXTRACTOR)
    assert planner.plan(16_000).layout.runs == (TokenRun(4, 25, is_embedding=True),)


def test_an_extractor_of_another_window_than_the_tower_is_refused(path: Path) -> None:
    settings = {**EXTRACTOR, "n_samples": 32000}

    with pytest.raises(UnsupportedModelError, match="32000 samples but the tower takes 64000"):
        make_planner(load_config(path), settings)


@pytest.mark.parametrize(
    ("num_frames", "rate", "expected"),
    [
        (1, 8000, 2),
        (3, 48000, 1),
        (4, 48000, 2),
        (44_100, 44_100, 16_000),
        (70_001, 44_100, 25_398),
    ],
)
def test_a_part_of_a_sample_counts_as_one(num_frames: int, rate: int, expected: int) -> None:
    assert resampled_length(num_frames, rate, RATE) == expected
