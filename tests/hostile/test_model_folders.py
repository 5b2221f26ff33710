"""Damaged model folders end in a message or are used; never in a traceback.

The damage is random and seeded: a failing test prints the seeds, and `check(whole, folder, seed)`
repeats one.
"""

import importlib
import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import REPOSITORY, RunScript
from hostile.mutations import damage_file, damage_json, damage_value
from safetensors.torch import load_file, save_file
from tiny import make_model_folder, write_rows, write_tone

from simpler_distil_whisper.config import ConfigError, load_config
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import load_whisper, save_whisper

CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")
OPTIONS = DecodingOptions(language="zh", max_new_tokens=3, timestamps=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "whole"
    make_model_folder(folder, languages=["en", "zh"], window_seconds=1)
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    extractor = json.loads((folder / "preprocessor_config.json").read_bytes())
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": extractor}))
    return folder


def damage(random: Random, folder: Path) -> str:
    """Damage a model folder, and return what was done."""
    if random.random() < 0.5:
        (folder / "processor_config.json").unlink()  # else it is read before the other
    if random.random() < 0.3:
        (folder / "tokenizer.json").unlink()
    kind = random.choice(["config", "config", "config", "tokenizer", "weights", "file"])
    names = {"config": CONFIGS, "tokenizer": TOKENIZER}.get(kind)
    if kind == "weights":
        return damage_weights(random, folder / "model.safetensors")
    if kind == "file":
        path = random.choice(sorted(folder.iterdir()))
        return f"{path.name}: {damage_file(random, path)}"
    path = random.choice([folder / name for name in names if (folder / name).exists()])
    if path.name.startswith("preprocessor") and (folder / "processor_config.json").exists():
        path = folder / "processor_config.json"
    return f"{path.name}: {damage_json(random, path)}"


def damage_weights(random: Random, path: Path) -> str:
    """Damage the header of a safetensors file, or put a wrong number among its values."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8 : 8 + length]), content[8 + length :]
    action = random.choice(["header", "tensor", "tensor", "values", "length"])
    name = random.choice([name for name in header if name != "__metadata__"])
    if action == "header":
        what = damage_value(random, header)
    elif action == "tensor":
        what = f"{name}: {damage_value(random, header[name])}"
    elif action == "values":
        place = random.randrange(len(values) // 4) * 4
        wrong = torch.tensor(random.choice([torch.nan, torch.inf, -3e38])).numpy().tobytes()
        values, what = values[:place] + wrong + values[place + 4 :], f"{wrong!r} at {place}"
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    size = len(text)
    if action == "length":
        what = f"length {(size := random.choice([0, size - 1, size + 9, 2**40, 2**63]))}"
    path.write_bytes(size.to_bytes(8, "little") + text + values)
    return f"{path.name}: {what}"


def use(folder: Path, target: Path, run: bool) -> None:
    """Read a model, and load, run and save it, as the scripts do."""
    facts = read_model_folder(folder, None, "model")
    facts.check_language_and_task("zh", "transcribe", "decoding")
    if not run:
        return
    whisper = load_whisper(facts)
    features = torch.randn(1, 80, 100, generator=torch.Generator().manual_seed(0))
    Transcriber(whisper, OPTIONS)(features, ["zh"])
    save_whisper(whisper.model, whisper.processor_folder, target)


def check(whole: Path, folder: Path, seed: int, run: bool = True) -> str | None:
    """Return what went wrong with the damage of a seed, if anything did."""
    shutil.copytree(whole, folder)
    what = damage(Random(seed), folder)
    try:
        use(folder, folder / "saved", run)
    except ConfigError as error:
        lines = str(error).splitlines()
        bad = [line for line in lines if not line.startswith(("model.", "decoding.", str(folder)))]
        return f"{seed}: {what}: a line without a place: {bad[0]}" if bad else None
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        return f"{seed}: {what}: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    return None


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 1560), marks=pytest.mark.slow)], ids=str
)
def test_a_damaged_folder_ends_in_a_message_or_is_used(
    whole: Path, tmp_path: Path, seeds: range
) -> None:
    # To load and run a model takes twenty times as long as to check its files.
    results = [check(whole, tmp_path / "m", seed, run=seed % 2 == 0) for seed in seeds]
    assert [result for result in results if result] == []


PLACES = [
    ("run_pseudo_labelling", "teacher"),
    ("create_student_model", "teacher"),
    ("run_distillation", "teacher"),
    ("run_distillation", "student"),
    ("offline_inference", "model"),
    ("offline_inference", "assistant"),
    ("simpler_distil_whisper.export.__main__", "model"),
]


@pytest.mark.parametrize(("script", "key"), PLACES)
def test_wherever_a_folder_is_named_it_is_checked(
    whole: Path, tmp_path: Path, script: str, key: str
) -> None:
    damaged = shutil.copytree(whole, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_bytes())
    (damaged / "config.json").write_text(json.dumps({**config, "decoder_layers": 10**6}))
    shipped = "export" if "export" in script else script
    settings = json.loads((REPOSITORY / f"{shipped}.json").read_text(encoding="utf-8"))
    for section in {"teacher", "student", "model", "assistant"} & settings.keys():
        if "path" in settings[section]:
            settings[section]["path"] = str(damaged if section == key else whole)
    (tmp_path / "x.json").write_text(json.dumps(settings))
    module = importlib.import_module(script)
    with pytest.raises(ConfigError, match=rf"^{key}.path: .*decoder_layers is 1000000, by the we"):
        module.prepare(load_config(tmp_path / "x.json", module.Config))


@pytest.mark.slow
def test_a_script_answers_weights_that_are_not_finite(
    whole: Path, tmp_path: Path, run_script: RunScript
) -> None:
    folder = shutil.copytree(whole, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["model.encoder.layers.1.fc1.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_tone(tmp_path / "a.wav")
    rows = write_rows(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "a", "language": "zh"}])
    for script, key in (("offline_inference", "model"), ("run_pseudo_labelling", "teacher")):
        config = {
            "output_dir": str(tmp_path / script),
            key: {"path": str(folder)},
            "data": {"manifest": str(rows)},
        }
        done = run_script(script, config)
        assert done.returncode == 2
        assert "the weights model.encoder.layers.1.fc1.bias are not finite" in done.stderr
        assert "Traceback" not in done.stderr
