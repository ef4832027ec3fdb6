"""Where a file system answers slowly, small files are read and made several at once, and come back as they were."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tree_picture import picture

from athena_backup import volume_latency
from athena_backup.errors import CancelledError, DamagedError, FinalError
from athena_backup.manifest import Component
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_ahead import Ahead
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_extract import _Dresser, read_volume
from athena_backup.volume_hand import Hand
from athena_backup.volume_latency import HELPERS, Helpers, Slowness, Way
from athena_backup.volume_walk import Walk

SET_ID = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
WAIT_SECONDS = 30
FOLDERS, FILES = 20, 30


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system counts as slow."""
    monkeypatch.setattr(volume_latency, "_SLOW_SECONDS", 0.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Many small files, in one folder and in folders within folders, with all that a tree may have besides."""
    place = tmp_path / "live"
    for number in range(FOLDERS):
        folder = place / f"folder-{number}" / "below"
        folder.mkdir(parents=True)
        for other in range(FILES):
            file = folder / f"file-{other}"
            file.write_bytes(bytes([number, other]) * other)
            os.utime(file, ns=(0, 1_600_000_000_000_000_000 + other))
        (folder / "link").symlink_to("../../many/0")
        os.mkfifo(folder / "fifo")
        folder.chmod(0o511)
    (place / "many").mkdir()
    for number in range(300):
        (place / "many" / str(number)).write_bytes(b"%d" % number)
    for number in range(0, 300, 10):
        os.link(place / "many" / str(number), place / f"folder-{number % FOLDERS}" / f"hard-{number}")
    return place


def written(root: Path, store: LocalStore, operation: Operation | None = None) -> Component:
    return write_volume(Volume("gitserver", root), store, SET_ID, "run", operation or Operation())


def helper_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "helper"]


@pytest.mark.usefixtures("slow")
def test_a_tree_comes_back_as_it_was_with_helpers_on_both_ways(
    root: Path, local_store: LocalStore, tmp_path: Path
) -> None:
    component = written(root, local_store)
    (tmp_path / "new").mkdir()
    read_volume(component, local_store, tmp_path / "new", Operation())
    assert picture(tmp_path / "new") == picture(root)
    assert component.volume is not None
    assert component.volume.vanished == component.volume.torn == ()
    assert not helper_threads()


@pytest.mark.usefixtures("slow")
def test_so_many_files_are_fetched_at_once_before_the_walk_comes_by(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, together, met = Ahead._read, threading.Barrier(HELPERS), threading.Event()

    def reading(self: Ahead, folder: int, name: bytes, size_bytes: int) -> None:
        read(self, folder, name, size_bytes)
        if threading.current_thread().name == "helper" and not met.is_set():
            together.wait(WAIT_SECONDS)
            met.set()

    monkeypatch.setattr(Ahead, "_read", reading)
    seen = 0
    for entry in Walk(root, Operation()).entries():
        if entry.path.startswith(b"many/"):
            assert met.wait(WAIT_SECONDS)
            seen += 1
    assert seen == 300


@pytest.mark.usefixtures("slow")
def test_a_tree_of_folders_with_few_files_each_is_fetched_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look, fetched = Ahead._look, set()

    def looking(self: Ahead, folder: int, name: bytes) -> bool:
        if threading.current_thread().name == "helper":
            fetched.add((os.readlink(f"/proc/self/fd/{folder}"), name))
        return look(self, folder, name)

    monkeypatch.setattr(Ahead, "_look", looking)
    for entry in Walk(root, Operation()).entries():
        if entry.path == b"folder-1":  # the walk is done with the second of twenty
            deadline = time.monotonic() + WAIT_SECONDS
            while not {f"{root}/folder-{number}" for number in range(2, FOLDERS)} <= {folder for folder, _ in fetched}:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            break


@pytest.mark.usefixtures("slow")
def test_so_many_files_are_made_at_once(
    root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = written(root, local_store)
    make, together, met = Hand.make, threading.Barrier(HELPERS), threading.Event()

    def making(self: Hand, *entry: object) -> None:
        if threading.current_thread().name == "helper" and not met.is_set():
            together.wait(WAIT_SECONDS)
            met.set()
        make(self, *entry)  # type: ignore[arg-type]

    monkeypatch.setattr(Hand, "make", making)
    (tmp_path / "new").mkdir()
    read_volume(component, local_store, tmp_path / "new", Operation())
    assert met.is_set()
    assert picture(tmp_path / "new") == picture(root)


def test_a_quick_file_system_has_no_helpers(
    root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_latency, "_SLOW_SECONDS", 3_600.0)
    monkeypatch.setattr(Helpers, "_run", lambda _: pytest.fail("a helper began"))
    component = written(root, local_store)
    (tmp_path / "new").mkdir()
    read_volume(component, local_store, tmp_path / "new", Operation())
    assert picture(tmp_path / "new") == picture(root)


@pytest.mark.usefixtures("slow")
def test_an_entry_that_a_helper_can_t_make_fails_the_restore(
    root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = written(root, local_store)
    dress = _Dresser.dress

    def dressing(self: _Dresser, path: bytes, *rest: object) -> None:
        if path == b"many/251":
            assert threading.current_thread().name == "helper"
            raise OSError(5, "Input/output error")
        dress(self, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_Dresser, "dress", dressing)
    (tmp_path / "new").mkdir()
    with pytest.raises(FinalError, match="many/251: Input/output error"):
        read_volume(component, local_store, tmp_path / "new", Operation())
    assert not helper_threads(), "nobody makes entries any more when the staging place is removed"


@pytest.mark.usefixtures("slow")
def test_a_cancelled_restore_waits_for_no_more_than_what_is_at_work(
    root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = written(root, local_store)
    operation = Operation()
    make = Hand.make

    def making(self: Hand, *entry: object) -> None:
        if threading.current_thread().name == "helper":
            operation.cancel("a person said so")
        make(self, *entry)  # type: ignore[arg-type]

    monkeypatch.setattr(Hand, "make", making)
    (tmp_path / "new").mkdir()
    with pytest.raises(CancelledError, match="a person said so"):
        read_volume(component, local_store, tmp_path / "new", operation)
    assert not helper_threads()


def test_four_slow_files_in_a_row_call_for_helpers_and_one_quick_one_does_not() -> None:
    slowness = Slowness()
    for seconds in (1.0, 1.0, 1.0, 0.0):
        assert slowness.next() is Way.TIMED
        slowness.note(seconds)
    alone = [slowness.next() for _ in range(volume_latency._BETWEEN_SAMPLES)]
    assert set(alone) == {Way.ALONE}
    for _ in range(4):
        assert slowness.next() is Way.TIMED
        slowness.note(1.0)
    helped = [slowness.next() for _ in range(volume_latency._STINT)]
    assert set(helped) == {Way.HELPED}
    assert slowness.next() is Way.TIMED, "whether that is still needed is looked at again"


@pytest.fixture
def helpers() -> Iterator[Helpers[None]]:
    with Helpers(contextlib.nullcontext, lambda: None, most=2) as made:
        yield made


def test_no_more_is_kept_in_memory_than_there_is_room_for(helpers: Helpers[None]) -> None:
    go_on, given = threading.Event(), []

    def give() -> None:
        for number in range(20):
            helpers.give(lambda _: go_on.wait(WAIT_SECONDS), 1 << 20)
            given.append(number)

    giver = threading.Thread(target=give)
    giver.start()
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while len(given) < volume_latency._WAITING_LIMIT_BYTES >> 20:
            assert time.monotonic() < deadline
            giver.join(0.01)
        giver.join(0.3)
        assert len(given) == volume_latency._WAITING_LIMIT_BYTES >> 20
    finally:
        go_on.set()
        giver.join(WAIT_SECONDS)
    helpers.finish()
    assert len(given) == 20


def test_the_first_error_is_told_to_who_waits_for_the_end(helpers: Helpers[None]) -> None:
    def fail(_: None) -> None:
        raise DamagedError("broken")

    helpers.give(fail)
    with pytest.raises(DamagedError, match="broken"):
        helpers.finish()


def test_no_error_is_lost_whichever_of_all_fails() -> None:
    """The last one too: who waits for the end may wake between its end and the end of the helper."""

    @contextlib.contextmanager
    def tool() -> Iterator[None]:
        try:
            yield
        finally:
            time.sleep(0.005)  # as a descriptor is closed, and others run meanwhile

    def fail(_: None) -> None:
        raise DamagedError("broken")

    for _ in range(20):
        with pytest.raises(DamagedError, match="broken"), Helpers(tool, lambda: None, most=2) as helpers:
            helpers.give(lambda _: None)
            helpers.give(fail)
            helpers.finish()


def test_who_gives_has_to_do_it_where_there_is_no_room_for_a_thread(
    root: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_latency, "_SLOW_SECONDS", 0.0)
    start = threading.Thread.start

    def starting(self: threading.Thread) -> None:
        if self.name == "helper":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", starting)
    component = written(root, local_store)
    (tmp_path / "new").mkdir()
    read_volume(component, local_store, tmp_path / "new", Operation())
    assert picture(tmp_path / "new") == picture(root)


@pytest.mark.usefixtures("slow")
def test_no_folder_stays_open_that_helpers_looked_into(root: Path) -> None:
    walk = Walk(root, Operation())
    for _ in walk.entries():
        pass
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if os.path.lexists(link)]
    assert [one for one in opened if one.startswith(str(root))] == []
