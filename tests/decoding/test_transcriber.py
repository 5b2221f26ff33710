"""The batched decoder against transformers' own `generate` and against a full forward pass."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from generated import generated_tokens, never_text
from tiny import add_words, make_corpus, make_model_folder, read_rows
from torch import Tensor

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.hypothesis import Hypothesis
from simpler_distil_whisper.decoding.search import (
    LoopTest,
    PromptedBatch,
    SearchResult,
    greedy_or_sampled,
    read_prompts,
)
from simpler_distil_whisper.decoding.token_rules import TokenRules
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions, SampledTexts
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

UTTERANCES = 8
ADDED = ["浴室", "Kubernetes", "Müller", "<|speaker|>"]

pytestmark = pytest.mark.usefixtures("one_thread")


def multilingual(folder: Path, **layout: object) -> Whisper:
    path = make_model_folder(folder, languages=["en", "zh", "ja"], talkative=True, **layout)
    return load_whisper(read_model_folder(path, None, "model"))


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    path = make_model_folder(
        tmp_path_factory.mktemp("model"), english_only=True, seed=4, talkative=True
    )
    return load_whisper(read_model_folder(path, None, "model"))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, whisper: Whisper) -> Tensor:
    folder = tmp_path_factory.mktemp("corpus")
    rows = read_rows(make_corpus(folder, UTTERANCES))
    waveforms = [load_audio(folder / row["audio"]) for row in rows]
    return log_mel(waveforms, whisper.feature_extractor)


def transcribe(
    whisper: Whisper, features: Tensor, languages: list[str | None], **options: object
) -> list[Hypothesis]:
    return Transcriber(whisper, DecodingOptions(**options))(features, languages)


def generated_texts(
    whisper: Whisper, features: Tensor, languages: list[str | None], max_new_tokens: int
) -> list[str]:
    tokens = generated_tokens(whisper, features, languages, max_new_tokens)
    return whisper.tokenizer.batch_decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("limit", [1, 30, 224])
def test_same_text_as_generate(whisper: Whisper, features: Tensor, limit: int) -> None:
    languages = ["zh", "en", "ja", "zh", "en", "ja", "zh", "en"]
    ours = transcribe(whisper, features, languages, max_new_tokens=limit)
    assert [h.text for h in ours] == generated_texts(whisper, features, languages, limit)
    if limit == 224:
        lengths = [h.token_count for h in ours]
        assert min(lengths) < 110 < max(lengths), "neither all short nor all at the limit"
        assert len({h.text for h in ours}) > UTTERANCES / 2


def test_same_text_as_generate_for_an_english_only_model(
    english: Whisper, features: Tensor
) -> None:
    ours = transcribe(english, features, [None] * UTTERANCES, max_new_tokens=60)
    theirs = generated_texts(english, features, [None] * UTTERANCES, 60)
    assert [h.text for h in ours] == theirs
    assert {h.language for h in ours} == {"en"}
    assert len(set(theirs)) > 1


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_same_tokens_as_generate_with_beams_and_timestamps(
    whisper: Whisper, features: Tensor, beams: int, timestamps: bool
) -> None:
    languages = ["zh", "en", "ja", "zh", "en", "ja", "zh", "en"]
    expected = generated_tokens(
        whisper, features, languages, 100, beams=beams, timestamps=timestamps
    )
    hypotheses = transcribe(
        whisper, features, languages, max_new_tokens=100, num_beams=beams, timestamps=timestamps
    )
    assert [list(h.token_ids) for h in hypotheses] == expected
    assert len({h.token_ids for h in hypotheses}) > 4
    kinds = {id in whisper.tokens.timestamps for h in hypotheses for id in h.token_ids}
    assert kinds == ({True, False} if timestamps else {False})


def test_a_prompt_is_the_previous_text(whisper: Whisper, features: Tensor) -> None:
    settings = copy.deepcopy(whisper.model.generation_config)
    settings.suppress_tokens = never_text(whisper)
    ids = whisper.model.generate(
        features,
        generation_config=settings,
        prompt_ids=whisper.tokenizer.get_prompt_ids("Taipei, tea", return_tensors="pt"),
        language="zh",
        task="transcribe",
        max_new_tokens=60,
        force_unique_generate_call=True,
        do_sample=False,
    )
    expected = [row[row.index(whisper.tokens.start) :] for row in ids.tolist()]
    expected = [[id for id in row if id < whisper.tokens.end] for row in expected]
    languages = ["zh"] * UTTERANCES
    hypotheses = transcribe(whisper, features, languages, max_new_tokens=60, prompt="Taipei, tea ")
    assert [list(h.token_ids) for h in hypotheses] == expected
    without = transcribe(whisper, features, languages, max_new_tokens=60)
    assert [h.text for h in hypotheses] != [h.text for h in without]


def test_each_row_has_its_own_past(whisper: Whisper, features: Tensor) -> None:
    """Prompts of different lengths in one batch, one of them longer than the model takes."""
    transcriber = Transcriber(whisper, DecodingOptions(language="zh"))
    states = transcriber.encode(features[:4])
    pasts = [[], [65], list(range(40, 90)), [66, 67] * 200]
    together = transcriber.from_encoder_states(states, [None] * 4, previous=pasts)
    for row, past in enumerate(pasts):
        row_states = states[row : row + 1]
        alone = transcriber.from_encoder_states(row_states, [None], previous=[past])[0]
        assert together[row].token_ids == alone.token_ids
        assert together[row].average_log_probability == pytest.approx(
            alone.average_log_probability, abs=1e-5
        )
        assert together[row].no_speech_probability == pytest.approx(
            alone.no_speech_probability, rel=1e-4
        )
    cut = transcriber.from_encoder_states(states[3:], [None], previous=[[66, 67] * 111 + [66]])
    assert cut[0].token_ids != together[3].token_ids
    kept = transcriber.from_encoder_states(states[3:], [None], previous=[([66, 67] * 112)[1:]])
    assert kept[0].token_ids == together[3].token_ids


def test_a_prompt_must_be_text(whisper: Whisper) -> None:
    with pytest.raises(ConfigError, match=r"decoding.prompt: <\|endoftext\|>"):
        Transcriber(whisper, DecodingOptions(prompt="a<|endoftext|>b"))


def test_random_numbers_are_those_of_the_utterance(whisper: Whisper, features: Tensor) -> None:
    options = DecodingOptions(temperatures=[1.0], max_new_tokens=30)
    languages, keys = ["zh"] * UTTERANCES, list(range(UTTERANCES))
    together = Transcriber(whisper, options, seed=5)(features, languages, keys)
    backwards = Transcriber(whisper, options, seed=5)(features.flip(0), languages, keys[::-1])
    assert [h.text for h in backwards[::-1]] == [h.text for h in together]
    other_seed = Transcriber(whisper, options, seed=6)(features, languages, keys)
    assert all(a.text != b.text for a, b in zip(together, other_seed, strict=True))
    same_audio = Transcriber(whisper, options, seed=5)(features[[0] * 8], languages, keys)
    assert len({h.text for h in same_audio}) == UTTERANCES
    assert {h.temperature for h in together} == {1.0}


def sampled(
    whisper: Whisper, features: Tensor, keys: list[int], count: int, temperature: float
) -> list[tuple[Hypothesis, tuple[str, ...]]]:
    """Greedy hypotheses and the texts sampled beside them."""
    section = SampledTexts.model_construct(count=count, temperature=temperature)
    transcriber = Transcriber(whisper, DecodingOptions(), seed=5, sampled_texts=section)
    states = transcriber.encode(features)
    languages = [["zh", "en", "ja"][key % 3] for key in keys]
    greedy = transcriber.from_encoder_states(states, languages)
    hypotheses = transcriber.with_sampled_texts(states, greedy, keys)
    assert [dataclasses.replace(each, sampled_texts=()) for each in hypotheses] == greedy
    return [(each, each.sampled_texts) for each in hypotheses]


def test_sampled_texts_depend_on_the_utterance_alone(whisper: Whisper, features: Tensor) -> None:
    keys = list(range(UTTERANCES))
    together = [texts for _, texts in sampled(whisper, features, keys, 3, 0.7)]
    backwards = sampled(whisper, features.flip(0), keys[::-1], 3, 0.7)
    assert [texts for _, texts in backwards[::-1]] == together
    [(_, alone)] = sampled(whisper, features[4:5], [4], 3, 0.7)
    assert alone == together[4]
    every = [text for texts in together for text in texts]
    assert len(every) > UTTERANCES and len(set(every)) == len(every)
    assert any(len(texts) < 3 for texts in together), "one that did not end is left out"


def test_cold_samples_are_the_most_probable_text(whisper: Whisper, features: Tensor) -> None:
    hypotheses = sampled(whisper, features, list(range(UTTERANCES)), 2, 1e-6)
    for hypothesis, texts in hypotheses:
        assert texts == ((hypothesis.text,) * 2 if hypothesis.complete else ())
    assert {hypothesis.complete for hypothesis, _ in hypotheses} == {True, False}


def test_only_what_fails_is_sampled_again(whisper: Whisper, features: Tensor) -> None:
    languages, keys = ["zh"] * UTTERANCES, list(range(UTTERANCES))
    thresholds = {"compression_ratio_threshold": None, "repetition_threshold": None}
    thresholds |= {"no_speech_threshold": None, "max_new_tokens": 40}

    def decode(temperatures: list[float], **options: object) -> list[Hypothesis]:
        options = thresholds | {"temperatures": temperatures} | options
        return Transcriber(whisper, DecodingOptions(**options))(features, languages, keys)

    first = decode([0.5])
    threshold = max(h.average_log_probability for h in first)
    both = decode([0.5, 0.6], log_probability_threshold=threshold)
    chosen = [h.temperature for h in both]
    for before, after in zip(first, both, strict=True):
        if after.temperature == 0.5:
            assert after == before
        else:
            assert threshold > before.average_log_probability < after.average_log_probability
    assert 0 < chosen.count(0.6) < UTTERANCES - 1, "some that fail are better than the next"
    # What all attempts fail with has the most probable of them; a hot one is mostly chance.
    assert decode([0.5, 0.6, 2.0], log_probability_threshold=threshold) == both
    # What is probably silence is left as it is.
    silence = {"no_speech_threshold": 0.0, "log_probability_threshold": threshold}
    assert decode([0.5, 0.6], **silence) == first


def test_loops_are_sampled_again(whisper: Whisper, features: Tensor) -> None:
    languages = ["zh"] * UTTERANCES
    ratios = [h.compression_ratio for h in transcribe(whisper, features, languages)]
    limit = sorted(set(ratios))[-2]
    hypotheses = transcribe(
        whisper,
        features,
        languages,
        temperatures=[0.0, 0.9],
        compression_ratio_threshold=limit,
        repetition_threshold=None,
        log_probability_threshold=None,
    )
    again = [h.temperature > 0 for h in hypotheses]
    assert again == [ratio > limit for ratio in ratios]
    assert any(again) and not all(again)


@torch.inference_mode()
def test_a_loop_is_cut_off_where_it_shows(whisper: Whisper, features: Tensor) -> None:
    transcriber = Transcriber(whisper, DecodingOptions())
    decoder, rules = transcriber.decoder, TokenRules(whisper, timestamps=False)
    states = transcriber.encode(features)
    prompts = [whisper.tokens.prompt("zh", "transcribe")] * UTTERANCES
    limits = torch.full((UTTERANCES,), 100)

    def search(loop_test: LoopTest | None) -> list[SearchResult]:
        cache = decoder.start(states, transcriber.positions, uneven=False)
        last = read_prompts(decoder, cache, prompts)[:, -1]
        return greedy_or_sampled(
            decoder, rules, PromptedBatch(cache, last, limits), loop_test=loop_test
        )

    whole = search(None)
    loop = max((each.ids for each in whole), key=len)[:64]
    seen = []

    def loop_test(ids: list[int]) -> bool:
        seen.append(ids)
        return ids == loop

    cut = [each.ids == loop and not each.complete for each in search(loop_test)]
    assert cut == [each.ids[:64] == loop for each in whole]
    assert any(cut) and not all(cut)
    for is_cut, before, after in zip(cut, whole, search(loop_test), strict=True):
        assert is_cut or (after.ids, after.complete) == (before.ids, before.complete)
    assert loop[:32] in seen and {len(ids) for ids in seen} <= {32, 64, 96}
    assert set(limits.tolist()) == {100}, "the caller's limits stay"


def test_segments_are_the_text_in_order(whisper: Whisper, features: Tensor) -> None:
    for hypothesis in transcribe(whisper, features, ["zh"] * UTTERANCES, timestamps=True):
        assert "".join(segment.text for segment in hypothesis.segments) == hypothesis.text
        times = [s.start_seconds for s in hypothesis.segments]
        assert times == sorted(times) and max(times) <= 2.0


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    """A model that writes words which were added to its vocabulary, behind the timestamps."""
    folder = tmp_path_factory.mktemp("extended")
    make_model_folder(folder, languages=["en", "zh", "ja"], talkative=True, seed=53)
    add_words(folder, dict(zip(ADDED, "pWjU", strict=True)))
    return load_whisper(read_model_folder(folder, None, "model"))


@pytest.mark.parametrize("beams", [1, 3])
def test_added_words_are_text_as_in_generate(
    extended: Whisper, features: Tensor, beams: int
) -> None:
    languages = ["zh"] * UTTERANCES
    settings = copy.deepcopy(extended.model.generation_config)
    settings.suppress_tokens = sorted({*extended.tokens.control, *settings.suppress_tokens})
    ids = extended.model.generate(
        features,
        generation_config=settings,
        language="<|zh|>",
        task="transcribe",
        max_new_tokens=100,
        num_beams=beams,
        force_unique_generate_call=True,
        do_sample=False,
    )
    theirs = extended.tokenizer.batch_decode(ids, skip_special_tokens=True)
    ours = transcribe(extended, features, languages, max_new_tokens=100, num_beams=beams)
    # The tokenizer takes the letter of one of them for a byte.
    assert [h.text.replace("ü", "\ufffd") for h in ours] == theirs
    for word in ADDED:
        assert any(word in h.text for h in ours), word


def test_added_words_are_no_timestamps(extended: Whisper, features: Tensor) -> None:
    ours = transcribe(extended, features, ["zh"] * UTTERANCES, timestamps=True)
    for hypothesis in ours:
        assert "".join(segment.text for segment in hypothesis.segments) == hypothesis.text
        times = [
            time
            for segment in hypothesis.segments
            for time in (segment.start_seconds, segment.end_seconds)
            if time is not None
        ]
        assert times == sorted(times) and max(times) <= 2.0
    for word in ADDED:
        assert any(word in h.text for h in ours), word


def test_the_languages_of_the_rows_decide(whisper: Whisper, features: Tensor) -> None:
    codes = ["zh", "en", "ja"]
    mixed = transcribe(whisper, features[[0, 0, 0]], codes, language="en", max_new_tokens=30)
    alone = [transcribe(whisper, features[:1], [code], max_new_tokens=30)[0].text for code in codes]
    assert [h.text for h in mixed] == alone
    assert [h.language for h in mixed] == codes
    assert len(set(alone)) == 3, "the model must care for the language"


def test_the_option_is_for_rows_that_name_no_language(whisper: Whisper, features: Tensor) -> None:
    hypotheses = transcribe(whisper, features[:2], [None, "zh"], language="ja", max_new_tokens=5)
    assert [h.language for h in hypotheses] == ["ja", "zh"]


def test_detects_the_same_languages_as_generate(tmp_path: Path, features: Tensor) -> None:
    whisper = multilingual(tmp_path, seed=37)
    # Louder or softer features make the random model detect different languages.
    features = torch.cat([features, -features, 4 * features, features.flip(-1)])
    ids = whisper.model.detect_language(features)
    names = {id: code for code, id in whisper.tokens.languages.items()}
    theirs = [names[id] for id in ids.flatten().tolist()]
    ours = transcribe(whisper, features, [None] * len(features), max_new_tokens=20)
    assert [h.language for h in ours] == theirs
    assert len(set(theirs)) > 1
    given = transcribe(whisper, features, theirs, max_new_tokens=20)
    assert [h.text for h in ours] == [h.text for h in given]


def test_neither_batch_size_nor_order_nor_neighbours_matter(
    whisper: Whisper, features: Tensor
) -> None:
    languages = ["zh", "en"] * (UTTERANCES // 2)
    together = transcribe(whisper, features, languages)
    alone = [
        transcribe(whisper, features[row : row + 1], [languages[row]])[0]
        for row in range(UTTERANCES)
    ]
    backwards = transcribe(whisper, features.flip(0), languages[::-1])[::-1]
    silence = torch.full_like(features[:1], features.min())
    padded = transcribe(whisper, torch.cat([silence, features]), ["ja", *languages])[1:]
    for other in (alone, backwards, padded):
        assert [h.text for h in other] == [h.text for h in together]
        for mine, its in zip(together, other, strict=True):
            assert mine.complete == its.complete
            assert mine.average_log_probability == pytest.approx(
                its.average_log_probability, abs=1e-5
            )
            assert mine.no_speech_probability == pytest.approx(its.no_speech_probability, rel=1e-4)


def test_probabilities_are_those_of_a_full_forward_pass(whisper: Whisper, features: Tensor) -> None:
    """No cache, no batch: prompt and text at once, then the sum over what greedy could choose."""
    hypotheses = transcribe(whisper, features, ["zh"] * UTTERANCES)
    assert {h.complete for h in hypotheses} == {True, False}
    prompt = whisper.tokens.prompt("zh", "transcribe")
    for row, hypothesis in enumerate(hypotheses):
        text = whisper.tokenizer(hypothesis.text, add_special_tokens=False).input_ids
        assert len(text) == hypothesis.token_count
        chosen = [*text, whisper.tokens.end] if hypothesis.complete else text
        with torch.no_grad():
            logits = whisper.model(
                features[row : row + 1], decoder_input_ids=torch.tensor([[*prompt, *chosen[:-1]]])
            ).logits[0]
        allowed = logits[len(prompt) - 1 :].double()
        allowed[:, never_text(whisper)] = -torch.inf
        allowed[0, whisper.model.generation_config.begin_suppress_tokens] = -torch.inf
        log_probabilities = allowed.log_softmax(-1)
        assert allowed.argmax(-1).tolist() == chosen
        chosen_log_probabilities = log_probabilities[range(len(chosen)), chosen]
        assert hypothesis.average_log_probability == pytest.approx(
            float(chosen_log_probabilities.mean()), abs=1e-5
        )
        silence = logits[0].double().softmax(-1)[whisper.tokens.no_speech]
        assert hypothesis.no_speech_probability == pytest.approx(float(silence), rel=1e-4)


def test_the_limit_is_kept_and_what_it_cut_is_not_complete(
    whisper: Whisper, features: Tensor
) -> None:
    languages = ["zh"] * UTTERANCES
    whole = transcribe(whisper, features, languages)
    cut = transcribe(whisper, features, languages, max_new_tokens=100)
    for long, short in zip(whole, cut, strict=True):
        assert short.token_count == min(long.token_count, 100)
        assert long.text.startswith(short.text)
        assert short.complete == (long.token_count < 100)
    assert {h.complete for h in cut} == {True, False}


def test_the_end_token_at_the_limit_makes_a_text_complete(
    whisper: Whisper, features: Tensor
) -> None:
    whole = transcribe(whisper, features, ["zh"] * UTTERANCES)
    row, ended = next((row, h) for row, h in enumerate(whole) if h.complete)
    for limit, complete in ((ended.token_count, False), (ended.token_count + 1, True)):
        again = transcribe(whisper, features[row : row + 1], ["zh"], max_new_tokens=limit)[0]
        assert (again.text, again.complete) == (ended.text, complete)


def test_default_limit_is_half_of_the_positions(whisper: Whisper, features: Tensor) -> None:
    lengths = [h.token_count for h in transcribe(whisper, features, ["zh"] * UTTERANCES)]
    assert max(lengths) == 224


def test_a_limit_beyond_the_positions_is_no_crash(tmp_path: Path, features: Tensor) -> None:
    whisper = multilingual(tmp_path, seed=53, max_target_positions=40)
    hypotheses = transcribe(whisper, features, ["zh"] * UTTERANCES, max_new_tokens=1000)
    assert max(h.token_count for h in hypotheses) == 36


def test_suppressed_tokens_are_never_chosen(whisper: Whisper, features: Tensor) -> None:
    """Rule out the favourite tokens: others must be chosen, still no special ones."""
    free = transcribe(whisper, features, ["zh"] * UTTERANCES, max_new_tokens=40)
    first = {h.text[0] for h in free}
    favourites = set("".join(h.text[1:] for h in free)) - first

    def ids(characters: set[str]) -> list[int]:
        return [whisper.tokenizer(c, add_special_tokens=False).input_ids[0] for c in characters]

    model = copy.deepcopy(whisper.model)
    model.generation_config.suppress_tokens += ids(favourites)
    model.generation_config.begin_suppress_tokens += ids(first)
    restrained = dataclasses.replace(whisper, model=model)
    hypotheses = transcribe(restrained, features, ["zh"] * UTTERANCES, max_new_tokens=40)
    characters = set("".join(h.text for h in hypotheses))
    assert not characters & favourites
    assert not first & {h.text[0] for h in hypotheses}
    assert characters & first, "those are forbidden at the beginning alone"
    assert not any("<|" in h.text for h in hypotheses)


def test_warm_up_changes_nothing(whisper: Whisper, features: Tensor) -> None:
    transcriber = Transcriber(whisper, DecodingOptions(max_new_tokens=10, batch_size=2))
    before = transcriber(features[:2], ["zh", "en"])
    transcriber.warm_up()
    assert transcriber(features[:2], ["zh", "en"]) == before


def test_languages_and_tasks_without_a_token_are_refused(
    whisper: Whisper, english: Whisper, features: Tensor
) -> None:
    with pytest.raises(ConfigError, match='transcribe "fr"'):
        transcribe(whisper, features[:1], ["fr"])
    with pytest.raises(ConfigError, match="English-only"):
        transcribe(english, features[:1], ["zh"])
    with pytest.raises(ConfigError, match="English-only"):
        transcribe(english, features[:1], [None], task="translate")


def test_translating_is_another_prompt(whisper: Whisper, features: Tensor) -> None:
    ids = whisper.tokenizer.convert_tokens_to_ids
    names = ["<|startoftranscript|>", "<|zh|>", "<|translate|>", "<|notimestamps|>"]
    assert whisper.tokens.prompt("zh", "translate") == ids(names)
    texts = [
        transcribe(whisper, features[:1], ["zh"], task=task, max_new_tokens=30)[0].text
        for task in ("transcribe", "translate")
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperatures": []}, "at least 1 item"),
        ({"temperatures": [0.2, 0.0]}, "do not rise"),
        ({"temperatures": [0.0, 0.0]}, "do not rise"),
        ({"temperatures": [0.5], "num_beams": 3}, "num_beams is of no use"),
        ({"batch_size": 0}, "greater than 0"),
        ({"long_form": "cut"}, "'reject', 'sequential' or 'chunked'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DecodingOptions(**options)


def test_evidence_is_rounded_and_plain(whisper: Whisper, features: Tensor) -> None:
    hypothesis = transcribe(whisper, features[:1], ["zh"], max_new_tokens=3)[0]
    evidence = hypothesis.evidence()
    assert evidence == {
        "average_log_probability": round(hypothesis.average_log_probability, 4),
        "no_speech_probability": round(hypothesis.no_speech_probability, 4),
        "compression_ratio": round(hypothesis.compression_ratio, 3),
        "temperature": 0.0,
        "complete": False,
    }
    assert hypothesis.average_log_probability < 0 < hypothesis.no_speech_probability < 1
