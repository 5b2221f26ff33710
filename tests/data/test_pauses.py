"""Recordings that pause: their time stamps leave out what was not recorded."""

import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from simpler_distil_whisper.data.audio import AudioError, audio_seconds, load_audio

RATE = 16_000
CODEC_RATE = 48_000
LOW, HIGH, SILENT = 400, 1000, 0  # Hz, of the tone before and after the pause
LIVE = {"live": "1"}  # a WebM without a duration, as a browser writes it

pytestmark = pytest.mark.usefixtures("no_remarks_yet")


def recording(
    path: Path,
    pause: float = 10.0,
    *,
    layout: str = "mono",
    begin: float = 0.0,
    speed: float = 1.0,
    left_out: int = 0,
    **options: str,
) -> Path:
    """Write 4 s of a low tone, a pause, and 4 s of a high tone, in Opus or, in M4A and FLV, in AAC.

    Args:
        path: whose ending tells the format.
        pause: in seconds, without packets.
        layout: of the channels, which are alike.
        begin: the first time stamp, in seconds.
        speed: of the clock by which the time stamps are written.
        left_out: one of so many packets is not written; 0: all are.
        options: of the format.
    """
    with av.open(str(path), "w", options=options) as container:
        codec = "aac" if path.suffix in (".m4a", ".flv") else "libopus"
        stream = container.add_stream(codec, rate=CODEC_RATE, layout=layout)
        stream.bit_rate = 64_000
        size = 1024 if codec == "aac" else 960
        count = 8 * CODEC_RATE // size
        for index in range(count):
            second = index >= count // 2
            times = np.arange(index * size, (index + 1) * size) / CODEC_RATE
            tone = 0.3 * np.sin(2 * np.pi * (HIGH if second else LOW) * times)
            samples = np.stack([tone] * (2 if layout == "stereo" else 1)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate = CODEC_RATE
            if codec == "libopus":
                [frame] = av.AudioResampler("s16").resample(frame)
            frame.time_base = Fraction(1, CODEC_RATE)
            clock = begin + speed * index * size / CODEC_RATE + (pause if second else 0.0)
            frame.pts = round(clock * CODEC_RATE)
            packets = stream.encode(frame)
            if not left_out or index % left_out:
                container.mux(packets)
        container.mux(stream.encode(None))
    return path


def pitch(waveform: np.ndarray) -> int:
    """Return the frequency of a tone of a second in Hz; 0: it is silent."""
    assert len(waveform) == RATE
    return int(np.abs(np.fft.rfft(waveform)).argmax()) if waveform.any() else SILENT


CASES = {
    "x.mka": {},
    "x.webm": {},
    "live.webm": LIVE,
    "x.m4a": {},
    "fragmented.m4a": {"movflags": "frag_keyframe+empty_moov", "frag_duration": "500000"},
    "x.flv": {},
    "x.ogg": {},
    "packets.ogg": {"page_duration": "20000"},  # in microseconds: a page for each packet
}


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("name", CASES)
def test_a_pause_is_silence_as_long_as_it_was(
    tmp_path: Path, name: str, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = recording(tmp_path / name, layout=layout, **CASES[name])
    whole = load_audio(path)
    assert f"{path}: by its time stamps nothing was recorded for a while" in caplog.text
    assert len(whole) / RATE == pytest.approx(18.0, abs=0.1)
    assert audio_seconds(path) == pytest.approx(len(whole) / RATE, abs=0.001)
    heard = [pitch(whole[start * RATE :][:RATE]) for start in (1, 2, 5, 9, 12, 15, 16)]
    assert heard == [LOW, LOW, SILENT, SILENT, SILENT, HIGH, HIGH]
    silent = np.flatnonzero(whole == 0)
    assert silent[[0, -1]] / RATE == pytest.approx([4.0, 14.0], abs=0.1)


@pytest.mark.parametrize("channel", ["mean", "right"])
@pytest.mark.parametrize("name", CASES)
def test_a_part_is_cut_by_the_clock_of_the_recording(
    tmp_path: Path, name: str, channel: str
) -> None:
    path = recording(tmp_path / name, layout="stereo", **CASES[name])
    parts = [load_audio(path, start, 1.0, channel) for start in (2.5, 5.0, 14.5, 16.0)]
    assert [pitch(part) for part in parts] == [LOW, SILENT, HIGH, HIGH]
    whole = load_audio(path, channel=channel)
    across = load_audio(path, 13.5, 1.0, channel)  # where the pause ends
    assert np.abs(across - whole[int(13.5 * RATE) :][:RATE])[100:-100].max() < 0.002
    assert audio_seconds(path, 14.5, 1.0) == 1.0


@pytest.mark.parametrize("name", CASES)
def test_without_a_pause_no_sample_depends_on_the_time_stamps(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = recording(tmp_path / name, pause=0.0, **CASES[name])
    expected = load_audio(path)
    assert len(expected) / RATE == pytest.approx(8.0, abs=0.05)
    assert np.array_equal(load_audio(recording(path, 0.05, **CASES[name])), expected)
    assert not caplog.text


@pytest.mark.parametrize("name", ["x.mka", "x.webm", "live.webm", "x.flv", "x.ogg"])
def test_the_first_time_stamp_may_be_any(tmp_path: Path, name: str) -> None:
    expected = load_audio(recording(tmp_path / name, 0.0, **CASES[name]))
    later = load_audio(recording(tmp_path / name, 0.0, begin=3.0, **CASES[name]))
    assert np.array_equal(later, expected)


def test_many_packets_that_are_missing_one_by_one_add_up(tmp_path: Path) -> None:
    path = recording(tmp_path / "live.webm", pause=0.0, left_out=10, **LIVE)
    whole = load_audio(path)
    assert len(whole) / RATE == pytest.approx(8.0, abs=0.12)
    assert np.mean(np.abs(whole) < 1e-3) == pytest.approx(0.1, abs=0.03)


def test_a_clock_that_is_too_fast_is_no_pause(tmp_path: Path) -> None:
    path = recording(tmp_path / "live.webm", pause=0.0, speed=1.1, **LIVE)
    assert len(load_audio(path)) / RATE == pytest.approx(8.0, abs=0.02)


@pytest.mark.parametrize("name", ["live.webm", "x.mka"])
def test_time_stamps_that_are_nonsense_fill_no_memory(tmp_path: Path, name: str) -> None:
    before = time.process_time()
    path = recording(tmp_path / name, pause=40_000.0, **CASES[name])
    with pytest.raises(AudioError, match=r"too long: no end in \d+\.\d+ s, the maximum is 30$"):
        load_audio(path, max_seconds=30.0)
    assert pitch(load_audio(path, 40_005.0, 1.0)) == HIGH
    path = recording(tmp_path / name, pause=90_000.0, **CASES[name])
    for read in (load_audio, audio_seconds):
        with pytest.raises(AudioError, match=r"its time stamps leave out 90000 s"):
            read(path, 90_005.0, 1.0)
    assert time.process_time() - before < 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x.mka", r"cut off: its header promises 8\.0\d+ s, 7\.\d+ s are there"),
        ("live.webm", r"damaged: 0\.\d+ s of it are lost"),
        ("x.ogg", r"cut off: its header promises 8\.0\d+ s, [67]\.\d+ s are there"),
    ],
)
def test_what_is_damaged_is_no_pause(tmp_path: Path, name: str, reason: str) -> None:
    path = recording(tmp_path / name, pause=0.0, **CASES[name])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(AudioError, match=reason):
        load_audio(path)


@pytest.mark.parametrize("name", ["x.mka", "x.ogg"])
def test_recordings_that_were_joined_may_pause(tmp_path: Path, name: str) -> None:
    content = recording(tmp_path / name).read_bytes()
    path = tmp_path / f"joined.{name}"
    path.write_bytes(content + content)
    assert audio_seconds(path) == pytest.approx(36.0, abs=0.1)
    heard = [pitch(load_audio(path, start, 1.0)) for start in (1.0, 6.0, 15.0, 19.0, 24.0, 33.0)]
    assert heard == [LOW, SILENT, HIGH] * 2
