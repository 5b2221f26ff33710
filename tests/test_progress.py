"""How progress is shown."""

import pytest

from simpler_distil_whisper import progress


def test_where_there_is_no_terminal_progress_and_time_left_are_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress.log, "info", lambda text, *words: lines.append(text % words))
    assert list(progress.Progress("labelling", "rows", 12, done=9).over("abc")) == [*"abc"]
    assert [line.split(", about")[0] for line in lines] == [
        f"labelling: {done} of 12 rows" for done in (10, 11, 12)
    ]
    assert lines[-1].endswith("about 0:00:00 left")
