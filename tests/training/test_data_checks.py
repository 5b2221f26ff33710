"""Warnings about a run's rows: none where all is well, one where one thing is wrong."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from distilling import (
    Assembled,
    Setting,
    adding_spaces,
    assemble,
    make_setting,
    warnings_in,
    write_config,
)
from tiny import write_rows, write_tone

from simpler_distil_whisper.data.manifest import Manifest, read_manifest
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.training.data_checks import (
    check_hours,
    check_labels,
    check_references,
    check_shared_audio,
)
from simpler_distil_whisper.training.options import TrainingColumns
from simpler_distil_whisper.training.selection import Selection
from simpler_distil_whisper.training.tokens import Example

SIGNS = {"average_log_probability": -0.1, "compression_ratio": 1.1}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"))


def read(path: Path, **columns: str) -> Manifest:
    return read_manifest(path, TrainingColumns(**columns))


# Labels


def assemble_with(
    folder: Path, rows: list[dict[str, Any]], setting: Setting, **data: Any
) -> tuple[Assembled, list[Example]]:
    """The examples of some rows on the setting's first clip."""
    audio = str(setting.train.parent / "0.wav")
    common = {"audio": audio, "language": "en"}
    train = write_rows(folder / "rows.jsonl", [common | row for row in rows])
    changes = {f"data__{name}": value for name, value in data.items()}
    assembled = assemble(write_config(folder / "run", setting._replace(train=train), **changes))
    return assembled, assembled.prepared.selection.examples


TIMED = {
    "text": "Ab Cd. 好的",
    "segments": [
        {"start_seconds": 0.0, "end_seconds": 0.2, "text": "Ab Cd."},
        {"start_seconds": 0.2, "end_seconds": None, "text": "好的"},
    ],
}


def test_labels_that_survive_the_tokenizer_are_not_reported(
    tmp_path: Path, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    long_past = {"text": "x", "previous_text": "語" * 400}  # 3 tokens each: cut within a character
    rows = [{"text": "  Two  spaces \n"}, TIMED, TIMED | {"previous_text": "Before."}, long_past]
    rows = [row | {"sampled_texts": ["another"]} for row in rows]
    names = ("timestamp_probability", "previous_text_probability", "sampled_text_probability")
    options = dict.fromkeys(names, 0.5)
    (trainer, _, steps, _), examples = assemble_with(tmp_path, rows, setting, **options)
    assert check_labels(examples, steps.visit_tokens.data, trainer.models.student) == 0
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"text": "ab"}, {}),
        ({"text": " ab", "previous_text": "Before."}, {"previous_text_probability": 0.1}),
    ],
)
def test_text_that_its_tokens_do_not_give_back(
    tmp_path: Path,
    setting: Setting,
    caplog: pytest.LogCaptureFixture,
    row: dict[str, Any],
    options: dict[str, float],
) -> None:
    rows = [{"text": " ab", "previous_text": " Before."}] * 9 + [row]
    spaced = adding_spaces(setting, tmp_path)
    data = {"max_bad_fraction": 0.1, **options}
    (trainer, _, steps, _), examples = assemble_with(tmp_path, rows, spaced, **data)
    section = steps.visit_tokens.data
    assert check_labels(examples, section, trainer.models.student) == 1
    text = "Before." if options else "ab"
    [warning] = warnings_in(caplog)
    assert f'rows.jsonl:10: "{text}"' in warning.replace("previous text ", "")
    assert f'comes back as " {text}"' in warning
    with pytest.raises(DataError, match="1 of 10 rows"):
        strict = section.model_copy(update={"max_bad_fraction": 0.05})
        check_labels(examples, strict, trainer.models.student)


def test_a_million_labels_are_not_all_read(
    tmp_path: Path, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _, steps, prepared = assemble(write_config(tmp_path / "run", setting))
    with caplog.at_level("INFO"):
        examples = prepared.selection.examples * 1000
        check_labels(examples, steps.visit_tokens.data, trainer.models.student)
    assert "all labels that were read back (200) survive the tokenizer" in caplog.text


# Dev


@pytest.mark.parametrize(
    ("row", "columns", "fault"),
    [
        ({}, {}, False),
        (SIGNS, {}, True),
        (SIGNS | {"origin_text": "said"}, {}, False),
        (SIGNS | {"origin_text": None}, {}, False),
        (SIGNS | {"said": "said"}, {}, True),
        (SIGNS | {"said": "said"}, {"reference": "said"}, False),
        (SIGNS | {"origin_text": "said"}, {"reference": "text"}, True),
    ],
)
def test_a_dev_row_without_a_reference_of_its_own(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    row: dict[str, Any],
    columns: dict[str, str],
    fault: bool,
) -> None:
    write_tone(tmp_path / "a.wav")
    good = {"audio": "a.wav", "text": "a"}
    path = write_rows(tmp_path / "dev.jsonl", [good, good | row])
    manifest = read(path, **columns)
    assert check_references(manifest, TrainingColumns(**columns)) == int(fault)
    assert [f"{path}:2" in text for text in warnings_in(caplog)] == [True] * fault


def shared(tmp_path: Path, setting: Setting, train: dict[str, Any], dev: dict[str, Any]) -> int:
    """Return how many training rows, the second as given in `train`, share audio with dev."""
    folder = setting.train.parent
    rows = [{"audio": str(folder / "1.wav")}, {"audio": str(folder / "2.wav")} | train]
    _, examples = assemble_with(tmp_path, [{"text": "a"} | row for row in rows], setting)
    path = write_rows(tmp_path / "dev.jsonl", [{"audio": str(folder / "3.wav")}, dev])
    return check_shared_audio(examples, read(path), TrainingColumns())


def test_audio_in_train_and_dev(
    tmp_path: Path, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    clip, other = (setting.train.parent / name for name in ("2.wav", "7.wav"))
    assert clip.stat().st_size == other.stat().st_size  # the same length, not the same sound
    link, copy = tmp_path / "link.wav", tmp_path / "copy.wav"
    link.symlink_to(clip)
    shutil.copy(clip, copy)
    begin = {"duration_seconds": 0.4}
    rest = {"start_seconds": 0.4, "duration_seconds": 0.4}
    across = {"start_seconds": 0.2, "duration_seconds": 0.4}

    def pack(*clips: Path, **part: float) -> dict[str, Any]:
        return {"parts": [{"audio": str(other)}, *({"audio": str(one)} | part for one in clips)]}

    first, fifth = (setting.train.parent / name for name in ("0.wav", "4.wav"))
    unlike_ours = {"parts": ["x", {}, {"audio": 7}, {"audio": None, "start_seconds": "x"}]}
    for train, dev, expected in [
        ({}, {"audio": str(other)}, 0),
        ({}, {"audio": str(clip)}, 1),
        ({}, {"audio": str(link)}, 1),
        ({}, {"audio": str(copy)}, 1),
        (begin, {"audio": str(clip)} | rest, 0),
        (begin, {"audio": str(clip)} | across, 1),
        (begin, {"audio": str(copy)} | rest, 0),
        (begin, {"audio": str(copy)} | across, 1),
        (rest, {"audio": str(clip)}, 1),
        (pack(fifth), {"audio": str(fifth)}, 1),
        (pack(copy, fifth), {"audio": str(fifth)}, 1),
        (pack(clip) | {"audio": str(first)}, {"audio": str(copy)}, 1),
        (pack(fifth, **begin), {"audio": str(fifth)} | rest, 0),
        (pack(fifth, **begin), {"audio": str(fifth)} | across, 1),
        (pack(fifth), {"audio": str(other)} | pack(), 1),
        (unlike_ours, {"audio": str(fifth)} | unlike_ours, 0),
    ]:
        caplog.clear()
        assert shared(tmp_path, setting, train, dev) == expected, (train, dev)
        messages = [
            text for text in warnings_in(caplog) if "share audio with data.dev_manifest" in text
        ]
        assert len(messages) == expected
        for text in messages:
            assert f"{tmp_path}/rows.jsonl:2 and {tmp_path}/dev.jsonl:2" in text


def test_files_as_large_as_a_dev_file_are_read_only_so_far(
    tmp_path: Path,
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy = tmp_path / "copy.wav"
    shutil.copy(setting.train.parent / "2.wav", copy)
    monkeypatch.setattr("simpler_distil_whisper.training.data_checks.BYTES_COMPARED", 1000)
    with caplog.at_level("INFO"):
        assert shared(tmp_path, setting, {}, {"audio": str(copy)}) == 0
    assert "0 of 1 files as large as a dev file were compared" in caplog.text


# Hours


@pytest.mark.parametrize(("hours", "warned"), [(24.9, True), (25.0, False), (250.0, False)])
def test_little_audio(hours: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert check_hours(Selection([], [], {"kept": {"rows": 1, "hours": hours}}, None)) == hours
    assert ["30 % from 25" in text for text in warnings_in(caplog)] == [True] * warned
