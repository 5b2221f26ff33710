"""What depends on what, and that a script answers before it loads torch."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "simpler_distil_whisper"
SCRIPTS = [
    "run_pseudo_labelling",
    "create_student_model",
    "run_distillation",
    "offline_inference",
    "eval",
]
# In reading order: what stands in a place imports only from places before it, or from its own.
PLACES = "__init__ files terminal config atomic shards text pages launch stopping run script"
PLACES += " progress data model evaluation decoding labels training layers export"
# These are of use to anyone: they know nothing of ours but how a config section is declared.
PURE = {
    "files": set(),
    "terminal": set(),
    "config": {"files"},
    "atomic": {"config"},
    "shards": {"config"},
    "launch": {"config"},
    "stopping": set(),
    "training/losses": {"model/head", "training/options"},
    "data/pauses": set(),
    "data/byte_search": set(),
    "data/plain_text": set(),
    "data/frames": {"data/byte_search"},
    "data/signatures": {"data/byte_search", "data/frames"},
    "data/containers": {"data/byte_search", "data/frames", "data/pauses", "data/signatures"},
    "data/sound": set(),
    "data/part_of_file": {"data/containers"},
    "data/ffmpeg": {"data/containers", "data/part_of_file", "data/pauses", "data/sound"},
    "data/libsndfile": {
        "data/containers",
        "data/ffmpeg",
        "data/part_of_file",
        "data/signatures",
        "data/sound",
    },
    "data/audio": {"files", "data/decoders", "data/plain_text", "data/sound"},
    "text/languages": set(),
    "text/numerals": set(),
    "text/chinese": {"text/languages"},
    "text/normalization": {"config", "text/chinese", "text/languages", "text/numerals"},
    "model/pruning": set(),
    "model/head": set(),
    "layers/search": {"model/pruning"},
    "evaluation/metrics": {"config", "text/normalization", "text/languages"},
    "evaluation/intervals": {"evaluation/metrics"},
}
HEAVY_LIBRARIES = {
    "torch",
    "transformers",
    "accelerate",
    "librosa",
    "evaluate",
    "tensorboard",
    "matplotlib",
    "onnxruntime",
    "silero_vad",
}


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, wherever in it, by its full name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, such as "data/audio"."""
    names = [name.partition(f"{PACKAGE.name}.")[2].replace(".", "/") for name in imported(path)]
    return {name for name in names if name and (PACKAGE / f"{name}.py").exists()}


MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")
}
IMPORTS = {name: own_imports(path) for name, path in MODULES.items()}


def place(module: str) -> int:
    return PLACES.split().index(module.partition("/")[0])


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_places_before_its_own(name: str) -> None:
    assert {other for other in IMPORTS[name] if place(other) > place(name)} == set()
    assert IMPORTS[name] <= PURE.get(name, IMPORTS[name])


def test_no_modules_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_the_files_of_packages_are_empty() -> None:
    """Else a script would load torch to read its config."""
    assert {path for path in PACKAGE.glob("*/__init__.py") if path.read_bytes()} == set()


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_a_script(name: str) -> None:
    roots = {module.partition(".")[0] for module in imported(MODULES[name])}
    assert not roots & set(SCRIPTS)


def run_python(program: str, folder: Path) -> list[str]:
    preface = f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
    command = [sys.executable, "-c", preface + program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_scripts_load_without_heavy_libraries(tmp_path: Path) -> None:
    program = (
        "import importlib\n"
        f"for name in {SCRIPTS}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, sorted({HEAVY_LIBRARIES} & sys.modules.keys()))\n"
    )
    assert run_python(program, tmp_path) == [f"{name} []" for name in SCRIPTS]


def run_inside(name: str, arguments: list[str]) -> str:
    """Return a program that runs a script and prints its exit code and what it loaded."""
    return (
        "import runpy\n"
        f"sys.argv = {[f'{name}.py', *arguments]}\n"
        "try:\n"
        f"    runpy.run_path({str(REPOSITORY / f'{name}.py')!r}, run_name='__main__')\n"
        "except SystemExit as exit:\n"
        f"    print(exit.code, sorted({HEAVY_LIBRARIES} & sys.modules.keys()))\n"
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_a_misspelt_key_are_answered_without_heavy_libraries(
    name: str, tmp_path: Path
) -> None:
    config = json.loads((REPOSITORY / f"{name}.json").read_text(encoding="utf-8"))
    (tmp_path / "x.json").write_text(json.dumps({**config, "ouput_dir": "x"}), encoding="utf-8")
    program = run_inside(name, ["--help"]) + run_inside(name, ["x.json"])
    lines = run_python(program, tmp_path)
    assert [line for line in lines if line.endswith("[]")] == ["0 []", "2 []"]


@pytest.mark.parametrize("name", ["run_pseudo_labelling", "offline_inference", "run_distillation"])
def test_a_wrong_model_path_is_answered_without_heavy_libraries(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes((REPOSITORY / f"{name}.json").read_bytes())
    assert run_python(run_inside(name, ["x.json"]), tmp_path)[-1] == "2 []"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_no_script_imports_another() -> None:
    for name in SCRIPTS:
        roots = {module.partition(".")[0] for module in imported(REPOSITORY / f"{name}.py")}
        assert not roots & set(SCRIPTS)
