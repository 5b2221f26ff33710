"""What the documents state about the code: keys, messages, files, names and links that exist."""

import ast
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "simpler_distil_whisper"
DOCUMENTS = [
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").glob("*.md"),
    REPOSITORY / "demo" / "README.md",
]
ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"
WITH_KEYS = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # it names those that went
FILE_ENDINGS = (".html", ".json", ".jsonl", ".pt", ".py", ".safetensors", ".txt")
GENERATOR = runpy.run_path(str(REPOSITORY / "docs" / "configuration.py"))
KEYS = {row[0] for script in GENERATOR["COMMANDS"] for row in GENERATOR["rows"](script)}


def relative_name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_page_of_keys_is_made_from_the_config_classes() -> None:
    written = read(REPOSITORY / "docs" / "configuration.md")
    assert GENERATOR["page"]() == written, "run: python docs/configuration.py"


def test_every_key_has_a_type_and_a_meaning() -> None:
    for script in GENERATOR["COMMANDS"]:
        rows = GENERATOR["rows"](script)
        assert [key for key, kind, _, meaning in rows if not (kind and meaning)] == []


def strings_in(path: Path) -> Iterator[str]:
    """Yield the strings of a source file, without docstrings; of f-strings the fixed parts."""
    tree = ast.parse(read(path))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    for node in constants:
        if isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def quoted_messages() -> list[str]:
    text = read(REPOSITORY / "docs" / "troubleshooting.md")
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    return [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]


def test_every_message_in_troubleshooting_is_one_of_the_code() -> None:
    sources = [*PACKAGE.rglob("*.py"), *REPOSITORY.glob("*.py")]
    strings = "\n".join(string for path in sources for string in strings_in(path))
    messages = quoted_messages()
    assert len(messages) >= 20
    assert [message for message in messages if message not in strings] == []


def tree_of_files() -> set[str]:
    """Return the files of the package that the tree names, such as "data/audio.py"."""
    text = read(ARCHITECTURE)
    tree = text.partition("simpler_distil_whisper/\n")[2].partition("```")[0]
    folder, files = "", set()
    for line in tree.partition("\ntests/")[0].splitlines():
        indent, name = re.match(r"( *)(\S*)", line).groups()
        if len(indent) == 2:
            folder = name if name.endswith("/") else ""
        if name.endswith(".py"):
            files.add(name if len(indent) == 2 else folder + name)
    return files


def test_the_tree_names_every_file_of_the_package() -> None:
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert tree_of_files() == {name for name in modules if not name.endswith("__init__.py")}


def hops() -> list[tuple[str, str]]:
    rows = re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \| `(\w+)` \|", read(ARCHITECTURE), re.MULTILINE)
    return [(file, name) for file, name in rows]


def test_every_hop_of_the_two_roads_exists() -> None:
    assert len(hops()) >= 25
    for file, name in hops():
        path = PACKAGE / file if (PACKAGE / file).exists() else REPOSITORY / file
        assert re.search(rf"^ *(def|class) {name}\b", read(path), re.MULTILINE), (file, name)


def test_shell_commands_of_clusters_and_containers_are_well_formed() -> None:
    lines = read(REPOSITORY / "Dockerfile").replace("\\\n", "")
    scripts = re.findall(r"^RUN (.*)$", lines, re.MULTILINE)
    scripts += re.findall(r"```sh\n(.*?)```", read(REPOSITORY / "docs" / "cluster.md"), re.DOTALL)
    assert len(scripts) == 6
    for script in scripts:
        checked = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_architecture_names_the_places_of_the_import_order() -> None:
    layout = read(REPOSITORY / "tests" / "test_layout.py")
    places = "".join(re.findall(r'^PLACES \+?= "(.*)"', layout, re.MULTILINE)).split()
    assert "  ".join(place for place in places if place != "__init__") in read(ARCHITECTURE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative_name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", read(path)):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative_name)
def test_sources_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|html))`", read(path)):
        assert any((folder / name).exists() for folder in (REPOSITORY, PACKAGE)), name


def test_modules_that_are_run_exist_and_have_the_options_that_are_named() -> None:
    pattern = r"python -m\s+((?:benchmarks|demo)\.[a-z_]+)((?:(?!python -m)[^`#)|])*)"
    texts = map(read, [*DOCUMENTS, *(REPOSITORY / "benchmarks").glob("*.py")])
    commands = [command for text in texts for command in re.findall(pattern, text)]
    assert len(commands) >= 40
    for module, rest in commands:
        source = read(REPOSITORY / f"{module.replace('.', '/')}.py")
        for option in re.findall(r"(?<=[\s\[]--)[a-z-]+", rest):
            assert option in source, (module, option)


@pytest.mark.parametrize("path", WITH_KEYS, ids=relative_name)
def test_keys_that_are_named_exist(path: Path) -> None:
    """A name such as `data.columns` or `pack.enabled`; with it, every name that begins alike."""
    sections = {key.partition(".")[0] for key in KEYS}
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", read(path)):
        if name.partition(".")[0] in sections and not name.endswith(FILE_ENDINGS):
            assert any(f"{key}.".startswith(f"{name}.") for key in KEYS), name
