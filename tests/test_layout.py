"""What depends on what, and that a script answers before it loads torch."""

import ast
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
# In reading order: a module imports only modules that stand before it. Those of the first line
# need neither torch nor transformers, so that a script can check everything before it loads them.
LIGHT = "__init__ config text numerals normalization audio jsonl run options metrics"
LIGHT += " model_folder export_targets manifest row_results hallucination hypotheses"
LIGHT += " utterances scoring intervals tallies report page report_page listing label_quality"
LIGHT += " packing training_options pruning layer_search"
HEAVY = "workers devices weights whisper teacher_cache batches losses token_rules decoder search"
HEAVY += " speculative decoding long_form transcription training_plan augment training_data"
HEAVY += " data_checks layer_scoring teacher training validation training_log model_card trainer"
HEAVY += " learning_rate preflight evaluate_metric export_verification export_formats export"
ORDER = [*LIGHT.split(), *HEAVY.split()]
# These are of use to anyone: they know nothing of ours but how a config section is declared.
PURE = {
    "__init__": set(),
    "config": set(),
    "audio": set(),
    "text": set(),
    "numerals": set(),
    "normalization": {"config", "numerals", "text"},
    "pruning": set(),
    "layer_search": {"pruning"},
    "metrics": {"config", "normalization", "text"},
    "intervals": {"metrics"},
    "losses": {"batches"},
}
HEAVY_LIBRARIES = {
    "torch",
    "transformers",
    "accelerate",
    "librosa",
    "evaluate",
    "tensorboard",
    "matplotlib",
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


def own_modules_in(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path)]
    named = {part[1] for part in parts if part[0] == PACKAGE.name and len(part) > 1}
    return {name for name in named if (PACKAGE / f"{name}.py").exists()}


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_before_it(name: str) -> None:
    found = own_modules_in(PACKAGE / f"{name}.py")
    assert found <= set(ORDER[: ORDER.index(name)])
    assert found <= PURE.get(name, found)


@pytest.mark.parametrize("name", ORDER)
def test_no_module_imports_a_script(name: str) -> None:
    roots = {module.partition(".")[0] for module in imported(PACKAGE / f"{name}.py")}
    assert not roots & set(SCRIPTS)


def run_python(program: str, folder: Path) -> list[str]:
    preface = f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
    command = [sys.executable, "-c", preface + program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_light_modules_and_scripts_load_without_heavy_libraries(tmp_path: Path) -> None:
    modules = [f"{PACKAGE.name}.{name}" for name in LIGHT.split()] + SCRIPTS
    program = (
        "import importlib\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, sorted({HEAVY_LIBRARIES} & sys.modules.keys()))\n"
    )
    assert run_python(program, tmp_path) == [f"{name} []" for name in modules]


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
