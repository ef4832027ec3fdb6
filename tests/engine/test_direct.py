"""Files that are written past the page cache hold what was written, and where that can't be, they are written all the same."""

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
from collections.abc import Iterable
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


def test_a_write_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "file", [bytes(BLOCK_BYTES)])
