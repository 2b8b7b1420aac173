"""Plans of audio clips, made from their length, equal what the checkpoint's processor makes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.families import (
    PositionScheme,
    UnsupportedModelError,
    family_of,
    served_part,
)
from chiasm.common.families.resampling import resampled_length
from chiasm.common.media import Modality, ProcessingOptions
from tests.fakes.sound_checkpoints import (
    HEARD_SECONDS,
    make_qwen2_5_omni,
    make_qwen2_audio,
    nest_thinker,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chiasm.common.families import AudioPlanner

MAKERS = {"qwen2_audio": make_qwen2_audio, "qwen2_5_omni": make_qwen2_5_omni}
RATE = 16000
EXTRACTOR = {"n_samples": 64000, "hop_length": 160, "n_fft": 400, "sampling_rate": RATE}


@pytest.fixture(scope="module", params=list(MAKERS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen2_audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    assert plan.layout.audio_lengths == (-(-num_samples // 160),)


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


def test_towers_of_windows_pay_for_the_whole_window_and_others_for_the_sound(
    path: Path, processor: Any
) -> None:
    config = load_config(path)
    planner = make_planner(config, processor.feature_extractor.to_dict())
    plans = [planner.plan(1000), planner.plan(60_000)]

    costs = [plan.num_positions for plan in plans]

    assert planner.packs_frames == (config["model_type"] == "qwen2_5_omni_thinker")
    assert costs == ([4, 188] if planner.packs_frames else [200, 200])
    assert [plan.layout.audio_lengths for plan in plans] == [(7,), (375,)]
    lengths = [planner.padded_length(n) for n in (1000, 60_000, 64_000)]
    assert lengths == ([1440, 60_480, 64_000] if planner.packs_frames else [64_000] * 3)


def test_the_families_know_their_positions_and_placeholders(
    qwen2_audio: Path, tmp_path: Path
) -> None:
    hears, omni = load_config(qwen2_audio), load_config(make_qwen2_5_omni(tmp_path))

    assert family_of(hears).modalities == (Modality.AUDIO,)
    assert family_of(hears).positions is PositionScheme.LINEAR
    assert set(family_of(omni).modalities) == set(Modality)
    assert family_of(omni).positions is PositionScheme.TMROPE
    assert family_of(omni).read_positions_per_s(omni) == 25.0
    for config in (hears, omni):
        for modality in family_of(config).modalities:
            token_id = family_of(config).placeholder_token_id(config, modality)
            assert token_id == config[f"{modality.value}_token_index"]


def test_the_served_part_of_a_configuration_is_the_thinker(tmp_path: Path) -> None:
    thinker = load_config(make_qwen2_5_omni(tmp_path))
    nested = load_config(nest_thinker(tmp_path))

    assert served_part(thinker) is thinker
    assert served_part(nested)["model_type"] == "qwen2_5_omni_thinker"
    assert served_part({"model_type": "qwen2_5_omni"}) == {"model_type": "qwen2_5_omni"}


def test_videos_of_omni_have_the_bounds_that_its_processor_has_in_its_code(tmp_path: Path) -> None:
    path = make_qwen2_5_omni(tmp_path)
    config = load_config(path)
    maker = family_of(config).make_video_planner
    assert maker is not None
    loaded: Any = transformers.AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]

    planner = maker(config, loaded.video_processor.to_dict())

    assert planner.processor_size(ProcessingOptions()) == loaded.videos_kwargs["size"]
    wish = ProcessingOptions(max_pixels=200_000)
    assert planner.processor_size(wish) == {"shortest_edge": 128 * 28 * 28, "longest_edge": 200_000}


def test_an_extractor_of_another_window_than_the_tower_is_refused(qwen2_audio: Path) -> None:
    settings = {**EXTRACTOR, "n_samples": 32000}

    with pytest.raises(UnsupportedModelError, match="32000 samples but the tower takes 64000"):
        make_planner(load_config(qwen2_audio), settings)


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
