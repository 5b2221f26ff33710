"""Any file that libsndfile reads becomes a mono 16 kHz waveform, or is rejected with a reason."""

import contextlib
import json
from pathlib import Path

import av
import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpler_distil_whisper.data.audio import AudioError, audio_seconds, load_audio

RATES = [8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000]


def speechlike(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Return float64 [S, C]: chirps with noise, other ones in each channel."""
    random = np.random.default_rng(0)
    time = np.arange(round(seconds * rate)) / rate
    sounds = [np.sin(2 * np.pi * (200 + 150 * c + 900 * time) * time) for c in range(channels)]
    return 0.4 * np.stack(sounds, axis=1) + random.normal(0, 0.02, (len(time), channels))


def write(path: Path, sound: np.ndarray, rate: int, subtype: str | None = None) -> Path:
    soundfile.write(path, sound, rate, subtype=subtype)
    return path


def mono_wav(folder: Path, seconds: float = 1.0, rate: int = 16_000) -> Path:
    return write(folder / f"{seconds:g}.wav", speechlike(seconds, rate), rate)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("rate", RATES)
def test_every_rate_and_channel_count_is_what_librosa_loads(
    tmp_path: Path, rate: int, channels: int
) -> None:
    path = write(tmp_path / "x.wav", speechlike(1.237, rate, channels), rate)
    expected, _ = librosa.load(path, sr=16_000, mono=True, res_type="soxr_hq")
    loaded = load_audio(path)
    assert loaded.dtype == np.float32
    # librosa appends a zero where the length is no whole number of samples.
    assert 0 <= len(expected) - len(loaded) <= 1
    assert not expected[len(loaded) :].any()
    np.testing.assert_allclose(loaded, expected[: len(loaded)], rtol=0, atol=1e-6)


def test_mono_is_the_mean_of_the_channels(tmp_path: Path) -> None:
    # Powers of two: exact in 16 bits and in the mean.
    channels = np.tile([[0.5, -0.25, 0.0, 0.125]], (1600, 1))
    path = write(tmp_path / "x.wav", channels, 16_000)
    assert np.array_equal(load_audio(path), np.full(1600, 0.09375, np.float32))


def test_sixteen_bits_are_read_exactly(tmp_path: Path) -> None:
    samples = np.array([0, 1, -1, 32767, -32768, 12345] * 400, dtype=np.int16)
    path = write(tmp_path / "x.wav", samples, 16_000)
    assert np.array_equal(load_audio(path), samples.astype(np.float32) / 32768)


@pytest.mark.parametrize(
    ("suffix", "subtype", "noise"),
    [
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-6),
        ("wav", "PCM_U8", 1e-2),
        ("wav", "FLOAT", 1e-6),
        ("wav", "DOUBLE", 1e-6),
        ("wav", "ULAW", 0.02),
        ("wav", "ALAW", 0.02),
        ("wav", "IMA_ADPCM", 0.05),
        ("flac", "PCM_16", 1e-4),
        ("flac", "PCM_24", 1e-6),
        ("aiff", "PCM_16", 1e-4),
        ("au", "ULAW", 0.02),
        ("caf", "PCM_16", 1e-4),
        ("w64", "PCM_16", 1e-4),
        ("ogg", "VORBIS", 0.1),
        ("ogg", "OPUS", 0.15),
        ("mp3", "MPEG_LAYER_III", 0.1),
    ],
)
def test_every_format_sounds_like_what_was_written(
    tmp_path: Path, suffix: str, subtype: str, noise: float
) -> None:
    sound = speechlike(1.5, 16_000)[:, 0]
    path = write(tmp_path / f"x.{suffix}", sound, 16_000, subtype)
    loaded = load_audio(path)
    block = 505 if subtype == "IMA_ADPCM" else 0  # a whole number of blocks is stored
    assert len(loaded) == pytest.approx(24_000, abs=160 + block)  # 10 ms
    assert audio_seconds(path) == pytest.approx(1.5, abs=0.01 + block / 16_000)
    length = min(len(loaded), len(sound))
    rms = np.sqrt(np.mean((loaded[:length] - sound[:length]) ** 2))
    assert rms < noise * np.sqrt(np.mean(sound**2)) * 3


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    path = mono_wav(tmp_path)
    as_mp3 = path.rename(tmp_path / "speech.mp3")
    assert len(load_audio(as_mp3)) == 16_000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rate=st.sampled_from([8_000, 16_000, 44_100]),
    start=st.integers(0, 1_800),
    length=st.integers(1, 200),
    suffix=st.sampled_from(["wav", "flac"]),
)
def test_a_part_is_a_slice_of_the_whole(
    tmp_path: Path, rate: int, start: int, length: int, suffix: str
) -> None:
    whole = tmp_path / f"{rate}.{suffix}"
    if not whole.exists():
        write(whole, speechlike(2.0, rate, 2), rate)
    samples, _ = soundfile.read(whole, dtype="int16")
    first, last = (
        round(start / 1000 * rate),
        round(start / 1000 * rate) + round(length / 1000 * rate),
    )
    cut = write(tmp_path / f"cut.{suffix}", samples[first:last], rate)
    part = load_audio(whole, start / 1000, length / 1000)
    assert np.array_equal(part, load_audio(cut))
    assert audio_seconds(whole, start / 1000, length / 1000) == pytest.approx(length / 1000)


@pytest.mark.parametrize("suffix", ["ogg", "mp3"])
def test_a_part_of_a_compressed_file_is_where_it_sounds(tmp_path: Path, suffix: str) -> None:
    whole = write(tmp_path / f"x.{suffix}", speechlike(3.0, 48_000), 48_000)
    samples, rate = soundfile.read(whole, dtype="float32")
    part = load_audio(whole, 1.25, 0.5)
    slice_ = librosa.resample(samples[60_000:84_000], orig_sr=rate, target_sr=16_000)
    assert len(part) == 8_000
    # The edges of the resampler aside; libsndfile seeks in lossy files to a few 16-bit steps.
    assert np.abs(part[100:-100] - slice_[100:-100]).max() < 0.02


def test_a_start_alone_reads_to_the_end(tmp_path: Path) -> None:
    path = mono_wav(tmp_path, 2.0)
    assert np.array_equal(load_audio(path, 0.5), load_audio(path)[8_000:])
    assert audio_seconds(path, 0.5) == 1.5


def test_times_rounded_in_the_manifest_are_no_error(tmp_path: Path) -> None:
    path = mono_wav(tmp_path, 1.996)
    assert len(load_audio(path, 0.0, 2.0)) == round(1.996 * 16_000)
    assert audio_seconds(path, 1.0, 1.0) == pytest.approx(0.996)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
def test_exactly_the_window_is_accepted_and_one_sample_more_is_not(
    tmp_path: Path, rate: int
) -> None:
    silence = np.zeros(30 * rate + 1)
    assert len(load_audio(write(tmp_path / "a.wav", silence[:-1], rate), max_seconds=30)) == 480_000
    longer = write(tmp_path / "b.wav", silence, rate)
    with pytest.raises(AudioError, match=r"too long: 30\.000 s, the maximum is 30 s"):
        load_audio(longer, max_seconds=30)
    assert len(load_audio(longer, 0.0, 30.0, max_seconds=30)) == 480_000


def test_exactly_the_minimum_is_accepted_and_one_sample_less_is_not(tmp_path: Path) -> None:
    sound = speechlike(0.1, 16_000)
    assert len(load_audio(write(tmp_path / "a.wav", sound, 16_000), min_seconds=0.1)) == 1_600
    shorter = write(tmp_path / "b.wav", sound[:-1], 16_000)
    with pytest.raises(AudioError, match=r"too short: 0\.100 s, the minimum is 0\.1 s"):
        load_audio(shorter, min_seconds=0.1)


def test_silence_is_audio(tmp_path: Path) -> None:
    path = write(tmp_path / "x.wav", np.zeros(16_000), 44_100)
    assert not load_audio(path).any()


def broken_files(folder: Path) -> dict[str, Path]:
    whole = write(folder / "whole.flac", speechlike(2.0, 16_000), 16_000)
    for name in ("nan", "inf"):
        sound = speechlike(1.0, 16_000)
        sound[777] = float(name)
        write(folder / f"{name}.wav", sound, 16_000, "FLOAT")
    write(folder / "no_samples.wav", np.zeros(0), 16_000)
    content = {
        "no_bytes.wav": b"",
        "text.wav": "這不是聲音。".encode(),
        "garbage.wav": np.random.default_rng(0).bytes(5_000),
        "garbage.mp3": np.random.default_rng(1).bytes(5_000),
        "headerless.raw": np.random.default_rng(2).bytes(5_000),
        "header.wav": mono_wav(folder).read_bytes()[:30],
        "torn.flac": whole.read_bytes()[: whole.stat().st_size // 2],
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (folder / "folder.wav").mkdir()
    names = [*content, "no_samples.wav", "nan.wav", "inf.wav", "folder.wav", "gone.wav"]
    return {name: folder / name for name in names}


REASONS = {
    "no_bytes.wav": "empty: the file has no bytes",
    "no_samples.wav": "empty",
    "nan.wav": "not finite",
    "inf.wav": "not finite",
    "gone.wav": "no such file",
    "text.wav": "is no audio (it begins with 這不是聲音。)",
    "torn.flac": "cut off: its header promises 2.000 s",
    "folder.wav": "it is a folder",
}


def test_files_that_cannot_be_used_are_refused_with_the_reason(tmp_path: Path) -> None:
    files = broken_files(tmp_path)
    for name, path in files.items():
        with pytest.raises(AudioError) as caught:
            load_audio(path)
        assert REASONS.get(name, "cannot be decoded") in str(caught.value), name
        assert str(tmp_path) not in str(caught.value)


def test_durations_of_what_cannot_be_opened_are_errors_too(tmp_path: Path) -> None:
    files = broken_files(tmp_path)
    for name in ("no_bytes.wav", "no_samples.wav", "garbage.wav", "headerless.raw", "gone.wav"):
        with pytest.raises(AudioError):
            audio_seconds(files[name])


@pytest.mark.parametrize(
    ("start", "duration", "reason"),
    [
        (2.0, None, "the part starts at 2 s, the file ends at 2.000 s"),
        (5.0, 1.0, "the part starts at 5 s"),
        (1.5, 0.6, "the part ends at 2.1 s, the file at 2.000 s"),
        (0.0, 2.1, "the part ends at 2.1 s"),
    ],
)
def test_a_part_outside_the_file_is_an_error(
    tmp_path: Path, start: float, duration: float | None, reason: str
) -> None:
    path = mono_wav(tmp_path, 2.0)
    for read in (load_audio, audio_seconds):
        with pytest.raises(AudioError, match=reason):
            read(path, start, duration)


@given(st.binary(max_size=300), st.sampled_from(["wav", "flac", "ogg", "mp3", "raw", "aiff", "x"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_audio_or_an_audio_error(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    try:
        sound = load_audio(path)
    except AudioError:
        return
    assert np.isfinite(sound).all()
    assert len(sound) > 0


@given(st.integers(0, 9_000), st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_file_is_audio_or_an_audio_error(tmp_path: Path, where: int, byte: int) -> None:
    good = tmp_path / "good.flac"
    if not good.exists():
        write(good, speechlike(0.5, 16_000), 16_000)
    data = bytearray(good.read_bytes())
    data[where % len(data)] = byte
    (tmp_path / "bad.flac").write_bytes(data)
    with contextlib.suppress(AudioError):
        assert np.isfinite(load_audio(tmp_path / "bad.flac", max_seconds=30)).all()


# Real speech.


def pyav_seconds(path: Path) -> float:
    with av.open(str(path)) as container:
        frames = [(frame.samples, frame.rate) for frame in container.decode(audio=0)]
    return sum(samples for samples, _ in frames) / frames[0][1]


def listed(folder: Path) -> list[dict]:
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_real_clips_decode_to_their_duration(real_speech: Path) -> None:
    rows = listed(real_speech)
    assert len(rows) == 113
    for row in rows:
        path = real_speech / row["path"]
        sound = load_audio(path)
        assert len(sound) / 16_000 == pytest.approx(row["duration"], abs=0.01), row["path"]
        assert audio_seconds(path) == pytest.approx(row["duration"], abs=0.01), row["path"]
        assert np.sqrt(np.mean(sound**2)) > 1e-4, row["path"]


def test_real_files_in_other_formats_decode_or_are_refused_with_the_reason(
    real_speech: Path,
) -> None:
    folder = real_speech / "extra_formats"
    for row in listed(folder):
        path = folder / row["path"]
        if row["soundfile_ok"]:
            seconds = len(load_audio(path)) / 16_000
            assert seconds == pytest.approx(row["duration"], abs=0.01), row["path"]
        elif row["path"] == "original/p001.flac":
            with pytest.raises(AudioError, match=r"promises 8\.995 s, 8\.986 s are there"):
                load_audio(path)
        else:
            expected = pyav_seconds(path)
            assert len(load_audio(path)) / 16_000 == pytest.approx(expected, abs=0.01), row["path"]
            assert audio_seconds(path) == pytest.approx(expected, abs=0.01), row["path"]
