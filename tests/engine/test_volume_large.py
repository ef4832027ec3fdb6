"""Large files stand in archives of their own: read at once, found again in full, and right whatever happens to them meanwhile."""

import dataclasses
import itertools
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from tree_picture import picture

from athena_backup import volume_archive, volume_large
from athena_backup.crew import Crew, Unit
from athena_backup.errors import CancelledError, FinalError, FullError
from athena_backup.manifest import Component, VolumeFacts
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.pipeline import FRAME_BYTES, read_stream
from athena_backup.store import Entry as StoreEntry
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_entry import Entry
from athena_backup.volume_extract import read_volume
from athena_backup.volume_large import Folder, LargeFile, Layout, Shares, _shared_out, look
from athena_backup.volume_read import _Archive
from athena_backup.volume_walk import Walk

SET_ID = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
LARGE_BYTES = 64 << 10
AS_ROOT = os.geteuid() == 0
WALK_FIRST = pytest.mark.parametrize("walk_first", [False, True], ids=["archive-first", "walk-first"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "live"
    place.mkdir()
    return place


def large(path: Path, letter: bytes = b"a", *, size_bytes: int = LARGE_BYTES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(letter * size_bytes)
    return path


def back_up(
    root: Path,
    store: LocalStore,
    operation: Operation | None = None,
    *,
    jobs: int = 1,
    torn_limit: float = 1,
    archive_bytes: int = 1,
    part_limit_bytes: int = 1 << 30,
) -> Component:
    return write_volume(
        Volume("gitserver", root), store, SET_ID, "run", operation or Operation(), crew=Crew(jobs), torn_limit=torn_limit,
        large_bytes=LARGE_BYTES, archive_bytes=archive_bytes, part_limit_bytes=part_limit_bytes,
    )  # fmt: skip


def restored(component: Component, store: LocalStore, target: Path) -> Path:
    target.mkdir()
    read_volume(component, store, target, Operation(), crew=Crew(3))
    return target


def names(component: Component, store: LocalStore) -> list[list[str]]:
    """The members' names of each archive, in order."""
    found = []
    for stream in component.streams:
        archive = _Archive(read_stream("gitserver", stream.parts, store, Operation()))
        found.append([])
        for member in archive.members():
            found[-1].append(member.name.decode())
            for _ in archive.content(member):
                pass
        archive.check_end()
    return found


def facts(component: Component) -> VolumeFacts:
    assert component.volume is not None
    return component.volume


def ordered(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], object] = lambda: None, *, walk_first: bool = False
) -> None:
    """Have the walk come first or last, and something happen when the look is done."""
    real = volume_archive.look

    def looking(*arguments: object, **named: object) -> Layout:
        layout = real(*arguments, **named)  # type: ignore[arg-type]
        act()
        return dataclasses.replace(layout, rest_bytes=1 << 50 if walk_first else 0)

    monkeypatch.setattr(volume_archive, "look", looking)


def after_walk(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have the walk come first, and something happen when it has come by."""
    ordered(monkeypatch, walk_first=True)
    real = Shares.end_walk

    def ending(shares: Shares) -> list[tuple[bytes, Folder]]:
        act()
        return real(shares)

    monkeypatch.setattr(Shares, "end_walk", ending)


def test_large_files_stand_in_archives_of_their_own_and_everything_else_in_the_last(
    root: Path, local_store: LocalStore, tmp_path: Path
) -> None:
    large(root / "a" / "b" / "big", size_bytes=2 * LARGE_BYTES)
    large(root / "middle", size_bytes=LARGE_BYTES + 512)
    large(root / "exactly")
    large(root / "almost", size_bytes=LARGE_BYTES - 512)
    large(root / "linked", size_bytes=4 * LARGE_BYTES)
    os.link(root / "linked", root / "a" / "second name")
    with (root / "hole").open("wb") as file:
        file.truncate(100 * LARGE_BYTES)
    large(root / ".athena-0123456789ab" / "staged")
    component = back_up(root, local_store)
    *firsts, last = names(component, local_store)
    assert firsts == [["a/b/big"], ["middle"], ["exactly"]]
    assert last == ["a/b", "a/second name", "a", "almost", "hole", "linked", "."]
    assert [stream.name for stream in component.streams] == [f"{number:04}.tar.zst" for number in range(4)]
    shutil.rmtree(root / ".athena-0123456789ab")
    os.utime(root, ns=(1, 1_500_000_000_999_999_999))
    component = back_up(root, local_store)
    before = picture(root)
    target = restored(component, local_store, tmp_path / "new")
    assert picture(target) == before
    assert os.stat(target / "hole").st_blocks == 0
    found = facts(component)
    assert (found.members, found.files, found.torn, found.vanished) == (10, 6, (), ())
    assert found.content_bytes == sum((root / name).stat().st_size for name in
                                      ("a/b/big", "middle", "exactly", "almost", "linked", "hole"))  # fmt: skip


def test_everything_about_a_large_file_and_the_folders_above_it_comes_back(
    root: Path, local_store: LocalStore, tmp_path: Path
) -> None:
    odd = Path(os.fsdecode(b"not-utf8-\xff\n" + b"n" * 200))
    big = large(root / odd / "sub" / odd, size_bytes=3 * LARGE_BYTES)
    with big.open("r+b") as file:
        file.seek(10 * LARGE_BYTES)
        file.write(b"behind a hole")
    big.chmod(0o4711)
    os.utime(big, ns=(1, -1_500_000_001))
    os.setxattr(big, "user.note", b"\0\xff=\n")
    os.setxattr(root / odd, "user.folder", b"x")
    if AS_ROOT:
        os.chown(big, 1234, 2_500_000)
        os.chown(root / odd / "sub", 65534, 65534)
        big.chmod(0o4711)
    (root / odd / "sub").chmod(0o2751)
    os.utime(root / odd / "sub", ns=(1, 1_600_000_000_000_000_001))
    os.utime(root / odd, ns=(1, 1_500_000_000_000_000_001))
    before = picture(root)
    component = back_up(root, local_store, part_limit_bytes=100)
    assert len(component.streams) == 2
    assert all(len(stream.parts) >= 2 for stream in component.streams)
    assert picture(restored(component, local_store, tmp_path / "new")) == before
    assert facts(component).special_modes
    assert facts(component).xattr_classes == ("user",)
    if AS_ROOT:
        assert set(facts(component).uids) >= {1234, 65534}


class Meeting(LocalStore):
    """A store that lets nobody begin an object before two are begun."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.begun: list[str] = []
        self._both = threading.Barrier(2, timeout=20)

    def write(self, key: str, chunks: Iterable[bytes]) -> StoreEntry:
        self.begun.append(key.rpartition("/")[2])
        if len(self.begun) <= 2:
            self._both.wait()
        return super().write(key, chunks)


def test_two_archives_are_written_at_the_same_time_the_biggest_first(root: Path, local_store: LocalStore) -> None:
    for letter, size in (("x", 2), ("y", 30), ("z", 20)):
        large(root / letter, size_bytes=size * LARGE_BYTES)
    store = Meeting(local_store.location.place)
    component = back_up(root, store, jobs=2)
    assert sorted(store.begun[:2]) == ["0000.tar.zst.0000", "0001.tar.zst.0000"]
    assert names(component, store) == [["y"], ["z"], ["x"], ["."]]


def test_a_table_goes_before_any_archive_that_is_not_begun(root: Path, local_store: LocalStore) -> None:
    for letter in "xyz":
        large(root / letter)
    crew = Crew(1)
    order: list[str] = []
    tables: list[threading.Thread] = []

    class Queueing(LocalStore):
        def write(self, key: str, chunks: Iterable[bytes]) -> StoreEntry:
            order.append(key.rpartition("/")[2])
            if not tables:
                table = Unit(1, lambda _: order.append("table"))
                tables.append(threading.Thread(target=lambda: crew.run([table])))
                tables[0].start()
                while not any(one.unit is table for one in crew._waiting):
                    threading.Event().wait(0.001)
            return super().write(key, chunks)

    store = Queueing(local_store.location.place)
    write_volume(
        Volume("v", root), store, SET_ID, "run", Operation(), crew=crew, large_bytes=LARGE_BYTES, archive_bytes=1
    )
    tables[0].join(20)
    assert order.index("table") == 1
    assert len(order) == 5


@WALK_FIRST
class TestBetweenLookAndRead:
    """What happens to a listed path after the look, whoever comes by first."""

    def after(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], *, walk_first: bool) -> None:
        ordered(monkeypatch, act, walk_first=walk_first)

    def test_gone(
        self, root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk_first: bool
    ) -> None:
        big = large(root / "big")
        (root / "small").touch()
        self.after(monkeypatch, big.unlink, walk_first=walk_first)
        component = back_up(root, local_store)
        assert facts(component).vanished == ("big",)
        assert os.listdir(restored(component, local_store, tmp_path / "new")) == ["small"]
        large(root / "big")
        with pytest.raises(FinalError, match="1 of 2 files changed or vanished while they were read: big"):
            back_up(root, local_store, torn_limit=0.49)

    def test_replaced_by_rename(
        self, root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk_first: bool
    ) -> None:
        big = large(root / "big")
        large(root / "next", b"new", size_bytes=10)
        self.after(monkeypatch, lambda: (root / "next").rename(big), walk_first=walk_first)
        component = back_up(root, local_store, torn_limit=0)
        assert (restored(component, local_store, tmp_path / "new") / "big").read_bytes() == b"new" * 10

    def test_renamed_while_a_new_one_is_begun(
        self, root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk_first: bool
    ) -> None:
        """As logs are rotated: where the walk came by before, the old one is in no archive, and that is told."""
        big = large(root / "big", b"old")

        def rotate() -> None:
            big.rename(root / "big.1")
            large(big, b"new", size_bytes=10)

        if walk_first:
            after_walk(monkeypatch, rotate)
        else:
            self.after(monkeypatch, rotate, walk_first=False)
        component = back_up(root, local_store)
        target = restored(component, local_store, tmp_path / "new")
        assert (target / "big").read_bytes() == b"new" * 10
        assert facts(component).torn == (("big",) if walk_first else ())
        assert (target / "big.1").exists() == (not walk_first)

    def test_turned_into_a_folder(
        self, root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk_first: bool
    ) -> None:
        big = large(root / "big")

        def turn() -> None:
            big.unlink()
            large(big / "inner", size_bytes=1)

        self.after(monkeypatch, turn, walk_first=walk_first)
        component = back_up(root, local_store, torn_limit=0)
        assert (restored(component, local_store, tmp_path / "new") / "big" / "inner").read_bytes() == b"a"

    @pytest.mark.parametrize("kind", ["link", "fifo"])
    def test_turned_into_something_else(
        self,
        root: Path,
        local_store: LocalStore,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        walk_first: bool,
        kind: str,
    ) -> None:
        big = large(root / "big")
        large(tmp_path / "secret")

        def turn() -> None:
            big.unlink()
            if kind == "link":
                big.symlink_to(tmp_path / "secret")
            else:
                os.mkfifo(big)

        self.after(monkeypatch, turn, walk_first=walk_first)
        component = back_up(root, local_store, torn_limit=0)
        target = restored(component, local_store, tmp_path / "new")
        assert picture(target) == picture(root)

    def test_turned_into_a_socket(
        self, root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk_first: bool
    ) -> None:
        big = large(root / "big")
        (root / "small").touch()
        monkeypatch.chdir(root)  # a socket's path is at most 108 bytes
        with socket.socket(socket.AF_UNIX) as listener:
            self.after(monkeypatch, lambda: (big.unlink(), listener.bind("big")), walk_first=walk_first)
            component = back_up(root, local_store)
        assert (facts(component).sockets, facts(component).vanished) == (1, ("big",))

    def test_given_a_second_name(
        self, root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk_first: bool
    ) -> None:
        big = large(root / "big")
        self.after(monkeypatch, lambda: os.link(big, root / "another"), walk_first=walk_first)
        component = back_up(root, local_store, torn_limit=0)
        assert names(component, local_store) == [[], ["another", "big", "."]]
        assert picture(restored(component, local_store, tmp_path / "new")) == picture(root)

    def test_in_a_folder_that_was_renamed(
        self, root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk_first: bool
    ) -> None:
        large(root / "folder" / "sub" / "big")
        self.after(monkeypatch, lambda: (root / "folder").rename(root / "moved"), walk_first=walk_first)
        component = back_up(root, local_store)
        assert facts(component).vanished == ("folder/sub/big",)
        target = restored(component, local_store, tmp_path / "new")
        assert (target / "moved" / "sub" / "big").stat().st_size == LARGE_BYTES
        # The walk may have left it to its archive, which finds nothing: then its folders are there, and empty.
        assert [path.name for path in target.rglob("*") if path.is_file()] == ["big"]
        assert (target / "folder").exists() == walk_first

    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_in_a_folder_that_became_something_else(
        self,
        root: Path,
        local_store: LocalStore,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        walk_first: bool,
        kind: str,
    ) -> None:
        large(root / "folder" / "sub" / "big")
        large(tmp_path / "outside" / "sub" / "big", b"secret")

        def turn() -> None:
            shutil.rmtree(root / "folder")
            if kind == "link":
                (root / "folder").symlink_to(tmp_path / "outside")
            else:
                (root / "folder").touch()

        self.after(monkeypatch, turn, walk_first=walk_first)
        component = back_up(root, local_store)
        assert facts(component).vanished == ("folder/sub/big",)
        assert picture(restored(component, local_store, tmp_path / "new")) == picture(root)

    def test_in_a_folder_that_became_a_git_repository(
        self, root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk_first: bool
    ) -> None:
        # As rsync does: the pack comes before the refs.
        large(root / "r.git" / "objects" / "pack" / "pack-1.pack")
        large(root / "r.git" / "objects" / "ab" / "cdef")
        large(root / "r.git" / "objects" / "info" / "commit-graphs" / "graph-1.graph")
        (root / "r.git" / "HEAD").touch()
        self.after(monkeypatch, (root / "r.git" / "refs").mkdir, walk_first=walk_first)
        component = back_up(root, local_store, torn_limit=0)
        firsts = [name for archive in names(component, local_store)[:-1] for name in archive]
        assert bool(firsts) != walk_first, "what is not read yet is read in git's order"
        assert picture(restored(component, local_store, tmp_path / "new")) == picture(root)


class TestBetweenArchiveAndWalk:
    """What happens after an archive has a file, before the walk comes by."""

    @pytest.fixture
    def before_walk(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
        def set_up(act: Callable[[], object]) -> None:
            real = Walk.entries

            def entries(walk: Walk, root: int | None = None) -> Iterator[Entry]:
                act()
                yield from real(walk, root)

            ordered(monkeypatch, walk_first=False)
            monkeypatch.setattr(Walk, "entries", entries)

        return set_up

    def test_a_folder_that_is_gone_is_given_as_it_was_found(
        self, root: Path, local_store: LocalStore, tmp_path: Path, before_walk: Callable[[Callable[[], object]], None]
    ) -> None:
        large(root / "folder" / "sub" / "big")
        os.setxattr(root / "folder", "user.note", b"x")
        (root / "folder" / "sub").chmod(0o2710)
        os.utime(root / "folder", ns=(1, 1_500_000_000_000_000_001))
        expected = picture(root)
        before_walk(lambda: shutil.rmtree(root / "folder"))
        target = restored(back_up(root, local_store, torn_limit=0), local_store, tmp_path / "new")
        os.utime(target, ns=(1, os.stat(root).st_mtime_ns))
        found = picture(target)
        assert found.pop(b"")
        assert expected.pop(b"")
        assert found == expected

    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_what_took_the_folders_place_is_told_and_left_out(
        self,
        root: Path,
        local_store: LocalStore,
        tmp_path: Path,
        before_walk: Callable[[Callable[[], object]], None],
        kind: str,
    ) -> None:
        large(root / "folder" / "sub" / "big")

        def turn() -> None:
            shutil.rmtree(root / "folder")
            if kind == "file":
                (root / "folder").touch()
            else:
                (root / "folder").symlink_to("elsewhere")

        before_walk(turn)
        component = back_up(root, local_store)
        assert facts(component).vanished == ("folder",)
        assert (restored(component, local_store, tmp_path / "new") / "folder" / "sub" / "big").is_file()

    def test_a_folder_that_took_the_files_place_is_told_and_left_out(
        self, root: Path, local_store: LocalStore, tmp_path: Path, before_walk: Callable[[Callable[[], object]], None]
    ) -> None:
        big = large(root / "big")
        before_walk(lambda: (big.unlink(), large(big / "inner", size_bytes=1)))
        component = back_up(root, local_store)
        assert facts(component).vanished == ("big",)
        assert (restored(component, local_store, tmp_path / "new") / "big").is_file()

    def test_a_link_that_took_the_files_place_is_given_no_second_time(
        self, root: Path, local_store: LocalStore, tmp_path: Path, before_walk: Callable[[Callable[[], object]], None]
    ) -> None:
        big = large(root / "big")
        before_walk(lambda: (big.unlink(), big.symlink_to("x")))
        target = restored(back_up(root, local_store, torn_limit=0), local_store, tmp_path / "new")
        assert (target / "big").is_file()
        assert not (target / "big").is_symlink()


class TestBetweenWalkAndArchive:
    """What happens after the walk left a file to its archive, before that reads it."""

    @pytest.fixture
    def before_archive(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
        def set_up(act: Callable[[], object]) -> None:
            real = volume_archive.open_large

            def opening(root: int, path: bytes) -> object:
                act()
                return real(root, path)

            ordered(monkeypatch, walk_first=True)
            monkeypatch.setattr(volume_archive, "open_large", opening)

        return set_up

    def test_a_file_that_is_gone_is_vanished_and_its_folder_is_whole(
        self,
        root: Path,
        local_store: LocalStore,
        tmp_path: Path,
        before_archive: Callable[[Callable[[], object]], None],
    ) -> None:
        large(root / "folder" / "big")
        before_archive(lambda: shutil.rmtree(root / "folder"))
        component = back_up(root, local_store)
        assert facts(component).vanished == ("folder/big",)
        assert os.listdir(restored(component, local_store, tmp_path / "new") / "folder") == []

    def test_a_folder_in_its_place_makes_it_vanished(
        self,
        root: Path,
        local_store: LocalStore,
        tmp_path: Path,
        before_archive: Callable[[Callable[[], object]], None],
    ) -> None:
        big = large(root / "big")
        (root / "small").touch()
        before_archive(lambda: (big.unlink(), large(big / "inner")))
        component = back_up(root, local_store)
        assert facts(component).vanished == ("big",)
        assert os.listdir(restored(component, local_store, tmp_path / "new")) == ["small"]

    def test_a_second_name_is_too_late_and_told(
        self,
        root: Path,
        local_store: LocalStore,
        tmp_path: Path,
        before_archive: Callable[[Callable[[], object]], None],
    ) -> None:
        big = large(root / "big")
        before_archive(lambda: os.link(big, root / "another"))
        component = back_up(root, local_store)
        assert facts(component).torn == ("big",)
        assert os.listdir(restored(component, local_store, tmp_path / "new")) == ["big"]

    def test_a_root_that_became_another_fails(
        self, root: Path, local_store: LocalStore, before_archive: Callable[[Callable[[], object]], None]
    ) -> None:
        large(root / "big")
        before_archive(lambda: (root.rename(root.with_name("elsewhere")), root.mkdir()))
        with pytest.raises(FinalError, match="became another directory"):
            back_up(root, local_store)


def test_a_volume_of_which_every_large_file_vanished_counts_as_empty(
    root: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered(monkeypatch, large(root / "big").unlink)
    with pytest.raises(FinalError, match="is empty: is it mounted"):
        back_up(root, local_store)


@pytest.mark.skipif(not AS_ROOT or not shutil.which("unshare"), reason="only root may mount")
def test_the_look_enters_no_other_file_system(root: Path) -> None:
    large(root / "here")
    (root / "inner").mkdir()
    script = (
        "import os, sys\n"
        "from athena_backup.volume_large import look\n"
        "open(sys.argv[1] + '/inner/there', 'wb').write(b'x' * 100_000)\n"
        "layout = look(os.open(sys.argv[1], os.O_RDONLY), lambda: None, large_bytes=1, archive_bytes=1)\n"
        "print([file.path for archive in layout.archives for file in archive], layout.rest_bytes)\n"
    )
    command = f'mount -t tmpfs none "{root}/inner" && exec "{sys.executable}" -c "$SCRIPT" "{root}"'
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, env={**os.environ, "SCRIPT": script}
    )
    if "mount" in ended.stderr:
        pytest.skip(f"no mounting here: {ended.stderr}")
    assert ended.stdout == f"[b'here'] {2 * volume_large._ENTRY_BYTES}\n", ended.stderr


def test_the_look_leaves_git_repositories_to_their_order(root: Path, local_store: LocalStore) -> None:
    for name in ("objects/pack/pack-1.pack", "lfs/objects/large", "objects/ab/cd"):
        large(root / "project" / ".git" / name)
    (root / "project" / ".git" / "refs").mkdir()
    (root / "project" / ".git" / "HEAD").touch()
    large(root / "project" / "asset")
    component = back_up(root, local_store)
    first, last = names(component, local_store)
    assert first == ["project/asset"]
    assert last.index("project/.git/objects/ab/cd") < last.index("project/.git/objects/pack/pack-1.pack")


def test_the_look_passes_over_what_vanishes_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/big", "b/big", "c"):
        large(root / name)
    real = volume_large._status

    def looking(folder: int, name: bytes) -> os.stat_result | None:
        if name == b"c":
            shutil.rmtree(root / "a")
            (root / "c").unlink()
        return real(folder, name)

    monkeypatch.setattr(volume_large, "_status", looking)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        layout = look(descriptor, lambda: None, large_bytes=LARGE_BYTES, archive_bytes=1)
    finally:
        os.close(descriptor)
    assert [file.path for archive in layout.archives for file in archive] == [b"b/big"]
    assert layout.folders.keys() == {b"b"}


def test_the_look_weighs_packs_and_needs_no_memory_for_the_entries_of_a_folder(root: Path) -> None:
    for name in ("project.git/objects/pack/pack-1.pack", "small"):
        large(root / name, size_bytes=LARGE_BYTES - 4096)
    (root / "project.git" / "refs").mkdir()
    (root / "project.git" / "HEAD").touch()
    for number in range(3_000):
        (root / f"{number:0200}").touch()
    descriptor = os.open(root, os.O_RDONLY)
    tracemalloc.start()
    try:
        layout = look(descriptor, lambda: None, large_bytes=LARGE_BYTES, archive_bytes=1)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        os.close(descriptor)
    assert layout.rest_bytes == 3_002 * volume_large._ENTRY_BYTES + 2 * (LARGE_BYTES - 4096)
    assert peak_bytes < 300_000


def test_archives_are_full_before_the_next_begins_and_their_number_is_bounded() -> None:
    def sizes(*files: int, archive_bytes: int) -> list[list[int]]:
        found = _shared_out([LargeFile(size, b"x") for size in files], archive_bytes)
        return [[file.size_bytes for file in archive] for archive in found]

    assert sizes(archive_bytes=100) == []
    assert sizes(500, 60, 50, 40, 30, archive_bytes=100) == [[500], [60, 50], [40, 30]]
    assert sizes(0, 0, archive_bytes=100) == [[0, 0]]
    many = sizes(*([1000] * 5_000), archive_bytes=100)
    assert sum(len(archive) for archive in many) == 5_000
    assert len(many) <= 65


def test_a_failure_of_one_archive_stops_the_others(
    root: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for letter in "xy":
        with (root / letter).open("wb") as file:
            for _ in range(32):
                file.write(letter.encode() * FRAME_BYTES)
    failed = threading.Event()
    read: list[bytes] = []
    real = os.pread

    def reading(descriptor: int, size_bytes: int, offset: int) -> bytes:
        data = real(descriptor, size_bytes, offset)
        if data.startswith(b"x"):
            failed.set()
            raise OSError(5, "Input/output error")
        if data.startswith(b"y"):
            assert failed.wait(20)
            read.append(data[:1])
        return data

    monkeypatch.setattr(os, "pread", reading)
    with pytest.raises(FinalError, match="x can't be read: Input/output error"):
        back_up(root, local_store, jobs=2)
    assert len(read) < 32
    assert list(local_store.entries("")) == []


def test_a_store_that_is_full_is_said_by_its_own_error(root: Path, local_store: LocalStore) -> None:
    for letter in "xyz":
        large(root / letter)

    class Full(LocalStore):
        def write(self, key: str, chunks: Iterable[bytes]) -> StoreEntry:
            if "0001.tar" in key:
                raise FullError("no room")
            return super().write(key, chunks)

    with pytest.raises(FullError, match="no room"):
        back_up(root, Full(local_store.location.place), jobs=2)


def test_a_cancel_in_the_middle_of_large_files_stops_them_all(
    root: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for letter in "xy":
        with (root / letter).open("wb") as file:
            for _ in range(8):
                file.write(letter.encode() * FRAME_BYTES)
    operation = Operation()
    reads = itertools.count()
    real = os.pread

    def reading(descriptor: int, size_bytes: int, offset: int) -> bytes:
        if next(reads) == 6:
            operation.cancel("somebody did")
        return real(descriptor, size_bytes, offset)

    monkeypatch.setattr(os, "pread", reading)
    with pytest.raises(CancelledError, match="somebody did"):
        back_up(root, local_store, operation, jobs=2)
    assert next(reads) < 2 * 8
    assert list(local_store.entries("")) == []


def test_progress_counts_the_bytes_of_all_archives(root: Path, local_store: LocalStore) -> None:
    for letter in "xyz":
        large(root / letter)
    operation = Operation()
    component = back_up(root, local_store, operation, jobs=2)
    assert [one.done_bytes for one in operation.progress()] == [component.raw_size_bytes]


def test_whatever_happens_in_the_tree_its_backup_can_be_restored(
    root: Path, local_store: LocalStore, tmp_path: Path
) -> None:
    """Paths of every kind turn into one another while two slots read them: no archive is ever refused."""
    chance = random.Random(5)
    paths = [root / one / two for one in "ab" for two in ("x", "y", "x/z", "y/z")]
    stop = threading.Event()

    def change() -> None:
        path = chance.choice(paths)
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            act = chance.randrange(6)
            if act < 3:
                large(path)
            elif act == 3:
                path.symlink_to("x")
            elif act == 4:
                os.link(chance.choice(paths), path)
            else:
                shutil.rmtree(root / "a")
                (root / "b").rename(root / "a")
        except OSError:
            pass

    def go_on() -> None:
        while not stop.is_set():
            change()

    for _ in range(50):
        change()
    (root / "quiet").touch()
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        streams = 0
        for number in range(25):
            component = back_up(root, local_store, jobs=2, torn_limit=100)
            streams += len(component.streams)
            shutil.rmtree(restored(component, local_store, tmp_path / str(number)))
    finally:
        stop.set()
        thread.join(20)
    assert streams > 25, "no large file was ever found"


def test_a_file_that_is_replaced_after_the_walk_came_by_is_given_as_it_is_then(
    root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost by that, so nothing is told: of a volume of few files it would fail every backup."""
    big = large(root / "big")
    large(tmp_path / "next", b"new", size_bytes=10)
    after_walk(monkeypatch, lambda: (tmp_path / "next").rename(big))
    component = back_up(root, local_store, torn_limit=0)
    assert facts(component).torn == ()
    assert (restored(component, local_store, tmp_path / "new") / "big").read_bytes() == b"new" * 10
