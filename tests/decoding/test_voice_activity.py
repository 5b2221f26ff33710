"""What is decoded of audio in which nobody speaks for a while, or at all."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from tiny import SIXTEEN_KHZ, make_model_folder, read_rows
from torch import Tensor

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import long_log_mel
from simpler_distil_whisper.data.manifest import Utterance
from simpler_distil_whisper.data.options import DataLimits
from simpler_distil_whisper.data.speech_activity import SpeechSpan, speech_spans
from simpler_distil_whisper.decoding.batches import SpeechReader
from simpler_distil_whisper.decoding.long_form import transcribe_long
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.decoding.transcription import transcribe_batch
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions, VoiceActivityOptions
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

DEMO = REPOSITORY / "demo_data"
LANGUAGES = ["en", "zh", "ja"]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    """A window of 2 s, and different languages for louder and softer log-mels."""
    torch.set_num_threads(1)
    path = make_model_folder(
        tmp_path_factory.mktemp("model"), languages=LANGUAGES, talkative=True, seed=37
    )
    return load_whisper(read_model_folder(path, None, "model"))


def options(form: str, **others: object) -> DecodingOptions:
    return DecodingOptions(long_form=form, max_new_tokens=24, timestamps=True, **others)


@pytest.fixture(scope="module")
def sounds() -> list[Tensor]:
    """Two log-mels of 2 s for which the random model detects different languages."""
    noise = torch.from_numpy(np.random.default_rng(3).normal(0, 1, (80, 200)))
    return [noise.float(), 4 * noise.float()]


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_the_first_speech_decides_the_language_of_a_recording(
    whisper: Whisper, sounds: list[Tensor], form: str
) -> None:
    transcriber = Transcriber(whisper, options(form))
    languages = transcriber.detect_languages(transcriber.encode(torch.stack(sounds)))
    assert languages[0] != languages[1]
    recording = torch.cat(sounds, dim=1)
    spans = [None, [], [SpeechSpan(0.0, 4.0)], [SpeechSpan(2.0, 4.0)]]
    hypotheses = transcribe_long(transcriber, [recording] * 4, [None] * 4, speech=spans)
    assert [h.language for h in hypotheses] == [*[languages[0]] * 3, languages[1]]
    [given] = transcribe_long(transcriber, [recording], ["en"], speech=spans[3:])
    assert given.language == "en"


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_only_the_parts_with_speech_have_text(
    whisper: Whisper, sounds: list[Tensor], form: str
) -> None:
    recording = torch.cat([*sounds] * 3, dim=1)
    spans = [SpeechSpan(4.5, 6.0), SpeechSpan(10.5, 11.5)]
    vad = VoiceActivityOptions(enabled=True, padding_seconds=0.0)
    transcriber = Transcriber(whisper, options(form, voice_activity=vad))
    everywhere, some, nowhere = transcribe_long(
        transcriber, [recording] * 3, ["en"] * 3, speech=[None, spans, []]
    )
    assert everywhere.segments[0].start_seconds < 2
    assert some.segments and some.segments[-1].end_seconds <= 12
    for segment in some.segments:
        assert any(
            segment.start_seconds <= span.end_seconds and segment.end_seconds >= span.start_seconds
            for span in spans
        )
    assert (nowhere.text, nowhere.segments, nowhere.token_ids) == ("", (), ())
    assert (nowhere.no_speech_probability, nowhere.complete) == (1.0, True)


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_speech_that_lasts_to_the_end_is_decoded_to_the_end(
    whisper: Whisper, sounds: list[Tensor], form: str
) -> None:
    """Its last second is no padding, whatever the padding is."""
    recording = torch.cat([*sounds] * 3, dim=1)
    vad = VoiceActivityOptions(enabled=True, padding_seconds=1.0)
    transcriber = Transcriber(whisper, options(form, voice_activity=vad))
    [hypothesis] = transcribe_long(
        transcriber, [recording], ["en"], speech=[[SpeechSpan(11.2, 12.0)]]
    )
    assert hypothesis.segments and hypothesis.segments[0].start_seconds >= 11


@pytest.mark.slow
def test_rows_without_speech_have_no_text_and_others_lose_nothing(tmp_path: Path) -> None:
    """The demo's teacher: silence, noise, one of its clips, and that clip late in a recording."""
    import soundfile

    row = read_rows(DEMO / "test.jsonl")[0]
    clip = load_audio(DEMO / row["audio"])
    noise = np.random.default_rng(5).normal(0, 0.01, 35 * SIXTEEN_KHZ).astype(np.float32)
    silence = np.zeros(35 * SIXTEEN_KHZ, dtype=np.float32)
    waveforms = [silence[:80_000], noise[:80_000], clip, np.concatenate([silence, clip]), noise]
    for number, waveform in enumerate(waveforms):
        soundfile.write(tmp_path / f"{number}.wav", waveform, SIXTEEN_KHZ)
    utterances = [
        Utterance(number, "m", "{}", "", tmp_path / f"{number}.wav", 0.0, None, None, "en")
        for number in range(5)
    ]
    whisper = load_whisper(read_model_folder(DEMO / "teacher", None, "model"))
    decoding = DecodingOptions(
        long_form="sequential", voice_activity=VoiceActivityOptions(enabled=True)
    )
    transcriber = Transcriber(whisper, decoding)
    read = SpeechReader(whisper.feature_extractor, DataLimits(), decoding=decoding)
    nothing, noisy, alone, late, long_noise = transcribe_batch(transcriber, None, read(utterances))
    assert [h.text for h in (nothing, noisy, long_noise)] == ["", "", ""]
    assert alone.text.strip() == late.text.strip() == row["text"]
    assert all(segment.start_seconds > 34.5 for segment in late.segments)


@pytest.mark.slow
@pytest.mark.skipif(
    not {"SDW_WHISPER_BASE", "SDW_REAL_SPEECH"} <= os.environ.keys(),
    reason="SDW_WHISPER_BASE and SDW_REAL_SPEECH name no Whisper and no recordings",
)
def test_german_after_35_seconds_of_silence_is_german() -> None:
    folder = Path(os.environ["SDW_REAL_SPEECH"])
    row = next(row for row in read_rows(folder / "manifest.jsonl") if "fleurs-de" in row["path"])
    clip = load_audio(folder / row["path"])
    waveform = np.concatenate([np.zeros(35 * SIXTEEN_KHZ, dtype=np.float32), clip])
    whisper = load_whisper(read_model_folder(Path(os.environ["SDW_WHISPER_BASE"]), None, "model"))
    features = long_log_mel(waveform, whisper.feature_extractor)
    [hypothesis] = transcribe_long(
        Transcriber(whisper, DecodingOptions(long_form="sequential")),
        [features],
        [None],
        speech=[speech_spans(waveform)],
    )
    assert hypothesis.language == "de"
    words = row["text"].split()
    assert sum(word in hypothesis.text.lower() for word in words) > len(words) / 2
