"""Disks as they are: really full, out of inodes, laid over one another. Each test has mounts of its own that end with it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_mounts import in_own_mounts, mount, tmpfs

from athena_backup.backup import Expected, close_set, put_component
from athena_backup.catalog import list_sets
from athena_backup.errors import FinalError, FullError
from athena_backup.manifest import Component, Failure, Manifest
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore, initialize
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_exchange import leftovers, recover_volume, stage_volume, switch_volume

RESTORE_ID = "0123456789ab"
SET = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


def tree(root: Path, what: str, count: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (root / f"{what}-{number}").write_text(what)
    return root


def contents(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in root.iterdir() if not path.name.startswith(".athena-")}


def back_up(root: Path, store: LocalStore) -> Component:
    return write_volume(Volume("repos", root), store, SET, "run", Operation())


@pytest.fixture
def component(tmp_path: Path, local_store: LocalStore) -> Component:
    return back_up(tree(tmp_path / "source", "new", 30), local_store)


def use_inodes(file_system: Path, leave: int) -> Iterator[Path]:
    number = 0
    while os.statvfs(file_system).f_favail > leave:
        filler = file_system / f"filler-{number}"
        filler.touch()
        yield filler
        number += 1


class TestStore:
    def test_a_store_that_fills_up_fails_the_set_names_the_cause_and_the_next_set_is_whole(
        self, tmp_path: Path
    ) -> None:
        def work() -> None:
            place = tmpfs(tmp_path / "store", "size=2m")
            initialize(place)
            store = LocalStore(str(place))
            volume = tree(tmp_path / "volume", "small", 3)
            (volume / "large").write_bytes(os.urandom(4 << 20))
            with pytest.raises(FullError, match="No space left on device") as caught:
                back_up(volume, store)
            assert list(store.entries("")) == [], "what did not fit is discarded, and its room is free again"
            expected = [Expected("repos", "volume")]
            fault = caught.value.fault(component="repos", step="archiving")
            failed = close_set(store, SET, expected, [fault], run_id="run", began=fault.at)
            assert isinstance(failed, Failure)
            assert "repos: error archiving: " in failed.status
            assert "No space left on device" in failed.status
            (volume / "large").unlink()
            put_component(store, SET, back_up(volume, store))
            assert isinstance(close_set(store, SET, expected, [], run_id="run", began=fault.at), Manifest)
            assert [one.status for one in list_sets(store, "app")] == ["Success"]

        in_own_mounts(work)

    def test_a_store_without_room_for_the_manifest_has_no_set_and_says_at_which_step(self, tmp_path: Path) -> None:
        def work() -> None:
            place = tmpfs(tmp_path / "store", "size=1m")
            initialize(place)
            store = LocalStore(str(place))
            component = back_up(tree(tmp_path / "volume", "small", 3), store)
            put_component(store, SET, component)
            filler = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
            with pytest.raises(OSError, match="No space left"):
                while True:
                    os.write(filler, bytes(4096))
            os.close(filler)
            with pytest.raises(FullError) as caught:
                close_set(store, SET, [Expected("repos", "volume")], [], run_id="run", began=component.began)
            assert "error closing the set: " in str(caught.value.fault(step="preparing"))
            assert [one.status for one in list_sets(store, "app")] != ["Success"]

        in_own_mounts(work)


class TestStaging:
    @pytest.mark.parametrize("options", ["size=600k", "size=4m,nr_inodes=30"], ids=["full", "out of inodes"])
    def test_a_volume_that_fills_up_keeps_what_is_live_and_gets_its_room_back(
        self, component: Component, local_store: LocalStore, tmp_path: Path, options: str
    ) -> None:
        def work() -> None:
            live = tree(tmpfs(tmp_path / "live", options), "old", 5)
            if "inodes" not in options:
                (live / "room").write_bytes(bytes(550 << 10))
                before = os.statvfs(live).f_bavail
            else:
                before = os.statvfs(live).f_favail
            old = {name: live.joinpath(name).read_bytes() for name in os.listdir(live)}
            with pytest.raises(FullError, match="No space left on device"):
                stage_volume(component, local_store, live, RESTORE_ID, Operation())
            assert leftovers(live) == []
            assert {name: live.joinpath(name).read_bytes() for name in os.listdir(live)} == old
            status = os.statvfs(live)
            assert (status.f_bavail if "inodes" not in options else status.f_favail) == before

        in_own_mounts(work)

    @pytest.mark.parametrize("left", range(8))
    def test_a_switch_out_of_inodes_leaves_wholly_old_for_good_or_wholly_new(
        self, component: Component, local_store: LocalStore, tmp_path: Path, left: int
    ) -> None:
        def work() -> None:
            disk = tmpfs(tmp_path / "disk", "size=4m,nr_inodes=400")
            live = tree(disk / "live", "old", 5)
            old = contents(live)
            stage_volume(component, local_store, live, RESTORE_ID, Operation())
            fillers = list(use_inodes(disk, left))
            try:
                switch_volume(live, RESTORE_ID, Operation())
            except FullError:
                pass
            else:
                assert contents(live) == contents(tmp_path / "source")
                return
            assert contents(live) == old, "what is told as left alone is as it was"
            for filler in fillers:
                filler.unlink()
            # Long afterwards, when there is room again and people have gone on working, another restore recovers first.
            (live / "written later").write_text("precious")
            assert recover_volume(live, RESTORE_ID) is False
            assert contents(live) == {**old, "written later": "precious"}

        in_own_mounts(work)


class TestMounts:
    def test_files_of_an_overlay_are_read_although_they_bear_other_device_numbers(
        self, local_store: LocalStore, tmp_path: Path
    ) -> None:
        def work() -> None:
            disk = tmpfs(tmp_path / "disk", "size=4m")
            low, up, live = (disk / name for name in ("low", "up", "live"))
            live.mkdir()
            tmpfs(low, "size=4m")
            tmpfs(up, "size=4m")
            for name in ("upper", "work"):
                (up / name).mkdir()
            tree(low / "folder", "lower", 3)
            mount("-t", "overlay", "-o", f"lowerdir={low},upperdir={up}/upper,workdir={up}/work", "overlay", live)
            tree(live, "upper", 2)
            (live / "mounted").touch()
            mount("--bind", tmp_path / "foreign", live / "mounted")
            volume = back_up(live, local_store).volume
            assert volume is not None
            assert volume.files == 5
            assert volume.other_file_systems == ("mounted",)

        (tmp_path / "foreign").write_text("of another file system")
        in_own_mounts(work)


def test_a_volume_in_the_middle_of_a_switch_is_not_backed_up(
    component: Component, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tree(tmp_path / "live", "old", 5)
    stage_volume(component, local_store, live, RESTORE_ID, Operation())
    real, left = os.replace, [2]

    def failing(*values: object, **named: object) -> None:
        left[0] -= bytes(values[0]) in (b"moving out", b"moving in", b"switched")  # type: ignore[call-overload]
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        real(*values, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(FinalError, match="neither wholly old nor wholly new, its switch broke off: Input/output error"):
        switch_volume(live, RESTORE_ID, Operation())
    monkeypatch.undo()
    with pytest.raises(FinalError, match="neither wholly old nor wholly new"):
        back_up(live, local_store)
    assert recover_volume(live, RESTORE_ID) is True
    assert contents(live) == contents(tmp_path / "source")
    assert back_up(live, local_store).volume == component.volume
