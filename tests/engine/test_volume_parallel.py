"""A restore extracts a volume's archives at once, as far as the budget goes, and the tree is the same."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tree_picture import picture

from athena_backup import crew
from athena_backup.crew import Crew, Unit
from athena_backup.errors import AthenaError, CancelledError, FinalError, UnavailableError
from athena_backup.manifest import Component
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_exchange import stage_volume
from athena_backup.volume_extract import Tree, _Dresser, read_volume
from athena_backup.volume_pax import FILE, Member

SET_ID = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
LARGE_BYTES = 64 << 10
WAIT_SECONDS = 30


class WatchedStore(LocalStore):
    """A real store; ``reading`` is called with an object's key when its first chunk is asked for, in the thread that asks."""

    reading: Callable[[str], object] = staticmethod(lambda _key: None)
    before: Callable[[str], Iterator[bytes]] = staticmethod(lambda _key: iter(()))
    """What comes before an object's own bytes."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        chunks = super().read(key, start, end)
        self.reading(key)
        yield from self.before(key)
        yield from chunks


@pytest.fixture
def watched(local_store: LocalStore, tmp_path: Path) -> WatchedStore:
    return WatchedStore(str(tmp_path / "store"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two large files, each in an archive of its own, deep in folders that none but the last archive names."""
    place = tmp_path / "live"
    for name in ("one", "two"):
        path = place / "deep" / "down" / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * LARGE_BYTES)
    for number in range(50):
        (place / "deep" / f"small-{number}").write_bytes(bytes([number]))
    (place / "deep" / "down").chmod(0o510)
    return place


@pytest.fixture
def component(root: Path, watched: WatchedStore) -> Component:
    written = write_volume(
        Volume("gitserver", root), watched, SET_ID, "run", Operation(), large_bytes=LARGE_BYTES, archive_bytes=1
    )
    assert len(written.streams) == 3
    return written


def archive_of(key: str) -> str:
    return key.rpartition("/")[2].partition(".")[0]


def test_as_many_archives_are_read_at_once_as_there_are_slots(
    component: Component, watched: WatchedStore, root: Path, tmp_path: Path
) -> None:
    together = threading.Barrier(3)
    watched.reading = lambda _key: together.wait(WAIT_SECONDS)
    (tmp_path / "new").mkdir()
    read_volume(component, watched, tmp_path / "new", Operation(), crew=Crew(3))
    assert picture(tmp_path / "new") == picture(root)


def test_one_slot_reads_one_archive_after_the_other(
    component: Component, watched: WatchedStore, root: Path, tmp_path: Path
) -> None:
    keys: list[str] = []
    watched.reading = keys.append
    (tmp_path / "new").mkdir()
    read_volume(component, watched, tmp_path / "new", Operation(), crew=Crew(1))
    assert [archive_of(key) for key in keys] == ["0000", "0001", "0002"]
    assert picture(tmp_path / "new") == picture(root)


def test_an_archive_that_fails_stops_the_others_and_leaves_no_staging(
    component: Component, watched: WatchedStore, tmp_path: Path
) -> None:
    has_failed = threading.Event()
    read_to_the_end: list[str] = []

    def reading(key: str) -> None:
        if archive_of(key) == "0001":
            has_failed.set()
            raise UnavailableError("the store is away")
        assert has_failed.wait(WAIT_SECONDS)
        read_to_the_end.append(archive_of(key))

    watched.reading = reading
    live = tmp_path / "place"
    live.mkdir()
    with pytest.raises(UnavailableError, match="the store is away"):
        stage_volume(component, watched, live, "0123456789ab", Operation(), crew=Crew(2))
    assert list(live.iterdir()) == []
    assert "0002" not in read_to_the_end  # what had not begun does not begin


def test_an_archive_that_stands_twice_in_the_manifest_is_refused(
    component: Component, watched: WatchedStore, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    twice = component.model_copy(update={"streams": (*component.streams, component.streams[0])})
    with pytest.raises(AthenaError, match=r"more than the manifest promises|stands twice"):
        read_volume(twice, watched, tmp_path / "new", Operation(), crew=Crew(4))


def test_a_volume_whose_store_stalls_holds_one_slot_and_no_more(
    root: Path, watched: WatchedStore, tmp_path: Path
) -> None:
    single = write_volume(Volume("gitserver", root), watched, SET_ID, "run", Operation())
    assert len(single.parts) == 1
    crew = Crew(2)
    is_done = threading.Event()

    def reading(_key: str) -> None:
        threading.Thread(target=lambda: crew.run([Unit(1, lambda _: is_done.set())]), daemon=True).start()
        assert is_done.wait(WAIT_SECONDS)

    watched.reading = reading
    (tmp_path / "new").mkdir()
    read_volume(single, watched, tmp_path / "new", Operation(), crew=crew)
    assert is_done.is_set()
    assert picture(tmp_path / "new") == picture(root)


def test_an_archive_that_fails_ends_one_that_waits_for_the_store(
    component: Component, watched: WatchedStore, tmp_path: Path
) -> None:
    is_over = threading.Event()

    def waiting(key: str) -> Iterator[bytes]:
        """As a range that hangs: nothing comes, but whoever reads can look around."""
        if archive_of(key) == "0001":
            raise UnavailableError("the store is away")
        while not is_over.wait(0.01):
            yield b""
        raise UnavailableError("nobody had stopped")

    watched.before = waiting
    (tmp_path / "new").mkdir()
    failing = threading.Timer(WAIT_SECONDS, is_over.set)
    failing.daemon = True
    failing.start()
    with pytest.raises(UnavailableError, match="the store is away"):
        read_volume(component, watched, tmp_path / "new", Operation(), crew=Crew(2))
    assert not is_over.is_set()
    failing.cancel()


def test_a_restore_that_is_cancelled_while_a_read_hangs_is_not_kept_by_it(
    component: Component, watched: WatchedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a mount whose server is gone: nothing comes back, and nothing can be stopped."""
    monkeypatch.setattr(crew, "_GRACE_SECONDS", 0.01)
    operation, is_mended = Operation(), threading.Event()

    def hanging(_key: str) -> None:
        operation.cancel("a person said so")
        assert is_mended.wait(WAIT_SECONDS)

    watched.reading = hanging
    (tmp_path / "new").mkdir()
    try:
        with pytest.raises(CancelledError, match="a person said so"):
            read_volume(component, watched, tmp_path / "new", operation, crew=Crew(2))
        assert not is_mended.is_set()
    finally:
        is_mended.set()


def test_a_thread_that_nobody_waits_for_writes_nowhere_else(tmp_path: Path) -> None:
    """Its staging place is closed and removed; the number that it had leads to what lives, as the next that was opened."""
    staging, live = tmp_path / "staging", tmp_path / "live"
    staging.mkdir()
    live.mkdir()
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    owner = (os.geteuid(), os.getegid())
    file = Member(b"deep/file", FILE, 0o600, *owner, mtime_ns=0, size_bytes=4, stored_bytes=4)
    with contextlib.ExitStack() as threads:
        with Tree(descriptor, _Dresser({}, accepts_loss=False), Operation().check, allow_devices=False) as tree:
            begun = threads.enter_context(tree.receiving())
        os.close(descriptor)
        staging.rmdir()
        reused = os.open(live, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert reused == descriptor
            only_beginning = threads.enter_context(tree.receiving())
            for receive in (begun, only_beginning):
                with pytest.raises(FinalError):
                    receive(b"deep/file", file, iter([(0, b"data")]))
        finally:
            os.close(reused)
    assert list(live.iterdir()) == []
    assert opened_below(tmp_path) == [], "the removed place's room is free as soon as the last thread has ended"
    with pytest.raises(FinalError, match="has ended"), tree.receiving():
        pass


def opened_below(place: Path) -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [one for one in found if one.startswith(str(place))]
