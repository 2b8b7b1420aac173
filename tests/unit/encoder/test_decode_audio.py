"""Every format gives the samples that librosa gives, and no file makes the decoder overreach."""

from __future__ import annotations

import mmap
import struct

import numpy as np
import pytest

from chiasm.common.families.resampling import resampled_length
from chiasm.encoder.decode_audio import decode, probe
from chiasm.encoder.decode_errors import MediaTooLargeError
from chiasm.encoder.media_mappings import MediaMappings
from chiasm.encoder.media_writer import MediaWriter
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.wire_audio import SAMPLE_BYTES, AudioBounds, AudioHeader, AudioTask
from tests.fakes import sounds

BOUNDS = AudioBounds(
    max_samples=1 << 20, max_duration_s=10, max_channels=8, min_rate=1000, max_rate=192_000
)
RATE = 16000
NUM_COPIES = 30
SOUND_FILES = [
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAVEX", "PCM_16"),
    ("RF64", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]
CONTAINERS = [
    ("mp4", "aac"),
    ("ipod", "alac"),
    ("mov", "aac"),
    ("webm", "libopus"),
    ("matroska", "flac"),
    ("adts", "aac"),
]


def as_source(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


def read_header(data: bytes, bounds: AudioBounds = BOUNDS) -> AudioHeader:
    return AudioHeader.unpack(probe(AudioTask(bounds).pack(), as_source(data)))


def load(data: bytes, rate: int = RATE, header: AudioHeader | None = None) -> np.ndarray:
    """Return the decoded clip. [num_samples], float32."""
    header = header or read_header(data)
    num_samples = resampled_length(header.num_frames, header.rate, rate)
    media = MemoryFile(num_samples * SAMPLE_BYTES)
    decode(
        AudioTask(BOUNDS, header, rate).pack(),
        as_source(data),
        MediaWriter(media.fd, MediaMappings()),
    )
    return np.frombuffer(media.map(), np.float32)


@pytest.mark.parametrize(("kind", "subtype"), SOUND_FILES)
def test_sound_files_give_the_samples_of_librosa(kind: str, subtype: str) -> None:
    data = sounds.write(sounds.tone(50_001, 2, 48000), 48000, kind, subtype)

    assert np.array_equal(load(data), sounds.reference(data, RATE))


@pytest.mark.parametrize("start", [0, 312, 48_000])
def test_ogg_opus_of_ffmpeg_gives_the_samples_of_librosa(start: int) -> None:
    data = sounds.mux(sounds.tone(3 * 48_000, 1, 48_000), 48_000, "ogg", "libopus", start=start)

    samples = load(data)

    assert np.array_equal(samples, sounds.reference(data, RATE))


@pytest.mark.parametrize("num_channels", [1, 2])
def test_an_mp3_of_changing_bit_rate_gives_the_samples_of_librosa(num_channels: int) -> None:
    # Of one pitch, because its frames keep many of their bits in frames far before them.
    sound = sounds.pitch(3 * 44_100, num_channels, 44_100)
    data = sounds.mux(sound, 44_100, "mp3", "libmp3lame", options=sounds.CHANGING_BIT_RATE)

    samples = load(data)

    assert np.array_equal(samples, sounds.reference(data, RATE))


def test_a_wav_in_which_nobody_can_seek_is_read() -> None:
    data = sounds.write(sounds.tone(100_000), RATE, "WAV", "GSM610")

    assert np.array_equal(load(data), sounds.reference(data, RATE))


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("num_channels", [1, 2, 6])
def test_all_rates_and_channels_give_the_samples_of_librosa(rate: int, num_channels: int) -> None:
    data = sounds.write(sounds.tone(rate // 3 + 1, num_channels, rate), rate)

    samples = load(data)

    assert np.array_equal(samples, sounds.reference(data, RATE))
    assert read_header(data) == AudioHeader(rate // 3 + 1, rate, num_channels)


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_containers_give_the_sound_that_went_in(container: str, codec: str) -> None:
    sound = sounds.tone(48_000, 2, 48000)
    data = sounds.mux(sound, 48000, container, codec)

    header, samples = read_header(data), load(data)

    expected = sounds.reference(sounds.write(sound, 48000, "WAV", "FLOAT"), RATE)
    assert (header.rate, header.num_channels) == (48000, 2)
    assert len(samples) == resampled_length(header.num_frames, 48000, RATE)
    assert sounds.likeness(samples, expected) > 0.95


def test_the_sound_of_a_video_is_taken_and_its_frames_are_not_decoded() -> None:
    sound = sounds.tone(48_000, 1, 48000)

    with_frames = sounds.mux(sound, 48000, "mp4", "aac", video=True)

    assert np.array_equal(load(with_frames), load(sounds.mux(sound, 48000, "mp4", "aac")))


def test_a_title_in_another_encoding_is_no_fault_of_the_sound() -> None:
    data = sounds.mux(sounds.tone(48_000), RATE, "ipod", "alac", title="Fruehling")
    assert data.count(b"Fruehling") == 1

    in_latin_1 = data.replace(b"Fruehling", "Fr\u00fchling!".encode("latin-1"))

    assert np.array_equal(load(in_latin_1), load(data))


def test_a_sound_at_the_rate_of_the_model_is_not_resampled() -> None:
    sound = sounds.tone(1234)

    assert np.array_equal(load(sounds.write(sound, RATE, "WAV", "FLOAT")), sound[:, 0])


def test_a_single_frame_is_sound() -> None:
    assert len(load(sounds.write(sounds.tone(1, 1, 8000), 8000))) == 2


def test_a_flac_without_a_length_is_counted() -> None:
    data = sounds.write(sounds.tone(20_000, 2), RATE, "FLAC")

    unknown = sounds.with_flac_length(data, 0)

    assert read_header(unknown).num_frames == 20_000
    assert np.array_equal(load(unknown), load(data))


def test_a_wav_from_a_pipe_ends_where_its_file_ends() -> None:
    data = bytearray(sounds.write(sounds.tone(1000), RATE))
    data[4:8] = data[40:44] = b"\xff" * 4
    assert data[36:40] == b"data"

    assert np.array_equal(load(bytes(data)), load(sounds.write(sounds.tone(1000), RATE)))


def test_what_lies_behind_the_announced_frames_is_not_heard() -> None:
    data = sounds.write(sounds.tone(20_000), RATE, "FLAC")

    samples = load(sounds.with_flac_length(data, 5000))

    assert np.array_equal(samples, load(data)[:5000])


def swelling(num_channels: int = 2, rate: int = 44_100) -> np.ndarray:
    """Return a pitch, then noise: the first half takes far fewer bits. 3 s, float32."""
    sound = sounds.pitch(3 * rate, num_channels, rate)
    loud = sounds.tone(2 * rate, num_channels, rate) * 2
    sound[rate:] = loud + np.random.default_rng(0).normal(0, 0.2, loud.shape)
    return sound


def as_mp3(sound: np.ndarray, rate: int = 44_100, options: dict[str, str] | None = None) -> bytes:
    return sounds.mux(sound, rate, "mp3", "libmp3lame", options=options or sounds.CHANGING_BIT_RATE)


def assert_whole(data: bytes, sound: np.ndarray, rate: int) -> None:
    """Check that a file is heard from the first frame to the last, which padding may follow."""
    header, samples = read_header(data), load(data)
    expected = sounds.reference(sounds.write(sound, rate, "WAV", "FLOAT"), RATE)
    assert len(sound) <= header.num_frames < len(sound) + 3 * 1152
    assert sounds.likeness(samples[: len(expected)], expected) > 0.9


@pytest.mark.parametrize("is_loud_first", [False, True])
@pytest.mark.parametrize(("num_channels", "rate"), [(1, 44_100), (2, 44_100), (1, 16_000)])
def test_an_mp3_without_a_length_is_counted(
    num_channels: int, rate: int, is_loud_first: bool
) -> None:
    sound = swelling(num_channels, rate)[:: -1 if is_loud_first else 1]

    assert_whole(sounds.without_length(as_mp3(sound, rate)), sound, rate)


@pytest.mark.parametrize("tag", [b"", b"ID3\4\0\0\0\2\0\0" + bytes(2 << 14)])
def test_an_mp3_of_one_bit_rate_without_a_length_is_counted(tag: bytes) -> None:
    sound = swelling()

    data = sounds.without_length(as_mp3(sound, options={"b": "128000"}))

    assert_whole(tag + data, sound, 44_100)


def test_an_mp3_that_went_through_a_pipe_is_counted() -> None:
    # Its header was written before anything was known, and nobody could go back.
    assert_whole(sounds.with_mp3_length(as_mp3(swelling()), 0), swelling(), 44_100)


def test_mp3s_one_behind_the_other_are_heard_to_the_end() -> None:
    one = as_mp3(swelling())

    header = read_header(one + one)

    assert header.num_frames >= 2 * read_header(one).num_frames


def test_junk_and_tags_between_the_frames_of_an_mp3_are_passed_over() -> None:
    data = sounds.without_length(as_mp3(swelling()))
    middle = len(data) // 2

    with_junk = data[:middle] + b"junk" * 99 + data[middle:] + b"TAG".ljust(128)

    # The frame in which the junk lies and the one behind it are lost.
    assert 0 <= read_header(data).num_frames - read_header(with_junk).num_frames <= 2 * 1152


def test_an_mp3_without_a_length_gives_the_samples_of_librosa() -> None:
    # Of one bit rate, of which libsndfile guesses the length well enough to read it whole.
    data = sounds.without_length(as_mp3(sounds.tone(3 * RATE), RATE, {"b": "64000"}))

    samples = load(data)

    assert np.allclose(samples, sounds.reference(data, RATE), rtol=0, atol=1e-5)


def test_counting_an_mp3_stops_at_the_bound() -> None:
    data = sounds.without_length(as_mp3(sounds.pitch(11 * RATE), RATE))

    with pytest.raises(MediaTooLargeError, match="10s"):
        read_header(data)


@pytest.mark.parametrize(
    ("num_frames", "num_channels", "rate"), [(110_000, 1, 11_000), (524_289, 2, 192_000)]
)
def test_a_long_clip_is_refused_by_its_header(
    num_frames: int, num_channels: int, rate: int
) -> None:
    data = sounds.write(np.zeros((num_frames, num_channels), np.float32), rate)
    assert read_header(sounds.write(np.zeros((1, num_channels), np.float32), rate))

    with pytest.raises(MediaTooLargeError, match="Audio exceeds"):
        read_header(data, AudioBounds(1 << 20, 9, 8, 1000, 192_000))


def test_an_absurd_number_of_frames_is_refused_by_the_header() -> None:
    data = sounds.with_flac_length(sounds.write(sounds.tone(100), RATE, "FLAC"), (1 << 36) - 1)

    with pytest.raises(MediaTooLargeError, match=r"Audio exceeds maximum allowed duration of 10s"):
        read_header(data)


def test_counting_stops_at_the_bound() -> None:
    data = sounds.mux(sounds.tone(11 * 48000, 1, 48000), 48000, "webm", "libopus")

    with pytest.raises(MediaTooLargeError, match="10s"):
        read_header(data)


@pytest.mark.parametrize("rate", [0, 999, 192_001, 655_350, 0x7FFFFFFF])
def test_absurd_rates_are_refused(rate: int) -> None:
    data = bytearray(sounds.write(sounds.tone(100), RATE))
    data[24:28] = struct.pack("<I", rate)

    with pytest.raises(ValueError, match=r"sampling rate of|Invalid or corrupted"):
        read_header(bytes(data))


def test_many_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="it has 9 channels, and 1 to 8 are accepted"):
        read_header(sounds.write(sounds.tone(100, 9), RATE))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 2.0**33])
@pytest.mark.parametrize("rate", [RATE, 48000])
def test_samples_that_are_no_sound_are_refused(value: float, rate: int) -> None:
    sound = sounds.tone(30_000, 2, rate)
    sound[20_000, 1] = value

    with pytest.raises(ValueError, match="it has samples that are not finite numbers"):
        load(sounds.write(sound, rate, "WAV", "FLOAT"))


def test_samples_in_whole_numbers_of_32_bits_are_sound() -> None:
    sound = sounds.tone(100) * 2.0**31

    assert np.array_equal(load(sounds.write(sound, RATE, "WAV", "FLOAT")), sound[:, 0])


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
)
def test_a_file_without_samples_is_refused(kind: str, subtype: str) -> None:
    data = sounds.write(np.zeros((0, 1), np.float32), 48000, kind, subtype)

    with pytest.raises(ValueError, match=r"it holds no sound|Invalid or corrupted"):
        read_header(data)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["FLAC", "MP3"])
def test_a_file_that_ends_early_is_refused(kind: str, share: float) -> None:
    data = sounds.write(sounds.tone(40_000, 2), RATE, kind)

    with pytest.raises(ValueError, match=r"it ends after \d+ of the|Invalid or corrupted"):
        load(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"junk" * 99, b"<svg/>", b"\x89PNG\r\n\x1a\n", b"FORM\0\0\0\0AIFF"]
)
def test_other_files_are_refused_without_asking_a_library(data: bytes) -> None:
    with pytest.raises(ValueError, match="its format is not one of WAV, FLAC, OGG, MP3"):
        read_header(data + b"\0" * (not data))


def test_a_video_without_sound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No audio stream found\."):
        read_header(sounds.silent_video())


def test_codecs_that_are_not_listed_are_refused() -> None:
    data = sounds.mux(sounds.tone(48000, 2, 48000), 48000, "matroska", "ac3")

    with pytest.raises(ValueError, match=r"sound coded as ac3 is not accepted"):
        read_header(data)


def broken_copies(data: bytes, num_copies: int) -> list[bytes]:
    """Return copies with eight wrong bytes that may end early."""
    generator = np.random.default_rng(7)
    copies = []
    for _ in range(num_copies):
        copy = bytearray(data[: generator.integers(len(data) // 2, len(data) + 1)])
        for offset in generator.integers(0, len(copy), size=8):
            copy[offset] = generator.integers(256)
        copies.append(bytes(copy))
    return copies


def assert_refused_or_finite(copies: list[bytes]) -> None:
    num_refused = 0
    for copy in copies:
        try:
            samples = load(copy)
        except (ValueError, MediaTooLargeError, MemoryError):
            num_refused += 1
        else:
            assert np.isfinite(samples).all()
    assert num_refused, "at least one copy is too broken"


@pytest.mark.parametrize(("kind", "subtype"), SOUND_FILES[-4:])
def test_broken_sound_files_are_refused_or_give_finite_sound(kind: str, subtype: str) -> None:
    data = sounds.write(sounds.tone(9600, 2, 48000), 48000, kind, subtype)

    assert_refused_or_finite(broken_copies(data, NUM_COPIES))


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_broken_containers_are_refused_or_give_finite_sound(container: str, codec: str) -> None:
    data = sounds.mux(sounds.tone(9600, 2, 48000), 48000, container, codec)

    assert_refused_or_finite(broken_copies(data, NUM_COPIES))
