"""Config files: all mistakes in one are reported at once, each with its key and a remedy."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from conftest import REPOSITORY, RunScript
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

import run_distillation
from simpler_distil_whisper.config import (
    RENAMED_KEYS,
    ConfigError,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Ratio,
    StrictModel,
    defaults_used,
    help_table,
    key_paths,
    load_config,
)

SCRIPTS = [
    "run_pseudo_labelling",
    "create_student_model",
    "run_distillation",
    "offline_inference",
    "eval",
]


class Limits(StrictModel):
    min_seconds: float = Field(0.1, ge=0, description="Shorter is rejected.")
    threshold: Ratio | None = None


class System(StrictModel):
    name: str
    path: Path


class Example(StrictModel):
    """A config with a key of every type that the scripts' configs use."""

    output_dir: Path = Field(description="Where to write.")
    count: PositiveInt = Field(3, description="How many.")
    seed: NonNegativeInt = 0
    rate: PositiveFloat = 1.0
    flag: bool = False
    kind: Literal["linear", "cosine"] = "linear"
    at_most: PositiveInt | None = None
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2)
    limits: Limits = Limits()
    systems: list[System] = []


GOOD: dict[str, Any] = {"output_dir": "out"}


def load(folder: Path, content: object) -> Example:
    path = folder / "x.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return load_config(path, Example)


def problems(folder: Path, content: object) -> list[str]:
    """Return the lines of the message without the path that each begins with."""
    with pytest.raises(ConfigError) as caught:
        load(folder, content)
    lines = str(caught.value).splitlines()
    prefix = f"{folder / 'x.json'}: "
    assert all(line.startswith(prefix) for line in lines), lines
    return [line.removeprefix(prefix) for line in lines]


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        {
            **GOOD,
            "rate": 2,
            "at_most": 5,
            "limits": {"threshold": 0},
            "systems": [{"name": "甲", "path": "a/b"}],
        },
    )
    assert config.output_dir == Path("out")
    assert (config.count, config.rate, config.at_most) == (3, 2.0, 5)
    assert config.limits.threshold == 0.0
    assert config.systems == [System(name="甲", path=Path("a/b"))]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"cuont": 1}, 'cuont: unknown key. Did you mean "count"?'),
        (
            {"limits": {"min_second": 1}},
            'limits.min_second: unknown key. Did you mean "min_seconds"?',
        ),
        ({"min_seconds": 1}, 'min_seconds: unknown key. Did you mean "limits.min_seconds"?'),
        ({"limits": {"zzz": 1}}, "limits.zzz: unknown key. Valid here: min_seconds, threshold"),
        ({"systems": [{"name": "a", "path": "b", "pth": "c"}]}, "systems.0.pth: unknown key. Did"),
        ({"output_path": "x"}, 'output_path: unknown key: it is now "output_dir"'),
        (
            {"limits": {"lang": 1}},
            'limits.lang: unknown key: it is now "decoding.language" of another script',
        ),
        ({"output_dir": "~/out"}, 'output_dir: begins with "~", which only a shell knows'),
        ({"output_dir": 3}, "output_dir: Input should be a valid string, found 3"),
        ({"output_dir": None}, "output_dir: Input should be a valid string, found null"),
        ({"count": "8"}, 'count: Input should be a valid integer, found "8"'),
        ({"count": 1.0}, "count: Input should be a valid integer, found 1.0"),
        ({"count": True}, "count: Input should be a valid integer, found true"),
        ({"count": None}, "count: Input should be a valid integer, found null"),
        ({"count": 0}, "count: Input should be greater than 0, found 0"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, found -1"),
        ({"rate": "1"}, 'rate: Input should be a valid number, found "1"'),
        ({"rate": True}, "rate: Input should be a valid number, found true"),
        ({"flag": "yes"}, 'flag: Input should be a valid boolean, found "yes"'),
        ({"flag": 1}, "flag: Input should be a valid boolean, found 1"),
        ({"kind": "step"}, "kind: Input should be 'linear' or 'cosine', found \"step\""),
        ({"at_most": 0}, "at_most: Input should be greater than 0, found 0"),
        ({"betas": [0.9, 1.0]}, "betas.1: Input should be less than 1, found 1.0"),
        ({"betas": 0.9}, "betas: Input should be a valid "),
        ({"limits": {"threshold": 10}}, "limits.threshold: Input should be less than or equal to"),
        ({"limits": []}, "limits: Input should be an object, found []"),
        ({"systems": [{"name": "甲"}]}, "systems.0.path: missing; this key is required"),
        ({"systems": [{"name": 1, "path": "文"}]}, "systems.0.name: Input should be a valid str"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, keys: dict[str, Any], problem: str) -> None:
    (line,) = problems(tmp_path, {**GOOD, **keys})
    assert line.startswith(problem)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_only_finite_numbers_are_numbers(tmp_path: Path, number: str) -> None:
    (line,) = problems(tmp_path, f'{{"output_dir": "out", "rate": {number}}}')
    assert line.startswith("rate: Input should be ")


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = (
        '{"count": "8", "kind": "step", "limits": {"x": 1, "threshold": 2}, "seed": 1, "seed": 2}'
    )
    lines = problems(tmp_path, text)
    assert [line.partition(":")[0] for line in lines] == [
        '"seed"',
        "output_dir",
        "count",
        "kind",
        "limits.threshold",
        "limits.x",
    ]


def test_a_key_that_stands_twice_is_refused_at_any_depth(tmp_path: Path) -> None:
    text = '{"output_dir": "out", "limits": {"threshold": 0.5, "threshold": 0.5}}'
    assert problems(tmp_path, text) == ['"threshold": this key stands twice in one object']
    # The same name in two objects is no repetition.
    both = [{"name": "a", "path": "p"}, {"name": "b", "path": "p"}]
    assert len(load(tmp_path, {**GOOD, "systems": both}).systems) == 2


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("", 1, 1),
        ('{"output_dir": "out",}', 1, 22),
        ('{\n  "output_dir": "out"\n  "count": 1\n}', 3, 3),
        ('{\n  "count": \n}', 3, 1),
        ("{'count': 1}", 1, 2),
        ('{"count": 1} // two', 1, 14),
        ('{"output_dir": "a\nb"}', 1, 18),
    ],
)
def test_broken_json_is_located(tmp_path: Path, text: str, line: int, column: int) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}:{line}:{column}: not JSON: ")


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", '"out"', "[" * 100_000, '{"count": ' + "9" * 5000 + "}", '{"\\ud800": 1}'],
)
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (line,) = problems(tmp_path, text)
    assert line.startswith(("the file: ", "not JSON that can be read: "))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('{"output_dir": "é"}'.encode("latin-1"))
    for name in ("nowhere.json", "latin.json", "."):
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name, Example)
        assert str(caught.value).startswith(f"{tmp_path / name}: cannot read the config: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(sorted({"output_dir", *Example.model_fields, *RENAMED_KEYS}))


@given(st.dictionaries(KEYS | st.text(), JSON) | JSON | st.text())
def test_any_file_is_a_config_or_a_config_error(content: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            config = load_config(path, Example)
        except ConfigError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
        else:
            # Nothing was converted on the way: written again, the file's own values come back.
            written = config.model_dump(mode="json", exclude_unset=True)
            assert written == json.loads(text)


def test_a_loaded_config_cannot_be_changed(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.count = 4  # type: ignore[misc]


def test_defaults_used_are_the_keys_that_the_file_lacks(tmp_path: Path) -> None:
    given = {**GOOD, "count": 3, "limits": {"min_seconds": 0.1}, "betas": [0.5, 0.5]}
    assert defaults_used(load(tmp_path, given)) == [
        "seed = 0",
        "rate = 1.0",
        "flag = false",
        'kind = "linear"',
        "at_most = null",
        "limits.threshold = null",
        "systems = []",
    ]
    whole = defaults_used(load(tmp_path, GOOD))
    assert 'limits = {"min_seconds":0.1,"threshold":null}' in whole


def test_help_states_type_bounds_default_and_meaning() -> None:
    table = help_table(Example)
    rows = dict(zip(table.splitlines()[::2], table.splitlines()[1::2], strict=True))
    assert {key.strip(): row.strip() for key, row in rows.items()} == {
        "output_dir": "path, required. Where to write.",
        "count": "integer > 0 <= 1000000000, default 3. How many.",
        "seed": "integer >= 0 <= 1000000000, default 0.",
        "rate": "number > 0 <= 1000000000, default 1.0.",
        "flag": "true | false, default false.",
        "kind": '"linear" | "cosine", default "linear".',
        "at_most": "integer > 0 <= 1000000000 or null, default null.",
        "betas": "list of number >= 0 < 1 at least 2, default [0.9, 0.999].",
        "limits.min_seconds": "number >= 0, default 0.1. Shorter is rejected.",
        "limits.threshold": "number >= 0 <= 1 or null, default null.",
        "systems": "list of object, default [].",
        "systems.name": "string, required.",
        "systems.path": "path, required.",
    }


# The scripts' own configs.


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_key(name: str, run_script_afresh: RunScript) -> None:
    done = run_script_afresh(name, None, "--help")
    assert done.returncode == 0
    module = importlib.import_module(name)
    model = module.Config
    lines = [line.strip() for line in done.stdout.splitlines()]
    leaves = [path for path, field in key_paths(model) if not is_section(path, model)]
    assert len(leaves) > 5
    for path in leaves:
        assert path in lines
        assert (
            ", default " in lines[lines.index(path) + 1]
            or "required" in lines[lines.index(path) + 1]
        )
    assert module.__doc__.strip() in done.stdout
    assert "--check" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_shown_whatever_the_terminal_can_show(
    name: str, run_script_afresh: RunScript
) -> None:
    done = run_script_afresh(name, None, "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    reader, writer = os.pipe()
    os.close(reader)  # as head does
    command = [sys.executable, REPOSITORY / f"{name}.py", "--help"]
    gone = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (0, b"")


def is_section(path: str, model: type[StrictModel]) -> bool:
    return any(other.startswith(f"{path}.") for other, _ in key_paths(model))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shipped_config_names_every_key_and_no_other(name: str) -> None:
    shipped = REPOSITORY / f"{name}.json"
    module = importlib.import_module(name)
    model = module.Config
    assert defaults_used(load_config(shipped, model)) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_problems_end_a_script_with_exit_code_2(
    name: str, run_script: RunScript, tmp_path: Path
) -> None:
    config = json.loads((REPOSITORY / f"{name}.json").read_text(encoding="utf-8"))
    output = tmp_path / "out"
    done = run_script(name, {**config, "output_dir": str(output), "output_dri": 1, "data_path": 2})
    assert done.returncode == 2
    assert done.stdout == ""
    path = tmp_path / "config.json"
    place = {
        "create_student_model": '"layer_scoring.manifest"',
        "run_distillation": '"data.manifest" of another script',
        "eval": '"data.manifest" of another script',
    }.get(name, '"data.manifest"')
    assert done.stderr.splitlines() == [
        f'{path}: output_dri: unknown key. Did you mean "output_dir"?',
        f"{path}: data_path: unknown key: it is now {place}",
    ]
    assert not output.exists()


@pytest.mark.parametrize(
    ("section", "keys", "problem"),
    [
        ("objective", {"cross_entropy_weight": 0, "kl_weight": 0}, "are both 0"),
        ("freeze", {"encoder": True, "decoder": True}, "are both frozen"),
        ("schedule", {"epochs": 1, "max_steps": 5}, "exactly one of epochs and max_steps"),
        ("schedule", {"epochs": None, "max_steps": None}, "exactly one of epochs and max_steps"),
        ("data", {"min_duration_seconds": 3, "max_duration_seconds": 3}, "3.0 is not below"),
        ("data", {"language": "klingon"}, '"klingon" is no language'),
        ("data", {"train_manifests": []}, "at least 1 item"),
        ("optimizer", {"betas": [0.9, 0.99, 0.999]}, "at most 2 items"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    tmp_path: Path, section: str, keys: dict[str, Any], problem: str
) -> None:
    config = json.loads((REPOSITORY / "run_distillation.json").read_text(encoding="utf-8"))
    config[section] |= keys
    path = tmp_path / "x.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, run_distillation.Config)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: {section}")
    assert problem in line


@pytest.mark.parametrize("of", ["run_pseudo_labelling", "run_distillation", "eval"])
def test_the_config_of_another_script_gets_one_sentence(of: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(REPOSITORY / f"{of}.json", importlib.import_module("offline_inference").Config)
    (line,) = str(caught.value).splitlines()
    assert "is this the config of another script? Unknown here: " in line
    assert line.endswith("decoding, output_columns, subtitles")


def test_a_retired_key_is_answered_with_the_whole_new_name(tmp_path: Path) -> None:
    config = json.loads((REPOSITORY / "run_distillation.json").read_text(encoding="utf-8"))
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**config, "min_pseudo_label_metric": 10, "text_col": "text"}))
    with pytest.raises(ConfigError) as caught:
        load_config(path, run_distillation.Config)
    assert str(caught.value).splitlines() == [
        f'{path}: min_pseudo_label_metric: unknown key: it is now "data.max_error_rate" (it always '
        "was a maximum)",
        f'{path}: text_col: unknown key: it is now "data.columns.text"',
    ]


@pytest.mark.parametrize(
    ("script", "old", "new"),
    [
        ("run_distillation", "model_name_or_path", '"teacher.path" or "student.path"'),
        ("run_pseudo_labelling", "model_name_or_path", '"teacher.path"'),
        ("offline_inference", "processor_path_or_name", '"model.processor"'),
        ("run_pseudo_labelling", "student_model_path", '"student.path" of another script'),
        ("eval", "metric_col", '"columns.error_rate" of another script'),
        ("eval", "asr_results_path", '"hypotheses" (a list of {"name": ..., "path": ...})'),
    ],
)
def test_a_retired_key_has_the_place_that_the_script_gives_it(
    tmp_path: Path, script: str, old: str, new: str
) -> None:
    config = json.loads((REPOSITORY / f"{script}.json").read_text(encoding="utf-8"))
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**config, old: "x"}))
    with pytest.raises(ConfigError) as caught:
        load_config(path, importlib.import_module(script).Config)
    assert str(caught.value) == f"{path}: {old}: unknown key: it is now {new}"


@pytest.mark.parametrize(
    ("script", "section"),
    [("run_distillation", "audio_context"), ("offline_inference", "decoding.voice_activity")],
)
def test_a_section_that_can_be_switched_off_can_be_null(
    tmp_path: Path, script: str, section: str
) -> None:
    config = json.loads((REPOSITORY / f"{script}.json").read_text(encoding="utf-8"))
    *parents, name = section.split(".")
    keys = config
    for parent in parents:
        keys = keys[parent]
    keys[name] = None
    path = tmp_path / "x.json"
    path.write_text(json.dumps(config))
    loaded: Any = load_config(path, importlib.import_module(script).Config)
    for part in section.split("."):
        loaded = getattr(loaded, part)
    assert loaded.enabled is False


def test_early_stopping_without_dev_rows_is_refused(tmp_path: Path) -> None:
    config = json.loads((REPOSITORY / "run_distillation.json").read_text(encoding="utf-8"))
    config["validation"]["early_stopping_patience"] = 3
    config["data"]["dev_manifest"] = None
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="early_stopping_patience needs a data.dev_manifest"):
        load_config(path, run_distillation.Config)


def test_texts_of_the_teacher_do_not_take_the_place_of_labels_that_people_wrote(
    tmp_path: Path,
) -> None:
    """Fine-tuning on transcripts, with what else is shipped."""
    config = json.loads((REPOSITORY / "run_distillation.json").read_text(encoding="utf-8"))
    config["data"]["columns"]["text"] = "origin_text"
    config["objective"] = {"cross_entropy_weight": 1.0, "kl_weight": 0.0}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.sampled_text_probability 0\.75 .*: set it to 0"):
        load_config(path, run_distillation.Config)
    config["data"]["sampled_text_probability"] = 0.0
    path.write_text(json.dumps(config), encoding="utf-8")
    load_config(path, run_distillation.Config)


@pytest.mark.parametrize("name", ["run_pseudo_labelling", "offline_inference"])
def test_an_empty_language_names_none(name: str, tmp_path: Path) -> None:
    config = json.loads((REPOSITORY / f"{name}.json").read_text(encoding="utf-8"))
    config["decoding"]["language"] = ""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    model = importlib.import_module(name).Config
    assert load_config(path, model).decoding.language is None


def test_a_key_that_is_gone_is_answered_with_the_reason(tmp_path: Path) -> None:
    config = json.loads((REPOSITORY / "run_distillation.json").read_text(encoding="utf-8"))
    path = tmp_path / "old.json"
    config["optimizer"]["average_decay"] = None  # as earlier versions wrote it, to leave it off
    path.write_text(json.dumps(config), encoding="utf-8")
    assert load_config(path, run_distillation.Config).optimizer.learning_rate == "auto"
    config["optimizer"]["average_decay"] = 0.99
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"optimizer\.average_decay: unknown key: it is gone, since"
    ):
        load_config(path, run_distillation.Config)


def test_every_retired_key_has_a_new_name_that_exists() -> None:
    models = [importlib.import_module(name).Config for name in SCRIPTS]
    valid = {path for model in models for path, _ in key_paths(model)}
    for new_names in RENAMED_KEYS.values():
        for new in new_names.partition(" (")[0].replace(" and ", ", ").split(", "):
            if '"' not in new and "..." not in new:
                assert any(f".{key}".endswith(f".{new}") for key in valid), new
