"""Folders that are renamed while a volume is read: what was in them is in the backup all the same."""

import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tree_picture import picture

from athena_backup import volume_members, volume_moved
from athena_backup.errors import FinalError
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_entry import Entry
from athena_backup.volume_extract import read_volume
from athena_backup.volume_moved import _COARSE_NANOSECONDS, Moved
from athena_backup.volume_walk import Walk

SET_ID = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``first`` is read before ``middle``, and that before ``zeta``, which has the most in it."""
    # What a test made a moment before its walk is to be old.
    monkeypatch.setattr(volume_moved, "_COARSE_NANOSECONDS", 0)
    place = tmp_path / "live"
    for name in ("first/file", "middle/file", "zeta/file", "zeta/deep/down/file", "zeta/deep/other"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"content of {name}")
    return place


def walked(root: Path, when: bytes, disturb: Callable[[], object]) -> tuple[Walk, list[str]]:
    """A walk with something done when an entry is given."""
    walk = Walk(root, Operation())
    paths = []
    for entry in walk.entries():
        if entry.path == when:
            disturb()
        paths.append(entry.path.decode())
    assert len(set(paths)) == len(paths)
    return walk, paths


@pytest.mark.parametrize("target", ["alpha", "first/zeta", "middle/zeta", "zz"])
def test_a_folder_that_is_renamed_before_the_walk_comes_to_it_is_read(root: Path, target: str) -> None:
    walk, paths = walked(root, b"first/file", lambda: (root / "zeta").rename(root / target))
    # Where the walk came by later it stands under its new name; the copy is that of no instant either way.
    own = "middle/zeta" if target == "middle/zeta" else "zeta"
    assert {f"{own}/file", f"{own}/deep/down/file", f"{own}/deep/other", f"{own}/deep", own} <= set(paths)
    assert walk.vanished == []
    assert paths[-1] == "."


def test_what_is_renamed_comes_back_with_its_content(
    root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = picture(root)
    pieces = volume_members.Members.pieces

    def disturbed(self: volume_members.Members, entry: Entry) -> object:
        if entry.path == b"first/file":
            (root / "zeta").rename(root / "first" / "zeta")
        return pieces(self, entry)

    monkeypatch.setattr(volume_members.Members, "pieces", disturbed)
    component = write_volume(Volume("edweb", root), local_store, SET_ID, "run", Operation())
    (tmp_path / "new").mkdir()
    read_volume(component, local_store, tmp_path / "new", Operation())
    restored = picture(tmp_path / "new")
    for found in (restored, expected):  # the folders into which and out of which it went
        for changed in (b"", b"/first"):
            found.pop(changed, None)
    assert restored == expected


def test_folders_in_one_that_is_renamed_may_be_renamed_too(root: Path) -> None:
    def rename() -> None:
        (root / "zeta" / "deep" / "down").rename(root / "first" / "down")
        (root / "zeta").rename(root / "first" / "zeta")

    walk, paths = walked(root, b"first/file", rename)
    assert "zeta/deep/other" in paths
    assert walk.vanished == [], "as it was moved before its folder was listed, nobody listed it there"


def test_folders_that_change_their_names_with_each_other_are_both_read(root: Path) -> None:
    def swap() -> None:
        (root / "middle").rename(root / "aside")
        (root / "zeta").rename(root / "middle")
        (root / "aside").rename(root / "zeta")

    walk, paths = walked(root, b"first/file", swap)
    assert {"middle/deep/other", "zeta/file"} <= set(paths)
    assert walk.vanished == []


def test_a_folder_that_was_away_for_a_moment_is_read(root: Path) -> None:
    (root / "zulu").mkdir()
    (root / "zulu" / "file").touch()
    walk = Walk(root, Operation())
    paths = []
    for entry in walk.entries():
        paths.append(entry.path.decode())
        if entry.path == b"first/file":
            (root / "zeta").rename(root / "aside")
        if entry.path == b"zulu/file":
            (root / "aside").rename(root / "zeta")
    assert {"zeta/file", "zeta/deep/down/file", "zeta"} <= set(paths)
    assert walk.vanished == []


def test_of_a_folder_that_was_moved_and_replaced_every_file_counts_as_vanished(
    root: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has its name by then. More than a hundredth of all files fails the backup, as of others that vanish."""

    def replace() -> None:
        (root / "zeta").rename(root / "first" / "before")
        (root / "zeta").mkdir()
        (root / "zeta" / "new").touch()

    walk, paths = walked(root, b"first/file", replace)
    assert {"zeta", "zeta/new"} <= set(paths)
    assert (walk.vanished, walk.missed_files) == (["zeta"], 2)

    shutil.rmtree(root / "zeta")
    (root / "first" / "before").rename(root / "zeta")
    pieces = volume_members.Members.pieces

    def disturbed(self: volume_members.Members, entry: Entry) -> object:
        if entry.path == b"first/file":
            replace()
        return pieces(self, entry)

    monkeypatch.setattr(volume_members.Members, "pieces", disturbed)
    with pytest.raises(FinalError, match="3 of 6 files changed or vanished while they were read: zeta"):
        write_volume(Volume("edweb", root), local_store, SET_ID, "run", Operation())


def test_of_a_folder_whose_name_a_link_has_by_then_every_file_counts_as_vanished(root: Path) -> None:
    def replace() -> None:
        (root / "zeta").rename(root / "first" / "version-1")
        (root / "zeta").symlink_to("first/version-1")

    walk, paths = walked(root, b"first/file", replace)
    assert "zeta" in paths
    assert (walk.vanished, walk.missed_files) == (["zeta"], 2)


def test_a_folder_that_is_deleted_is_one_that_vanished(root: Path) -> None:
    walk, paths = walked(root, b"first/file", lambda: shutil.rmtree(root / "zeta"))
    assert walk.vanished == ["zeta"]
    assert not any(path.startswith("zeta") for path in paths)


def test_a_new_folder_with_the_number_of_a_deleted_one_is_not_taken_for_it(root: Path) -> None:
    number = (root / "zeta").stat().st_ino
    reused: list[Path] = []

    def reuse() -> None:
        shutil.rmtree(root / "zeta")
        made_from = time.time_ns() + 2 * _COARSE_NANOSECONDS
        while time.time_ns() < made_from:  # what is made in the same instant could be as old
            time.sleep(0.001)
        for count in range(2_000):
            made = root / "first" / f"new-{count}"
            made.mkdir()
            if made.stat().st_ino == number:
                (made / "new").touch()
                reused.append(made)
                return

    walk, paths = walked(root, b"first/file", reuse)
    if not reused:
        pytest.skip("this file system did not use the number again")
    assert walk.vanished == ["zeta"]
    assert not any(path.startswith("zeta") for path in paths)


@pytest.mark.parametrize("is_told", [True, False], ids=["birth-told", "birth-unknown"])
@pytest.mark.parametrize(
    ("made_after_ns", "is_found"),
    [(-2 * _COARSE_NANOSECONDS, True), (-_COARSE_NANOSECONDS // 2, False), (_COARSE_NANOSECONDS // 2, False)],
    ids=["before", "at-once", "after"],
)
def test_a_folder_that_may_be_as_young_as_the_walk_is_not_taken_for_a_lost_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool, made_after_ns: int, is_found: bool
) -> None:
    """Its files would stand under a name that they never had; NFS may not tell when it was made, but when it was changed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    status = folder.stat()
    monkeypatch.setattr(volume_moved, "_birth_ns", lambda _: status.st_mtime_ns if is_told else None)
    if is_told:
        os.utime(folder, ns=(0, 0))
    moved = Moved(began_ns=status.st_mtime_ns - made_after_ns)
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        found = [one.inode for one in moved.seek({status.st_ino}, root, status.st_dev, 1, lambda: None, b".athena-")]
    finally:
        os.close(root)
    assert found == ([status.st_ino] if is_found else [])


def test_a_folder_that_may_not_be_entered_is_not_sought_elsewhere(root: Path) -> None:
    """It is there under its name, in the place of a file that is in another archive, and counts as vanished."""
    walk = Walk(root, Operation(), may_enter=lambda path: path != b"zeta")
    paths = [entry.path for entry in walk.entries()]
    assert walk.vanished == ["zeta"]
    assert b"zeta" not in paths


def test_a_file_system_whose_listings_have_other_numbers_is_read_as_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an overlay's may have."""
    scandir = os.scandir
    monkeypatch.setattr("athena_backup.volume_walk.os.scandir", lambda folder: _Listing(scandir(folder)))
    walk = Walk(root, Operation())
    paths = [entry.path for entry in walk.entries()]
    assert not walk._numbers_agree
    assert b"zeta/deep/down/file" in paths
    assert walk.vanished == []


def test_where_every_listing_makes_up_numbers_no_folder_costs_another_listing_for_long(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on FAT and on an SMB share without its server's numbers."""
    for number in range(30):
        (root / f"sub-{number}").mkdir()
    folders = sum(path.is_dir() for path in root.rglob("*")) + 1
    scandir = os.scandir
    listed: list[int] = []

    def listing(folder: int) -> _Listing:
        listed.append(folder)
        return _Listing(scandir(folder))

    made_up = itertools.count(1 << 40)
    monkeypatch.setattr(_Item, "inode", lambda _: next(made_up))
    monkeypatch.setattr("athena_backup.volume_walk.os.scandir", listing)
    monkeypatch.setattr(volume_moved, "_STEP_NANOSECONDS", -(1 << 60))  # what was made a moment ago is at rest
    walk = Walk(root, Operation())
    paths = [entry.path for entry in walk.entries()]
    assert (walk.vanished, walk.missed_files) == ([], 0)
    assert {b"sub-29", b"zeta/deep/down/file"} <= set(paths)
    assert len(listed) == folders + 8


def test_however_many_folders_are_replaced_each_is_known_to_be_another(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        (root / f"sub-{number}").mkdir()
        (root / f"sub-{number}" / "file").touch()
    os.utime(root, ns=(1, 1))
    # A time that can be set stands for the one that can't.
    monkeypatch.setattr("athena_backup.volume_walk.last_change_ns", lambda folder: os.fstat(folder).st_mtime_ns)

    def replace() -> None:
        for number in range(10):
            (root / f"sub-{number}").rename(root / "first" / f"before-{number}")
            (root / f"sub-{number}").mkdir()

    walk, _ = walked(root, b"first/file", replace)
    assert sorted(walk.vanished) == [f"sub-{number}" for number in range(10)]


class _Listing:
    """A listing with other numbers than looks have."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __enter__(self) -> "map[_Item]":
        return map(_Item, self._items)

    def __exit__(self, *_: object) -> None:
        self._items.close()


@pytest.mark.parametrize("when", [b"first/file", b"middle/file"])
def test_folders_of_which_listings_give_no_numbers_of_their_own_count_as_vanished(
    root: Path, monkeypatch: pytest.MonkeyPatch, when: bytes
) -> None:
    """As of many a file system in user space: one number for all."""
    scandir = os.scandir
    monkeypatch.setattr(_Item, "inode", lambda _: 0xFFFFFFFF)
    monkeypatch.setattr("athena_backup.volume_walk.os.scandir", lambda folder: _Listing(scandir(folder)))

    def remove() -> None:
        for name in ("middle", "zeta"):
            (root / name).rename(root / "first" / name)

    walk, paths = walked(root, when, remove)
    gone = ["zeta"] if when == b"middle/file" else ["middle", "zeta"]
    assert [name for name in walk.vanished if "/" not in name] == gone
    assert not any(path.startswith("zeta") for path in paths)


class _Item:
    def __init__(self, item: "os.DirEntry[str]") -> None:
        self.name, self.is_dir, self._number = item.name, item.is_dir, item.inode() + (1 << 40)

    def inode(self) -> int:
        return self._number
