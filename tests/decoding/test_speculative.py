"""A student that drafts changes the speed alone: the tokens are those of the teacher without it."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, RunScript
from tiny import add_words, make_corpus, make_model_folder, read_rows
from torch import Tensor

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.hypothesis import Hypothesis
from simpler_distil_whisper.decoding.speculative import DRAFT_TOKENS, Assistant, DraftCounts
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

LANGUAGES = ["zh", "en", "ja", "zh", "en", "ja", "zh", "en"]
# Tokens of the previous text: none, a few, and more than the model takes.
PREVIOUS = [[], [1, 2, 3], list(range(50, 150)) * 3, [7], [], [9] * 60, [5, 6], [8] * 30]
DEMO = REPOSITORY / "demo_data"

pytestmark = pytest.mark.usefixtures("one_thread")


def loaded(path: Path) -> Whisper:
    return load_whisper(read_model_folder(path, None, "model"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    """It gives 96 to 224 tokens, other ones for each utterance, with timestamps among them."""
    folder = tmp_path_factory.mktemp("teacher")
    return loaded(make_model_folder(folder, languages=["en", "zh", "ja"], talkative=True, seed=53))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, teacher: Whisper) -> Tensor:
    folder = tmp_path_factory.mktemp("corpus")
    rows = read_rows(make_corpus(folder, len(LANGUAGES)))
    return log_mel([load_audio(folder / row["audio"]) for row in rows], teacher.feature_extractor)


def pruned(teacher: Whisper, encoder: Sequence[int], decoder: Sequence[int]) -> Whisper:
    return dataclasses.replace(teacher, model=prune_whisper(teacher.model, encoder, decoder))


def contrary(teacher: Whisper) -> Whisper:
    """A student that always drafts the least probable token of the teacher."""
    model = copy.deepcopy(teacher.model)
    with torch.no_grad():
        model.model.decoder.layer_norm.weight.neg_()
        model.model.decoder.layer_norm.bias.neg_()
    return dataclasses.replace(teacher, model=model)


def transcribed(
    teacher: Whisper,
    student: Whisper | None,
    features: Tensor,
    *,
    batch_size: int = 8,
    previous: Sequence[Sequence[int]] | None = None,
    **options: object,
) -> tuple[list[Hypothesis], DraftCounts]:
    """The hypotheses of the teacher, alone or with an assistant, and how much that drafted."""
    assistant = Assistant(student, teacher) if student else None
    transcriber = Transcriber(teacher, DecodingOptions(**options), assistant=assistant)
    hypotheses = []
    for first in range(0, len(features), batch_size):
        batch = slice(first, min(first + batch_size, len(features)))
        hypotheses += transcriber.from_encoder_states(
            transcriber.encode(features[batch]),
            LANGUAGES[batch],
            previous=previous[batch] if previous else None,
            keys=range(len(features))[batch],
        )
    return hypotheses, assistant.draft_counts if assistant else DraftCounts()


def assert_same(hypotheses: list[Hypothesis], alone: list[Hypothesis]) -> None:
    assert [h.token_ids for h in hypotheses] == [h.token_ids for h in alone]
    for hypothesis, other in zip(hypotheses, alone, strict=True):
        assert hypothesis.complete == other.complete
        assert hypothesis.language == other.language
        assert hypothesis.average_log_probability == pytest.approx(
            other.average_log_probability, abs=1e-5
        )
        assert hypothesis.no_speech_probability == pytest.approx(
            other.no_speech_probability, rel=1e-4
        )


@pytest.mark.parametrize(
    ("own_encoder", "timestamps", "previous"),
    [
        (False, False, None),
        (False, True, PREVIOUS),
        (True, False, PREVIOUS),
        (True, True, None),
    ],
    ids=["shared", "shared-timed-previous", "own-previous", "own-timed"],
)
def test_the_same_tokens_as_the_teacher_alone(
    teacher: Whisper,
    features: Tensor,
    own_encoder: bool,
    timestamps: bool,
    previous: list[list[int]] | None,
) -> None:
    student = pruned(teacher, [0] if own_encoder else [0, 1], [1])
    assert Assistant(student, teacher).own_encoder == own_encoder
    options = {"timestamps": timestamps, "previous": previous, "max_new_tokens": 115}
    alone, _ = transcribed(teacher, None, features, **options)
    together, drafts = transcribed(teacher, student, features, **options)
    assert_same(together, alone)
    assert 0 < drafts.accepted < drafts.drafted, "right and wrong drafts must both have occurred"
    assert {h.complete for h in alone} == {True, False}
    assert len({h.token_count for h in alone}) > 2, "the utterances must end at different times"
    times = teacher.tokens.timestamps
    if timestamps:
        assert max(sum(id in times for id in h.token_ids) for h in alone) > 4


def test_added_words_are_drafted_and_accepted(tmp_path: Path, features: Tensor) -> None:
    layout = {"languages": ["en", "zh", "ja"], "talkative": True, "seed": 53}
    teacher = loaded(add_words(make_model_folder(tmp_path, **layout), {"浴室": "p"}))
    alone, _ = transcribed(teacher, None, features, max_new_tokens=60)
    together, drafts = transcribed(
        teacher, pruned(teacher, [0, 1], [1]), features, max_new_tokens=60
    )
    assert_same(together, alone)
    assert [h.text for h in together] == [h.text for h in alone]
    assert any("浴室" in h.text for h in together)
    _, agreed = transcribed(teacher, teacher, features, max_new_tokens=60)
    assert drafts.accepted < agreed.accepted == agreed.drafted


def test_one_by_one_as_in_a_batch(teacher: Whisper, features: Tensor) -> None:
    student = pruned(teacher, [0, 1], [1])
    alone, _ = transcribed(teacher, None, features, max_new_tokens=50)
    single, drafts = transcribed(teacher, student, features, batch_size=1, max_new_tokens=50)
    assert_same(single, alone)
    assert 0 < drafts.accepted < drafts.drafted


@pytest.mark.parametrize("limit", [1, 2, DRAFT_TOKENS, DRAFT_TOKENS + 1, DRAFT_TOKENS + 2, 97])
def test_limits_are_kept(teacher: Whisper, features: Tensor, limit: int) -> None:
    """At 97 some end, some are cut one token before the end, and others in the middle."""
    alone, _ = transcribed(teacher, None, features, max_new_tokens=limit)
    for student in (teacher, pruned(teacher, [0, 1], [1])):
        together, drafts = transcribed(
            teacher, copy.deepcopy(student), features, max_new_tokens=limit
        )
        assert_same(together, alone)
        assert (drafts.drafted == 0) == (limit == 1), "the first token needs no draft"


def test_texts_that_reach_the_last_position(tmp_path: Path, features: Tensor) -> None:
    """With more previous text, fewer positions are left: the rows end at different limits."""
    folder = make_model_folder(
        tmp_path, languages=["en", "zh", "ja"], talkative=True, seed=53, max_target_positions=60
    )
    teacher = loaded(folder)
    with torch.no_grad():  # It never chooses the end token.
        teacher.model.model.decoder.embed_tokens.weight[teacher.tokens.end].zero_()
    student = pruned(teacher, [0, 1], [1])
    options = {"max_new_tokens": 1000, "previous": [[1] * 5 * n for n in range(8)]}
    together, _ = transcribed(teacher, student, features, **options)
    alone, _ = transcribed(teacher, None, features, **options)
    assert_same(together, alone)
    assert len({h.token_count for h in together if not h.complete}) > 3


def test_a_student_that_always_agrees(teacher: Whisper, features: Tensor) -> None:
    """30 tokens: the first, and then in each of five rounds five of the draft and one more."""
    alone, _ = transcribed(teacher, None, features[:1], max_new_tokens=30)
    together, drafts = transcribed(teacher, copy.deepcopy(teacher), features[:1], max_new_tokens=30)
    assert_same(together, alone)
    assert DRAFT_TOKENS == 5
    assert drafts == DraftCounts(drafted=25, accepted=25)
    # Where the end is drafted, no more is counted: n tokens and the end are made of rounds of six.
    whole, everything = transcribed(teacher, copy.deepcopy(teacher), features, previous=PREVIOUS)
    assert all(h.complete for h in whole)
    assert everything.drafted == sum(h.token_count - h.token_count // 6 for h in whole)
    assert everything.accepted == everything.drafted
    timed = transcribed(teacher, copy.deepcopy(teacher), features, timestamps=True)[1]
    assert timed.accepted == timed.drafted > 25


def test_a_student_that_never_agrees(teacher: Whisper, features: Tensor) -> None:
    """8 tokens: the first, and then seven rounds with as many drafts as the limit leaves room."""
    alone, _ = transcribed(teacher, None, features, max_new_tokens=110)
    together, drafts = transcribed(teacher, contrary(teacher), features, max_new_tokens=110)
    assert_same(together, alone)
    assert drafts.accepted == 0 < drafts.drafted
    few = transcribed(teacher, contrary(teacher), features[:1], max_new_tokens=8)[1]
    assert few == DraftCounts(drafted=5 + 5 + 5 + 4 + 3 + 2 + 1, accepted=0)


def test_drafts_are_for_the_first_temperature_alone(teacher: Whisper, features: Tensor) -> None:
    options = {"temperatures": [0.0, 0.7], "max_new_tokens": 20, "no_speech_threshold": None}
    options["compression_ratio_threshold"] = 0.01  # all of them repeat too much
    alone, _ = transcribed(teacher, None, features, **options)
    together, drafts = transcribed(teacher, pruned(teacher, [0, 1], [1]), features, **options)
    assert_same(together, alone)
    assert {h.temperature for h in alone} == {0.7}
    assert drafts.drafted > 0


@pytest.mark.parametrize("second", [0.7, 0.01])
def test_that_loops_are_cut_off_changes_nothing(
    tmp_path: Path, features: Tensor, monkeypatch: pytest.MonkeyPatch, second: float
) -> None:
    """Drafted text is not cut off: it is verified in few steps. Cold samples are loops again."""
    folder = make_model_folder(tmp_path, languages=["en", "zh", "ja"], talkative=True, seed=53)
    characters = {chr(ord("一") + place): letter for place, letter in enumerate(ascii_letters)}
    teacher = loaded(add_words(folder, characters))
    teacher.model.generation_config.suppress_tokens = list(range(256))  # but for the characters
    found: list[Hypothesis] = []
    search = Transcriber._search

    def searched(self: Transcriber, *arguments: Any) -> list[Hypothesis]:
        hypotheses = search(self, *arguments)
        found.extend(hypotheses)
        return hypotheses

    monkeypatch.setattr(Transcriber, "_search", searched)
    options = {"temperatures": [0.0, second], "max_new_tokens": 100, "repetition_threshold": 3}
    options |= {"compression_ratio_threshold": None, "log_probability_threshold": None}
    alone, _ = transcribed(teacher, None, features, **options)
    cut_off = [each for each in found if not each.complete and each.token_count < 100]
    assert {each.token_count for each in cut_off} <= {32, 64, 96} and cut_off
    found.clear()
    together, _ = transcribed(teacher, pruned(teacher, [0, 1], [1]), features, **options)
    assert_same(together, alone)
    assert all(each.complete or each.token_count == 100 for each in found)
    assert {h.temperature for h in alone} == {second}


def test_warming_up_does_not_count(teacher: Whisper) -> None:
    assistant = Assistant(pruned(teacher, [0, 1], [1]), teacher)
    Transcriber(teacher, DecodingOptions(batch_size=2), assistant=assistant).warm_up()
    assert assistant.draft_counts == DraftCounts()
    assert assistant.report()["acceptance_rate"] is None


def test_the_same_encoder_is_in_memory_once(teacher: Whisper) -> None:
    student = pruned(teacher, [0, 1], [1])
    assert student.model.model.encoder is not teacher.model.model.encoder
    Assistant(student, teacher)
    assert student.model.model.encoder is teacher.model.model.encoder
    trained = pruned(teacher, [0, 1], [1])
    with torch.no_grad():
        trained.model.model.encoder.layers[1].fc2.bias[3] += 1e-6
    assert Assistant(trained, teacher).own_encoder
    assert trained.model.model.encoder is not teacher.model.model.encoder


def test_beams_take_no_drafts(teacher: Whisper) -> None:
    assistant = Assistant(pruned(teacher, [0, 1], [1]), teacher)
    with pytest.raises(ConfigError, match="assistant.path: .*3 beams"):
        Transcriber(teacher, DecodingOptions(num_beams=3), assistant=assistant)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[0, 3], [0, 1]])
def test_the_same_texts_on_the_demo_recordings(layers: list[int]) -> None:
    teacher = loaded(DEMO / "teacher")
    rows = read_rows(DEMO / "test.jsonl")[:48]
    waveforms = [load_audio(DEMO / row["audio"]) for row in rows]
    states = Transcriber(teacher, DecodingOptions()).encode(
        log_mel(waveforms, teacher.feature_extractor)
    )
    assistant = Assistant(pruned(teacher, [0, 1, 2], layers), teacher)
    alone, together = (
        Transcriber(teacher, DecodingOptions(), assistant=helper).from_encoder_states(
            states, [row["language"] for row in rows]
        )
        for helper in (None, assistant)
    )
    assert_same(together, alone)
    assert len({h.text for h in alone}) > 40
    assert 0 < assistant.draft_counts.accepted < assistant.draft_counts.drafted


@pytest.mark.slow
def test_inference_with_an_assistant(tmp_path: Path, run_script: RunScript) -> None:
    model = make_model_folder(
        tmp_path / "model", languages=["en", "zh", "ja"], talkative=True, seed=53
    )
    config = {
        "model": {"path": str(model)},
        "data": {"manifest": str(make_corpus(tmp_path / "corpus", 5))},
        "decoding": {"batch_size": 2, "max_new_tokens": 30},
    }
    outputs = {}
    for name, more in (("alone", {}), ("assisted", {"assistant": {"path": str(model)}})):
        done = run_script("offline_inference", {**config, **more, "output_dir": name})
        assert done.returncode == 0, done.stderr
        outputs[name] = (tmp_path / name / "hypotheses.jsonl").read_bytes()
    assert outputs["alone"] == outputs["assisted"]
    speed = json.loads((tmp_path / "assisted" / "speed.json").read_text())
    # In each of five rounds the model agrees with five tokens of its own, for all five utterances.
    assert (speed["drafted_tokens"], speed["accepted_tokens"]) == (125, 125)
    assert speed["acceptance_rate"] == 1.0
    beams = {**config, "assistant": {"path": str(model)}, "decoding": {"num_beams": 2}}
    refused = run_script("offline_inference", {**beams, "output_dir": "beams"}, "--check")
    assert refused.returncode == 2
    assert "decoding.num_beams" in refused.stderr
    other = make_model_folder(tmp_path / "other", mels=128)
    stranger = {**config, "assistant": {"path": str(other)}, "output_dir": "stranger"}
    refused = run_script("offline_inference", stranger, "--check")
    assert refused.returncode == 2
    assert f"assistant.path: {other} has num_mel_bins 128" in refused.stderr
