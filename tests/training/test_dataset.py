"""Training batches: sounds, altered views and labels that belong together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model_folder, write_tone
from training_data import (
    ALWAYS,
    EN,
    END,
    HI,
    TIME,
    WINDOW,
    ZH,
    Select,
    make_select,
    make_visit_tokens,
    row,
    visits_to,
)
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.workers import load_ahead
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.packing import packed_row
from simpler_distil_whisper.labels.rows import LabelColumns
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.teacher_cache import EncoderStateCache
from simpler_distil_whisper.model.tensor_store import TensorStore
from simpler_distil_whisper.training.augment import Views
from simpler_distil_whisper.training.dataset import StateCaches, TrainingBatch, TrainingDataset
from simpler_distil_whisper.training.options import Augmentation
from simpler_distil_whisper.training.plan import Visit
from simpler_distil_whisper.training.tokens import Example


@pytest.fixture
def select(tmp_path: Path) -> Select:
    return make_select(tmp_path)


def make_dataset(
    examples: list[Example],
    batches: list[list[int]] | list[list[Visit]],
    *,
    augmentation: dict[str, Any] | None = None,
    cache: EncoderStateCache | None = None,
    **data: Any,
) -> TrainingDataset:
    options = Augmentation.model_validate(augmentation or {})
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    visits = [
        [Visit(each, each, 0) if isinstance(each, int) else each for each in batch]
        for batch in batches
    ]
    views = Views(options, 1.0, float(WINDOW), 0)
    return TrainingDataset(
        visits, make_visit_tokens(examples, **data), views, extractor, StateCaches(cache)
    )


@pytest.fixture
def dataset(select: Select, tmp_path: Path) -> TrainingDataset:
    for number, seconds in enumerate((0.5, 1.25, 2.0)):
        write_tone(tmp_path / f"{number}.wav", seconds, seed=number)
    rows = [row(audio="0.wav"), row(audio="1.wav", text="Hi", language="en"), row(audio="2.wav")]
    return make_dataset(select(*rows).examples, [[2, 0, 1], [1]])


def test_a_packed_row_that_fills_the_window_is_learnt_with_its_times(
    select: Select, tmp_path: Path
) -> None:
    columns = LabelColumns(
        **{name: name for name in ("id", "audio", "start_seconds", "duration_seconds", "language")},
        label="text",
        reference="origin_text",
        error_rate="cer/wer",
        segments="segments",
    )
    parts: list[Row] = [
        {
            "audio": "a.wav",
            "text": text,
            "origin_text": text,
            "error_unit": "word",
            "error_language": None,
        }
        | {"audio_seconds": 1.0, "language": "en"}
        for text in ("Hi", "there")
    ]
    pack = packed_row(parts, 0, columns, ["language"], Scorer(Metric()))
    write_tone(tmp_path / str(pack["audio"]), float(WINDOW))
    selection = select(pack, max_error_rate=0, previous_text_probability=1.0, **ALWAYS)
    (example,) = selection.examples
    assert example.seconds == WINDOW
    batch = make_dataset([example], [[0]], **ALWAYS)[0]
    there = [ord(letter) - 33 for letter in "there"]
    label = [TIME, *HI, TIME + 50, TIME + 50, *there, TIME + 100]
    assert batch.labels[0].tolist() == [-100, -100, *label, END]
    assert batch.input_features.shape == (1, 80, 100 * WINDOW)


def test_a_batch_pairs_each_sound_with_its_own_label(dataset: TrainingDataset) -> None:
    batch = dataset[0]
    assert len(dataset) == 2
    assert batch.input_features.shape == (3, 80, WINDOW * 100)
    assert batch.decoder_input_ids[:, 1].tolist() == [ZH, ZH, EN]
    assert batch.seconds == 3.75
    assert batch.label_tokens == 7 + 7 + 3
    assert batch.rejections == []
    alone = dataset[1]
    assert torch.equal(alone.input_features[0], batch.input_features[2])
    assert alone.labels.tolist() == [[-100, -100, -100, *HI, END]]


def test_a_clip_longer_than_its_row_states_is_not_cut(select: Select, tmp_path: Path) -> None:
    write_tone(tmp_path / "0.wav", 1.9)
    slower = {"views": None, "waveform": {"speed": [0.8, 0.8]}}
    for stated, reasons in ((1.0, ["it has 1.900 s, not 1.000 s"]), (1.9, [])):
        rows = [row(audio="0.wav", audio_seconds=stated)]
        batch = make_dataset(select(*rows).examples, [[0]], augmentation=slower)[0]
        assert [each.reason.split(": ")[1] for each in batch.rejections] == reasons
        assert batch.label_tokens == 7 * (not reasons)


def test_a_file_that_breaks_during_training_has_no_labels(
    dataset: TrainingDataset, tmp_path: Path
) -> None:
    whole = dataset[0]
    (tmp_path / "0.wav").write_bytes(b"no longer audio")
    batch = dataset[0]
    (rejection,) = batch.rejections
    assert rejection.reason.startswith(f"{tmp_path / '0.wav'}: is no audio")
    assert rejection.place == f"{tmp_path / 'train.jsonl'}:1"
    assert json.loads(json.dumps(rejection.row)) == row(audio="0.wav")
    assert (batch.labels[1] == -100).all()
    assert batch.label_tokens == 7 + 3
    assert torch.isfinite(batch.input_features).all()
    # The other rows, and the shape that processes agree on, stay as they were.
    for before, after in (
        (whole.input_features, batch.input_features),
        (whole.decoder_input_ids, batch.decoder_input_ids),
        (whole.labels, batch.labels),
    ):
        assert before.shape == after.shape
        assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_the_other_labels_of_a_row_do_not_matter(dataset: TrainingDataset) -> None:
    batch = dataset[0].to(torch.device("cpu"))
    assert torch.equal(batch.labels, dataset[0].labels)
    assert (batch.seconds, batch.label_tokens) == (3.75, 17)


# Views


SPEED_AND_NOISE = {"waveform": {"speed": [0.8, 1.25], "noise_db": [5.0, 20.0]}}


def make_epochs(dataset: TrainingDataset, uses: int, **options: Any) -> list[TrainingBatch]:
    """The same three clips, once in each of some epochs."""
    examples = list(dataset.visit_tokens.examples)
    visits = [visits_to(0, 1, 2, use=use) for use in range(uses)]
    other = make_dataset(examples, visits, **options)
    return [other[number] for number in range(len(other))]


def kinds(batches: list[TrainingBatch], row: int) -> list[int]:
    """Number a clip's log-mels of each epoch, equal ones by the same number."""
    seen: list[torch.Tensor] = []
    numbers = []
    for batch in batches:
        log_mel = batch.input_features[row]
        known = [n for n, other in enumerate(seen) if torch.equal(log_mel, other)]
        numbers.append(known[0] if known else len(seen))
        if not known:
            seen.append(log_mel)
    return numbers


def test_epochs_use_the_clip_and_its_views_in_turn(dataset: TrainingDataset) -> None:
    (clean,) = make_epochs(dataset, 1)
    batches = make_epochs(dataset, 6, augmentation={"views": 2, **SPEED_AND_NOISE})
    firsts = set()
    for row_number in range(3):
        assert kinds(batches, row_number) == [0, 1, 2, 0, 1, 2]
        as_they_are = [
            torch.equal(batch.input_features[row_number], clean.input_features[row_number])
            for batch in batches
        ]
        assert sum(as_they_are[:3]) == 1
        firsts.add(as_they_are.index(True))
    assert len(firsts) > 1
    for batch in batches:
        assert torch.equal(batch.labels, clean.labels)
        assert batch.seconds == clean.seconds


def test_without_a_number_of_views_every_use_is_another(dataset: TrainingDataset) -> None:
    batches = make_epochs(dataset, 5, augmentation={"views": None, **SPEED_AND_NOISE})
    assert all(kinds(batches, number) == [0, 1, 2, 3, 4] for number in range(3))


@pytest.mark.parametrize("views", [2, None])
def test_the_view_depends_on_the_visit_alone(dataset: TrainingDataset, views: int | None) -> None:
    spec = {"time_masks": 1, "frequency_masks": 1}
    options = {"augmentation": {"views": views, "spec_augment": spec, **SPEED_AND_NOISE}}
    whole = make_epochs(dataset, 4, **options)
    visits = [visits_to(example, use=use) for use in range(4) for example in range(3)]
    alone = make_dataset(list(dataset.visit_tokens.examples), visits, **options)
    loaded = list(load_ahead(alone.__getitem__, range(len(alone)), 2))
    for number, batch in enumerate(loaded):
        use, example = divmod(number, 3)
        torch.testing.assert_close(batch.input_features[0], whole[use].input_features[example])


def test_only_views_that_come_again_are_kept(dataset: TrainingDataset, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", languages=["zh", "en"], window_seconds=WINDOW)
    teacher = read_model_folder(folder, None, "teacher")
    store = TensorStore(tmp_path / "cache", 10**9)
    cache = EncoderStateCache(store, torch.float32, teacher, dataset.extractor)
    encoder = WhisperForConditionalGeneration.from_pretrained(folder).eval().model.encoder
    for views, again in ((1, 0), (None, 3)):
        options = {"augmentation": {"views": views, **SPEED_AND_NOISE}, "cache": cache}
        first, second = make_epochs(dataset, 2, **options)
        for batch in (first, second):
            assert batch.cached_encoder_states is not None
            assert set(batch.cached_encoder_states.missing) == {0, 1, 2}
            assert all(
                (name is None) == (views is None)
                for name in batch.cached_encoder_states.missing.values()
            )
            cache.complete(batch.cached_encoder_states, batch.input_features, encoder)
        for batch, uncached in zip(
            make_epochs(dataset, 2, **options),
            make_epochs(dataset, 2, augmentation=options["augmentation"]),
            strict=True,
        ):
            assert batch.cached_encoder_states is not None
            assert len(batch.cached_encoder_states.missing) == again
            assert batch.seconds == pytest.approx(uncached.seconds)
            states = cache.complete(batch.cached_encoder_states, batch.input_features, encoder)
            expected = encoder(uncached.input_features).last_hidden_state
            torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_a_broken_file_is_silence_in_every_view(dataset: TrainingDataset, tmp_path: Path) -> None:
    options = {"augmentation": {"views": None, **SPEED_AND_NOISE}}
    (whole,) = make_epochs(dataset, 1, **options)
    (tmp_path / "0.wav").write_bytes(b"no longer audio")
    (batch,) = make_epochs(dataset, 1, **options)
    assert (batch.labels[0] == -100).all()
    assert torch.equal(batch.input_features[1:], whole.input_features[1:])
    assert batch.input_features[0].unique().numel() == 1
