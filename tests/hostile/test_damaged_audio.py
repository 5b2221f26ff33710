"""Any bytes as an audio file: a waveform of finite numbers, or an AudioError with the reason.

The damage is random and seeded: a failing test prints the seed, and `check(folder, [seed])` repeats
it.
"""

import io
import os
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
import soundfile

from simpler_distil_whisper.data.audio import AudioError, audio_seconds, load_audio

LONGEST = 30.0  # seconds
SECONDS_FOR_ONE = 5.0  # of processor time
MEGABYTES = 500  # more than before, over all files: mostly what the libraries themselves take
SNDFILE = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "IMA_ADPCM"),
    ("WAVEX", "PCM_24"),
    ("FLAC", "PCM_16"),
    ("OGG", "OPUS"),
    ("OGG", "VORBIS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"),
    ("AU", "ULAW"),
    ("CAF", "PCM_16"),
    ("W64", "PCM_16"),
    ("RF64", "PCM_16"),
]
FFMPEG = [("m4a", "aac"), ("webm", "libopus"), ("mka", "flac"), ("avi", "pcm_s16le")]
RATES = (1, 7, 100, 8_000, 11_025, 16_000, 44_100, 48_000, 192_000, 655_350, 2**31 - 1)
COMMON_RATES = (8_000, 16_000, 48_000)  # of lossy formats
WORDS = (b"RIFF", b"data", b"fLaC", b"OggS", b"\xff\xfb\x90\x00", b"ID3\x03", b"moov", b"\x1aE\xdf")
TEXTS = (b"", b"\n", b"<html>", b"{}", b"#EXTM3U\n/etc/passwd\n", b"ffconcat version 1.0\nfile x\n")
SUFFIXES = ("wav", "flac", "ogg", "opus", "mp3", "m4a", "raw", "gsm", "vox", "txt", "webm", "m3u8")


def samples(random: Random, channels: int, *, odd: bool) -> np.ndarray:
    """Return float64 [S, C]: noise, silence or nothing; if `odd`, with an odd number in some."""
    numbers = np.random.default_rng(random.getrandbits(32))
    length = random.choice([0, 1, 2, 100, 1_000, 8_000, 8_000])
    sound = numbers.normal(0, random.choice([0.0, 1e-9, 0.1, 0.1, 0.1, 1.0]), (length, channels))
    if odd and length and random.random() < 0.3:
        sound[random.randrange(length)] = random.choice([np.nan, np.inf, 1e30, -40_000, 9.0])
    return sound


def by_sndfile(random: Random) -> bytes:
    kind, subtype = random.choice(SNDFILE)
    is_lossy = kind in ("OGG", "MP3")
    rate = random.choice(COMMON_RATES if is_lossy else RATES)
    channels = random.choice([1, 1, 2] if is_lossy or subtype == "IMA_ADPCM" else [1, 1, 2, 5])
    content = io.BytesIO()
    try:
        sound = samples(random, channels, odd=subtype == "FLOAT")  # others' encoders crash
        soundfile.write(content, sound, rate, subtype, format=kind)
    except soundfile.LibsndfileError:  # this format cannot hold it
        return by_sndfile(random)
    return content.getvalue()


def by_ffmpeg(random: Random) -> bytes:
    kind, codec = random.choice(FFMPEG)
    content = io.BytesIO()
    names = {"m4a": "ipod", "mka": "matroska"}
    with av.open(content, "w", format=names.get(kind, kind)) as container:
        stream = container.add_stream(codec, rate=48_000, layout="mono")
        numbers = np.random.default_rng(random.getrandbits(32))
        for number in range(random.choice([0, 1, 10])):
            noise = numbers.normal(0, 3_000, (1, 960)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            frame.rate, frame.pts = 48_000, number * 960
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return content.getvalue()


def damaged(random: Random, content: bytes) -> bytes:
    """Return a file with something changed, mostly in its header."""
    action = random.choice(["bytes", "bytes", "number", "cut", "word", "join", "swap", "twice"])
    reach = len(content) if random.random() < 0.3 else min(len(content), 300)
    place = random.randrange(reach + 1)
    if action == "bytes":
        return (
            content[:place] + random.randbytes(random.choice([1, 1, 2, 8])) + content[place + 1 :]
        )
    if action == "number":
        limit = random.choice([0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1])
        number = limit.to_bytes(4, random.choice(["little", "big"]))
        return content[:place] + number + content[place + 4 :]
    if action == "cut":
        return content[:place] if random.random() < 0.5 else content[place:]
    if action == "word":
        return content[:place] + random.choice(WORDS) + content[place:]
    if action == "join":
        return content + by_sndfile(random)
    if action == "swap":
        return content[:place] + content[place : place + 9][::-1] + content[place + 9 :]
    return content[:place] + content[place // 2 :]


def odd_file(seed: int) -> tuple[str, bytes]:
    """Return the ending of a name, and a file's content."""
    random = Random(seed)
    suffix = random.choice(SUFFIXES)
    kind = random.randrange(10)
    if kind == 0:
        return suffix, random.choice(
            [*TEXTS, random.randbytes(random.randrange(3_000)), bytes(999)]
        )
    content = by_ffmpeg(random) if kind <= 2 else by_sndfile(random)
    for _ in range(random.choice([0, 1, 1, 1, 2, 4])):
        content = damaged(random, content)
    return suffix, content


def check(folder: Path, seeds: Iterable[int]) -> int:
    """Load the files of these seeds; return how many of them are audio."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = 0
    for seed in seeds:
        suffix, content = odd_file(seed)
        path = folder / f"x.{suffix}"
        path.write_bytes(content)
        before = time.process_time()
        used += is_audio(path, seed)
        assert time.process_time() - before < SECONDS_FOR_ONE, seed
        path.unlink()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        assert grown / 1024 < MEGABYTES, (seed, grown)
    return used


def is_audio(path: Path, seed: int) -> bool:
    random = Random(seed)
    part = random.choice([(0.0, None)] * 3 + [(0.01, None), (0.0, 0.05), (0.3, 0.1), (1e6, 1.0)])
    channel = random.choice(["mean", "mean", "left", "right", "3"])
    seconds = outcome(lambda: audio_seconds(path, *part, channel), seed)
    waveform = outcome(lambda: load_audio(path, *part, channel, max_seconds=LONGEST), seed)
    if isinstance(waveform, str):
        return False
    assert waveform.dtype == np.float32, seed
    assert waveform.ndim == 1, seed
    assert 0 < len(waveform) <= LONGEST * 16_000 + 1, seed
    assert np.isfinite(waveform).all(), seed
    assert np.abs(waveform).max() <= 16, seed
    # The rest of a file may be damaged, of which a part can be used.
    assert isinstance(seconds, float) or part[1], (seed, seconds)
    return True


def outcome(read: Callable[[], object], seed: int) -> object:
    """Return what is read, or the reason why it cannot be."""
    try:
        return read()
    except AudioError as error:
        reason = str(error)
    assert 5 < len(reason) < 300, (seed, reason)
    assert "\n" not in reason, (seed, reason)
    return reason


def test_damaged_audio_is_a_waveform_or_an_error(tmp_path: Path) -> None:
    assert 20 < check(tmp_path, range(100)) < 80


@pytest.mark.slow
def test_much_damaged_audio_is_a_waveform_or_an_error(tmp_path: Path) -> None:
    first = int(os.environ.get("SDW_SEED", "1000"))
    check(tmp_path, range(first, first + int(os.environ.get("SDW_INPUTS", "1500"))))
