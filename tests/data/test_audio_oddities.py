"""Audio that headers are wrong about, that is damaged on purpose, or whose mean is silent."""

import contextlib
import functools
import io
import math
import os
import struct
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from simpler_distil_whisper.data.audio import AudioError, audio_seconds, load_audio
from simpler_distil_whisper.data.decoders import open_sound
from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.data.options import Columns

RATE = 16_000

pytestmark = pytest.mark.usefixtures("no_remarks_yet")


def sound(seconds: float = 2.0, pitch: float = 300.0) -> np.ndarray:
    """Return float64 [S]: a chirp with noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(0).normal(0, 0.02, len(time))
    return 0.4 * np.sin(2 * np.pi * (pitch + 400 * time) * time) + noise


def encoded(kind: str, subtype: str | None = None, samples: np.ndarray | None = None) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, sound() if samples is None else samples, RATE, subtype, format=kind)
    return content.getvalue()


def put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def by_ffmpeg(path: Path, codec: str, rate: int = RATE, **options: str) -> Path:
    """Write a file of two seconds with PyAV; return its path."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 64_000
        frame = av.AudioFrame.from_ndarray(
            (sound()[None] * 32767).astype(np.int16), format="s16", layout="mono"
        )
        frame.rate = RATE
        resampler = av.AudioResampler(
            stream.codec_context.format.name if stream.codec_context.format else "fltp",
            "mono",
            rate,
            frame_size=stream.codec_context.frame_size or 0,
        )
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


def without_xing(content: bytes) -> bytes:
    """Return an MP3 without its first frame, which tells how many frames follow."""
    return content[content.index(b"\xff\xf3", 4) :]


def without_size(content: bytes, size: int = 0) -> bytes:
    place = content.index(b"data") + 4
    return (
        content[:4]
        + struct.pack("<I", size)
        + content[8:place]
        + struct.pack("<I", size)
        + content[place + 4 :]
    )


# Where the length of the audio stands: behind which bytes, how far, and how it is written.
LENGTHS = {
    "AU": (b".snd", 4, ">I"),
    "RF64": (b"ds64", 12, "<Q"),
    "W64": (b"data", 12, "<Q"),
    "AIFF": (b"SSND", 0, ">I"),
    "CAF": (b"data", 0, ">Q"),
}


def with_length(kind: str, length: int) -> bytes:
    name, gap, layout = LENGTHS[kind]
    content = bytearray(encoded(kind))
    struct.pack_into(layout, content, content.index(name) + len(name) + gap, length)
    return bytes(content)


def without_total_samples(content: bytes) -> bytes:
    flac = bytearray(content)
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    return bytes(flac)


WHOLE: dict[str, Callable[[], bytes]] = {
    "size_zero.wav": lambda: without_size(encoded("WAV")),
    # Its first samples could be the name of a chunk.
    "size_zero_letters.wav": lambda: without_size(
        encoded("WAV", samples=np.concatenate([np.full(4, 0x4141 / 2**15), sound()[4:]]))
    ),
    "size_unknown.wav": lambda: without_size(encoded("WAV"), 2**32 - 1),
    "size_of_a_part.wav": lambda: without_size(encoded("WAV"), 16_000),
    "size_unknown.au": lambda: with_length("AU", 2**32 - 1),
    "size_of_a_part.au": lambda: with_length("AU", 16_000),
    "size_zero.rf64": lambda: with_length("RF64", 0),
    "size_of_a_part.rf64": lambda: with_length("RF64", 16_000),
    "size_unknown.caf": lambda: with_length("CAF", 2**64 - 1),
    "size_zero.au": lambda: with_length("AU", 0),
    **{
        f"size_{size}.{kind.lower()}": functools.partial(with_length, kind, size)
        for kind in ("AIFF", "CAF", "W64")
        for size in (0, 16_000)
    },
    "no_total.flac": lambda: without_total_samples(encoded("FLAC")),
    "no_xing.mp3": lambda: without_xing(encoded("MP3")),
    "gsm.wav": lambda: encoded("WAV", "GSM610"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_all_of_a_file_with_a_wrong_header_is_used(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, name, WHOLE[name]())
    tolerance = 0.11 if name == "no_xing.mp3" else 0.025  # the encoder's padding; blocks of GSM
    assert len(load_audio(path)) / RATE == pytest.approx(2.0, abs=tolerance)
    assert audio_seconds(path) == pytest.approx(len(load_audio(path)) / RATE, abs=0.01)
    end = load_audio(path, 1.5, 0.4)
    assert np.array_equal(end, load_audio(path)[24_000:30_400])


def test_audio_of_unknown_length_is_decoded_no_further_than_it_may_be_long(tmp_path: Path) -> None:
    content = without_total_samples(encoded("FLAC", samples=np.zeros(100 * RATE)))
    path = put(tmp_path, "x.flac", content)
    with pytest.raises(AudioError, match=r"too long: no end in 30\.\d+ s, the maximum is 30$"):
        load_audio(path, max_seconds=30.0)


def by_pyav(kind: str, codec: str) -> Callable[[], bytes]:
    def content() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return by_ffmpeg(Path(folder) / f"x.{kind}", codec).read_bytes()

    return content


BEFORE_ZEROS: dict[str, Callable[[], bytes]] = {
    "x.wav": lambda: encoded("WAV"),
    "size_zero.wav": lambda: without_size(encoded("WAV")),
    "size_unknown.wav": lambda: without_size(encoded("WAV"), 2**32 - 1),
    "gsm.wav": lambda: encoded("WAV", "GSM610"),
    **{kind: functools.partial(encoded, kind) for kind in ("RF64", "W64", "AIFF", "AU", "CAF")},
    **{kind: functools.partial(encoded, kind) for kind in ("FLAC", "OGG", "MP3")},
    "no_total.flac": lambda: without_total_samples(encoded("FLAC")),
    "no_xing.mp3": lambda: without_xing(encoded("MP3")),
    "x.m4a": by_pyav("m4a", "aac"),
    "x.aac": by_pyav("aac", "aac"),
}


@pytest.mark.parametrize("name", BEFORE_ZEROS)
def test_gigabytes_of_zeros_behind_a_recording_are_no_part_of_it(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, name, BEFORE_ZEROS[name]())
    os.truncate(path, 2**34)
    before = time.process_time()
    assert len(load_audio(path)) / RATE == pytest.approx(2.0, abs=0.3)
    assert audio_seconds(path) == pytest.approx(2.0, abs=0.3)
    assert time.process_time() - before < 2


@pytest.mark.parametrize("size", [0, 2**32 - 1])
def test_days_of_audio_are_rejected_before_they_are_decoded(tmp_path: Path, size: int) -> None:
    path = put(tmp_path, "x.wav", without_size(encoded("WAV"), size))
    with path.open("r+b") as file:
        file.seek(2**33)
        file.write(b"\1" * 1000)
    with pytest.raises(AudioError, match=r"too long: \d+\.\d+ s, the maximum is 86400"):
        load_audio(path, max_seconds=math.inf)


def test_megabytes_of_what_is_no_audio_are_not_searched_for_ever(tmp_path: Path) -> None:
    content = by_pyav("mka", "aac")() + b"\1" * 1000
    path = put(tmp_path, "x.mka", content)
    with path.open("r+b") as file:
        for place in range(2**24, 2**31, 2**24):  # no zeros at the end, and no plain hole
            file.seek(place)
            file.write(b"\1")
    before = time.process_time()
    with contextlib.suppress(AudioError):
        load_audio(path)
    assert time.process_time() - before < 5


KINDS = ["WAV", "RF64", "W64", "FLAC", "OGG", "AIFF", "AU", "CAF", "MP3"]


JOINED: dict[str, Callable[[], bytes]] = {
    **{kind: functools.partial(encoded, kind) for kind in KINDS},
    "no_xing.mp3": lambda: without_xing(encoded("MP3")),
    "id3.mp3": lambda: b"ID3\3\0\0\0\0\0\x0a" + bytes(10) + encoded("MP3"),
    "m4a": by_pyav("m4a", "aac"),
    "aac": by_pyav("aac", "aac"),
    "mka": by_pyav("mka", "libopus"),
}


@functools.cache
def joined_kind(name: str) -> bytes:
    return JOINED[name]()


@pytest.mark.parametrize("first", JOINED)
def test_of_recordings_of_two_kinds_that_were_joined_none_is_lost(
    tmp_path: Path, first: str
) -> None:
    for second in ("WAV", "OGG", "no_xing.mp3", "m4a"):
        path = put(tmp_path, f"joined.{first}", joined_kind(first) + joined_kind(second))
        if first == "FLAC":  # only its decoder knows where it ends
            with pytest.raises(AudioError, match="another recording follows on it"):
                load_audio(path)
        else:
            assert len(load_audio(path)) / RATE == pytest.approx(4.0, abs=0.3), second


@pytest.mark.parametrize("count", [1, 2])
def test_the_blocks_of_a_wavpack_are_one_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    content = by_ffmpeg(tmp_path / "one.wv", "wavpack", 44_100).read_bytes()
    path = put(tmp_path, "x.wv", content * count)
    with caplog.at_level("INFO"):
        assert len(load_audio(path)) / RATE == pytest.approx(2.0 * count, abs=0.01)
    assert ("2 files joined" if count == 2 else "") in caplog.text
    assert ("joined" in caplog.text) == (count == 2)


@pytest.mark.parametrize("kind", JOINED)
def test_a_tag_in_front_of_a_recording_is_passed_over(tmp_path: Path, kind: str) -> None:
    path = put(tmp_path, f"tagged.{kind}", b"ID3\3\0\0\0\0\0\x0a" + bytes(10) + joined_kind(kind))
    assert len(load_audio(path)) / RATE == pytest.approx(2.0, abs=0.15)
    assert audio_seconds(path) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize(
    "broken",
    [
        encoded("WAV")[:40_000],
        without_size(encoded("WAV")),
        without_size(encoded("WAV"), 2**32 - 1),
        without_size(encoded("WAV"), 16_000),
    ],
    ids=["cut", "zero", "unknown", "part"],
)
def test_a_header_that_counts_wrongly_does_not_take_the_next_header_for_audio(
    tmp_path: Path, broken: bytes
) -> None:
    path = put(tmp_path, "x.wav", broken + encoded("WAV"))
    alone = put(tmp_path, "alone.wav", encoded("WAV"))
    if len(broken) == 40_000:
        with pytest.raises(AudioError, match="cut off: its header promises 4"):
            load_audio(path)
    else:
        assert np.array_equal(load_audio(path)[-2 * RATE :], load_audio(alone))
        assert len(load_audio(path)) == 4 * RATE


@pytest.mark.parametrize("between", [b"", b"LIST\x04\x00\x00\x00name"])
def test_that_a_second_chunk_of_audio_is_not_used_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, between: bytes
) -> None:
    content = encoded("WAV")
    path = put(tmp_path, "two.wav", content + between + content[36:])  # from its chunk of audio on
    assert np.array_equal(load_audio(path), load_audio(put(tmp_path, "one.wav", content)))
    assert audio_seconds(path) == 2.0
    assert f"{path}: it has several chunks of audio, of which only the first" in caplog.text
    assert "one.wav" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_joined_files_is_used(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = encoded(kind)
    alone = load_audio(put(tmp_path, f"alone.{kind}", content))
    path = put(tmp_path, f"joined.{kind}", content + content)
    both = load_audio(path)
    assert len(both) / RATE == pytest.approx(4.0, abs=0.15 if kind == "MP3" else 0.001)
    assert str(path) in caplog.text
    if kind != "MP3":
        assert np.array_equal(both, np.concatenate([alone, alone]))
        assert np.array_equal(load_audio(path, 1.5, 1.0), both[24_000:40_000])
    if kind != "FLAC":
        assert audio_seconds(path) == pytest.approx(len(both) / RATE, abs=0.01)


@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind != "OGG"), "m4a", "mka"])
def test_what_is_cut_off_is_rejected_with_both_lengths_unless_a_part_is_named(
    tmp_path: Path, kind: str
) -> None:
    if kind in ("m4a", "mka"):
        faststart = {"movflags": "faststart"} if kind == "m4a" else {}
        content = by_ffmpeg(tmp_path / f"whole.{kind}", "aac", **faststart).read_bytes()
    else:
        content = encoded(kind)
    path = put(tmp_path, f"cut.{kind}", content[: len(content) * 6 // 10])
    with pytest.raises(AudioError, match=r"promises (1\.99|2\.[01])\d* s, [01]\.\d+ s are"):
        load_audio(path)
    assert len(load_audio(path, 0.1, 0.3)) == 4_800
    with pytest.raises(AudioError, match="cut off"):
        load_audio(path, 0.5, 1.2)


def without_mdat_length(content: bytes) -> bytes:
    """Return an MP4 as long as its recorder is at work: without an index."""
    place = content.index(b"mdat") - 4
    return content[:place] + bytes(4) + content[place + 4 : content.index(b"moov") - 4]


UNFINISHED: dict[str, Callable[[bytes], bytes]] = {
    "in its audio": lambda content: content[: len(content) * 6 // 10],
    "behind its audio": lambda content: content[: content.index(b"moov") - 4],
    "in its index": lambda content: content[: content.index(b"moov") + 100],
    "in the name of its index": lambda content: content[: content.index(b"moov") + 2],
    "while it is recorded": without_mdat_length,
}


@pytest.mark.parametrize("end", UNFINISHED)
def test_an_mp4_without_its_index_is_to_be_had_again_not_converted(
    tmp_path: Path, end: str
) -> None:
    content = by_ffmpeg(tmp_path / "whole.m4a", "aac").read_bytes()
    path = put(tmp_path, "x.m4a", UNFINISHED[end](content))
    for read in (load_audio, audio_seconds):
        with pytest.raises(AudioError) as caught:
            read(path)
        assert str(caught.value) == (
            "cannot be decoded (it ends before its index is complete); download or copy it again"
        )


def test_an_mp4_that_is_damaged_is_not_taken_for_one_that_ends_too_early(tmp_path: Path) -> None:
    content = by_ffmpeg(tmp_path / "whole.m4a", "aac").read_bytes()
    path = put(tmp_path, "x.m4a", content.replace(b"mvhd", b"xxxx").replace(b"stsd", b"xxxx"))
    with pytest.raises(AudioError) as caught:
        load_audio(path)
    assert "index" not in str(caught.value)


def test_an_ogg_that_ends_within_a_page_is_rejected(tmp_path: Path) -> None:
    content = encoded("OGG", "OPUS", sound(6.0))
    path = put(tmp_path, "cut.opus", content[:-200])
    with pytest.raises(AudioError, match=r"cut off: its end is missing, \d\.\d+ s are there"):
        load_audio(path)


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("x.m4a", "aac", 44_100), ("x.webm", "libopus", 48_000), ("x.wma", "wmav2", 44_100)],
)
def test_formats_of_phones_and_browsers(tmp_path: Path, name: str, codec: str, rate: int) -> None:
    path = by_ffmpeg(tmp_path / name, codec, rate)
    whole = load_audio(path)
    assert audio_seconds(path) == pytest.approx(len(whole) / RATE, abs=0.001)
    assert len(whole) / RATE == pytest.approx(2.0, abs=0.1)
    part = load_audio(path, 0.5, 1.0)
    assert len(part) == RATE
    assert np.abs(part[100:-100] - whole[8_000:24_000][100:-100]).max() < 0.02


@pytest.mark.parametrize("silent", [False, True])
def test_the_louder_channel_takes_the_place_of_a_silent_mean(
    tmp_path: Path, silent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other = np.zeros(2 * RATE) if silent else -0.9 * sound()
    path = tmp_path / "x.wav"
    soundfile.write(path, np.stack([other, sound()], axis=1), RATE)
    right = load_audio(path, channel="right")
    assert np.array_equal(load_audio(path), right)
    assert np.abs(right - sound()).max() < 1e-4
    assert "the louder one, right, is used" in caplog.text


def test_channels_that_cancel_for_a_while_lose_nothing(tmp_path: Path) -> None:
    """A call: one speaker in phase, the other one not."""
    left = np.concatenate([sound(), sound(pitch=500)])
    right = 0.9 * np.concatenate([sound(), -sound(pitch=500)])
    path = tmp_path / "x.wav"
    soundfile.write(path, np.stack([left, right], axis=1), RATE)
    assert np.abs(load_audio(path) - left).max() < 1e-4


def test_a_channel_that_is_not_there(tmp_path: Path) -> None:
    path = put(tmp_path, "x.wav", encoded("WAV"))
    assert np.array_equal(load_audio(path, channel="left"), load_audio(path))
    for read in (load_audio, audio_seconds):
        with pytest.raises(AudioError, match='no channel "right": the file has 1'):
            read(path, 0.0, None, "right")


@pytest.mark.parametrize("scale", [2.0**15, 2.0**31])
def test_integers_in_floating_point_are_scaled(tmp_path: Path, scale: float) -> None:
    path = put(tmp_path, "x.wav", encoded("WAV", "FLOAT", sound() * scale))
    assert np.abs(load_audio(path) - sound()).max() < 1e-6


def test_a_few_extreme_samples_are_damage(tmp_path: Path) -> None:
    samples = sound()
    for value in (1e8, 1e30):
        samples[777] = value
        path = put(tmp_path, "x.wav", encoded("WAV", "FLOAT", samples))
        with pytest.raises(AudioError, match="damaged: some samples are as large as 1e"):
            load_audio(path)


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_a_rate_that_no_recorder_has_is_damage(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, sound(0.01), rate)
    with pytest.raises(AudioError, match=f"by its header, it has {rate} samples in a second"):
        load_audio(path)


def test_what_is_shorter_than_a_sample_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, [0.5], 48_000)
    with pytest.raises(AudioError, match="empty: it is shorter than a sample at 16 kHz"):
        load_audio(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"<!DOCTYPE html>\n<html>404</html>", "<!DOCTYPE html>"),
        (b'\xef\xbb\xbf{"error": 404}', '{"error": 404}'),
        ("<?xml?>\n".encode("utf-16"), "<?xml?>"),
        (b"#EXTM3U\n/etc/passwd\n", "#EXTM3U"),
    ],
)
def test_text_is_no_audio(tmp_path: Path, content: bytes, line: str) -> None:
    for name in ("x.mp3", "x.gsm", "x.vox"):
        path = put(tmp_path, name, content)
        for read in (load_audio, audio_seconds):
            with pytest.raises(AudioError) as caught:
                read(path)
            assert str(caught.value) == f"is no audio (it begins with {line})"


HEADERLESS = [("x.gsm", "GSM610"), ("x.VOX", "VOX_ADPCM")]


@pytest.mark.parametrize(("name", "subtype"), HEADERLESS)
def test_what_telephones_record_without_a_header_is_decoded_by_its_name(
    tmp_path: Path, name: str, subtype: str
) -> None:
    content = io.BytesIO()
    soundfile.write(content, sound()[::2], 8_000, subtype, format="RAW")
    path = put(tmp_path, name, content.getvalue())
    samples, _ = soundfile.read(
        path, format="RAW", subtype=subtype, samplerate=8_000, channels=1, dtype="float32"
    )
    decoded = tmp_path / "decoded.wav"
    soundfile.write(decoded, samples, 8_000, "FLOAT")
    assert len(samples) == pytest.approx(2 * 8_000, abs=160)
    assert np.array_equal(load_audio(path), load_audio(decoded))
    assert audio_seconds(path) == len(samples) / 8_000


WITH_HEADER: dict[str, Callable[[], bytes]] = {
    "x.wav": lambda: encoded("WAV"),
    "size_zero.wav": lambda: without_size(encoded("WAV")),
    "gsm.wav": lambda: encoded("WAV", "GSM610"),
    "x.mp3": lambda: encoded("MP3"),
    "id3.mp3": lambda: b"ID3\3\0\0\0\0\0\x0a" + bytes(10) + encoded("MP3"),
    "x.m4a": by_pyav("m4a", "aac"),
    "x.aac": by_pyav("aac", "aac"),
}


@pytest.mark.parametrize("kind", WITH_HEADER)
def test_a_header_is_believed_under_the_name_of_what_has_none(tmp_path: Path, kind: str) -> None:
    content = WITH_HEADER[kind]()
    expected = load_audio(put(tmp_path, kind, content))
    for name in ("x.gsm", "x.vox"):
        assert np.array_equal(load_audio(put(tmp_path, name, content)), expected)


def test_what_has_no_frames_of_gsm_is_no_gsm(tmp_path: Path) -> None:
    path = put(tmp_path, "x.gsm", np.random.default_rng(0).bytes(3_300))
    for read in (load_audio, audio_seconds):
        with pytest.raises(AudioError, match="cannot be decoded"):
            read(path)


def test_only_files_on_disk_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.wav")
    with pytest.raises(AudioError, match="it is a pipe"):
        load_audio(tmp_path / "x.wav")
    with pytest.raises(AudioError, match="it is a device"):
        audio_seconds(Path("/dev/zero"))


@pytest.mark.parametrize(("on_disk", "in_row"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_equal_in_both_forms_of_unicode(
    tmp_path: Path, on_disk: str, in_row: str
) -> None:
    name = "Gespräche/Müller.wav"
    path = tmp_path / unicodedata.normalize(on_disk, name)
    path.parent.mkdir()
    path.write_bytes(encoded("WAV"))
    line = f'{{"audio": "{unicodedata.normalize(in_row, name)}"}}\n'
    (tmp_path / "m.jsonl").write_text(line, encoding="utf-8")
    [utterance] = read_manifest(tmp_path / "m.jsonl", Columns()).utterances
    assert len(load_audio(*utterance.clip)) == 2 * RATE


# Files that failed once.


def test_a_part_of_an_mp3_has_the_samples_of_the_whole(real_speech: Path) -> None:
    path = real_speech / "extra_formats/derived/common_voice_zh-TW_18683268_mp3_vbr_24k_stereo.mp3"

    def samples(start: float, duration: float | None) -> np.ndarray:
        with path.open("rb") as file:
            opened = open_sound(file, path.name, thorough=True)
            return np.concatenate([block for _, block in opened.blocks(start, duration)])

    whole = samples(0.0, None)
    for start in range(3_000, len(whole) - 12_000, 3_777):
        part = samples(start / 24_000, 0.4)
        assert np.abs(part - whole[start : start + 9_600]).max() < 1e-5


def test_collected_cases(cases: Path) -> None:
    expected = {
        "joined.mp3": 7.603,
        "chained.ogg": 7.53,
        "vbr_noxing.mp3": 21.708,
        "flac_nosamples.flac": 4.4,
        "size_zero.wav": 4.4,
        "truncated.wav": r"cut off: its header promises 4\.400 s, 2\.199 s are there",
        "trunc.flac": r"cut off: its header promises 11\.660 s, 5\.666 s are there",
        "inverted.wav": 4.4,
        "int16scale.wav": 4.4,
        "tel_gsm.wav": 4.4,
        "aac_44k1.m4a": 3.947,
        "opus_48k.webm": 3.936,
        "html.mp3": "is no audio",
    }
    for name, outcome in expected.items():
        path = cases / "audio" / name
        if isinstance(outcome, str):
            with pytest.raises(AudioError, match=outcome):
                load_audio(path)
            continue
        loaded = load_audio(path)
        assert len(loaded) / RATE == pytest.approx(outcome, abs=0.01), name
        assert audio_seconds(path) == pytest.approx(outcome, abs=0.01), name
        assert 0.01 < np.sqrt(np.mean(loaded**2)) < 0.5, name
