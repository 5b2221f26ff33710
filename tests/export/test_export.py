"""Models in the layouts of other programs, and the texts that these programs get with them."""

import dataclasses
import difflib
import json
import math
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripts
import torch
from conftest import REPOSITORY
from openai_layout import make_openai_whisper, openai_tokenizer
from safetensors.torch import load_file
from tiny import make_corpus, make_model_folder, read_rows, write_rows, write_tone

from simpler_distil_whisper.config import key_paths, load_config
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.export import __main__ as export
from simpler_distil_whisper.export import formats, ggml, targets
from simpler_distil_whisper.model.audio_context import AudioContext
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import Whisper, load_whisper
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.script import run_script

DEMO = REPOSITORY / "demo_data"
CLIPS = 6
RunExport = Callable[..., int]


@pytest.fixture(scope="module")
def openai_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_openai_whisper(tmp_path_factory.mktemp("openai"), openai_tokenizer())


def long_clips(folder: Path) -> Path:
    """Clips that fill most of a window of 30 s, so that a random model tells them apart."""
    rows = []
    for seed in range(3):
        write_tone(folder / f"{seed}.wav", 28 + seed / 2, seed=seed)
        rows.append({"audio": f"{seed}.wav", "text": "words", "language": "en"})
    return write_rows(folder / "long.jsonl", rows)


@pytest.fixture
def run_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunExport:
    """Run the command in this process on a model and a manifest, with changes to the config."""

    def run(model: Path, manifest: Path, *variants: str, flags: tuple[str, ...] = (), **keys: Any):
        config = json.loads((REPOSITORY / "export.json").read_text())
        config["output_dir"] = str(tmp_path / "out")
        config["model"]["path"] = str(model)
        names = [variant.partition("-") for variant in variants]
        config["variants"] = [{"format": f, "quantization": q} for f, _, q in names]
        config["verification"] |= {"manifest": str(manifest), **keys}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        monkeypatch.setattr(sys, "argv", ["export", str(path), *flags])
        return run_script("export", export.__doc__, export.Config, export.prepare, export.work)

    return run


def demo_clips(folder: Path, count: int = CLIPS) -> Path:
    rows = read_rows(DEMO / "test.jsonl")[:count]
    for row in rows:
        row["audio"] = str(DEMO / row["audio"])
    return write_rows(folder / "clips.jsonl", rows)


def exports(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "exports.json").read_text())["systems"]


def test_the_demo_in_ctranslate2_gives_the_same_texts(
    tmp_path: Path, run_export: RunExport
) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    clips = demo_clips(tmp_path)
    variants = ["ctranslate2-float32", "ctranslate2-int8"]
    assert run_export(DEMO / "teacher", clips, *variants) == 0
    systems = exports(tmp_path)
    assert list(systems) == ["original", *variants]
    assert systems["ctranslate2-float32"]["identical"] == CLIPS
    assert systems["ctranslate2-float32"]["verified"] is True
    assert systems["ctranslate2-float32"]["difference"] == 0
    sizes = [systems[name]["weight_bytes"] for name in variants]
    assert sizes[0] > 3 * sizes[1]
    assert systems["ctranslate2-int8"]["compute_type"].startswith("int8")
    for system in systems.values():
        assert system["low"] <= system["error_rate"] <= system["high"]
        assert system["rtfx"] > 0
    table = (tmp_path / "out" / "exports.md").read_text()
    assert all(name in table for name in variants)
    # What was exported is whole: it loads and knows the model's languages.
    for name in variants:
        folder = tmp_path / "out" / name
        assert ctranslate2.models.Whisper(str(folder)).n_mels == 80
        assert json.loads((folder / "config.json").read_text())["lang_ids"] == [800, 801]
        assert {"tokenizer.json", "preprocessor_config.json"} <= {p.name for p in folder.iterdir()}
    # And eval.py takes their hypotheses, with their speed and size.
    check_that_eval_reads_them(tmp_path, variants)


def test_what_is_exported_first_changes_nothing_of_the_others(
    tmp_path: Path, run_export: RunExport
) -> None:
    pytest.importorskip("ctranslate2")
    variants = ["int8", "int16", "int8_float32", "float16", "float32"]
    names = [f"ctranslate2-{variant}" for variant in variants]
    assert run_export(DEMO / "teacher", demo_clips(tmp_path, 2), *names) == 0
    systems = exports(tmp_path)
    assert systems["ctranslate2-float32"]["identical"] == 2
    assert systems["ctranslate2-float16"]["identical"] == 2
    first, third = ((tmp_path / "out" / names[i] / "model.bin").read_bytes() for i in (0, 2))
    assert first == third  # two names of one rounding


@pytest.mark.slow
def test_an_export_can_be_given_the_clip_alone_as_documented(
    tmp_path: Path, run_export: RunExport
) -> None:
    pytest.importorskip("ctranslate2")
    clips = demo_clips(tmp_path, 1)
    assert run_export(DEMO / "teacher", clips, "ctranslate2-float32") == 0
    waveform = load_audio(Path(read_rows(clips)[0]["audio"]))
    seconds = len(waveform) / 16_000
    assert seconds < 3  # of the demo's window of 5 s
    whisper = load_whisper(read_model_folder(DEMO / "teacher", None, "model"), "float32")
    short = Transcriber(whisper, DecodingOptions(), audio_context=AudioContext(0.3))
    states = short.encode(
        log_mel([waveform], whisper.feature_extractor), [math.ceil(seconds + 0.3) * 50]
    )
    whole = Transcriber(whisper, DecodingOptions()).encode(
        log_mel([waveform], whisper.feature_extractor)
    )
    assert states.shape[1] < whole.shape[1]
    expected = short.from_encoder_states(states, ["zh"])[0].text
    changes = {
        "outputs/export/ctranslate2-int8": str(tmp_path / "out/ctranslate2-float32"),
        "clip.wav": read_rows(clips)[0]["audio"],
    }
    assert run_snippet("audio-context.md", "ctranslate2", changes) == f"{expected}\n"


def run_snippet(page: str, part: str, changes: dict[str, str]) -> str:
    """Run the program of a page that has a part in it; return what it prints."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    programs = [piece.partition("```")[0] for piece in text.split("```python\n")[1:]]
    [code] = [program for program in programs if part in program]
    for documented, actual in changes.items():
        assert documented in code
        code = code.replace(documented, actual)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_whisper_cpp_gives_the_texts_also_of_the_clip_alone(
    openai_whisper: Path, tmp_path: Path, run_export: RunExport
) -> None:
    """It rounds, and the choices of a random model are close: some tokens may be others."""
    pytest.importorskip("pywhispercpp")
    model = shutil.copytree(openai_whisper, tmp_path / "model")
    options = json.loads((model / "generation_config.json").read_text())
    options["suppress_tokens"] = None  # it takes no list of tokens
    (model / "generation_config.json").write_text(json.dumps(options))
    assert run_export(model, long_clips(tmp_path), "ggml-float16") == 0
    ours, theirs = (
        [
            row["hypothesis"]
            for row in read_rows(tmp_path / f"out/verification/{name}/hypotheses.jsonl")
        ]
        for name in ("original", "ggml-float16")
    )
    assert len(set(ours)) == 3, "all texts are the same, which proves nothing"
    assert all(map(alike, ours, theirs)), (ours, theirs)

    clip = write_tone(tmp_path / "short.wav", 3, seed=0)
    whisper = load_whisper(read_model_folder(model, None, "model"))
    short = Transcriber(whisper, DecodingOptions(), audio_context=AudioContext(0.3))
    mels = log_mel([load_audio(clip)], whisper.feature_extractor)
    alone, padded = (
        short.from_encoder_states(short.encode(mels, [positions]), ["en"])[0].text
        for positions in (short.encoder_positions(3), 1500)
    )
    assert not alike(alone, padded)
    changes = {
        "outputs/export": str(tmp_path / "out"),
        "clip.wav": str(clip),
        'language="zh"': 'language="en"',
    }
    assert alike(run_snippet("export.md", "audio_ctx", changes), alone)


def alike(text: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, text.strip(), other.strip()).ratio() > 0.9


def test_a_ggml_file_holds_sizes_filters_and_the_bytes_of_tokens(
    openai_whisper: Path, tmp_path: Path
) -> None:
    openai = pytest.importorskip("whisper")
    whisper = load_whisper(read_model_folder(openai_whisper, None, "model"))
    ggml.write_ggml(whisper, tmp_path / "x")
    with (tmp_path / "x" / "ggml-model.bin").open("rb") as file:

        def integers(count: int) -> list[int]:
            return list(struct.unpack(f"<{count}i", file.read(4 * count)))

        assert file.read(4) == b"lmgg"
        assert integers(11) == [51865, 1500, 16, 2, 2, 448, 16, 2, 2, 80, 1]
        assert integers(2) == [80, 201]
        filters = np.frombuffer(file.read(4 * 80 * 201), "<f4").reshape(80, 201)
        np.testing.assert_allclose(filters, openai.audio.mel_filters("cpu", 80), atol=1e-6)
        tokens = [file.read(length) for length in (integers(1)[0] for _ in range(integers(1)[0]))]
    encoding = openai.tokenizer.get_tokenizer(True, num_languages=99).encoding
    assert tokens == [encoding.decode_single_token_bytes(id) for id in range(50257)]


def check_that_eval_reads_them(folder: Path, variants: list[str]) -> None:
    config = json.loads((REPOSITORY / "eval.json").read_text())
    config["output_dir"] = str(folder / "eval")
    config["hypotheses"] = [
        {"name": name, "path": str(folder / "out" / "verification" / name / "hypotheses.jsonl")}
        for name in ["original", *variants]
    ]
    path = folder / "eval.json"
    path.write_text(json.dumps(config))
    done = scripts.run([str(REPOSITORY / "eval.py"), str(path)], folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "eval" / "summary.json").read_text())
    assert summary["utterances"] == CLIPS
    page = (folder / "eval" / "report.html").read_text()
    for system in exports(folder).values():
        assert f"<td>{system['weight_bytes'] / 1e6:.3g} MB</td>" in page


def test_a_wrong_export_is_noticed_and_does_not_get_its_name(
    tmp_path: Path,
    run_export: RunExport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ctranslate2")
    right = formats.write_ctranslate2

    def with_first_and_last_layer_swapped(
        whisper: Whisper, folder: ModelFolder, quantization: str, target: Path
    ) -> None:
        layers = whisper.model.model.decoder.layers
        layers[0], layers[3] = layers[3], layers[0]
        right(whisper, folder, quantization, target)
        layers[0], layers[3] = layers[3], layers[0]

    clips = demo_clips(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "write_ctranslate2", with_first_and_last_layer_swapped)
        assert run_export(DEMO / "teacher", clips, "ctranslate2-float32") == 3
    printed = capsys.readouterr()
    assert "ctranslate2-float32 UNVERIFIED" in printed.out
    assert "Not the model's texts: ctranslate2-float32 in" in printed.err
    out = tmp_path / "out"
    assert (out / "ctranslate2-float32.unverified").is_dir()
    assert not (out / "ctranslate2-float32").exists()
    assert exports(tmp_path)["ctranslate2-float32"]["verified"] is False
    assert json.loads((out / "run_info.json").read_text())["outcome"] == "failed"
    # The same command, the bug being gone, makes it good; once more there is nothing to do.
    assert run_export(DEMO / "teacher", clips, "ctranslate2-float32") == 0
    assert (out / "ctranslate2-float32").is_dir()
    assert not (out / "ctranslate2-float32.unverified").exists()
    capsys.readouterr()
    assert run_export(DEMO / "teacher", clips, "ctranslate2-float32") == 0
    assert "nothing to do" in capsys.readouterr().err


def test_the_openai_layout_computes_the_same(openai_whisper: Path, tmp_path: Path) -> None:
    openai = pytest.importorskip("whisper")
    ours = load_whisper(read_model_folder(openai_whisper, None, "model"))
    formats.write_openai(ours, "float32", tmp_path / "x")
    theirs = openai.load_model(str(tmp_path / "x" / "model.pt"), device="cpu")
    features = torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[50258, 50259, 50359, 50363, 1000, 1001]] * 2)
    with torch.no_grad():
        states = ours.model.model.encoder(features).last_hidden_state
        logits = ours.model(features, decoder_input_ids=ids).logits
        their_states = theirs.encoder(features)
        torch.testing.assert_close(their_states, states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(theirs.decoder(ids, their_states), logits, atol=1e-3, rtol=1e-4)
    # The safetensors hold the same tensors under the same names.
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    assert tensors.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, tensors[key]) for key, value in theirs.state_dict().items())


@pytest.mark.slow
def test_openai_whisper_and_faster_whisper_give_the_same_texts(
    openai_whisper: Path, tmp_path: Path, run_export: RunExport
) -> None:
    faster_whisper = pytest.importorskip("faster_whisper")
    clips = long_clips(tmp_path)
    variants = ["ctranslate2-float32", "openai-float32", "openai-float16"]
    assert run_export(openai_whisper, clips, *variants) == 0
    systems = exports(tmp_path)
    texts = [
        [row["hypothesis"] for row in read_rows(path)]
        for path in sorted((tmp_path / "out" / "verification").glob("*/hypotheses.jsonl"))
    ]
    assert len(set(texts[0])) == 3, "all texts are the same, which proves nothing"
    assert min(map(len, texts[0])) > 50
    for name in variants[:2]:
        assert systems[name]["identical"] == 3, name
    assert systems["ctranslate2-float32"]["library"].startswith("faster-whisper")
    sizes = [(tmp_path / "out" / name / "model.pt").stat().st_size for name in variants[1:]]
    assert sizes[0] > 1.8 * sizes[1]
    # As its users call it: the folder alone, no network.
    model = faster_whisper.WhisperModel(str(tmp_path / "out" / "ctranslate2-float32"))
    audio = load_audio(tmp_path / read_rows(clips)[0]["audio"])
    padded = np.pad(audio, (0, 480_000 - len(audio)))
    segments, _ = model.transcribe(
        padded, language="en", beam_size=1, temperature=0, without_timestamps=True,
        suppress_tokens=formats.suppressed_tokens(
            load_whisper(read_model_folder(openai_whisper, None, "model"))
        ),
        log_prob_threshold=None, compression_ratio_threshold=None, no_speech_threshold=None,
    )  # fmt: skip
    hypotheses = tmp_path / "out" / "verification" / "original" / "hypotheses.jsonl"
    assert "".join(s.text for s in segments).strip() == read_rows(hypotheses)[0]["hypothesis"]


@pytest.mark.slow
@pytest.mark.parametrize("mels", [80, 128])
def test_an_english_only_model_gives_the_same_texts(
    mels: int, tmp_path: Path, run_export: RunExport
) -> None:
    pytest.importorskip("faster_whisper")
    tokenizer = openai_tokenizer(english_only=True)
    assert len(tokenizer) == 51_864
    folder = make_openai_whisper(tmp_path / "model", tokenizer, english_only=True, mels=mels)
    clips = long_clips(tmp_path)
    assert run_export(folder, clips, "ctranslate2-float32", "openai-float32") == 0
    systems = exports(tmp_path)
    assert (
        systems["ctranslate2-float32"]["identical"] == systems["openai-float32"]["identical"] == 3
    )
    assert systems["ctranslate2-float32"]["library"].startswith("faster-whisper")


def test_added_words_are_nothing_for_faster_whisper(openai_whisper: Path, tmp_path: Path) -> None:
    """It leaves out every token behind the end token: the export is for CTranslate2 itself."""
    folder = read_model_folder(openai_whisper, None, "model")
    assert targets.why_not_faster_whisper(folder) is None
    extended = dataclasses.replace(folder, processor=tmp_path)
    content = json.loads((openai_whisper / "tokenizer.json").read_text())
    for token, special in (("<pad>", True), ("浴室", False)):
        assert targets.why_not_faster_whisper(extended) is None
        last = max(each["id"] for each in content["added_tokens"])
        content["added_tokens"].append({"id": last + 1, "content": token, "special": special})
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    reason = targets.why_not_faster_whisper(extended)
    assert reason == "it would leave the words out that were added to the vocabulary: 浴室"
    # As transformers 4 saves a tokenizer: first without what is special, then with it.
    (tmp_path / "tokenizer.json").unlink()
    added = content["added_tokens"]
    ids = {token["content"]: token["id"] for token in added if token["content"] != "<pad>"}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    assert targets.why_not_faster_whisper(extended) == reason
    settings = {"added_tokens_decoder": {str(token["id"]): token for token in added}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert targets.why_not_faster_whisper(extended) == reason
    (tmp_path / "added_tokens.json").unlink()
    del settings["added_tokens_decoder"][str(ids["浴室"])]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert targets.why_not_faster_whisper(extended) is None


@pytest.mark.parametrize(
    ("variant", "program"), [("openai-float32", "openai-whisper"), ("ggml-float16", "whisper.cpp")]
)
def test_a_model_that_a_program_cannot_take_is_refused_before_any_work(
    variant: str,
    program: str,
    tmp_path: Path,
    run_export: RunExport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(targets, "REQUIRED_PACKAGES", dict.fromkeys(targets.REQUIRED_PACKAGES, ()))
    clips = demo_clips(tmp_path, 1)
    assert run_export(DEMO / "teacher", clips, variant) == 2
    message = capsys.readouterr().err
    assert f"cannot become a model of {program}: " in message
    assert "its window is 5 s, there it is 30 s" in message
    assert "its vocabulary has 1059 tokens; OpenAI's own, built in, 51864, 51865, 51866" in message
    assert not (tmp_path / "out").exists()


def test_whisper_cpp_counts_special_tokens_off_and_takes_any_text_tokens(
    openai_whisper: Path,
) -> None:
    folder = read_model_folder(openai_whisper, None, "model")
    assert list(targets.why_not_whisper_cpp(folder)) == []
    ids = dict(folder.vocabulary)
    ids["a"], ids["b"] = ids["b"], ids["a"]
    other = dataclasses.replace(folder, vocabulary=ids)
    assert list(targets.why_not_whisper_cpp(other)) == []
    ids["<|de|>"], ids["<|zh|>"] = ids["<|zh|>"], ids["<|de|>"]
    [reason] = targets.why_not_whisper_cpp(other)
    assert reason == "<|zh|>, token 50260 there, is its token 50261"
    one_language = dataclasses.replace(folder, languages=frozenset())
    [reason] = targets.why_not_whisper_cpp(one_language)
    assert reason == "a model with a vocabulary of 51865 tokens is taken for multilingual"
    names = dataclasses.replace(folder, config={**folder.config, "vocab_size": 51_870})
    [reason] = targets.why_not_whisper_cpp(names)
    assert reason.startswith("its vocabulary has 51870 tokens")


def test_another_vocabulary_of_the_same_size_is_refused(
    openai_whisper: Path,
    tmp_path: Path,
    run_export: RunExport,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "model"
    other.mkdir()
    for path in openai_whisper.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert run_export(other, demo_clips(tmp_path, 1), "openai-float16", flags=("--check",)) == 2
    assert "is 'b'; openai-whisper has OpenAI's own vocabulary built in, where it is 'a'" in (
        capsys.readouterr().err
    )


def test_a_missing_program_is_named_with_the_way_to_install_it(
    tmp_path: Path,
    run_export: RunExport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(targets.REQUIRED_PACKAGES, "ctranslate2", ("no-such-package",))
    assert run_export(DEMO / "teacher", demo_clips(tmp_path, 1), "ctranslate2-int8") == 2
    message = capsys.readouterr().err
    assert "no-such-package, which is not installed: python -m pip install './[export]'" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variants", "complaint"),
    [
        (["openai-int8"], "openai-whisper takes float32 or float16, not int8"),
        (["ggml-float32"], "whisper.cpp takes float16, not float32"),
        (["ctranslate2-int8", "ctranslate2-int8"], "these stand twice: ctranslate2-int8"),
        (["ctranslate2-int4"], "variants.0.quantization"),
        (["onnx-int8"], "variants.0.format"),
        ([], "variants"),
    ],
)
def test_variants_that_cannot_be_are_refused(
    variants: list[str],
    complaint: str,
    tmp_path: Path,
    run_export: RunExport,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_export(DEMO / "teacher", demo_clips(tmp_path, 1), *variants) == 2
    assert complaint in capsys.readouterr().err


def test_every_quantization_is_one_of_ctranslate2() -> None:
    specs = pytest.importorskip("ctranslate2.specs.model_spec")
    assert set(export.Quantization.__args__) == set(specs.ACCEPTED_MODEL_TYPES)


@pytest.mark.slow
def test_unusable_rows_are_logged_and_left_out(
    tmp_path: Path, run_export: RunExport, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ctranslate2")
    model = make_model_folder(tmp_path / "model", languages=["en", "zh"], talkative=True, seed=53)
    good = read_rows(make_corpus(tmp_path, 3, language="en"))
    good[0].pop("text")
    good[1].pop("language")
    gone = {"id": "gone", "audio": "gone.wav", "language": "en"}
    (tmp_path / "empty.wav").write_bytes(b"")
    empty = {"id": "empty", "audio": "empty.wav", "language": "en"}
    clips = write_rows(tmp_path / "clips.jsonl", [gone, *good, empty])
    assert run_export(model, clips, "ctranslate2-float32") == 0
    log = capsys.readouterr().err
    assert "2 rows cannot be used" in log
    assert 'clips.jsonl:1: no such file: "gone.wav"' in log
    assert "clips.jsonl:5" in log
    assert exports(tmp_path)["ctranslate2-float32"]["clips"] == 3
    rows = read_rows(tmp_path / "out" / "verification" / "ctranslate2-float32" / "hypotheses.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in good]
    assert rows[1]["language"] in ("en", "zh"), "the model has detected it"
    write_rows(clips, [empty])
    assert run_export(model, clips, "ctranslate2-int8") == 2, "another run is in the folder"


def test_a_disk_too_full_for_the_tokenizer_ends_in_a_message(
    openai_whisper: Path, tmp_path: Path
) -> None:
    """Stood in for by the largest file that this process may write."""
    pytest.importorskip("ctranslate2")
    early = shutil.copytree(openai_whisper, tmp_path / "model")
    content = json.loads((early / "tokenizer.json").read_text())
    (early / "tokenizer.json").unlink()
    (early / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (early / "merges.txt").write_text("#version: 0.2\n")
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    (early / "added_tokens.json").write_text(json.dumps(ids))
    folder = read_model_folder(early, None, "model")
    whisper = load_whisper(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))  # the model takes less
    try:
        with pytest.raises(DataError, match="x cannot be written.*: make room"):
            formats.write_ctranslate2(whisper, folder, "int8", tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("left", [None, b""])
def test_audio_that_vanishes_ends_the_run_until_it_is_there_again(
    left: bytes | None,
    tmp_path: Path,
    run_export: RunExport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ctranslate2")
    clips = demo_clips(tmp_path, 2)
    rows = read_rows(clips)
    vanishing = tmp_path / "vanishing.opus"
    shutil.copyfile(rows[1]["audio"], vanishing)
    write_rows(clips, [rows[0], rows[1] | {"audio": str(vanishing)}])
    right = formats.write_ctranslate2

    def write_once_it_has_vanished(*arguments: Any) -> None:
        vanishing.unlink()
        if left is not None:
            vanishing.write_bytes(left)
        right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(formats, "write_ctranslate2", write_once_it_has_vanished)
        assert run_export(DEMO / "teacher", clips, "ctranslate2-float32") == 3
    message = capsys.readouterr().err
    assert f"clips.jsonl:2: {vanishing}: " in message
    assert ("Audio has vanished since the manifest was read" in message) == (left is None)
    shutil.copyfile(rows[1]["audio"], vanishing)
    assert run_export(DEMO / "teacher", clips, "ctranslate2-float32") == 0


def test_without_any_usable_clip_it_ends_with_the_reasons(
    tmp_path: Path, run_export: RunExport, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ctranslate2")
    clips = write_rows(tmp_path / "clips.jsonl", [{"audio": "gone.wav"}])
    assert run_export(DEMO / "teacher", clips, "ctranslate2-int8") == 3
    assert 'no such file: "gone.wav"' in capsys.readouterr().err


def test_the_shipped_config_is_valid_and_explained() -> None:
    config = load_config(REPOSITORY / "export.json", export.Config)
    assert str(config.model.path) == "outputs/distillation/final"
    fields = dict(key_paths(export.Config))
    sections = {key.rpartition(".")[0] for key in fields}
    assert [k for k, f in fields.items() if not f.description and k not in sections] == []


def test_check_does_no_work_and_loads_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    config = json.loads((REPOSITORY / "export.json").read_text())
    config["output_dir"] = str(tmp_path / "out")
    config["model"]["path"] = str(DEMO / "teacher")
    config["verification"]["manifest"] = str(DEMO / "test.jsonl")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['export', {str(path)!r}, '--check']\n"
        "try:\n"
        "    runpy.run_module('simpler_distil_whisper.export', run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    heavy = {'torch', 'transformers', 'ctranslate2', 'faster_whisper', 'whisper'}\n"
        "    print(exit.code, sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout == "0 []\n", done.stderr
    assert "not faster-whisper: its window is 5 s" in done.stderr
    assert not (tmp_path / "out").exists()
