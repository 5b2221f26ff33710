"""The token sequences that the decoder is given and learns, by hand."""

from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model_folder
from training_data import (
    ALWAYS,
    EN,
    END,
    HI,
    NEVER,
    NI_HAO,
    NO_TIMESTAMPS,
    PREVIOUS,
    START,
    TIME,
    TRANSCRIBE,
    TRANSLATE,
    WINDOW,
    ZH,
    Select,
    decoder_tokens,
    make_select,
    make_visit_tokens,
    row,
    timed_row,
    visits_to,
)
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.data.manifest import Utterance
from simpler_distil_whisper.training.augment import View
from simpler_distil_whisper.training.plan import Visit
from simpler_distil_whisper.training.tokens import DecoderTokens, Example, decoder_sequences


@pytest.fixture
def select(tmp_path: Path) -> Select:
    return make_select(tmp_path)


def test_a_chinese_and_an_english_label_by_hand(select: Select) -> None:
    examples = select(row(), row(text="Hi", language="en")).examples
    assert list(examples[0].tokens) == [START, ZH, TRANSCRIBE, NO_TIMESTAMPS, *NI_HAO, END]
    assert list(examples[1].tokens) == [START, EN, TRANSCRIBE, NO_TIMESTAMPS, *HI, END]
    assert [example.prompt_length for example in examples] == [4, 4]
    inputs, labels = decoder_sequences(decoder_tokens(examples), END)
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
    assert list(example.tokens) == [START, NO_TIMESTAMPS, *HI, END]
    inputs, labels = decoder_sequences(decoder_tokens([example]), END)
    assert inputs.tolist() == [[START, NO_TIMESTAMPS, *HI]]
    assert labels.tolist() == [[-100, *HI, END]]


def test_task_and_default_language_stand_in_the_prompt(select: Select) -> None:
    examples = select(row(), row(language=None), language="english", task="translate").examples
    assert [list(example.tokens[:4]) for example in examples] == [
        [START, ZH, TRANSLATE, NO_TIMESTAMPS],
        [START, EN, TRANSLATE, NO_TIMESTAMPS],
    ]


def random_examples(lengths: list[int]) -> list[Example]:
    utterance = Utterance(0, "p", "{}", "i", Path("a"), 0.0, None, "t", "zh")
    random = np.random.default_rng(0)
    prompt = [START, ZH, TRANSCRIBE, NO_TIMESTAMPS]
    return [
        Example(utterance, 1.0, array("i", [*prompt, *random.integers(0, 257, length), END]), 4)
        for length in lengths
    ]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 300))
def test_each_label_is_the_token_after_its_input(lengths: list[int], padding: int) -> None:
    examples = random_examples(lengths)
    inputs, labels = decoder_sequences(decoder_tokens(examples), padding)
    assert inputs.shape == labels.shape == (len(lengths), max(lengths) + 4)
    for example, given_, learnt in zip(examples, inputs.tolist(), labels.tolist(), strict=True):
        length = len(example.tokens)
        assert given_[: length - 1] == list(example.tokens[:-1])
        assert given_[length - 1 :] == [padding] * (len(given_) - length + 1)
        assert learnt[:3] == [-100] * 3
        assert learnt[3 : length - 1] == list(example.tokens[4:])
        assert learnt[length - 1 :] == [-100] * (len(given_) - length + 1)


def test_padding_never_reaches_the_loss(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", languages=["zh", "en"], window_seconds=WINDOW)
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    examples = random_examples([3, 17, 8])
    features = torch.randn(3, 80, WINDOW * 100, generator=torch.Generator().manual_seed(0))
    losses = []
    for padding in (END, START, 7):
        inputs, labels = decoder_sequences(decoder_tokens(examples), padding)
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
        inputs, labels = decoder_sequences(decoder_tokens([example]), END)
        with torch.inference_mode():
            logits = model(features[number : number + 1], decoder_input_ids=inputs).logits[0]
        alone = torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum")
        torch.testing.assert_close(alone, losses[0][number], rtol=1e-4, atol=1e-4)


# Timestamps and previous text: <|0.00|> is 266, <|0.02|> is 267, ...


def test_a_label_with_timestamps_by_hand(select: Select) -> None:
    there = [ord(letter) - 33 for letter in "there"]
    timed = timed_row((0.0, 0.42, "Hi"), (0.5, 1.0, "there"))
    examples = select(timed, **ALWAYS).examples
    tokens = make_visit_tokens(examples, **ALWAYS).of(Visit(0, 0, 0), View())
    # 0.42 s is 21 steps of 0.02 s, 0.5 s 25, 1 s 50.
    label = [TIME, *HI, TIME + 21, TIME + 25, *there, TIME + 50, END]
    assert list(tokens.tokens) == [START, EN, TRANSCRIBE, *label]
    inputs, labels = decoder_sequences([tokens], END)
    # The first timestamp is learnt, and <|notimestamps|> is nowhere.
    assert inputs[0].tolist() == [START, EN, TRANSCRIBE, *label[:-1]]
    assert labels[0].tolist() == [-100, -100, *label]
    untimed = make_visit_tokens(examples, **NEVER).of(Visit(0, 0, 0), View())
    assert list(untimed.tokens) == [START, EN, TRANSCRIBE, NO_TIMESTAMPS, *HI, *there, END]


@pytest.mark.parametrize(
    ("start", "end", "times"),
    [
        (0.0, 0.009, (0, 0)),
        (0.011, 0.029, (1, 1)),
        (1.234, 1.999, (62, 100)),
        (1.5, 7.0, (75, 100)),  # capped at the window
        (0.3, None, (15, None)),  # the model gave no end
    ],
)
def test_times_are_rounded_to_timestamps_of_the_window(
    select: Select, start: float, end: float | None, times: tuple[int, int | None]
) -> None:
    (example,) = select(timed_row((start, end, "Hi")), **ALWAYS).examples
    tokens = make_visit_tokens([example], **ALWAYS).of(Visit(0, 0, 0), View()).tokens
    last = [] if times[1] is None else [TIME + times[1]]
    assert list(tokens) == [START, EN, TRANSCRIBE, TIME + times[0], *HI, *last, END]


def test_an_english_only_model_learns_timestamps_after_its_short_prompt(select: Select) -> None:
    examples = select(timed_row((0, 1, "Hi")), english_only=True, **ALWAYS).examples
    tokens = make_visit_tokens(examples, **ALWAYS).of(Visit(0, 0, 0), View()).tokens
    assert list(tokens) == [START, TIME, *HI, TIME + 50, END]


def test_previous_text_by_hand(select: Select) -> None:
    data = {"previous_text_probability": 1.0}
    examples = select(row(previous_text="Hi"), row(previous_text=" "), row(), **data).examples
    visit_tokens = make_visit_tokens(examples, **data)
    given, *without = [visit_tokens.of(visit, View()) for visit in visits_to(0, 1, 2)]
    prompt = [PREVIOUS, *HI, START, ZH, TRANSCRIBE, NO_TIMESTAMPS]
    assert list(given.tokens) == [*prompt, *NI_HAO, END]
    inputs, labels = decoder_sequences([given], END)
    assert inputs[0].tolist() == [*prompt, *NI_HAO]
    # None of it is learnt, <|startoftranscript|> included.
    assert labels[0].tolist() == [-100] * 6 + [*NI_HAO, END]
    # Rows without it never get that of their neighbours.
    assert [list(tokens.tokens) for tokens in without] == [
        [START, ZH, TRANSCRIBE, NO_TIMESTAMPS, *NI_HAO, END]
    ] * 2


def test_previous_text_and_timestamps_by_hand(select: Select) -> None:
    data = {"previous_text_probability": 1.0, **ALWAYS}
    examples = select(timed_row((0, 1, "Hi"), previous_text="你好"), **data).examples
    tokens, prompt_length = make_visit_tokens(examples, **data).of(Visit(0, 0, 0), View())
    assert list(tokens[:prompt_length]) == [PREVIOUS, *NI_HAO, START, EN, TRANSCRIBE]
    assert list(tokens[prompt_length:]) == [TIME, *HI, TIME + 50, END]


@pytest.mark.parametrize("label", [1, 5, 14, 15, 16])
def test_only_the_end_of_a_long_previous_text_is_given(select: Select, label: int) -> None:
    data = {"previous_text_probability": 1.0}
    long_ago = row(text="x" * label, previous_text="abc" * 100 + "Hi")
    (example,) = select(long_ago, positions=20, **data).examples
    visit_tokens = make_visit_tokens([example], positions=20, **data)
    tokens = list(visit_tokens.of(Visit(0, 0, 0), View()).tokens)
    inputs, _ = decoder_sequences([DecoderTokens(tokens, tokens.index(START) + 4)], END)
    # Half of 20 positions, and no more than the label leaves: 4 are the prompt's.
    given = min(10, 20 - 4 - label)
    given = given if given > 1 else 0  # <|startofprev|> alone would be of no use
    assert inputs.shape == (1, 4 + label + given)
    assert tokens.index(START) == given
    assert tokens[-label - 5 :] == [START, ZH, TRANSCRIBE, NO_TIMESTAMPS, *[87] * label, END]
    if given:
        assert tokens[:given] == [PREVIOUS, *[*[64, 65, 66] * 3, *HI][12 - given :]]


def test_timestamps_and_previous_text_are_drawn_at_each_visit(select: Select) -> None:
    data = {"timestamp_probability": 0.3, "previous_text_probability": 0.6}
    examples = select(timed_row((0, 1, "Hi"), previous_text="Hi"), **data).examples
    visit_tokens = make_visit_tokens(examples, **data)
    visits = [Visit(0, position, position) for position in range(1000)]
    drawn = [list(visit_tokens.of(visit, View()).tokens) for visit in visits]
    timed = np.array([NO_TIMESTAMPS not in tokens for tokens in drawn])
    continued = np.array([tokens[0] == PREVIOUS for tokens in drawn])
    assert abs(timed.mean() - 0.3) < 0.06
    assert abs(continued.mean() - 0.6) < 0.06
    # The two are independent.
    assert abs((timed & continued).mean() - 0.18) < 0.05
    assert [visit_tokens.length(visit) for visit in visits] == [len(tokens) for tokens in drawn]
    # The same whoever asks, and when.
    again = make_visit_tokens(examples, **data)
    assert [list(again.of(visit, View()).tokens) for visit in visits[::-1]] == drawn[::-1]


def test_a_sampled_text_takes_the_place_of_the_label(select: Select) -> None:
    data = {"timestamp_probability": 0.5, "sampled_text_probability": 0.6}
    rows = [row(sampled_texts=["Hi", "HiHi"]), timed_row((0, 1, "Hi"), sampled_texts=["你好"])]
    rows += [row(sampled_texts=[]), row()]
    examples = select(*rows, **data).examples
    visit_tokens = make_visit_tokens(examples, **data)
    seen: list[Counter[tuple[int, ...]]] = []
    for example in range(4):
        visits = [Visit(example, position, position) for position in range(1000)]
        drawn = [tuple(visit_tokens.of(visit, View()).tokens) for visit in visits]
        assert [visit_tokens.length(visit) for visit in visits] == [*map(len, drawn)]
        seen.append(Counter(drawn))
    prompt = (START, ZH, TRANSCRIBE, NO_TIMESTAMPS)
    label, one, two = ((*prompt, *text, END) for text in (NI_HAO, HI, HI * 2))
    assert seen[0].keys() == {label, one, two}
    assert [seen[0][tokens] / 1000 for tokens in (label, one, two)] == pytest.approx(
        [0.4, 0.3, 0.3], abs=0.05
    )
    # With timestamps the label stays.
    timed = (START, EN, TRANSCRIBE, TIME, *HI, TIME + 50, END)
    english = (START, EN, TRANSCRIBE, NO_TIMESTAMPS)
    assert seen[1].keys() == {timed, (*english, *HI, END), (*english, *NI_HAO, END)}
    assert seen[1][timed] / 1000 == pytest.approx(0.5, abs=0.05)
    assert seen[2].keys() == seen[3].keys() == {label}


def test_timestamps_follow_the_view(select: Select) -> None:
    (example,) = select(timed_row((0.2, 0.8, "Hi")), **ALWAYS).examples
    tokens = make_visit_tokens([example], **ALWAYS).of(
        Visit(0, 0, 0), View(speed=1.25, shift_seconds=0.3)
    )
    # 0.2 / 1.25 + 0.3 is 0.46, 0.8 / 1.25 + 0.3 is 0.94.
    assert list(tokens.tokens[3:]) == [TIME + 23, *HI, TIME + 47, END]
