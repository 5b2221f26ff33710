"""What is no file on disk is refused at once, with the reason; slow ones are read together."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from simpler_distil_whisper.files import open_regular_file, read_files, read_regular_file


def reason(path: Path | str) -> str | None:
    with pytest.raises(OSError, match=".") as error:
        open_regular_file(path)
    return error.value.strerror


def test_a_file_on_disk_is_opened_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\ntwo\n")
    (tmp_path / "b").symlink_to("a")
    with open_regular_file(tmp_path / "b") as file:
        assert file.readlines() == [b"one\n", b"two\n"]


def test_a_pipe_a_socket_a_device_and_a_folder_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        assert "such device" in reason(tmp_path / "socket")
    assert reason(tmp_path / "pipe") == "it is a pipe, not a file on disk"
    assert reason("/dev/zero") == "it is a device, not a file on disk"
    assert reason(tmp_path) == "it is a folder, not a file on disk"


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="no Linux")
def test_a_file_of_the_kernel_is_refused() -> None:
    assert reason("/proc/version") == "it is a file of the kernel, not a file on disk"


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    assert reason(name) == "no file can have this name"


def test_a_name_that_is_too_long_is_refused() -> None:
    assert "too long" in reason("長" * 300)


def test_nothing_is_left_open_by_a_refusal(tmp_path: Path) -> None:
    def next_descriptor() -> int:
        with (tmp_path / "file").open("wb") as file:
            return file.fileno()

    before = next_descriptor()
    reason(tmp_path)
    assert next_descriptor() == before


def test_a_file_beyond_the_limit_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular_file(tmp_path / "a", 4)


@pytest.mark.parametrize(("seconds", "several"), [(0.0, False), (0.003, True)])
def test_only_files_that_are_slow_to_read_are_read_several_at_once(
    seconds: float, several: bool
) -> None:
    threads: set[int] = set()

    def read(item: int) -> int:
        time.sleep(seconds)
        threads.add(threading.get_ident())
        return item * item

    assert read_files(read, range(100)) == [item * item for item in range(100)]
    assert (len(threads) > 2) == several
