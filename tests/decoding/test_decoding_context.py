"""Decoding with an audio context: each clip is given what it needs, whatever else is decoded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import RunScript
from tiny import make_corpus, make_model_folder, read_rows, write_rows, write_tone

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel, long_log_mel
from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.data.options import Columns, DataLimits
from simpler_distil_whisper.decoding.batches import SpeechReader
from simpler_distil_whisper.decoding.hypothesis import Hypothesis
from simpler_distil_whisper.decoding.long_form import transcribe_long
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.decoding.transcription import transcribe_batch
from simpler_distil_whisper.model.audio_context import AudioContext
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

CONTEXT = AudioContext(0.1)  # clips of up to 0.9 s get half of the tiny model's window


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    path = make_model_folder(folder, languages=["en", "zh"], talkative=True, seed=53)
    return load_whisper(read_model_folder(path, None, "model"))


def transcriber_of(
    whisper: Whisper, context: AudioContext | None, **options: object
) -> Transcriber:
    limited = DecodingOptions.model_validate({"max_new_tokens": 12, **options})
    return Transcriber(whisper, limited, audio_context=context)


def transcribed(transcriber: Transcriber, manifest: Path) -> list[Hypothesis]:
    utterances = list(read_manifest(manifest, Columns()).utterances)
    reader = SpeechReader(transcriber.whisper.feature_extractor, DataLimits())
    return transcribe_batch(transcriber, None, reader(utterances))


@pytest.mark.parametrize("options", [{}, {"timestamps": True}, {"num_beams": 2}])
def test_a_clip_has_the_same_text_alone_and_among_others(
    tmp_path: Path, whisper: Whisper, options: dict[str, object]
) -> None:
    manifest = make_corpus(tmp_path, 7)
    transcriber = transcriber_of(whisper, CONTEXT, **options)
    together = transcribed(transcriber, manifest)
    for number, (row, hypothesis) in enumerate(zip(read_rows(manifest), together, strict=True)):
        alone = transcribed(transcriber, write_rows(tmp_path / f"{number}.jsonl", [row]))
        assert alone[0].token_ids == hypothesis.token_ids
        waveform = load_audio(tmp_path / row["audio"])
        positions = 50 if len(waveform) <= 0.9 * 16_000 else 100
        features = log_mel([waveform], whisper.feature_extractor)[:, :, : 2 * positions]
        states = whisper.encode(features)
        assert states.shape[1] == positions
        by_hand = transcriber.from_encoder_states(states, ["zh"])
        assert by_hand[0].token_ids == hypothesis.token_ids


def test_short_clips_differ_from_those_in_a_window_and_long_ones_do_not(
    tmp_path: Path, whisper: Whisper
) -> None:
    manifest = make_corpus(tmp_path, 7)
    cut = transcribed(transcriber_of(whisper, CONTEXT), manifest)
    whole = transcribed(transcriber_of(whisper, None), manifest)
    equal = [
        a.average_log_probability == b.average_log_probability
        for a, b in zip(cut, whole, strict=True)
    ]
    assert equal == [False] * 3 + [True] * 4


@pytest.mark.parametrize("long_form", ["sequential", "chunked"])
def test_the_last_window_of_a_recording_is_cut(
    tmp_path: Path, whisper: Whisper, long_form: str
) -> None:
    """Together with others or alone: the rest of each recording has a length of its own."""
    waveforms = []
    for number, seconds in enumerate((4.3, 4.9, 7.4)):
        write_tone(tmp_path / f"{number}.wav", seconds, seed=number)
        waveforms.append(load_audio(tmp_path / f"{number}.wav"))
    recordings = [long_log_mel(waveform, whisper.feature_extractor) for waveform in waveforms]
    transcriber = transcriber_of(whisper, CONTEXT, long_form=long_form, batch_size=4)
    together = transcribe_long(transcriber, recordings, ["en"] * 3, [0, 1, 2])
    for number, hypothesis in enumerate(together):
        alone = transcribe_long(transcriber, [recordings[number]], ["en"], [number])
        assert alone[0].token_ids == hypothesis.token_ids
    whole = transcriber_of(whisper, None, long_form=long_form, batch_size=4)
    others = transcribe_long(whole, recordings, ["en"] * 3, [0, 1, 2])
    assert [a.average_log_probability for a in together] != [
        b.average_log_probability for b in others
    ]


@pytest.mark.slow
def test_inference_follows_what_the_folder_states(
    tmp_path: Path, whisper: Whisper, run_script: RunScript
) -> None:
    released, trained = whisper.processor_folder, tmp_path / "trained"
    shutil.copytree(released, trained)
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    config["audio_context"] = CONTEXT.to_config()
    (trained / "config.json").write_text(json.dumps(config), encoding="utf-8")
    manifest = make_corpus(tmp_path, 2)

    def texts(model: Path, choice: object) -> list[str]:
        output = tmp_path / f"{model.name} {choice}"
        options = {"batch_size": 2, "max_new_tokens": 8, "audio_context": choice}
        path = tmp_path / "config.json"
        path.write_text(
            json.dumps(
                {
                    "output_dir": str(output),
                    "model": {"path": str(model)},
                    "data": {"manifest": str(manifest), "num_workers": 0},
                    "decoding": options,
                }
            )
        )
        done = run_script("offline_inference", path)
        assert done.returncode == 0, done.stderr
        rows = read_rows(output / "hypotheses.jsonl")
        return [row["hypothesis"] for row in rows]

    full, short = texts(released, "auto"), texts(trained, "auto")
    assert full != short
    assert texts(trained, "full") == full
    assert texts(released, 0.1) == short
