"""The store: what is read is what was written, whoever writes, is killed or damages it."""

import logging
import multiprocessing
import os
import pickle
import shutil
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from stored import bytes_in, entries_in, some_tensor

from simpler_distil_whisper.model import tensor_store
from simpler_distil_whisper.model.tensor_store import BackgroundWriter, TensorStore

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ENOUGH = 10**9  # bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_bit_for_bit_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    written = some_tensor().to(dtype)
    TensorStore(tmp_path, ENOUGH).write("kind/group/key", written)
    other = TensorStore(tmp_path, ENOUGH)
    kept = other.read("kind/group/key")
    assert kept is not None
    assert kept.dtype == dtype
    assert torch.equal(kept, written)
    assert other.read("kind/group/another") is None


def test_no_damaged_byte_is_ever_believed(tmp_path: Path) -> None:
    store, written = TensorStore(tmp_path, ENOUGH), some_tensor()
    store.write("kind/group/key", written)
    (path,) = entries_in(tmp_path)
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        kept = store.read("kind/group/key")
        noticed += kept is None
        assert kept is None or (kept.dtype == written.dtype and torch.equal(kept, written))
    assert noticed > 0.9 * len(whole)  # the rest are blanks of the header


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_truncated_entry_is_reported_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    store, written = TensorStore(tmp_path, ENOUGH), some_tensor()
    store.write("kind/group/key", written)
    (path,) = entries_in(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with caplog.at_level(logging.WARNING):
        assert store.read("kind/group/key") is None
    assert f"{path}: damaged" in caplog.text
    store.write("kind/group/key", written)
    kept = store.read("kind/group/key")
    assert kept is not None
    assert torch.equal(kept, written)


def test_an_entry_under_the_name_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, ENOUGH)
    store.write("kind/group/one", some_tensor(1))
    store.write("kind/group/two", some_tensor(2))
    first, second = entries_in(tmp_path)
    shutil.copyfile(first, second)
    names = ["kind/group/one", "kind/group/two"]
    assert [store.read(name) is None for name in names].count(True) == 1


def test_a_full_store_takes_no_more_warns_once_and_is_still_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = TensorStore(tmp_path, ENOUGH)
    store.write("kind/group/0", some_tensor(0))
    size = bytes_in(tmp_path)
    store = TensorStore(tmp_path, 3 * size + size // 2)
    with caplog.at_level(logging.WARNING):
        for number in range(6):
            store.write(f"kind/group/{number}", some_tensor(number))
    assert caplog.text.count("is full (teacher_cache.max_gigabytes") == 1
    assert store.used() == bytes_in(tmp_path) == 3 * size
    assert [store.read(f"kind/group/{number}") is not None for number in range(6)] == (
        [True] * 3 + [False] * 3
    )
    # What is damaged is replaced all the same: that adds nothing.
    entries_in(tmp_path)[0].write_bytes(b"torn")
    store.write("kind/group/0", some_tensor(0))
    assert store.read("kind/group/0") is not None


def test_a_bound_holds_for_all_groups_and_a_deleted_group_makes_room(tmp_path: Path) -> None:
    TensorStore(tmp_path, ENOUGH).write("kind/old/0", some_tensor())
    size = bytes_in(tmp_path)
    store = TensorStore(tmp_path, size)
    store.write("kind/new/0", some_tensor())
    assert store.read("kind/new/0") is None
    shutil.rmtree(tmp_path / "kind" / "old")
    store = TensorStore(tmp_path, size)
    store.write("kind/new/0", some_tensor())
    assert store.read("kind/new/0") is not None


def test_a_disk_that_takes_nothing_more_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = TensorStore(tmp_path, ENOUGH)
    store.write("kind/group/ab", some_tensor())
    (tmp_path / "kind" / "group" / "cd").write_text("a file where a folder is required")
    with caplog.at_level(logging.WARNING):
        store.write("kind/group/cd", some_tensor())
        store.write("kind/group/ef", some_tensor())
    assert caplog.text.count("cannot be written") == 1
    assert store.read("kind/group/ab") is not None
    assert store.read("kind/group/ef") is None


def test_what_another_user_keeps_private_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = TensorStore(tmp_path, ENOUGH)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "kind/group")

    monkeypatch.setattr(tensor_store, "safe_open", refuse)  # root may read everything
    monkeypatch.setattr(Path, "mkdir", refuse)
    with caplog.at_level(logging.WARNING):
        assert store.read("kind/group/ab") is None
        assert store.read("kind/group/cd") is None
        store.write_about("kind/group", {"teacher": "t"})
    assert caplog.text.count("Permission denied") == 1


def write_many(folder: Path, max_bytes: int, first: int) -> None:
    store = TensorStore(folder, max_bytes)
    for number in range(first, first + 40):
        store.write(f"kind/group/{number:02}", some_tensor(number, 50, 20))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_processes_write_at_once(tmp_path: Path, share: float) -> None:
    """Each key by two of four processes; then with a bound of half of what they have to write."""
    write_many(tmp_path / "alone", ENOUGH, 0)
    size = bytes_in(tmp_path / "alone") // 40
    bound = round(100 * size * share)
    together = tmp_path / "together"
    fork = multiprocessing.get_context("fork")
    writers = [
        fork.Process(target=write_many, args=(together, bound, first)) for first in (0, 20, 40, 60)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    store = TensorStore(together, bound)
    kept = [store.read(f"kind/group/{number:02}") for number in range(100)]
    there = [number for number, tensor in enumerate(kept) if tensor is not None]
    assert len(there) == len(entries_in(together))
    for number in there:
        assert torch.equal(kept[number], some_tensor(number, 50, 20))
    assert list((together / "writing").iterdir()) == []
    # What two processes write at the same moment can be counted twice, and add one entry each.
    assert bytes_in(together) <= bound + 4 * size
    assert len(there) > 40


def test_what_a_killed_writer_has_left_is_removed_after_a_day(tmp_path: Path) -> None:
    TensorStore(tmp_path, ENOUGH)
    old, new = (tmp_path / "writing" / f"{uuid.uuid4().hex}.unfinished" for _ in range(2))
    names = ["chapter one.txt", uuid.uuid4().hex]
    somebody_elses = [tmp_path / "writing" / name for name in names]
    for path in (old, new, *somebody_elses):
        path.write_bytes(b"half an ent")
    for path in (old, *somebody_elses):
        os.utime(path, (time.time() - 90_000,) * 2)
    TensorStore(tmp_path, ENOUGH)
    assert (old.exists(), new.exists()) == (False, True)
    assert all(path.exists() for path in somebody_elses)


class SlowStore(TensorStore):
    """Waits for `ready` before it writes; a name may be bad."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ENOUGH)
        self.ready = threading.Event()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        assert self.ready.wait(30)
        if name == "bad":
            raise MemoryError("no room for a copy")
        super().write(name, tensor)


def test_a_batch_is_written_while_the_next_is_computed(tmp_path: Path) -> None:
    store, tensors = SlowStore(tmp_path), some_tensor(0, 3, 4, 2)
    names = [f"kind/group/{number}" for number in range(2)]
    writer = BackgroundWriter(store)
    writer.keep([names[0], None, names[1]], tensors)
    assert entries_in(tmp_path) == []
    waiting = threading.Thread(target=writer.keep, args=(["kind/group/2"], tensors[:1]))
    waiting.start()  # this one still returns at once, with two batches at most in hand
    waiting.join(30)
    assert not waiting.is_alive() and entries_in(tmp_path) == []
    again = pickle.loads(pickle.dumps(BackgroundWriter(TensorStore(tmp_path, ENOUGH))))
    again.finish()
    store.ready.set()
    writer.finish()
    kept = [store.read(name) for name in [*names, "kind/group/2"]]
    for tensor, expected in zip(kept, tensors[[0, 2, 0]], strict=True):
        assert tensor is not None and torch.equal(tensor, expected)


def test_what_is_still_being_copied_is_waited_for_by_the_writing_thread(tmp_path: Path) -> None:
    store, copy = TensorStore(tmp_path, ENOUGH), torch.zeros(2, 3)
    copied = threading.Event()
    writer = BackgroundWriter(store)
    writer.keep(["kind/group/0", "kind/group/1"], [*copy], after=lambda: copied.wait(30))
    copy.fill_(7)
    copied.set()
    writer.finish()
    kept = store.read("kind/group/1")
    assert kept is not None and torch.equal(kept, copy[1])


def test_what_the_writing_thread_fails_at_is_not_silent(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    store.ready.set()
    writer = BackgroundWriter(store)
    writer.keep(["bad"], some_tensor(0, 1, 2))
    with pytest.raises(MemoryError, match="no room"):
        writer.finish()
