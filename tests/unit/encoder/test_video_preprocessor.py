"""Videos are sampled, laid out and encoded exactly as the whole model and its processor do it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.media import Modality, Placeholder, ProcessingOptions
from chiasm.encoder.checkpoint import EncoderCheckpoint
from chiasm.encoder.fused.fuse_tower import TowerRequest
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.preprocess import MediaLimits
from chiasm.encoder.video_preprocessor import DEFAULT_NUM_FRAMES, VideoPreprocessor
from chiasm.encoder.wire_video import VideoHeader, VideoTask
from tests.fakes.checkpoints import (
    load_whole,
    make_llava_onevision,
    make_qwen2_5_vl,
    make_qwen2_vl,
)
from tests.fakes.deepstack_checkpoints import make_qwen3_vl
from tests.fakes.videos import moving_square

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.encoder.preprocess import PlannedItem

MAKERS = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "llava_onevision": make_llava_onevision,
    "qwen3_vl": make_qwen3_vl,
}
RATE = 10.0
FEATURES = ("pixel_values_videos", "video_grid_thw")


@pytest.fixture(scope="module", params=list(MAKERS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@functools.cache
def load(path: Path) -> EncoderCheckpoint:
    return EncoderCheckpoint.load(path, device="cpu", request=TowerRequest("transformers"))


@functools.cache
def whole_of(path: Path) -> tuple[Any, Any]:
    return load_whole(path)


def preprocessor_of(path: Path) -> VideoPreprocessor:
    preprocessor = load(path).preprocessors[Modality.VIDEO]
    assert isinstance(preprocessor, VideoPreprocessor)
    return preprocessor


def header_of(frames: np.ndarray) -> VideoHeader:
    return VideoHeader(frames.shape[2], frames.shape[1], len(frames), RATE, len(frames) / RATE)


def plan(path: Path, header: VideoHeader, **options: Any) -> PlannedItem:
    return preprocessor_of(path).plan_header(MemoryFile(1), header, ProcessingOptions(**options))


def indices_of(item: PlannedItem) -> list[int]:
    return list(VideoTask.unpack(item.decoding.task).frame_indices)


def encode(path: Path, item: PlannedItem, frames: np.ndarray) -> torch.Tensor:
    pixels = frames[indices_of(item)]
    assert pixels.shape == item.decoding.shape
    media = MemoryFile(pixels.nbytes).map()
    media[:] = pixels.tobytes()
    return load(path).tower.encode([preprocessor_of(path).run(item, memoryview(media))])[0]


def metadata_of(num_frames: int) -> dict[str, Any]:
    return {"total_num_frames": num_frames, "fps": RATE, "duration": num_frames / RATE}


def process_whole(path: Path, frames: np.ndarray, **kwargs: Any) -> Any:
    """Return what the checkpoint's own processor makes of one video and no text."""
    _, processor = whole_of(path)
    videos_kwargs = {"video_metadata": [metadata_of(len(frames))], **kwargs}
    text = [processor.video_token]
    return processor(text=text, videos=[frames], videos_kwargs=videos_kwargs, return_tensors="pt")


def samples_by_itself(path: Path) -> bool:
    return bool(whole_of(path)[1].video_processor.do_sample_frames)


@pytest.mark.parametrize(("num_frames", "height", "width"), [(8, 48, 64), (5, 29, 90), (2, 70, 70)])
@torch.inference_mode()
def test_embeddings_and_layouts_equal_the_whole_model(
    path: Path, num_frames: int, height: int, width: int
) -> None:
    frames = moving_square(num_frames, width, height)
    model, _ = whole_of(path)
    expected = process_whole(path, frames)
    features = {name: expected[name] for name in FEATURES if name in expected}

    item = plan(path, header_of(frames))
    rows = encode(path, item, frames)

    output = model.get_video_features(**features)
    tensors = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    assert torch.equal(rows, torch.cat([torch.cat(list(tensor)) for tensor in tensors], dim=1))
    assert item.layout.expand() == expected["input_ids"][0].tolist()


WISHES: list[tuple[int, dict[str, Any]]] = [
    *((count, {"fps": fps}) for count in (3, 4, 7, 31, 60) for fps in (0.5, 2, 4.7, 10)),
    *((count, {"num_frames": wish}) for count in (4, 7, 31, 60) for wish in (2, 3, 4)),
]


@pytest.mark.parametrize(("num_frames", "wishes"), WISHES)
def test_frames_are_chosen_as_the_processor_does(
    path: Path, num_frames: int, wishes: dict[str, Any]
) -> None:
    _, processor = whole_of(path)
    frames = moving_square(num_frames, 40, 30)
    wishes = {"fps": None, "num_frames": None, **wishes}
    expected = process_whole(path, frames, do_sample_frames=True, **wishes)
    (metadata,) = processor.video_processor(
        [frames],
        video_metadata=[metadata_of(num_frames)],
        do_sample_frames=True,
        return_metadata=True,
        **wishes,
    )["video_metadata"]

    item = plan(path, header_of(frames), **wishes)

    assert indices_of(item) == list(metadata.frames_indices)
    assert item.layout.expand() == expected["input_ids"][0].tolist()
    if item.layout.grid is not None and len(item.layout.runs) == 1:
        interval_s = processor.video_processor.temporal_patch_size / metadata.sampled_fps
        assert np.diff(item.layout.timestamps_s) == pytest.approx(interval_s)


def test_without_wishes_32_frames_are_taken_of_a_long_video(path: Path) -> None:
    header = VideoHeader(40, 30, 1000, 25.0, 40.0)

    indices = indices_of(plan(path, header))

    if samples_by_itself(path):  # two frames a second
        assert len(indices) == 80
        return
    assert len(indices) == DEFAULT_NUM_FRAMES
    assert indices == [number * 1000 // 32 for number in range(32)]
    assert indices_of(plan(path, replace(header, num_frames=31))) == list(range(31))


def test_no_frame_behind_the_last_is_chosen(path: Path) -> None:
    for total in range(100, 200):
        indices = indices_of(plan(path, VideoHeader(40, 30, total, RATE, 9.0), num_frames=98))

        assert len(indices) == 98
        assert max(indices) < total


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"fps": 0.01}, {"fps": 900.0}, {"num_frames": 99}])
def test_the_shortest_videos_have_a_plan(
    path: Path, num_frames: int, options: dict[str, Any]
) -> None:
    item = plan(path, VideoHeader(40, 30, num_frames, RATE, num_frames / RATE), **options)

    assert 1 <= len(indices_of(item)) <= max(2, num_frames)
    assert max(indices_of(item)) < num_frames
    assert item.layout.num_tokens > 0


def test_a_list_of_pictures_is_taken_whole_and_its_rate_can_be_told(path: Path) -> None:
    header = VideoHeader(40, 30, 50, 0.0, 0.0, is_frame_list=True)

    plain, told = plan(path, header), plan(path, header, fps=2.0)

    assert indices_of(plain) == indices_of(told) == list(range(50))
    if plain.layout.grid is not None:
        assert np.diff(plain.layout.timestamps_s) == pytest.approx(2 / 24)
        assert np.diff(told.layout.timestamps_s) == pytest.approx(1.0)
    assert len(indices_of(plan(path, header, num_frames=10))) == 10


def test_large_frames_and_many_frames_are_sampled_more_coarsely(tmp_path: Path) -> None:
    path = make_qwen2_vl(tmp_path)
    limits = MediaLimits(max_video_frames=20, max_video_pixels=100_000)
    preprocessor = EncoderCheckpoint.load(path, device="cpu", limits=limits).preprocessors[
        Modality.VIDEO
    ]
    assert isinstance(preprocessor, VideoPreprocessor)

    def count(width: int, height: int, **options: Any) -> int:
        header = VideoHeader(width, height, 1000, RATE, 100.0)
        item = preprocessor.plan_header(MemoryFile(1), header, ProcessingOptions(**options))
        assert item.num_pixels >= len(indices_of(item)) * width * height
        return len(indices_of(item))

    assert count(50, 50, num_frames=500) == 20
    assert count(50, 50, fps=5.0) == 20
    assert count(100, 100, fps=5.0) == 10
    assert count(300, 300) <= 2
    with pytest.raises(TooLargeError, match="Video frames of 400x300 pixels exceed the maximum"):
        count(400, 300)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "options",
    [
        {"fps": float("nan")},
        {"fps": -1.0},
        {"fps": 0.0},
        {"fps": float("inf")},
        {"num_frames": 0},
        {"fps": 1.0, "num_frames": 4},
    ],
)
async def test_wishes_without_sense_are_refused(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        # Refused before the decoder, which is not there, is asked.
        await preprocessor_of(path).plan(None, MemoryFile(1), ProcessingOptions(**options))  # type: ignore[arg-type]

    assert caught.value.param in ("options.fps", "options.num_frames")


def test_videos_have_a_placeholder_of_their_own(path: Path) -> None:
    whole, _ = whole_of(path)

    assert load(path).placeholders == {
        Modality.IMAGE: Placeholder(whole.config.image_token_id),
        Modality.VIDEO: Placeholder(whole.config.video_token_id),
    }
