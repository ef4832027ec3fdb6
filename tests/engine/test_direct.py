"""Files that are written past the page cache hold what was written, and where that can't be, they are written all the same."""

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from athena_backup.store.direct import BLOCK_BYTES, write_direct


def write(path: Path, chunks: Iterable[bytes]) -> None:
    """A new file, as the store makes one."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_direct(file, chunks)
        os.fsync(file)
    finally:
        os.close(file)


def can_be_direct(folder: Path) -> bool:
    """Whether the tests' own file system knows direct writes."""
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def cached_share(path: Path) -> float:
    """How much of a file is in the page cache (mincore(2))."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        assert libc.mincore(ctypes.addressof(start), len(mapped), found) == 0
        del start
        return sum(one & 1 for one in found) / pages


SIZES = [
    [],
    [0],
    [1],
    [BLOCK_BYTES - 1],
    [BLOCK_BYTES],
    [BLOCK_BYTES + 1],
    [BLOCK_BYTES - 1, 2],
    [3 * BLOCK_BYTES + 5],
    [1_000_003] * 13,
    [BLOCK_BYTES, 0, BLOCK_BYTES, 7],
]


@pytest.mark.parametrize("sizes", SIZES)
def test_chunks_of_any_size_are_written_whole(tmp_path: Path, sizes: list[int]) -> None:
    chunks = [os.urandom(size) for size in sizes]
    write(tmp_path / "file", chunks)
    assert (tmp_path / "file").read_bytes() == b"".join(chunks)


def test_what_is_written_takes_no_room_in_the_page_cache(tmp_path: Path) -> None:
    if not can_be_direct(tmp_path):
        pytest.skip("the file system of the tests knows no direct writes")
    write(tmp_path / "file", itertools.repeat(os.urandom(1_000_003), 40))
    assert cached_share(tmp_path / "file") < 0.2  # the last bytes go through it


@pytest.mark.parametrize("refuses", ["the flag", "the write"])
def test_a_file_system_that_refuses_direct_writes_gets_ordinary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    is_direct, refused = False, 0
    change, put = fcntl.fcntl, os.write

    def changed(file: int, command: int, flags: int = 0) -> int:
        nonlocal is_direct, refused
        if command == fcntl.F_SETFL:
            if flags & os.O_DIRECT and refuses == "the flag":
                refused += 1
                raise OSError(errno.EINVAL, "Invalid argument")
            is_direct = bool(flags & os.O_DIRECT)
        return change(file, command, flags & ~os.O_DIRECT)

    def written(file: int, data: memoryview) -> int:
        nonlocal refused
        if is_direct:
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return put(file, data[:1_000_000])

    monkeypatch.setattr(fcntl, "fcntl", changed)
    monkeypatch.setattr(os, "write", written)
    content = os.urandom(2 * BLOCK_BYTES + 17)
    write(tmp_path / "file", [content])
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == content
    assert refused == 2


def test_what_a_direct_write_leaves_is_written_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, shortened = os.write, 0

    def written(file: int, data: memoryview) -> int:
        nonlocal shortened
        if len(data) == BLOCK_BYTES:
            shortened += 1
            return put(file, data[: 1 << 20])
        return put(file, data)

    monkeypatch.setattr(os, "write", written)
    content = os.urandom(3 * BLOCK_BYTES + 17)
    write(tmp_path / "file", [content])
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == content
    assert shortened == 3


def test_the_next_block_is_filled_while_one_is_written_and_no_third_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, filled, may_write = os.write, 0, threading.Event()
    blocks = [os.urandom(BLOCK_BYTES) for _ in range(3)]

    def written(file: int, data: memoryview) -> int:
        assert may_write.wait(20)
        return put(file, data)

    def chunks() -> Iterator[bytes]:
        nonlocal filled
        for block in blocks:
            if filled == 1:
                may_write.set()  # the first one is being written: that we are asked for more is the proof
            filled += 1
            yield block

    monkeypatch.setattr(os, "write", written)
    write(tmp_path / "file", chunks())
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"".join(blocks)


def test_a_source_that_fails_is_told_when_nothing_is_being_written_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, is_writing = os.write, False

    def written(file: int, data: memoryview) -> int:
        nonlocal is_writing
        is_writing = True
        failed.wait(20)
        done = put(file, data)
        is_writing = False
        return done

    failed = threading.Event()

    def chunks() -> Iterator[bytes]:
        yield bytes(BLOCK_BYTES)
        threading.Timer(0.2, failed.set).start()
        raise ValueError("the source")

    monkeypatch.setattr(os, "write", written)
    with pytest.raises(ValueError, match="the source"):
        write(tmp_path / "file", chunks())
    assert not is_writing


HANGING = """
import os, sys, threading
from pathlib import Path
from athena_backup.errors import AthenaError
from athena_backup.operation import Operation
from athena_backup.pipeline import Source, write_stream
from athena_backup.store import direct
from athena_backup.store.local import LocalStore

operation = Operation()

def hang(file, block):
    operation.cancel("somebody did")
    threading.Event().wait()

direct._write_block = hang
source = Source("edweb", lambda _: (os.urandom(1 << 20) for _ in range(20)))
try:
    write_stream(source, LocalStore(sys.argv[1]), lambda number: f"set/{number}", operation)
except AthenaError as error:
    print(error)
"""


def test_a_disk_that_hangs_keeps_no_cancelled_process_from_ending(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)], timeout=60, check=True, capture_output=True, text=True
    )
    assert "somebody did" in ended.stdout


def test_a_write_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for blocks in (1, 2, 5):
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / f"file {blocks}", [bytes(BLOCK_BYTES)] * blocks)
