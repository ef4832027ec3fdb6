"""What every store promises: one suite, run over each kind on a real server. What only a directory can get wrong follows."""

import errno
import os
import random
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from athena_backup.errors import AbsentError, DeniedError, FinalError, FullError, UnavailableError
from athena_backup.store import CHUNK_SIZE_BYTES, Store, read_document
from athena_backup.store.local import MARKER, LocalStore, NoStoreYetError, initialize, open_local, store_id


def test_what_is_written_is_read_whole_and_in_ranges(store: Store) -> None:
    data = os.urandom(3_000_000)
    entry = store.write("app/set/part", [data[:1], data[1:2_000_000], data[2_000_000:]])
    assert entry.size_bytes == len(data)
    assert b"".join(store.read("app/set/part")) == data
    assert b"".join(store.read("app/set/part", 10, 1_500_000)) == data[10:1_500_000]
    assert b"".join(store.read("app/set/part", 2_999_999)) == data[-1:]


def test_an_object_of_several_upload_parts_comes_back_and_from_the_middle_of_one_into_the_next(store: Store) -> None:
    data = random.Random(1).randbytes(20_000_000)
    entry = store.write("app/set/part", (data[start : start + 700_001] for start in range(0, len(data), 700_001)))
    assert entry.size_bytes == len(data)
    assert b"".join(store.read("app/set/part")) == data
    assert b"".join(store.read("app/set/part", 8_000_000, 17_000_001)) == data[8_000_000:17_000_001]
    assert b"".join(store.read("app/set/part", len(data))) == b""
    assert max(len(chunk) for chunk in store.read("app/set/part")) <= CHUNK_SIZE_BYTES


def test_an_object_without_a_byte_is_one(store: Store) -> None:
    assert store.write("app/set/empty", []).size_bytes == 0
    assert list(store.read("app/set/empty")) == []
    assert [entry.size_bytes for entry in store.entries("app/")] == [0]


def test_of_many_creates_at_once_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: store.put("app/manifest.json", b"%d" % number, if_absent=True), range(8)))
    assert won.count(True) == 1
    assert read_document(store, "app/manifest.json") == b"%d" % won.index(True)


def test_names_of_every_kind_are_kept(store: Store) -> None:
    keys = sorted(["app/with space", "app/100%", "app/a+b", "app/ümläut-名", "app/a=b&c?d#e", "app/~tilde"])
    for key in keys:
        store.put(key, key.encode())
    assert [entry.key for entry in store.entries("app/")] == keys
    assert [read_document(store, key).decode() for key in keys] == keys
    store.delete(keys)
    assert list(store.entries("")) == []


def test_more_objects_than_one_page_of_a_listing(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(f"app/{number:04}", b""), range(1_050)))
    assert [entry.key for entry in store.entries("app/")] == [f"app/{number:04}" for number in range(1_050)]
    store.delete(f"app/{number:04}" for number in range(1_050))
    assert list(store.entries("app/")) == []


def test_a_write_that_breaks_off_leaves_nothing_to_see(store: Store) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise FinalError("the source died")

    with pytest.raises(FinalError, match="the source died"):
        store.write("app/set/part", broken())
    assert store.head("app/set/part") is None
    assert list(store.entries("")) == []


def test_nothing_is_written_twice(store: Store) -> None:
    store.write("app/part", [b"first"])
    with pytest.raises(FinalError, match="exists already"):
        store.write("app/part", [b"second"])
    assert read_document(store, "app/part") == b"first"


def test_of_two_creates_of_one_key_the_second_is_refused(store: Store) -> None:
    assert store.put("app/manifest.json", b"first", if_absent=True)
    assert not store.put("app/manifest.json", b"second", if_absent=True)
    assert read_document(store, "app/manifest.json") == b"first"


def test_a_put_replaces_an_older_document(store: Store) -> None:
    assert store.put("app/failure.json", b"old")
    assert store.put("app/failure.json", b"new")
    assert read_document(store, "app/failure.json") == b"new"


def test_entries_come_in_the_order_of_their_keys(store: Store) -> None:
    keys = ["app/a/z", "app/a-b/c", "app/a.x", "app/a0", "app/b"]
    for key in keys:
        store.put(key, b"x")
    assert [entry.key for entry in store.entries("app/")] == sorted(keys)
    assert list(store.entries("nowhere/")) == []


def test_folders_are_listed_one_level_deep(store: Store) -> None:
    for key in ("app/2/x/y", "app/1/x", "app/file"):
        store.put(key, b"")
    assert list(store.folders("app/")) == ["1", "2"]
    assert list(store.folders("")) == ["app"]


def test_what_is_absent_is_none_to_a_look_and_an_error_to_a_reader(store: Store) -> None:
    assert store.head("app/nothing") is None
    with pytest.raises(AbsentError):
        list(store.read("app/nothing"))


def test_deleting_what_is_absent_is_done(store: Store) -> None:
    store.put("app/one", b"")
    store.delete(["app/one", "app/one", "app/two", "other/three"])
    assert list(store.entries("")) == []


@pytest.mark.parametrize(
    "key", ["../x", "a/../b", "/etc/passwd", "a//b", "a/./b", ".athena-store", "a/.athena-tmp-1", "a\0", ""]
)
def test_a_key_that_leads_out_of_the_store_is_refused(store: Store, key: str) -> None:
    for call in (
        store.head,
        lambda key: list(store.read(key)),
        lambda key: store.put(key, b""),
        lambda key: store.write(key, []),
    ):
        with pytest.raises(FinalError):
            call(key)


class TestLocal:
    """What only a directory can get wrong."""

    def test_the_files_of_a_set_are_for_their_owner_only(self, local_store: LocalStore) -> None:
        local_store.write("app/set/part", [b"secret"])
        root = Path(local_store.location.place)
        assert (root / "app/set/part").stat().st_mode & 0o077 == 0
        assert (root / "app").stat().st_mode & 0o077 == 0

    def test_symbolic_links_in_the_store_are_foreign(self, local_store: LocalStore, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_text("secret")
        root = Path(local_store.location.place)
        (root / "app").mkdir()
        (root / "app/link").symlink_to(outside)
        (root / "app/file").symlink_to(outside / "secret")
        assert list(local_store.entries("app/")) == []
        assert list(local_store.folders("app/")) == []
        assert local_store.head("app/link/secret") is None
        with pytest.raises(AbsentError):
            list(local_store.read("app/file"))
        local_store.delete(["app/link/secret"])
        assert (outside / "secret").exists()
        with pytest.raises(FinalError):
            local_store.put("app/link/new", b"x")
        assert not (outside / "new").exists()

    def test_a_full_disk_is_told_as_such_and_discards_the_object(
        self, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(FullError, match="No space left"):
            local_store.write("part", [b"x" * 100_000])
        monkeypatch.undo()
        assert list(Path(local_store.location.place).iterdir()) == [Path(local_store.location.place) / MARKER]

    def test_an_error_of_close_discards_the_object(
        self, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real_close = os.close
        real_open = os.open
        written: list[int] = []

        def open_(path: str, flags: int, *args: int, **kwargs: int) -> int:
            descriptor = real_open(path, flags, *args, **kwargs)
            if flags & os.O_WRONLY:
                written.append(descriptor)
            return descriptor

        def close(descriptor: int) -> None:
            real_close(descriptor)
            if descriptor in written:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(os, "close", close)
        with pytest.raises(FullError, match="quota"):
            local_store.write("part", [b"x"])
        monkeypatch.undo()
        assert local_store.head("part") is None

    def test_an_error_of_syncing_the_folder_discards_the_object(
        self, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        local_store.put("app/old", b"old")
        real = os.fsync

        def failing(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EIO, "Input/output error")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(UnavailableError, match="Input/output error"):
            local_store.put("app/new", b"new", if_absent=True)
        assert [entry.key for entry in local_store.entries("")] == ["app/old"]

    def test_a_file_and_its_new_folders_are_synced_before_the_write_returns(
        self, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(local_store.location.place))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        local_store.write("a/b/part", [b"x"])
        assert "" in synced
        assert "/a" in synced
        assert any(name.startswith("/a/b/.athena-tmp-") for name in synced)
        assert synced[-1] == "/a/b"

    def test_what_a_killed_writer_left_is_invisible_and_swept(self, local_store: LocalStore) -> None:
        folder = Path(local_store.location.place) / "app" / "set"
        folder.mkdir(parents=True)
        (folder / ".athena-tmp-0123").write_bytes(b"half")
        assert list(local_store.entries("app/")) == []
        assert local_store.sweep("app/") == 1
        assert list(folder.iterdir()) == []

    def test_a_directory_without_write_permission_is_denied(
        self, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object, **kwargs: object) -> int:
            raise PermissionError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(os, "mkdir", refuse)
        with pytest.raises(DeniedError, match="Read-only"):
            local_store.put("app/x", b"")


class TestMarker:
    """A missing mount must not become a backup into the root file system."""

    def test_a_first_start_into_an_empty_directory_makes_it_a_store(self, tmp_path: Path) -> None:
        root, memory = tmp_path / "backup", tmp_path / "home" / "stores.json"
        root.mkdir()
        open_local(str(root), memory, adopt=True).put("app/x", b"1")
        assert store_id(root)
        assert read_document(open_local(str(root), memory, adopt=True), "app/x") == b"1"

    def test_whoever_only_looks_makes_no_store(self, tmp_path: Path) -> None:
        root, memory = tmp_path / "backup", tmp_path / "stores.json"
        root.mkdir()
        with pytest.raises(NoStoreYetError, match=r"is empty, and no store yet \(mount it"):
            open_local(str(root), memory, adopt=False)
        assert list(root.iterdir()) == []
        assert not memory.exists()
        identifier = initialize(root)
        open_local(str(root), memory, adopt=False)
        assert store_id(root) == identifier

    def test_a_mount_that_is_missing_is_noticed(self, tmp_path: Path) -> None:
        root, memory = tmp_path / "backup", tmp_path / "stores.json"
        root.mkdir()
        open_local(str(root), memory, adopt=True)
        root.rename(tmp_path / "unmounted")
        root.mkdir()
        with pytest.raises(FinalError, match="carries no store id"):
            open_local(str(root), memory, adopt=True)
        assert list(root.iterdir()) == []

    def test_a_mount_that_goes_away_in_the_middle_is_neither_written_below_nor_read(self, tmp_path: Path) -> None:
        root = tmp_path / "backup"
        root.mkdir()
        store = open_local(str(root), tmp_path / "stores.json", adopt=True)
        store.put("app/before", b"1")
        root.rename(tmp_path / "unmounted")
        root.mkdir()
        for call in (
            lambda: store.put("app/after", b"2"),
            lambda: store.write("app/part", [b"2"]),
            lambda: store.head("app/before"),
            lambda: list(store.entries("")),
            lambda: list(store.folders("")),
            lambda: store.delete(["app/before"]),
        ):
            with pytest.raises(FinalError, match="carries no store id"):
                call()
        assert list(root.iterdir()) == []

    def test_another_volume_in_its_place_is_noticed(self, tmp_path: Path) -> None:
        root, memory = tmp_path / "backup", tmp_path / "stores.json"
        root.mkdir()
        open_local(str(root), memory, adopt=True)
        (root / MARKER).write_text("another")
        with pytest.raises(FinalError, match="another store"):
            open_local(str(root), memory, adopt=True)

    def test_a_directory_with_other_files_is_no_store_until_init_says_so(self, tmp_path: Path) -> None:
        root, memory = tmp_path / "backup", tmp_path / "stores.json"
        root.mkdir()
        (root / "photos").mkdir()
        with pytest.raises(FinalError, match="athena-backup init"):
            open_local(str(root), memory, adopt=True)
        initialize(root)
        open_local(str(root), memory, adopt=True)

    def test_a_store_that_another_machine_made_is_taken(self, tmp_path: Path) -> None:
        root = tmp_path / "backup"
        root.mkdir()
        identifier = initialize(root)
        open_local(str(root), tmp_path / "stores.json", adopt=True)
        assert store_id(root) == identifier

    def test_a_directory_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FinalError, match="does not exist"):
            open_local(str(tmp_path / "missing"), tmp_path / "stores.json", adopt=True)

    def test_what_is_no_directory_is_named_with_its_setting(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("")
        for call in (lambda: open_local(str(file), tmp_path / "stores.json", adopt=True), lambda: initialize(file)):
            with pytest.raises(FinalError, match="OBJECT_STORE_LOCATION_LOCAL") as refused:
                call()
            # Of which the API would say that there is no such set.
            assert not isinstance(refused.value, AbsentError)

    @pytest.mark.parametrize("home", ["/dev/null/home", "/proc/home"])
    def test_a_home_in_which_nothing_can_be_remembered_is_named_with_its_setting(
        self, tmp_path: Path, home: str
    ) -> None:
        with pytest.raises(FinalError, match=f"ATHENA_HOME: {home} can't be written"):
            open_local(str(tmp_path), Path(home) / "stores.json", adopt=True)
