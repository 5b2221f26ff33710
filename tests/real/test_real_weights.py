"""OpenAI's base on recordings of people: the same tokens, languages and times as elsewhere.

`SDW_REAL_CLIPS` says on how many of the recordings, 0 for all.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import folder_named_by
from generated import generated_tokens
from tiny import SIXTEEN_KHZ, read_rows

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel, long_log_mel
from simpler_distil_whisper.decoding.hypothesis import Hypothesis, TimedWord
from simpler_distil_whisper.decoding.long_form import transcribe_long
from simpler_distil_whisper.decoding.timed_segments import with_words
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.export.formats import write_openai
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

pytestmark = pytest.mark.real
WINDOW_SECONDS = 30
CODES = {"zh-CN": "zh", "zh-TW": "zh", "zh-HK": "zh"}  # base has no token for Cantonese


class Clip(NamedTuple):
    """A recording, read when it is used, since all of them would take gigabytes."""

    path: Path
    language: str
    seconds: float

    @property
    def waveform(self) -> np.ndarray:
        return load_audio(self.path)


@pytest.fixture(scope="session")
def whisper_base() -> Path:
    """A model folder of OpenAI's base; `ct2` in it holds the same weights for faster-whisper."""
    return folder_named_by("SDW_WHISPER_BASE")


@pytest.fixture(scope="session")
def whisper(whisper_base: Path) -> Whisper:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    return load_whisper(read_model_folder(whisper_base, None, "model"))


@pytest.fixture(scope="session")
def openai(whisper: Whisper, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same weights in openai-whisper, in float32, with the same alignment heads."""
    package = pytest.importorskip("whisper")
    folder = tmp_path_factory.mktemp("openai") / "base"
    write_openai(whisper, "float32", folder)
    model = package.load_model(str(folder / "model.pt"), device="cpu")
    heads = torch.zeros(model.dims.n_text_layer, model.dims.n_text_head, dtype=torch.bool)
    for layer, head in whisper.model.generation_config.alignment_heads:
        heads[layer, head] = True
    model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return model


@pytest.fixture(scope="session")
def every_clip(real_speech: Path) -> list[Clip]:
    rows = read_rows(real_speech / "manifest.jsonl")
    clips = [
        Clip(real_speech / row["path"], CODES.get(row["lang"], row["lang"]), row["duration"])
        for row in rows
    ]
    speech = folder_named_by("SDW_SPEECH")
    return clips + [
        Clip(speech / row["audio"], row["language"], row["duration_seconds"])
        for row in read_rows(speech / "test.jsonl")
    ]


@pytest.fixture(scope="session")
def clips(every_clip: list[Clip]) -> list[Clip]:
    """Those that fit into a window: all, or evenly spread ones."""
    short = [clip for clip in every_clip if clip.seconds <= WINDOW_SECONDS]
    count = int(os.environ.get("SDW_REAL_CLIPS", "30")) or len(short)
    return short[:: max(1, len(short) // count)][:count]


@pytest.fixture(scope="session")
def long_clips(every_clip: list[Clip]) -> list[Clip]:
    return [clip for clip in every_clip if clip.seconds > WINDOW_SECONDS]


@pytest.fixture(scope="session")
def joined(clips: list[Clip]) -> np.ndarray:
    """Ten minutes of English, half a second apart; of a sample, its English clips."""
    pause = np.zeros(SIXTEEN_KHZ // 2, dtype=np.float32)
    pieces = [piece for clip in clips if clip.language == "en" for piece in (clip.waveform, pause)]
    return np.concatenate(pieces)[: 600 * SIXTEEN_KHZ]


BATCH = 16
# Two orders of summation in float32 give logits that differ by a few 1e-5: of tokens that are
# closer than this, either may be the greater one.
NEAR_TIE = 1e-3


def batches(clips: Sequence[Clip]) -> Iterator[Sequence[Clip]]:
    for first in range(0, len(clips), BATCH):
        yield clips[first : first + BATCH]


@torch.inference_mode()
def gap(whisper: Whisper, features: torch.Tensor, prompt: list[int], a: list, b: list) -> float:
    """How far apart the logits are where two texts part; of a time, all times count together."""
    place = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    ids = torch.tensor([[*prompt, *a[:place]]])
    logits = whisper.model(features, decoder_input_ids=ids).logits[0, -1].log_softmax(-1)
    times = whisper.tokens.timestamps
    closest = abs(float(logits[a[place]] - logits[b[place]]))
    if (a[place] in times) != (b[place] in times):
        text = logits[: whisper.tokens.end].max()
        closest = min(closest, abs(float(logits[times.start : times.stop].logsumexp(0) - text)))
    return closest


@pytest.mark.parametrize("timestamps", [False, True])
def test_tokens_are_those_of_generate(
    whisper: Whisper, clips: list[Clip], timestamps: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone and in batches; where they part, the logits of both tokens are next to equal."""
    one = Transcriber(whisper, DecodingOptions(timestamps=timestamps))
    parted: dict[Path, float] = {}
    for group in batches(clips):
        languages = [clip.language for clip in group]
        features = log_mel([clip.waveform for clip in group], whisper.feature_extractor)
        together = one(features, languages)
        for clip, feature, language, in_batch in zip(
            group, features, languages, together, strict=True
        ):
            [alone] = one(feature[None], [language])
            [theirs] = generated_tokens(
                whisper, feature[None], [language], 224, timestamps=timestamps
            )
            prompt = whisper.tokens.prompt(language, "transcribe", timestamps)
            for mine in (alone, in_batch):
                if list(mine.token_ids) != theirs:
                    end = [whisper.tokens.end]
                    a, b = [*mine.token_ids, *end], [*theirs, *end]
                    parted[clip.path] = gap(whisper, feature[None], prompt, a, b)
    with capsys.disabled():
        print(f"\n{len(clips)} clips, timestamps {timestamps}: parted at gaps {parted}")
    assert all(distance < NEAR_TIE for distance in parted.values())
    assert len(parted) <= max(1, len(clips) // 100)


def test_languages_are_those_of_others(
    whisper: Whisper, whisper_base: Path, openai: Any, clips: list[Clip]
) -> None:
    faster = pytest.importorskip("faster_whisper").WhisperModel(
        str(whisper_base / "ct2"), device="cpu", compute_type="float32", local_files_only=True
    )
    mine = Transcriber(whisper, DecodingOptions(max_new_tokens=1))
    for group in batches(clips):
        waveforms = [clip.waveform for clip in group]
        features = log_mel(waveforms, whisper.feature_extractor)
        states = mine.encode(features)
        hypotheses = mine.from_encoder_states(states, [None] * len(group))
        for clip, state, waveform, hypothesis in zip(
            group, states, waveforms, hypotheses, strict=True
        ):
            _, probabilities = openai.detect_language(state)
            # It would fill the window with zeros of the log-mel, which are no silence.
            padded = np.pad(waveform, (0, WINDOW_SECONDS * SIXTEEN_KHZ - len(waveform)))
            theirs = (max(probabilities, key=probabilities.get), faster.detect_language(padded)[0])
            assert theirs == (hypothesis.language,) * 2, clip.path


def assert_same_segments(whisper: Whisper, openai: Any, waveform: np.ndarray, code: str) -> None:
    theirs = openai.transcribe(waveform, language=code, temperature=0.0, fp16=False)
    # At a single temperature openai/whisper takes loops for context too.
    loops_will_do = {"compression_ratio_threshold": None, "repetition_threshold": None}
    options = DecodingOptions(long_form="sequential", **loops_will_do)
    transcriber = Transcriber(whisper, options)
    features = long_log_mel(waveform, whisper.feature_extractor)
    [mine] = transcribe_long(transcriber, [features], [code])
    expected = [s for s in theirs["segments"] if s["text"]]
    assert [s.text for s in mine.segments] == [s["text"] for s in expected]
    times = [time for s in mine.segments for time in (s.start_seconds, s.end_seconds)]
    end = len(waveform) / SIXTEEN_KHZ
    their_times = [min(time, end) for s in expected for time in (s["start"], s["end"])]
    assert times == pytest.approx(their_times, abs=0.011)


def test_long_recordings_are_transcribed_as_by_openai_whisper(
    whisper: Whisper, openai: Any, long_clips: list[Clip]
) -> None:
    assert long_clips
    for clip in long_clips:
        assert_same_segments(whisper, openai, clip.waveform, clip.language)


def test_ten_minutes_are_transcribed_as_by_openai_whisper(
    whisper: Whisper, openai: Any, joined: np.ndarray
) -> None:
    assert_same_segments(whisper, openai, joined, "en")


ALIGNED_CLIPS = 15  # of a sample: the other program compiles and transcribes for a while
STEP = 0.02 + 1e-6  # seconds: one position of the encoder


def short_form(transcriber: Transcriber, clip: Clip) -> Hypothesis:
    features = log_mel([clip.waveform], transcriber.whisper.feature_extractor)
    states = transcriber.encode(features)
    hypotheses = transcriber.from_encoder_states(states, [clip.language])
    seconds = [len(clip.waveform) / SIXTEEN_KHZ]
    [hypothesis] = with_words(transcriber.aligner, states, hypotheses, seconds)
    return hypothesis


def long_form(transcriber: Transcriber, clip: Clip) -> Hypothesis:
    """As openai-whisper does with every clip: what follows its end is no silence, but zeros."""
    features = long_log_mel(clip.waveform, transcriber.whisper.feature_extractor)
    return transcribe_long(transcriber, [features], [clip.language])[0]


def words_of(hypothesis: Hypothesis) -> list[TimedWord]:
    return [word for segment in hypothesis.segments for word in segment.words]


def differences(mine: list[TimedWord], theirs: list[dict[str, Any]]) -> list[float]:
    """Of the times, in seconds; empty if the words are others."""
    if [word.word for word in mine] != [word["word"] for word in theirs]:
        return []
    return [
        max(abs(word.start - other["start"]), abs(word.end - other["end"]))
        for word, other in zip(mine, theirs, strict=True)
    ]


def test_words_are_timed_as_by_openai_whisper(
    whisper: Whisper, openai: Any, clips: list[Clip], capsys: pytest.CaptureFixture[str]
) -> None:
    transcriber = Transcriber(whisper, DecodingOptions(timestamps=True), word_timestamps=True)
    some = clips if len(clips) > 30 else clips[:: max(1, len(clips) // ALIGNED_CLIPS)]
    forms = {"with its padding": long_form, "with silence as padding": short_form}
    apart_by_form: dict[str, list[list[float]]] = {form: [] for form in forms}
    for clip in some:
        result = openai.transcribe(
            clip.waveform, language=clip.language, temperature=0.0, fp16=False, word_timestamps=True
        )
        theirs = [word for segment in result["segments"] for word in segment["words"]]
        for form, transcribe in forms.items():
            if apart := differences(words_of(transcribe(transcriber, clip)), theirs):
                apart_by_form[form].append(apart)
    shares = {}
    for form, apart in apart_by_form.items():
        every = np.concatenate(apart)
        shares[form] = (every < STEP).mean()
        with capsys.disabled():
            print(
                f"\n{form}: {len(apart)} of {len(some)} clips have the same words; of {len(every)} "
                f"words {shares[form]:.4f} within 20 ms, at most {every.max():.2f} s apart"
            )
    # With another padding many a text is another one; the times of the others are printed.
    assert len(apart_by_form["with its padding"]) > len(some) / 2
    assert shares["with its padding"] > 0.99
