"""Any file as a config: a run begins, or a message says why not; nothing hangs, nothing crashes."""

import importlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, RunScript
from tiny import make_corpus, make_model_folder, write_rows

from simpler_distil_whisper.config import ConfigError, StrictModel, load_config
from simpler_distil_whisper.script import run_script as run_in_process

MODULES = {
    "run_pseudo_labelling": "run_pseudo_labelling",
    "create_student_model": "create_student_model",
    "run_distillation": "run_distillation",
    "offline_inference": "offline_inference",
    "eval": "eval",
    "export": "simpler_distil_whisper.export.__main__",
}
# Written as they are, so that also what is no JSON can stand in the place of a value.
ODD_VALUES = """
null true false -1 0 1 2 3.5 -0.0 1e-320 1e308 1e400 -1e400 NaN Infinity 2147483648 4294967296
18446744073709551616 1000000000000000000000000000000 "" "\\u0000" "a\\u0000b" "\\ud800"
"/dev/zero" "/dev/stdin" "/proc/self/mem" "/proc/kmsg" "pipe" "." "\\u001b[2J\\u202e" "auto" "zh"
"cuda:999" "cpu" "cuda" [] [1] ["a"] [null] {} {"a":1} [[[[]]]] "nan" "1" "\\u00e9" "text" "id"
""".split()  # noqa: SIM905
ODD_VALUES += ['" "']
ODD_VALUES += ["9" * 5000, '"' + "長" * 300 + '"', '"' + "a/" * 3000 + '"', "[" * 60 + "]" * 60]
ODD_VALUES += ["[" * 5000 + "]" * 5000, '"' + "x" * 100_000 + '"']


def shipped(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / f"{name}.json").read_text(encoding="utf-8"))


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a tree."""
    if path:
        yield path
    if not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from places(value, (*path, key))


def mutated(tree: dict[str, Any], seed: int) -> bytes:
    """Return a config file in which something is odd."""
    chance = random.Random(seed)
    marks: dict[str, str] = {}
    for number in range(chance.choice([1, 1, 1, 2, 4])):
        *parents, key = chance.choice(list(places(tree)))
        inner: Any = tree
        for parent in parents:
            inner = inner[parent]
        mark = f"@{number}@"
        marks[f'"{mark}"'] = chance.choice(ODD_VALUES)
        kind = chance.choice(["replace"] * 7 + ["delete", "add", "move"])
        if kind == "replace" or isinstance(inner, list):
            inner[key] = mark
        elif kind == "add":
            inner[chance.choice([f"{key}x", "path", "", "data_path", "\0"])] = mark
        else:
            value = inner.pop(key)
            if kind == "move":
                tree[key] = value
    text = json.dumps(tree, ensure_ascii=chance.random() < 0.5)
    for mark, value in marks.items():
        text = text.replace(mark, value)
    return spoilt(text, chance)


def spoilt(text: str, chance: random.Random) -> bytes:
    """Return a file of the text, mostly in UTF-8 and whole."""
    kind = chance.randrange(16)
    content = text.encode("utf-8", "surrogatepass")
    if kind == 0:
        return text.encode(chance.choice(["utf-8-sig", "utf-16", "utf-32"]), "surrogatepass")
    if kind == 1:
        return content[: chance.randrange(len(content))]
    if kind == 2:
        at = chance.randrange(len(content))
        return content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
    if kind == 3:
        return text.replace("{", '{"output_dir": 1, ', 1).encode("utf-8", "surrogatepass")
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the shipped configs find what they name."""
    folder = tmp_path_factory.mktemp("hostile")
    make_model_folder(folder / "model", languages=["en", "zh"], talkative=True)
    rows = make_corpus(folder, 3)
    labels = [
        {**json.loads(line), "hypothesis": "第一句", "origin_text": "第二句", "cer/wer": 0.1}
        for line in rows.read_text(encoding="utf-8").splitlines()
    ]
    rows.rename(folder / "rows.jsonl")
    write_rows(folder / "labels.jsonl", labels)
    os.mkfifo(folder / "pipe")
    return folder


def adapted(name: str) -> dict[str, Any]:
    """The shipped config, with paths that exist in the folder."""
    text = json.dumps(shipped(name), ensure_ascii=False)
    for path in ("demo_data/teacher", "outputs/student", "outputs/distillation/final"):
        text = text.replace(f'"path": "{path}"', '"path": "model"')
    for path in ("pseudo_labels/pseudo_labels", "inference/hypotheses"):
        text = text.replace(f"outputs/{path}.jsonl", "labels.jsonl")
    for path in ("train", "dev", "test"):
        text = text.replace(f"demo_data/{path}.jsonl", "rows.jsonl")
    config: dict[str, Any] = json.loads(text)
    if name == "eval":
        config["columns"]["speaker"] = None
    if name == "run_distillation":
        config["schedule"]["warmup_steps"] = 2
    return config


Begin = Callable[[str, bytes], int]


@pytest.fixture
def begin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Begin a run with a config of these bytes, without its work; return its exit code."""
    monkeypatch.chdir(folder)

    def begin_with(name: str, content: bytes) -> int:
        Path("x.json").write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["x.py", "x.json"])
        module = importlib.import_module(MODULES[name])
        return run_in_process(name, None, module.Config, module.prepare, lambda *_: "")

    return begin_with


@pytest.mark.parametrize("name", MODULES)
def test_the_unspoilt_config_begins(name: str, begin: Begin) -> None:
    config = adapted(name)
    config["output_dir"] = f"out_{name}"
    assert begin(name, json.dumps(config).encode()) == 0


def check(begin: Begin, capsys: pytest.CaptureFixture[str], seeds: range) -> None:
    for seed in seeds:
        name = list(MODULES)[seed % len(MODULES)]
        content = mutated(adapted(name), seed)
        code = begin(name, content)
        shown = capsys.readouterr().err
        assert code in (0, 2, 3), (seed, shown[-3000:])
        assert "Traceback" not in shown, (seed, shown[-3000:])
        assert len(shown) < 100_000, (seed, len(shown))
        assert code == 0 or shown.strip(), seed
        assert not any(ord(sign) < 32 and sign not in "\t\n" for sign in shown), seed


def test_odd_configs_begin_or_are_refused(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    check(begin, capsys, range(150))


@pytest.mark.slow
def test_many_odd_configs_begin_or_are_refused(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    first = int(os.environ.get("SDW_SEED", "1000"))
    check(begin, capsys, range(first, first + int(os.environ.get("SDW_INPUTS", "1500"))))


@pytest.mark.parametrize("name", MODULES)
def test_every_number_has_both_bounds(name: str) -> None:
    """Else a value of 30 digits would hang the run or exhaust the memory."""
    schema = importlib.import_module(MODULES[name]).Config.model_json_schema()
    without = [
        path
        for path, rule in rules(schema)
        if rule.get("type") in ("integer", "number")
        and not (
            {"minimum", "exclusiveMinimum"} & rule.keys()
            and {"maximum", "exclusiveMaximum"} & rule.keys()
        )
    ]
    assert without == []


def rules(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        yield path, schema
        for key, inner in schema.items():
            if key not in ("default", "examples"):
                yield from rules(inner, f"{path}/{key}")
    elif isinstance(schema, list):
        for number, inner in enumerate(schema):
            yield from rules(inner, f"{path}/{number}")


class Section(StrictModel):
    pass


class Keys(StrictModel):
    output_dir: Path = Path("out")
    section: Section = Section()


MANY_KEYS = b"{" + b",".join(b'"k%d": 1' % n for n in range(20_000)) + b"}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b" " * (2**22 + 1), "it has more than 4194304 bytes"),
        ('{"output_dir": "é"}'.encode("utf-16"), "save it in UTF-8"),
        (b'{"output_dir": "a\\u0000b"}', "output_dir: holds a NUL character"),
        (json.dumps({"output_dir": "長" * 300}).encode(), "a name of more than 255 bytes"),
        (json.dumps({"output_dir": "a/" * 3000}).encode(), "is longer than 4000 bytes"),
        (MANY_KEYS, "another script? Unknown here: k0, k1,"),
        (b'{"section": ' + MANY_KEYS + b"}", "section.k0: unknown key"),
        (b"{" + b'"k": 1, ' * 100_000 + b'"k": 1}', '"k": this key stands twice'),
    ],
    ids=[
        "large",
        "utf-16",
        "nul",
        "long name",
        "long path",
        "many keys",
        "in a section",
        "one key often",
    ],
)
def test_a_file_that_is_no_config_is_refused_at_once(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "x.json", Keys)
    message = str(caught.value)
    assert reason in message
    assert len(message) < 50_000


def test_a_config_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes('{"output_dir": "é"}'.encode("utf-8-sig"))
    assert load_config(tmp_path / "x.json", Keys).output_dir == Path("é")


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/mem", "."])
def test_a_config_that_never_ends_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config: it is a .* file on disk"):
        load_config(Path(path), Keys)


def test_a_config_that_would_be_waited_for_is_refused(
    tmp_path: Path, run_script: RunScript
) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = run_script("eval", Path("pipe"))
    assert done.returncode == 2
    assert "pipe: cannot read the config: it is a pipe, not a file on disk" in done.stderr


@pytest.mark.slow
def test_odd_configs_through_the_scripts(folder: Path, run_script: RunScript) -> None:
    for seed in range(9000, 9008):
        name = list(MODULES)[seed % 5]
        (folder / "y.json").write_bytes(mutated(adapted(name), seed))
        done = run_script(name, folder / "y.json", "--check")
        assert done.returncode in (0, 2, 3), (seed, done.stderr[-3000:])
        assert "Traceback" not in done.stderr, (seed, done.stderr[-3000:])
