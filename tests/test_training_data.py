"""What is trained on, as which tokens, in which order; and what is not, and why."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model_folder, make_tokenizer, write_rows, write_tone
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from simpler_distil_whisper.manifest import Utterance, read_manifest
from simpler_distil_whisper.model_folder import ModelFolder
from simpler_distil_whisper.training_data import (
    Example,
    ExampleFilter,
    MicroBatches,
    Selection,
    TrainingDataset,
    TrainingPlan,
    decoder_sequences,
)
from simpler_distil_whisper.training_options import TrainingData
from simpler_distil_whisper.whisper import special_tokens

WINDOW = 2
# The tokenizer's 256 bytes come first: those that print by their value, then the others.
END, START, ZH, EN, TRANSLATE, TRANSCRIBE, NO_TIMESTAMPS = 256, 257, 258, 259, 260, 261, 265
NI_HAO = [160, 121, 254, 161, 98, 121]  # 你好: E4 BD A0, E5 A5 BD
HI = [39, 72]


def model_facts(*languages: str) -> ModelFolder:
    config = {"vocab_size": 400, "max_target_positions": 448, "max_source_positions": 50 * WINDOW}
    return ModelFolder(Path("m"), Path("m"), config, frozenset(languages))


Select = Callable[..., Selection]


@pytest.fixture
def select(tmp_path: Path) -> Select:
    """Pass rows through the filters of a `data` section."""

    def passed(
        *rows: dict[str, Any] | str, english_only: bool = False, positions: int = 448, **data: Any
    ) -> Selection:
        path = write_rows(tmp_path / "train.jsonl", list(rows))
        section = TrainingData(train_manifests=[path], **data)
        tokenizer = make_tokenizer(["zh", "en"], WINDOW)
        tokens = special_tokens(tokenizer, model_facts(*(() if english_only else ("zh", "en"))))
        filters = ExampleFilter(section, tokens, tokenizer, float(WINDOW), positions)
        return filters.select([read_manifest(path, section.columns)])

    write_tone(tmp_path / "a.wav", 1.0)
    return passed


def row(**fields: Any) -> dict[str, Any]:
    return {"audio": "a.wav", "text": "你好", "language": "zh", **fields}


# Two token sequences, by hand.


def test_a_chinese_and_an_english_sentence_by_hand(select: Select) -> None:
    examples = select(row(), row(text="Hi", language="en")).examples
    assert examples[0].tokens == [START, ZH, TRANSCRIBE, NO_TIMESTAMPS, *NI_HAO, END]
    assert examples[1].tokens == [START, EN, TRANSCRIBE, NO_TIMESTAMPS, *HI, END]
    assert [example.prompt_length for example in examples] == [4, 4]
    inputs, labels = decoder_sequences(examples, END)
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.tolist() == [
        [START, ZH, TRANSCRIBE, NO_TIMESTAMPS, *NI_HAO],
        [START, EN, TRANSCRIBE, NO_TIMESTAMPS, *HI, END, END, END, END],
    ]
    # The end token is learnt once, although it also is what pads; nothing else of the padding is.
    assert labels.tolist() == [
        [-100, -100, -100, *NI_HAO, END],
        [-100, -100, -100, *HI, END, -100, -100, -100, -100],
    ]


def test_an_english_only_model_has_a_short_prompt(select: Select) -> None:
    (example,) = select(row(text="Hi", language="en"), english_only=True).examples
    assert example.tokens == [START, NO_TIMESTAMPS, *HI, END]
    inputs, labels = decoder_sequences([example], END)
    assert inputs.tolist() == [[START, NO_TIMESTAMPS, *HI]]
    assert labels.tolist() == [[-100, *HI, END]]


def test_task_and_default_language_stand_in_the_prompt(select: Select) -> None:
    examples = select(row(), row(language=None), language="english", task="translate").examples
    assert [example.tokens[:4] for example in examples] == [
        [START, ZH, TRANSLATE, NO_TIMESTAMPS],
        [START, EN, TRANSLATE, NO_TIMESTAMPS],
    ]


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|0.50|>"])
def test_a_transcript_cannot_hold_a_special_token(select: Select, token: str) -> None:
    selection = select(row(text=f"你好{token}"), row(text="<|> <|hello|>", language="en"))
    assert [example.utterance.text for example in selection.examples] == ["<|> <|hello|>"]
    (rejection,) = selection.rejections
    assert token in rejection.reason
    assert selection.report["special token in label"]["rows"] == 1


def examples_of(lengths: list[int]) -> list[Example]:
    one = Utterance(0, "p", "{}", "i", Path("a"), 0.0, None, "t", "zh")
    random = np.random.default_rng(0)
    prompt = [START, ZH, TRANSCRIBE, NO_TIMESTAMPS]
    return [
        Example(one, 1.0, [*prompt, *random.integers(0, 257, length).tolist(), END], 4)
        for length in lengths
    ]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 300))
def test_each_label_is_the_token_after_its_input(lengths: list[int], padding: int) -> None:
    examples = examples_of(lengths)
    inputs, labels = decoder_sequences(examples, padding)
    assert inputs.shape == labels.shape == (len(lengths), max(lengths) + 4)
    for example, given_, learnt in zip(examples, inputs.tolist(), labels.tolist(), strict=True):
        length = len(example.tokens)
        assert given_[: length - 1] == example.tokens[:-1]
        assert given_[length - 1 :] == [padding] * (len(given_) - length + 1)
        assert learnt[:3] == [-100] * 3
        assert learnt[3 : length - 1] == example.tokens[4:]
        assert learnt[length - 1 :] == [-100] * (len(given_) - length + 1)


def test_padding_never_reaches_the_loss(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", languages=["zh", "en"], window_seconds=WINDOW)
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    examples = examples_of([3, 17, 8])
    features = torch.randn(3, 80, WINDOW * 100, generator=torch.Generator().manual_seed(0))
    losses = []
    for padding in (END, START, 7):
        inputs, labels = decoder_sequences(examples, padding)
        with torch.inference_mode():
            logits = model(features, decoder_input_ids=inputs).logits
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        losses.append(each.sum(dim=1))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    # Alone, without any padding, an example has the same loss.
    for number, example in enumerate(examples):
        inputs, labels = decoder_sequences([example], END)
        with torch.inference_mode():
            logits = model(features[number : number + 1], decoder_input_ids=inputs).logits[0]
        alone = torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum")
        torch.testing.assert_close(alone, losses[0][number], rtol=1e-4, atol=1e-4)


# Filters.


@pytest.mark.parametrize(
    ("fields", "data", "kind", "reason"),
    [
        ({"text": ""}, {}, "no label", '"text" is empty'),
        ({"text": " \n"}, {}, "no label", '"text" is empty'),
        ({"text": None}, {}, "no label", '"text" is empty'),
        ({"language": None}, {}, "no language", "neither the row nor data.language"),
        ({}, {"max_error_rate": 0.1}, "no error rate", '"cer/wer" is empty'),
        ({"cer/wer": "0.1"}, {"max_error_rate": 0.1}, "no error rate", "is not a number: '0.1'"),
        ({"cer/wer": True}, {"max_error_rate": 1}, "no error rate", "is not a number: True"),
        ({"cer/wer": 0.1001}, {"max_error_rate": 0.1}, "error rate above maximum", "0.1001, above"),
        ({}, {"min_duration_seconds": 1.001}, "too short", "1.000 s, the minimum is 1.001 s"),
        ({}, {"max_duration_seconds": 0.999}, "too long", "1.000 s, the maximum is 0.999 s"),
        ({}, {"max_label_tokens": 5}, "label too long", "label of 6 tokens, the maximum is 5"),
        ({"audio": "text.wav"}, {}, "unreadable audio", "text.wav: cannot be decoded"),
        ({"start_seconds": 1.5}, {}, "unreadable audio", "the part starts at 1.5 s"),
        ({"audio": "nowhere.wav"}, {}, "unusable row", "no such file"),
    ],
)
def test_each_filter_says_what_it_drops(
    select: Select, tmp_path: Path, fields: dict, data: dict, kind: str, reason: str
) -> None:
    (tmp_path / "text.wav").write_text("no audio", encoding="utf-8")
    selection = select(row(**fields), **data)
    assert selection.examples == []
    (rejection,) = selection.rejections
    assert reason in rejection.reason
    assert rejection.place == f"{tmp_path / 'train.jsonl'}:1"
    assert rejection.row == row(**fields)
    assert selection.report.keys() == {"kept", kind}
    assert selection.report["kept"] == {"rows": 0, "hours": 0}
    assert selection.report[kind]["rows"] == 1


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"cer/wer": 0.1}, {"max_error_rate": 0.1}),
        ({"cer/wer": 0}, {"max_error_rate": 0}),
        ({"cer/wer": 5.0}, {}),
        ({"cer/wer": "?"}, {}),
        ({"rate": 0.2}, {"max_error_rate": 0.2, "columns": {"error_rate": "rate"}}),
        ({}, {"min_duration_seconds": 1.0}),
        ({}, {"max_duration_seconds": 1.0}),
        ({"duration_seconds": 0.5}, {"max_duration_seconds": 0.5}),
        ({}, {"max_label_tokens": 6}),
        ({"audio": "window.wav"}, {}),
    ],
)
def test_each_limit_still_belongs_to_what_is_kept(
    select: Select, tmp_path: Path, fields: dict, data: dict
) -> None:
    write_tone(tmp_path / "window.wav", float(WINDOW))
    assert len(select(row(**fields), **data).examples) == 1


def test_audio_longer_than_the_window_is_dropped_whatever_the_config_allows(
    select: Select, tmp_path: Path
) -> None:
    write_tone(tmp_path / "long.wav", WINDOW + 0.001)
    selection = select(row(audio="long.wav"), max_duration_seconds=30.0)
    assert selection.report["too long"]["rows"] == 1


@pytest.mark.parametrize(("english_only", "prompt"), [(False, 4), (True, 2)])
def test_the_longest_label_is_what_the_decoder_can_hold(
    select: Select, english_only: bool, prompt: int
) -> None:
    texts = ["x" * (20 - prompt), "x" * (21 - prompt)]
    rows = [row(text=text, language="en") for text in texts]
    for data in ({}, {"max_label_tokens": 400}):
        selection = select(*rows, english_only=english_only, positions=20, **data)
        assert [len(example.tokens) for example in selection.examples] == [21]
        inputs, _ = decoder_sequences(selection.examples, END)
        assert inputs.shape == (1, 20)
        assert selection.report["label too long"]["rows"] == 1


def test_the_report_counts_rows_and_hours_of_every_reason(select: Select, tmp_path: Path) -> None:
    for seconds in (0.5, 1.5, 1.9):
        write_tone(tmp_path / f"{seconds}.wav", seconds)
    rows: list[dict[str, Any] | str] = [
        row(audio="1.5.wav"),
        row(audio="1.9.wav", **{"cer/wer": 0.0}),
        "{",
        row(audio="1.5.wav", **{"cer/wer": 0.9}),
        row(audio="1.5.wav", **{"cer/wer": 0.8}),
        row(audio="0.5.wav", **{"cer/wer": 0.1}),
    ]
    many = [entry for entry in rows for _ in range(100)]
    selection = select(*many, max_error_rate=0.5, min_duration_seconds=0.6)
    assert selection.report == {
        "kept": {"rows": 100, "hours": 0.0528},
        "unusable row": {"rows": 100, "hours": 0.0},
        "no error rate": {"rows": 100, "hours": 0.0417},
        "error rate above maximum": {"rows": 200, "hours": 0.0833},
        "too short": {"rows": 100, "hours": 0.0139},
    }
    assert len(selection.examples) + len(selection.rejections) == 600
    assert sum(count["rows"] for count in selection.report.values()) == 600


def test_seconds_are_those_of_the_part(select: Select) -> None:
    (example,) = select(row(start_seconds=0.25, duration_seconds=0.5)).examples
    assert example.seconds == 0.5


# The order.

Plan = st.builds(
    TrainingPlan,
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 3),
)


@given(Plan, st.integers(1, 4))
@settings(deadline=None)
def test_every_example_comes_once_per_epoch(plan: TrainingPlan, epochs: int) -> None:
    count = len(plan.lengths)
    # After so many steps both the epochs and the pools are whole.
    steps = epochs * count * plan.pool_steps
    seen = Counter(example for step in range(steps) for example in plan.step(step))
    assert set(seen) == set(range(count))
    assert set(seen.values()) == {steps * plan.step_size // count}


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 3))
@settings(deadline=None)
def test_no_example_comes_again_before_all_have_come(count: int, size: int, seed: int) -> None:
    plan = TrainingPlan([1] * count, size, False, seed)
    seen: Counter[int] = Counter()
    for step in range(3 * count // size + 1):
        seen.update(plan.step(step))
        counts = [seen[example] for example in range(count)]
        assert max(counts) - min(counts) <= 1


@given(Plan, st.integers(0, 39))
@settings(deadline=None)
def test_a_resumed_run_sees_the_tail_of_the_whole_run(plan: TrainingPlan, start: int) -> None:
    whole = [plan.step(step) for step in range(40)]
    again = TrainingPlan(plan.lengths.tolist(), plan.step_size, plan.pool_steps > 1, plan.seed)
    assert [again.step(step) for step in range(start, 40)] == whole[start:]
    # Nor does it matter what was asked before.
    assert [plan.step(step) for step in reversed(range(40))] == whole[::-1]
    assert all(len(step) == plan.step_size for step in whole)


@pytest.mark.parametrize("bucketing", [False, True])
@pytest.mark.parametrize(
    ("size", "processes", "accumulation"),
    [(12, 1, 1), (6, 2, 1), (6, 1, 2), (3, 2, 2), (1, 12, 1), (1, 4, 3), (2, 3, 2)],
)
def test_a_step_holds_the_same_examples_however_it_is_shared(
    bucketing: bool, size: int, processes: int, accumulation: int
) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 100).tolist()
    plan = TrainingPlan(lengths, 12, bucketing, 5)
    steps = range(3, 20)
    lazy = [MicroBatches(plan, steps, size, rank, processes) for rank in range(processes)]
    shares = [list(share) for share in lazy]
    assert {len(share) for share in lazy} == {accumulation * len(steps)}
    for share in shares:
        assert [len(batch) for batch in share] == [size] * accumulation * len(steps)
    for place, number in enumerate(steps):
        own = slice(place * accumulation, (place + 1) * accumulation)
        used = [example for share in shares for batch in share[own] for example in batch]
        assert sorted(used) == sorted(plan.step(number))


def padding_share(plan: TrainingPlan, steps: int) -> float:
    lengths = [plan.lengths[plan.step(step)] for step in range(steps)]
    padded = sum(len(each) * each.max() for each in lengths)
    return 1 - sum(each.sum() for each in lengths) / padded


def test_bucketing_puts_similar_lengths_together() -> None:
    lengths = np.random.default_rng(0).lognormal(2.5, 0.6, 3000).astype(int) + 1
    shares = [padding_share(TrainingPlan(lengths, 16, b, 0), 180) for b in (False, True)]
    assert shares[0] > 0.4
    assert shares[1] < 0.15


def test_bucketed_steps_do_not_come_sorted_and_their_neighbours_change() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 640)
    plan = TrainingPlan(lengths, 16, True, 0)
    means = [lengths[plan.step(step)].mean() for step in range(40)]
    rising = sum(a < b for a, b in zip(means, means[1:], strict=False))
    assert 10 < rising < 30

    def pairs(steps: range) -> set[tuple[int, int]]:
        return {
            pair for step in steps for pair in itertools.combinations(sorted(plan.step(step)), 2)
        }

    met, met_again = pairs(range(40)), pairs(range(40, 80))
    assert len(met & met_again) < 0.3 * len(met)


@pytest.mark.parametrize("bucketing", [False, True])
def test_seeds_and_epochs_differ(bucketing: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 64)
    first, same, other = (TrainingPlan(lengths, 8, bucketing, seed) for seed in (0, 0, 1))
    orders = [[plan.step(step) for step in range(8)] for plan in (first, same, other)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != [first.step(step) for step in range(8, 16)]


# Batches.


@pytest.fixture
def dataset(select: Select, tmp_path: Path) -> TrainingDataset:
    for number, seconds in enumerate((0.5, 1.25, 2.0)):
        write_tone(tmp_path / f"{number}.wav", seconds, seed=number)
    rows = [row(audio="0.wav"), row(audio="1.wav", text="Hi", language="en"), row(audio="2.wav")]
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    return TrainingDataset(select(*rows).examples, [[2, 0, 1], [1]], extractor, END)


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


def test_a_file_that_breaks_during_training_teaches_nothing(
    dataset: TrainingDataset, tmp_path: Path
) -> None:
    whole = dataset[0]
    (tmp_path / "0.wav").write_bytes(b"no longer audio")
    batch = dataset[0]
    (rejection,) = batch.rejections
    assert rejection.reason.startswith(f"{tmp_path / '0.wav'}: cannot be decoded")
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
