"""Scores of decoder layers: what they measure, on which rows, and the student made from them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPOSITORY, RunScript
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_corpus, make_model_folder, make_tokenizer, read_rows, write_rows, write_tone

import create_student_model
from simpler_distil_whisper import progress
from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.layers import scoring
from simpler_distil_whisper.layers.rows import LayerScoring, select_rows, spread_order
from simpler_distil_whisper.layers.scoring import LayerScorer
from simpler_distil_whisper.layers.search import search_layers
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.whisper import Whisper, load_whisper
from simpler_distil_whisper.run import DataError, Run
from simpler_distil_whisper.stopping import Interrupted
from simpler_distil_whisper.training.tokens import Example

SETS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (0, 1, 3), (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of three encoder and four decoder layers, and nine clips."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("scoring")
    layout: dict[str, Any] = {"encoder_layers": 3, "decoder_layers": 4, "talkative": True}
    make_model_folder(folder / "teacher", languages=["en", "zh"], seed=5, **layout)
    make_corpus(folder, 9)
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Whisper:
    return load_whisper(read_model_folder(folder / "teacher", None, "teacher"))


@pytest.fixture(scope="module")
def labelled(folder: Path) -> list[Example]:
    return selected(folder / "teacher", folder / "zh-0.jsonl")


def selected(teacher: Path, manifest: Path, **options: Any) -> list[Example]:
    section = LayerScoring(manifest=manifest, **options)
    return select_rows(section, read_model_folder(teacher, None, "teacher"))


def settings(folder: Path, output: Path, **student: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "teacher": {"path": str(folder / "teacher")},
        "student": {"decoder_layers": 2, **student},
        "layer_scoring": {"manifest": str(folder / "zh-0.jsonl")},
    }


def create_student(config: dict[str, Any], stop_signal: int | None = None) -> Path:
    """What create_student_model.py does, in this process."""
    output = Path(config["output_dir"])
    path = output.with_suffix(".json")
    path.write_text(json.dumps(config))
    parsed = create_student_model.Config.model_validate_json(path.read_text())
    run = Run("create_student_model", path, parsed)
    run.stop_signal = stop_signal
    create_student_model.work(parsed, create_student_model.prepare(parsed), run)
    return output


def score(whisper: Whisper, labelled: list[Example], encoder: tuple[int, ...] = (0, 1, 2)) -> Any:
    scorer = LayerScorer(whisper, encoder, labelled, lambda: None)
    return scorer(SETS, "all")


def log_probabilities(model: Any, labelled: Example, teacher: Whisper) -> torch.Tensor:
    """Return float64 [tokens, V]: a model's prediction of each token of the label."""
    ids, prompt_length = labelled.tokens, labelled.prompt_length
    sound, _ = soundfile.read(labelled.utterance.audio, dtype="float32")
    features = teacher.feature_extractor(sound, 16_000, return_tensors="pt").input_features
    with torch.no_grad():
        logits = model(features, decoder_input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits
    predicted: torch.Tensor = logits[0, prompt_length - 1 :].double().log_softmax(-1)
    return predicted


@pytest.mark.parametrize("encoder", [(0, 1, 2), (0, 2)])
def test_a_score_is_the_divergence_of_the_student_that_would_be_made(
    teacher: Whisper, labelled: list[Example], encoder: tuple[int, ...]
) -> None:
    """Row by row without padding, by transformers' own forward pass and the plain formula."""
    some = labelled[:4]
    scores = score(teacher, some, encoder)
    expected = [log_probabilities(teacher.model, each, teacher) for each in some]
    for layers in SETS:
        student = prune_whisper(teacher.model, encoder, layers)
        actual = [log_probabilities(student, each, teacher) for each in some]
        p, q = torch.cat(expected), torch.cat(actual)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert scores[layers].kl == pytest.approx(kl, rel=1e-5, abs=1e-6), layers
        agreed = (p.argmax(-1) == q.argmax(-1)).double().mean()
        assert scores[layers].agreement == pytest.approx(float(agreed))


def test_all_layers_are_no_different_from_the_teacher(
    teacher: Whisper, labelled: list[Example]
) -> None:
    scores = score(teacher, labelled)
    assert scores[0, 1, 2, 3] == (0.0, 1.0)
    assert all(scores[layers].kl > 1e-3 for layers in SETS[:-1])


def test_what_a_set_shares_with_others_changes_no_bit(
    teacher: Whisper, labelled: list[Example]
) -> None:
    scorer = LayerScorer(teacher, (0, 1, 2), labelled, lambda: None)
    together = scorer(SETS[::-1], "together")
    assert [scorer([layers], "alone")[layers] for layers in SETS] == [together[s] for s in SETS]


def test_the_batch_size_changes_no_score(
    teacher: Whisper, labelled: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = score(teacher, labelled)
    monkeypatch.setattr(scoring, "suitable_batch_size", lambda model: 2)
    by_two = score(teacher, labelled)
    for layers in SETS:
        assert by_two[layers].kl == pytest.approx(at_once[layers].kl, rel=1e-5, abs=1e-6)
        assert by_two[layers].agreement == at_once[layers].agreement


def with_idle_layers(whisper: Whisper, idle: list[int]) -> Whisper:
    """The same, with decoder layers that pass on what they are given."""
    for number in idle:
        layer = whisper.model.model.decoder.layers[number]
        for last in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    return whisper


def test_layers_that_do_nothing_are_the_ones_to_go(folder: Path, labelled: list[Example]) -> None:
    whisper = load_whisper(read_model_folder(folder / "teacher", None, "teacher"))
    scorer = LayerScorer(with_idle_layers(whisper, [0, 2]), (0, 1, 2), labelled, lambda: None)
    ranked = search_layers(4, 2, scorer)
    assert ranked[0].layers == (1, 3)
    assert ranked[0].score == (0.0, 1.0)
    assert ranked[1].score.kl > 0.01


def test_the_layers_that_work_are_found_among_many(tmp_path: Path, folder: Path) -> None:
    make_model_folder(
        tmp_path / "deep", languages=["en", "zh"], decoder_layers=14, talkative=True, seed=5
    )
    working = {1, 2, 6, 8, 11, 12}
    whisper = load_whisper(read_model_folder(tmp_path / "deep", None, "teacher"))
    with_idle_layers(whisper, sorted(set(range(14)) - working))
    labelled = selected(tmp_path / "deep", folder / "zh-0.jsonl", max_utterances=2)
    ranked = search_layers(14, 6, LayerScorer(whisper, (0, 1), labelled, lambda: None))
    assert set(ranked[0].layers) == working
    assert ranked[0].score == (0.0, 1.0)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_each_beginning_of_the_order_is_spread_over_all(case: tuple[int, int]) -> None:
    count, beginning = case
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    places = [-1, *sorted(order[:beginning]), count]
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    assert max(gaps) <= 3 * count / beginning + 1


def test_rows_are_taken_from_all_of_a_sorted_manifest(tmp_path: Path, folder: Path) -> None:
    rows = read_rows(folder / "zh-0.jsonl")
    audio = str(folder / rows[0]["audio"])
    languages = ["zh"] * 60 + ["en"] * 40
    write_rows(
        tmp_path / "sorted.jsonl",
        [{"audio": audio, "text": "a", "language": language} for language in languages],
    )
    chosen = selected(folder / "teacher", tmp_path / "sorted.jsonl", max_utterances=10)
    spoken = [each.utterance.language for each in chosen]
    assert (spoken.count("zh"), spoken.count("en")) == (6, 4)
    assert chosen == selected(folder / "teacher", tmp_path / "sorted.jsonl", max_utterances=10)


def unusable_rows(folder: Path) -> dict[str, object]:
    """Reason -> row, in a folder that holds their audio."""
    write_tone(folder / "good.wav", 0.5)
    write_tone(folder / "long.wav", 2.5)
    (folder / "broken.wav").write_bytes(b"RIFF and so on")
    good = {"audio": "good.wav", "text": "one two", "language": "en"}
    return {
        '"text" is empty': {**good, "text": " "},
        "not JSON": '{"audio": ',
        "no such file": {**good, "audio": "none.wav"},
        "too long: 2.500 s, the maximum is 2 s": {**good, "audio": "long.wav"},
        "is no audio": {**good, "audio": "broken.wav"},
        "no token for the language": {**good, "language": "ja"},
        "names the language": {**good, "language": None},
        "the label holds <|endoftext|>, which is no speech": {**good, "text": "one<|endoftext|>"},
        "label of 445 tokens, the maximum is 444": {**good, "text": "x" * 445},
        "the label holds U+FFFD": {**good, "text": "one \ufffd two"},
    }


def test_rows_that_are_of_no_use_are_passed_over_with_a_reason(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unusable = unusable_rows(tmp_path)
    good = {"audio": "good.wav", "text": "x" * 444, "language": "en"}
    for reason, row in unusable.items():
        manifest = write_rows(tmp_path / "rows.jsonl", [good, row, good])
        with caplog.at_level("INFO", logger="simpler_distil_whisper"):
            chosen = selected(folder / "teacher", manifest)
        assert len(chosen) == 2
        assert reason in caplog.text
        assert "2 of 3 rows" in caplog.text
        assert "fewer than max_utterances 100" in caplog.text
        caplog.clear()
    manifest = write_rows(tmp_path / "rows.jsonl", [*unusable.values(), good, *unusable.values()])
    assert len(selected(folder / "teacher", manifest, max_utterances=1)) == 1


def test_without_any_usable_row_there_is_nothing_to_score_on(tmp_path: Path, folder: Path) -> None:
    manifest = write_rows(tmp_path / "rows.jsonl", list(unusable_rows(tmp_path).values()))
    with pytest.raises(DataError, match="0 of 10 rows") as error:
        selected(folder / "teacher", manifest)
    assert f"{manifest}:2: " in str(error.value)


def test_a_label_that_was_cut_off_within_a_character_is_scored_without_it_and_without_an_end(
    tmp_path: Path, folder: Path
) -> None:
    write_tone(tmp_path / "good.wav", 0.5)
    row = {"audio": "good.wav", "text": "ab\ufffd", "language": "en", "complete": False}
    [labelled] = selected(folder / "teacher", write_rows(tmp_path / "rows.jsonl", [row]))
    tokens = labelled.tokens[labelled.prompt_length :]
    assert make_tokenizer(["en", "zh"]).decode(tokens) == "ab"


def test_the_language_of_rows_that_name_none_is_the_configs(tmp_path: Path, folder: Path) -> None:
    write_tone(tmp_path / "good.wav", 0.5)
    manifest = write_rows(tmp_path / "rows.jsonl", [{"audio": "good.wav", "text": "one"}])
    options: dict[str, Any] = {"language": "Chinese", "task": "translate"}
    [labelled] = selected(folder / "teacher", manifest, **options)
    tokens = load_whisper(read_model_folder(folder / "teacher", None, "teacher")).tokens
    assert [*labelled.tokens[: labelled.prompt_length]] == tokens.prompt("zh", "translate")
    with pytest.raises(ConfigError, match=r'layer_scoring.language: .* no token for "ja"'):
        selected(folder / "teacher", manifest, language="ja")


def test_audio_that_turns_out_to_be_unusable_is_left_out(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its header is all right; what is left is scored as if it had not been there."""
    rows = [
        {**row, "audio": str(folder / row["audio"])} for row in read_rows(folder / "zh-0.jsonl")
    ]
    sound = np.full(16_000, np.nan, dtype=np.float32)
    soundfile.write(tmp_path / "nan.wav", sound, 16_000, subtype="FLOAT")
    bad = {**rows[0], "audio": "nan.wav", "text": "第0"}
    write_rows(tmp_path / "good.jsonl", rows)
    write_rows(tmp_path / "bad.jsonl", [*rows[:4], bad, *rows[4:]])
    write_rows(tmp_path / "worse.jsonl", [bad])
    scores = {}
    for name in ("good", "bad"):
        config = settings(folder, tmp_path / name)
        config["layer_scoring"]["manifest"] = str(tmp_path / f"{name}.jsonl")
        with caplog.at_level("INFO", logger="simpler_distil_whisper"):
            output = create_student(config)
        scores[name] = json.loads((output / "layer_scores.json").read_text())
    assert f"{tmp_path / 'bad.jsonl'}:5: {tmp_path / 'nan.wav'}: " in caplog.text
    assert scores["bad"]["utterances"] == scores["good"]["utterances"] == 9
    assert scores["bad"]["tokens"] == scores["good"]["tokens"]
    good, bad = (
        {tuple(row["layers"]): row["kl"] for row in scores[name]["scores"]}
        for name in ("good", "bad")
    )
    assert bad == pytest.approx(good, rel=1e-5)
    config = settings(folder, tmp_path / "worse")
    config["layer_scoring"]["manifest"] = str(tmp_path / "worse.jsonl")
    with pytest.raises(DataError, match=r"no audio could be used(.|\n)*worse.jsonl:1"):
        create_student(config)


def test_a_broken_teacher_is_not_scored(tmp_path: Path, folder: Path) -> None:
    config = settings(folder, tmp_path / "out")
    config["teacher"]["path"] = str(
        make_model_folder(tmp_path / "t", languages=["en", "zh"], decoder_layers=3, sharp=torch.nan)
    )
    with pytest.raises(ConfigError, match="are not finite"):
        create_student(config)
    assert not (tmp_path / "out/config.json").exists()


def test_where_memory_ends_the_key_to_change_is_named(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*call: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")

    monkeypatch.setattr(scoring, "log_mel", exhaust)
    with pytest.raises(ConfigError, match=r"does not suffice \(CUDA .*2\.00 GiB\)") as caught:
        create_student(settings(folder, tmp_path / "out"))
    assert "layer_scoring: " in str(caught.value)
    assert "max_utterances below 9" in str(caught.value)


def test_layers_named_in_the_config_are_not_scored(tmp_path: Path, folder: Path) -> None:
    for number, student in enumerate(
        ({"decoder_layer_indices": [1, 2]}, {"decoder_layers": None}, {"decoder_layers": 4})
    ):
        config = settings(folder, tmp_path / str(number), **student)
        config["layer_scoring"]["manifest"] = "never read"
        output = create_student(config)
        assert not (output / "layer_scores.json").exists()
        kept = [1, 2] if number == 0 else [0, 1, 2, 3]
        assert json.loads((output / "layer_map.json").read_text())["decoder"] == kept


def test_a_pruned_encoder_is_scored_with(tmp_path: Path, folder: Path, teacher: Whisper) -> None:
    output = create_student(settings(folder, tmp_path / "out", encoder_layers=2))
    scores = json.loads((output / "layer_scores.json").read_text())
    labelled = selected(folder / "teacher", folder / "zh-0.jsonl")
    expected = score(teacher, labelled, (0, 2))
    assert scores["encoder"] == [0, 2]
    for row in scores["scores"]:
        assert row["kl"] == pytest.approx(expected[tuple(row["layers"])].kl, abs=1e-6)


def test_a_stopped_search_leaves_nothing_that_looks_like_a_student(
    tmp_path: Path, folder: Path
) -> None:
    with pytest.raises(Interrupted):
        create_student(settings(folder, tmp_path / "out"), stop_signal=signal.SIGTERM)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"create_student_model.json", "log.txt", "run_info.json"}


def test_the_best_is_kept_and_what_all_scored_is_written(
    tmp_path: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", logger="simpler_distil_whisper"):
        output = create_student(settings(folder, tmp_path / "out"))
    assert "all 6 sets of 2 of 4 layers" in caplog.text
    assert "layer_scoring: 9 of 9 rows" in caplog.text
    assert "refitting: 3 of 6 sets, about 0:00:" in caplog.text
    scores = json.loads((output / "layer_scores.json").read_text())
    assert (scores["utterances"], scores["manifest"]) == (9, str(folder / "zh-0.jsonl"))
    assert len(scores["scores"]) == 6
    refitted = [row["refitted_kl"] for row in scores["scores"]]
    assert refitted == sorted(refitted)
    spread = next(row for row in scores["scores"] if row["found_by"] == "spread")
    assert spread["layers"] == [0, 3]
    layer_map = json.loads((output / "layer_map.json").read_text())
    assert layer_map == {
        "teacher": str(folder / "teacher"),
        "encoder": [0, 1, 2],
        "decoder": scores["scores"][0]["layers"],
    }
    for row in scores["scores"][:5]:
        assert f"{row['refitted_kl']:.4f} {row['kl']:8.4f}" in caplog.text
    again = create_student(settings(folder, tmp_path / "again"))
    for name in ("layer_scores.json", "layer_map.json", "model.safetensors"):
        assert (again / name).read_bytes() == (output / name).read_bytes()


@pytest.mark.parametrize("encoder_layers", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_states_that_the_cache_has_are_not_computed_again(
    tmp_path: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    encoder_layers: int | None,
) -> None:
    caplog.set_level("INFO")
    scores = []
    for name in ("filling", "reading", "without"):
        config = settings(folder, tmp_path / name, encoder_layers=encoder_layers)
        if name != "without":
            config["teacher_cache"] = {"folder": str(tmp_path / "cache")}
        output = create_student(config)
        scores.append(json.loads((output / "layer_scores.json").read_text())["scores"])
    assert scores[0] == scores[1]
    for cached, computed in zip(scores[0], scores[2], strict=True):
        assert cached["layers"] == computed["layers"]
        assert cached["kl"] == pytest.approx(computed["kl"], abs=2e-6)
    # A student that keeps a part of the encoder needs states of its own.
    assert (": 0 of 9 hits" in caplog.text) == (encoder_layers is None)
    assert (": 9 of 9 hits" in caplog.text) == (encoder_layers is None)


def test_a_search_can_be_stopped_at_every_set(teacher: Whisper, labelled: list[Example]) -> None:
    calls: list[None] = []

    def stop() -> None:
        calls.append(None)
        if len(calls) > before + 5:
            raise Interrupted

    before = 100
    scorer = LayerScorer(teacher, (0, 1, 2), labelled, stop)
    before = len(calls)
    with pytest.raises(Interrupted):
        scorer(SETS, "all")


@pytest.mark.slow
def test_the_script_does_the_same(tmp_path: Path, folder: Path, run_script: RunScript) -> None:
    config = settings(folder, tmp_path / "out")
    checked = run_script("create_student_model", config, "--check")
    assert checked.returncode == 0, checked.stderr
    assert "all 6 sets of 2 of 4 layers" in checked.stderr
    assert not (tmp_path / "out").exists()
    done = run_script("create_student_model", config)
    assert done.returncode == 0, done.stderr
    expected = create_student(settings(folder, tmp_path / "again"))
    for name in ("layer_scores.json", "layer_map.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes()


def test_a_manifest_that_is_not_there_is_a_mistake_in_the_config(
    tmp_path: Path, folder: Path
) -> None:
    config = settings(folder, tmp_path / "out")
    config["layer_scoring"]["manifest"] = "nowhere.jsonl"
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl cannot be read"):
        create_student(config)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "code"), [(None, 2), ("{\n", 3)])
def test_exit_codes(
    tmp_path: Path, folder: Path, run_script: RunScript, text: str | None, code: int
) -> None:
    config = settings(folder, tmp_path / "out")
    config["layer_scoring"]["manifest"] = str(tmp_path / "rows.jsonl")
    if text:
        (tmp_path / "rows.jsonl").write_text(text)
    done = run_script("create_student_model", config, "--check")
    assert done.returncode == code
    assert str(tmp_path / "rows.jsonl") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_search_ended_by_sigterm_exits_with_143_and_can_be_begun_again(
    tmp_path: Path, folder: Path
) -> None:
    deep = make_model_folder(tmp_path / "deep", languages=["en", "zh"], decoder_layers=32)
    config = settings(folder, tmp_path / "out")
    config["teacher"]["path"] = str(deep)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, str(REPOSITORY / "create_student_model.py"), str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if "layer_scoring: in " in line:  # 496 sets lie ahead
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 143, rest
    assert not (tmp_path / "out/config.json").exists()
    assert not (tmp_path / "out/layer_map.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out/layer_scores.json").read_text())["scores"]
    assert len(scores) == 496
    student = json.loads((tmp_path / "out/config.json").read_text())
    assert student["decoder_layers"] == 2


@pytest.mark.slow
def test_several_processes_make_one_student(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings(folder, tmp_path / "out")))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(REPOSITORY / "create_student_model.py")
    done = subprocess.run(
        [sys.executable, *launcher, script, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    alone = create_student(settings(folder, tmp_path / "alone"))
    for name in ("layer_scores.json", "model.safetensors"):
        assert (alone / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
