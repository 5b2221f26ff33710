"""Folders that may be removed: those that are marked as made here, and no others."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpler_distil_whisper.atomic import MARK, new_folder, refuse_others, remove_own
from simpler_distil_whisper.config import ConfigError


def test_a_folder_left_by_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "a" / ".writing"
    (new_folder(place) / "half.bin").write_bytes(b"half")
    assert [path.name for path in new_folder(place).iterdir()] == [MARK]
    remove_own(place)
    remove_own(place)
    assert not place.exists()


def test_a_kill_while_a_folder_is_removed_leaves_one_that_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    place = tmp_path / ".writing"
    for survived in range(30):
        new_folder(place)
        for name in range(10):
            (place / f"{name}.bin").touch()
        (place / "link").symlink_to(tmp_path)
        (place / "parts" / "0").mkdir(parents=True)
        (place / "parts" / "0" / "a.bin").touch()
        left = survived

        def until_killed(remove: Callable[..., None]) -> Callable[..., None]:
            def removed(*arguments: Any, **options: Any) -> None:
                nonlocal left
                if not left:
                    raise Killed
                left -= 1
                remove(*arguments, **options)

            return removed

        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", until_killed(os.unlink))
            patched.setattr(os, "rmdir", until_killed(os.rmdir))
            try:
                remove_own(place)
            except Killed:
                continue
        assert not place.exists()
        return
    pytest.fail("it is never removed")


@pytest.mark.parametrize("kind", ["file", "folder", "link to a folder", "link to nowhere"])
def test_what_somebody_else_has_made_stays(tmp_path: Path, kind: str) -> None:
    place, notes = tmp_path / ".writing", tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("three years", encoding="utf-8")
    if kind == "file":
        place.write_text("three years", encoding="utf-8")
    elif kind == "folder":
        notes = notes.rename(place)
    else:
        place.symlink_to("notes" if kind == "link to a folder" else "nowhere")
    for act in (new_folder, remove_own, refuse_others):
        with pytest.raises(ConfigError, match=r"\.writing is in the way: no run has made it"):
            act(place)
    assert (notes / "mine.txt").exists()
    assert place.is_symlink() or place.exists()


def test_an_empty_folder_is_nobody_s(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    refuse_others(tmp_path / "a")
    assert [path.name for path in new_folder(tmp_path / "a").iterdir()] == [MARK]
