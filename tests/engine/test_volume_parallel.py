"""A restore extracts a volume's archives at once, as far as the budget goes, and the tree is the same."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tree_picture import picture

from athena_backup.crew import Crew, Unit
from athena_backup.errors import AthenaError, UnavailableError
from athena_backup.manifest import Component
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_exchange import stage_volume
from athena_backup.volume_extract import read_volume

SET_ID = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
LARGE_BYTES = 64 << 10
WAIT_SECONDS = 30


class WatchedStore(LocalStore):
    """A real store; ``reading`` is called with an object's key when its first chunk is asked for, in the thread that asks."""

    reading: Callable[[str], object] = staticmethod(lambda _key: None)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        chunks = super().read(key, start, end)
        self.reading(key)
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


def test_a_restore_that_has_every_slot_gives_back_what_another_one_waits_for(
    root: Path, watched: WatchedStore, tmp_path: Path
) -> None:
    single = write_volume(Volume("gitserver", root), watched, SET_ID, "run", Operation(), part_limit_bytes=4_096)
    assert len(single.streams) == 1
    assert len(single.parts) > 1
    crew = Crew(2)
    is_done = threading.Event()
    other = threading.Thread(target=lambda: crew.run([Unit(1, lambda _: is_done.set())]))

    def reading(key: str) -> None:
        if key == single.parts[0].key:
            other.start()
        elif key == single.parts[-1].key:  # at its end it gives back everything anyway
            assert is_done.wait(WAIT_SECONDS)

    watched.reading = reading
    (tmp_path / "new").mkdir()
    read_volume(single, watched, tmp_path / "new", Operation(), crew=crew)
    other.join(WAIT_SECONDS)
    assert picture(tmp_path / "new") == picture(root)
