"""One run of one script: its folder, its log, its signals, its exit code."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import REPOSITORY, RunScript

from simpler_distil_whisper import run as run_module
from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.config import ConfigError, NonNegativeInt, StrictModel
from simpler_distil_whisper.launch import check_launch
from simpler_distil_whisper.run import DataError, Run
from simpler_distil_whisper.script import run_script


class Data(StrictModel):
    manifest: str = "train.jsonl"
    num_workers: NonNegativeInt = 1
    other: Path | None = None


class Config(StrictModel):
    output_dir: Path
    resume: Literal["auto", "never"] = "auto"
    words: int = 3
    data: Data = Data()


Work = Callable[[Config, str, Run], str]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a script `x` in the test's process: its work, its keys, its flags -> its exit code."""
    monkeypatch.chdir(tmp_path)

    def start_with(
        work: Work,
        *flags: str,
        prepare: Callable[[Config], str] = lambda config: "prepared",
        overwrite: bool = False,
        **keys: Any,
    ) -> int:
        Path("x.json").write_text(json.dumps({"output_dir": "out", **keys}), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["x.py", "x.json", *flags])
        return run_script("x", "What it does.", Config, prepare, work, overwrite=overwrite)

    return start_with


def write_words(config: Config, prepared: str, run: Run) -> str:
    with (run.folder / "words.txt").open("a", encoding="utf-8") as file:
        file.write(f"{prepared} " * config.words)
    return "words written"


def fail(config: Config, prepared: str, run: Run) -> str:
    (run.folder / "half.txt").write_text("half", encoding="utf-8")
    raise ZeroDivisionError("a bug")


def info() -> dict[str, Any]:
    return json.loads(Path("out/run_info.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_leaves_its_results_log_and_facts(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(write_words, words=2) == 0
    assert Path("out/words.txt").read_text(encoding="utf-8") == "prepared prepared "
    assert "words written" in Path("out/log.txt").read_text(encoding="utf-8")
    shown = capsys.readouterr().err
    assert "words written" in shown
    assert '2 keys not in the file took defaults: resume = "auto"; data = ' in shown
    facts = info()
    assert (facts["script"], facts["outcome"], facts["resumed"]) == ("x", "done", False)
    assert facts["config"] == {
        "output_dir": "out",
        "resume": "auto",
        "words": 2,
        "data": {"manifest": "train.jsonl", "num_workers": 1, "other": None},
    }
    assert facts["command"][1:] == ["x.py", "x.json"]
    assert facts["started"] <= facts["ended"]
    assert facts["versions"].keys() >= {"python", "torch", "transformers", "soundfile"}
    assert facts["git_commit"] is None or len(facts["git_commit"].removesuffix("-dirty")) == 40


def test_the_name_of_a_config_need_not_be_utf8(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(write_words) == 0
    name = os.fsdecode(b"conf\xff.json")
    shutil.copy("x.json", name)
    shutil.rmtree("out")
    monkeypatch.setattr(sys, "argv", ["x.py", name])
    assert run_script("x", "What it does.", Config, lambda config: "prepared", write_words) == 0
    assert info()["command"][-1] == "conf\\udcff.json"


def test_the_config_is_copied_byte_for_byte_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = b'{ "words" : 1,\r\n\t"output_dir": "o\\u0075t" }\n\n'
    Path("mine.json").write_bytes(text)
    monkeypatch.setattr(sys, "argv", ["x.py", "mine.json"])

    def look(config: Config, prepared: str, run: Run) -> str:
        assert Path("out/x.json").read_bytes() == text
        assert info()["outcome"] == "running"
        return ""

    assert run_script("x", None, Config, lambda config: "", look) == 0


def test_a_failed_run_is_continued_by_the_same_command(start: Callable[..., int]) -> None:
    assert start(fail) == 1
    assert info()["outcome"] == "failed"
    seen = []

    def go_on(config: Config, prepared: str, run: Run) -> str:
        seen.append((run.resumed, (run.folder / "half.txt").read_text(encoding="utf-8")))
        return ""

    assert start(go_on) == 0
    assert seen == [(True, "half")]
    assert (info()["outcome"], info()["resumed"]) == ("done", True)


def test_a_finished_run_is_reported_as_such_and_does_nothing(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(write_words) == 0
    before = contents(Path("out"))
    assert start(fail) == 0
    assert "out holds the finished run of this config" in capsys.readouterr().err
    assert contents(Path("out")) == before


def test_resume_never_refuses_a_folder_with_a_run(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(write_words, resume="never") == 0
    before = contents(Path("out"))
    for keys in ({"resume": "never"}, {"resume": "never", "words": 1}):
        assert start(write_words, **keys) == 2
        assert 'out holds an earlier run; set "resume" to "auto"' in capsys.readouterr().err
    assert contents(Path("out")) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_of_another_program_is_refused(
    start: Callable[..., int], overwrite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("three years", encoding="utf-8")
    Path("out/eval.json").write_text("{}", encoding="utf-8")
    before = contents(Path("out"))
    assert start(write_words, overwrite=overwrite) == 2
    assert "x.json: output_dir: out is not empty" in capsys.readouterr().err
    assert contents(Path("out")) == before


@pytest.mark.parametrize(
    ("mine", "act"),
    [
        ("sub/thesis.txt", lambda place: write_atomically(place, b"")),
        ("sub", Path.mkdir),
        ("sub", lambda place: (place / ".writing").mkdir(parents=True)),
    ],
    ids=["folder in the place of a file", "file in that of a folder", "file above a folder"],
)
def test_what_a_user_has_put_in_the_place_of_a_result_is_named(
    start: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    mine: str,
    act: Callable[[Path], object],
) -> None:
    def work(config: Config, prepared: str, run: Run) -> str:
        (run.folder / mine).parent.mkdir(exist_ok=True)
        (run.folder / mine).write_text("three years", encoding="utf-8")
        act(run.folder / "sub")
        return "done"

    assert start(work) == 2
    message = f"{Path('out/sub')} is in the way: no run has made it; move it, or choose another"
    assert message in capsys.readouterr().err
    assert Path("out", mine).read_text(encoding="utf-8") == "three years"
    assert info()["outcome"] == "failed"


def test_an_empty_folder_is_used(start: Callable[..., int]) -> None:
    Path("out").mkdir()
    assert start(write_words) == 0


def test_a_run_killed_while_it_copied_its_config_is_no_other_program(
    start: Callable[..., int],
) -> None:
    Path("out").mkdir()
    Path("out/.x.json.tmp").write_text('{"output_', encoding="utf-8")
    assert start(write_words) == 0
    assert sorted(contents(Path("out"))) == ["log.txt", "run_info.json", "words.txt", "x.json"]


@pytest.mark.parametrize("output_dir", ["x.json", "x.json/out"])
def test_a_folder_that_cannot_be_made_is_a_config_error(
    start: Callable[..., int], output_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(write_words, output_dir=output_dir) == 2
    assert f"x.json: output_dir: {output_dir} cannot be made: " in capsys.readouterr().err


@pytest.mark.parametrize("first", [fail, write_words])
def test_a_run_of_another_config_is_refused_with_the_keys_that_differ(
    start: Callable[..., int], first: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    start(first, data={"manifest": "a.jsonl"})
    before = contents(Path("out"))
    capsys.readouterr()
    assert start(write_words, words=4, data={"manifest": "b.jsonl", "num_workers": 2}) == 2
    shown = capsys.readouterr().err
    assert '  data.manifest: was "a.jsonl", is "b.jsonl"\n  words: was 3, is 4\n' in shown
    assert "num_workers" not in shown.partition("holds a run of another config")[2]
    assert contents(Path("out")) == before


@pytest.mark.parametrize("first", [fail, write_words])
def test_a_run_that_has_read_something_else_is_refused(
    start: Callable[..., int], first: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model").mkdir()
    weights = Path("model/model.safetensors")
    weights.write_bytes(b"old" * 2**20)
    start(first, data={"other": "model"})
    before = contents(Path("out"))
    weights.write_bytes(b"new" * 2**20)  # trained again, into the same folder
    assert start(write_words, data={"other": "model"}) == 2
    assert "holds a run that has read something else in model; choose" in capsys.readouterr().err
    assert contents(Path("out")) == before
    weights.write_bytes(b"old" * 2**20)
    os.utime(weights, (1, 1))
    Path("model/log.txt").touch()
    assert start(write_words, data={"other": "model"}) == 0


def test_a_folder_in_which_no_work_was_done_is_free_for_another_config(
    start: Callable[..., int],
) -> None:
    """The model does not have what the config asks of it: that is known only once it is loaded."""

    def ask_too_much(config: Config, prepared: str, run: Run) -> str:
        raise ConfigError("words: the model knows fewer")

    assert start(ask_too_much, words=9) == 2
    assert start(write_words, words=2) == 0
    assert Path("out/words.txt").read_text(encoding="utf-8") == "prepared prepared "
    assert json.loads(Path("out/x.json").read_text())["words"] == 2
    assert not info()["resumed"]


def test_keys_that_change_no_result_may_change(start: Callable[..., int]) -> None:
    assert start(fail, data={"num_workers": 4}) == 1
    # Written out or left to its default, a value is the same value.
    assert start(write_words, words=3, data={"num_workers": 0}) == 0
    assert info()["config"]["data"]["num_workers"] == 0


def test_a_quick_script_replaces_its_own_results(start: Callable[..., int]) -> None:
    assert start(write_words, overwrite=True, words=1) == 0
    Path("out/mine.txt").write_text("my notes", encoding="utf-8")
    assert start(write_words, overwrite=True, words=2) == 0
    assert json.loads(Path("out/x.json").read_text(encoding="utf-8"))["words"] == 2
    assert info()["resumed"] is False
    assert Path("out/mine.txt").read_text(encoding="utf-8") == "my notes"


def test_what_a_user_keeps_in_the_folder_of_a_run_stays(start: Callable[..., int]) -> None:
    start(fail)
    Path("out/mine").mkdir()
    Path("out/mine/notes.txt").write_text("my notes", encoding="utf-8")
    assert start(write_words) == 0
    assert Path("out/mine/notes.txt").read_text(encoding="utf-8") == "my notes"


@pytest.mark.parametrize(
    ("error", "code", "outcome"),
    [
        (ConfigError("precision: no"), 2, "failed"),
        (DataError("no rows left"), 3, "failed"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 3, "failed"),
        (OSError(errno.EACCES, "Permission denied", "out/x"), 3, "failed"),
        (OSError(errno.EPERM, "Operation not permitted", "out/x"), 1, "failed"),
        (ZeroDivisionError("a bug"), 1, "failed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_how_work_ends_decides_the_exit_code(
    start: Callable[..., int],
    error: BaseException,
    code: int,
    outcome: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(config: Config, prepared: str, run: Run) -> str:
        raise error

    assert start(work) == code
    assert info()["outcome"] == outcome
    assert info()["ended"] is not None
    shown = capsys.readouterr().err
    assert str(error) in shown
    assert ("Traceback" in shown) == (code == 1)
    log = Path("out/log.txt").read_text(encoding="utf-8")
    assert str(error) in log
    assert ("Traceback" in log) == (code == 1)


def test_a_disk_that_cannot_take_the_outcome_either_hides_no_error(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def work(config: Config, prepared: str, run: Run) -> str:
        shutil.rmtree(run.folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    assert start(work) == 3
    shown = capsys.readouterr().err
    assert "No space left on device in out: make room, and run the same command again" in shown
    assert "Traceback" not in shown


def test_a_bug_leaves_its_traceback_in_the_log(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(fail) == 1
    log = Path("out/log.txt").read_text(encoding="utf-8")
    assert "Traceback" in log
    assert "ZeroDivisionError: a bug" in log
    assert "This is a bug" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("no such folder"), 2), (DataError("no rows"), 3)]
)
def test_what_prepare_finds_leaves_no_folder(
    start: Callable[..., int], error: Exception, code: int
) -> None:
    def prepare(config: Config) -> str:
        raise error

    assert start(write_words, prepare=prepare) == code
    assert not Path("out").exists()


def test_check_prepares_and_does_no_work(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = []

    def prepare(config: Config) -> str:
        prepared.append(config.words)
        return ""

    assert start(fail, "--check", prepare=prepare) == 0
    assert prepared == [3]
    assert "all checked, nothing done" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("place", ["out", "out/of/reach"])
def test_check_names_a_file_in_the_way_of_output_dir(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], place: str
) -> None:
    Path("out").write_text("mine")
    assert start(fail, "--check", output_dir=place) == 2
    assert f"output_dir: {place} cannot be made: out is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["another config", "a file of yours", "a run in shards"])
def test_check_refuses_the_output_dir_that_the_run_would_refuse(
    start: Callable[..., int], first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if first == "another config":
        assert start(write_words) == 0
    else:
        Path("out").mkdir()
        Path("out/shards" if first == "a run in shards" else "out/mine").mkdir()
    before = contents(Path("out"))
    for flags in ([], ["--check"]):
        capsys.readouterr()
        assert start(write_words, *flags, words=4) == 2
        assert "output_dir: out " in capsys.readouterr().err
    assert contents(Path("out")) == before


def test_check_of_a_run_that_can_go_on_is_good(start: Callable[..., int]) -> None:
    assert start(write_words) == 0
    before = contents(Path("out"))
    assert start(fail, "--check") == 0
    assert contents(Path("out")) == before


@pytest.mark.parametrize("arguments", [[], ["x.json", "y.json"], ["--check"]])
def test_a_wrong_command_line_shows_the_right_one(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    assert run_script("x", None, Config, lambda config: "", write_words) == 2
    assert "Usage: python x.py CONFIG.json" in capsys.readouterr().err


def test_help_needs_no_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    assert run_script("x", "What it does.", Config, lambda config: "", write_words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("What it does.\n\nUsage: python x.py CONFIG.json")
    assert '  data.manifest\n      string, default "train.jsonl"' in shown


def launched_as(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> None:
    """Set the variables of torchrun, with some changes; None: it is not set."""
    of_torchrun = dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
    of_torchrun |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {**of_torchrun, **variables}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


NO_TORCHRUN: dict[str, str | None] = dict.fromkeys(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": None}, "RANK or WORLD_SIZE is set, but not LOCAL_RANK: launch with"),
        ({"WORLD_SIZE": None, "MASTER_PORT": None}, "but not WORLD_SIZE, MASTER_PORT"),
        ({"RANK": ""}, "but not RANK"),
        ({**NO_TORCHRUN, "SLURM_STEP_NUM_TASKS": "4"}, "srun has started 4 processes"),
        ({**NO_TORCHRUN, "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes"),
    ],
)
def test_processes_that_do_not_know_of_one_another_do_not_begin(
    start: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str | None],
    message: str,
) -> None:
    launched_as(monkeypatch, **variables)
    assert start(write_words) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_RANK": None, "SLURM_LOCALID": "1"},
        {**NO_TORCHRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        {**NO_TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_STEP_NUM_TASKS": "2"},
    ],
    ids=["the local rank of SLURM", "one task of a step", "one process", "torchrun in a step"],
)
def test_launches_in_which_nothing_is_missing(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str | None]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "")  # so that it is as before after the test
    launched_as(monkeypatch, **variables)
    check_launch()
    if "SLURM_LOCALID" in variables:
        assert os.environ["LOCAL_RANK"] == "1"


def test_other_processes_write_none_of_the_shared_files(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched_as(monkeypatch, RANK="1")

    def work(config: Config, prepared: str, run: Run) -> str:
        run.note(device="gpu 1")
        return ""

    assert start(work) == 0
    assert contents(Path("out")) == {}


def test_notes_stand_in_run_info_even_after_a_bug(start: Callable[..., int]) -> None:
    def work(config: Config, prepared: str, run: Run) -> str:
        run.note(device="cpu", filters={"kept": 3})
        raise ZeroDivisionError

    assert start(work) == 1
    assert (info()["device"], info()["filters"]) == ("cpu", {"kept": 3})


# Signals and kills, in a process of their own.

PROGRAM = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.script import run_script

class Config(StrictModel):
    output_dir: Path
    where: str = "work"
    steps: int = 80

def prepare(config):
    if config.where == "prepare":
        print("ready", flush=True)
        time.sleep(60)

def work(config, prepared, run):
    file = (run.folder / "steps.txt").open("a")
    while (done := (run.folder / "steps.txt").read_text().count(".")) < config.steps:
        if done == 1:
            print("ready", flush=True)
        if config.where == "one long step":
            print("ready", flush=True)
            for _ in range(600):
                time.sleep(0.1)
        run.stop_if_asked()
        time.sleep(0.01)
        file.write(".")
        file.flush()
    return "all steps done"

sys.exit(run_script("x", None, Config, prepare, work))
"""


def heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def spawn(folder: Path, **keys: object) -> subprocess.Popen[str]:
    config = {"output_dir": str(folder / "out"), **keys}
    (folder / "x.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM, str(folder / "x.json")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        # What a shell starts in the background ignores Ctrl-C, and so would what the tests start.
        preexec_fn=heed_signals,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stop_signal_saves_the_work_and_the_next_run_goes_on(
    tmp_path: Path, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = spawn(tmp_path)
    process.send_signal(number)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == code
    assert "with the work saved" in shown
    assert "run the same command again to continue" in shown
    assert "Traceback" not in shown
    assert info()["outcome"] == "interrupted"
    log = Path("out/log.txt").read_text(encoding="utf-8")
    assert "Interrupted; run the same command again to continue." in log
    assert "Traceback" not in log
    done = len(Path("out/steps.txt").read_text(encoding="utf-8"))
    assert 0 < done < 80
    again = run_again(tmp_path)
    again.communicate(timeout=30)
    assert again.returncode == 0
    assert info()["outcome"] == "done"
    assert len(Path("out/steps.txt").read_text(encoding="utf-8")) == 80


def run_again(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder / "x.json")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder)


def test_a_second_signal_stops_a_long_step_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = spawn(tmp_path, where="one long step")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "the first signal lets the step end"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143
    assert info()["outcome"] == "interrupted"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_before_the_work_is_no_bug(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = spawn(tmp_path, where="prepare")
    process.send_signal(number)
    _, shown = process.communicate(timeout=10)
    assert process.returncode == code
    assert shown.splitlines()[1:] == ["Interrupted; run the same command again to continue."]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_of_signals_that_are_ignored_only_the_hangup_stays_so(
    start: Callable[..., int], number: signal.Signals, code: int
) -> None:
    """Under nohup a run outlives its terminal; in the background of a script it can be ended."""

    def work(config: Config, prepared: str, run: Run) -> str:
        signal.raise_signal(number)
        run.stop_if_asked()
        return ""

    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert start(work) == code
    finally:
        signal.signal(number, before)


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(
    tmp_path: Path,
) -> None:
    first = spawn(tmp_path, where="one long step")
    before = contents(tmp_path / "out")
    second = run_again(tmp_path)
    _, shown = second.communicate(timeout=30)
    assert second.returncode == 2
    assert f"output_dir: another run is at work in {tmp_path / 'out'}; end it, or" in shown
    assert contents(tmp_path / "out") == before
    first.kill()
    first.communicate()
    third = spawn(tmp_path, where="one long step")  # a lock ends with its process
    third.kill()
    third.communicate()


def test_a_file_system_without_locks_is_no_other_run(
    start: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def without_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", without_locks)
    assert start(write_words) == 0
    assert "log.txt cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_config_of_somebody_else_in_the_output_folder_survives(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/x.json").write_text('{"output_dir": "elsewhere"}', encoding="utf-8")
    for overwrite in (True, False):
        before = contents(Path("out"))
        assert start(write_words, overwrite=overwrite) == 2
        assert "so another program made it" in capsys.readouterr().err
        assert contents(Path("out")) == before


def test_control_characters_reach_neither_terminal_nor_log(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[2J\x07\r\u202eb\u2066\x9b\ud800"

    def work(config: Config, prepared: str, run: Run) -> str:
        raise DataError(f"{name}: no such file\nsecond line")

    assert start(work) == 3
    shown = r"a\x1b[2J\x07\r\u202eb\u2066\x9b\ud800: no such file" + "\nsecond line\n"
    assert shown in capsys.readouterr().err
    assert shown in Path("out/log.txt").read_text(encoding="utf-8")


def test_a_killed_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    process = spawn(tmp_path, steps=20)
    process.kill()
    process.communicate()
    assert info()["outcome"] == "running"
    again = run_again(tmp_path)
    again.communicate(timeout=30)
    assert again.returncode == 0
    assert (info()["outcome"], info()["resumed"]) == ("done", True)


def test_the_signal_handlers_of_before_are_restored(start: Callable[..., int]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    start(write_words)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_file_is_old_or_new_but_never_half(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path\n"
        "from simpler_distil_whisper.run import write_atomically\n"
        "while True:\n"
        "    for letter in 'ab':\n"
        "        write_atomically(Path('file'), letter.encode() * 2_000_000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    file = tmp_path / "file"
    while not file.exists():
        time.sleep(0.02)
    for _ in range(100):
        content = file.read_bytes()
        assert content in (b"a" * 2_000_000, b"b" * 2_000_000)
    process.kill()
    process.wait()
    assert file.read_bytes() in (b"a" * 2_000_000, b"b" * 2_000_000)
    write_atomically(file, b"c")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_log_of_a_second_run_follows_that_of_the_first(start: Callable[..., int]) -> None:
    start(fail)
    start(write_words)
    log = Path("out/log.txt").read_text(encoding="utf-8")
    assert log.index("ZeroDivisionError") < log.index("words written")
    assert len(run_module.log.handlers) == 1, "a run must not log into the folder of an earlier one"


def test_a_real_script_refuses_what_is_not_there(run_script: RunScript, tmp_path: Path) -> None:
    shipped = json.loads((REPOSITORY / "create_student_model.json").read_text(encoding="utf-8"))
    config = {**shipped, "output_dir": "out", "teacher": {"path": "nowhere"}}
    done = run_script("create_student_model", config)
    assert done.returncode == 2
    assert "teacher.path: no such folder: nowhere" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
