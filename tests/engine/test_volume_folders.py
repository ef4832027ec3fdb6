"""What a restore remembers of folders and links: as they were, and so little that millions fit into a small pod."""

import tracemalloc
from collections.abc import Callable

import pytest

from athena_backup.errors import FinalError
from athena_backup.volume_folders import Folders, SymbolicLinks
from athena_backup.volume_pax import DIRECTORY, SYMLINK, Member

FOLDERS = LINKS = 20_000


def folder(number: int) -> Member:
    name = f"repositories/repository-{number // 256:05}.git/objects/{number % 256:02x}".encode()
    return Member(name, DIRECTORY, 0o2755, 1000 + number, 1001, 1_700_000_000_123_456_789 + number)


def test_every_folder_comes_back_as_it_was() -> None:
    usual = folder(1)
    unusual = [
        Member(b"with/attributes", DIRECTORY, 0o700, 0, 0, 0, xattrs={"user.a": b"1"}),
        Member(b"before/1970", DIRECTORY, 0o700, 2**32 - 2, 0, -1),
        Member(b"after/2262", DIRECTORY, 0o700, 0, 0, 2**64),
        Member(b"of/nobody", DIRECTORY, 0o700, 2**40, 0, 0),
    ]
    folders = Folders()
    for member in (usual, *unusual):
        folders.add(member.name, member)
    assert [folders.of(member.name) for member in (usual, *unusual)] == [usual, *unusual]
    with pytest.raises(FinalError, match="with/attributes"):
        folders.add(b"with/attributes", usual)


def test_the_deepest_come_first_and_the_root_last() -> None:
    folders = Folders()
    for name in (b"", b"a", b"a/b", b"c", b"a/b/c", b"c/d"):
        folders.add(name, Member(name, DIRECTORY, 0o700, 0, 0, 0))
    assert [sorted(paths) for paths in folders.deepest_first()] == [[b"a/b/c"], [b"a/b", b"c/d"], [b"a", b"c"], [b""]]


def bytes_each(add: Callable[[bytes, Member], None], make: Callable[[int], Member], count: int) -> float:
    """What is kept of each of ``count`` members once it was noted."""
    tracemalloc.start()
    try:
        for number in range(count):
            member = make(number)
            add(member.name, member)
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return taken_bytes / count


def test_a_folder_takes_few_bytes() -> None:
    """A million of them was more than half of what a whole operation may take."""
    assert bytes_each(Folders().add, folder, FOLDERS) < 300


def link(number: int) -> Member:
    name = f"packages/{number // 256:05}/node_modules/.bin/{number % 256:02x}".encode()
    return Member(name, SYMLINK, 0o777, 1000, 1001, 1_700_000_000_123_456_789 + number, link=b"../%d.js" % number)


def test_every_link_comes_back_as_it_was_in_its_turn() -> None:
    unusual = [
        Member(b"with/attributes", SYMLINK, 0o777, 0, 0, 0, link=b"x", xattrs={"trusted.a": b"1"}),
        Member(b"after/2262", SYMLINK, 0o777, 0, 0, 2**64, link=b"not-utf8-\xff"),
        Member(b"long", SYMLINK, 0o777, 0, 0, -1, link=b"n" * 4095),
    ]
    members = [link(2), *unusual, link(1)]
    links = SymbolicLinks()
    for member in members:
        links.add(member.name, member)
    assert list(links) == [(member.name, member) for member in members]


def test_a_link_takes_few_bytes() -> None:
    assert bytes_each(SymbolicLinks().add, link, LINKS) < 250
