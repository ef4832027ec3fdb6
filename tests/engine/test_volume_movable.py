"""What at a volume's root no switch could move is told before anything is touched, with what to do about it."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from own_mounts import in_own_mounts, mount, tmpfs
from unprivileged import NOBODY, as_user

from athena_backup.errors import AthenaError
from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_entry import SOME
from athena_backup.volume_exchange import discard_volume, stage_volume, switch_volume
from athena_backup.volume_preflight import preflight_volume

RESTORE_ID = "0123456789ab"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become somebody else, mount and set attributes"
)


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """A root with a folder and a file, all of an ordinary user."""
    root = tmp_path / "live"
    (root / "folder").mkdir(parents=True)
    (root / "file").write_text("old")
    for path in (root, root / "folder", root / "file"):
        os.chown(path, NOBODY, NOBODY)
    return root


@pytest.fixture
def changed_attributes() -> Iterator[Callable[[str, Path], None]]:
    """chattr(1), taken back in the end: what is immutable would outlive the tests."""
    changed: list[tuple[str, Path]] = []

    def change(flag: str, path: Path) -> None:
        ended = subprocess.run(["chattr", f"+{flag}", path], capture_output=True, text=True)
        if ended.returncode != 0:
            pytest.skip(f"no such attributes here: {ended.stderr}")
        changed.append((flag, path))

    yield change
    for flag, path in changed:
        subprocess.run(["chattr", f"-{flag}", path], check=True)


def told(component: Component, live: Path) -> str:
    faults = preflight_volume(component, live, RESTORE_ID, accept_metadata_loss=True)
    with contextlib.suppress(AthenaError):
        discard_volume(live, RESTORE_ID)
    return "; ".join(map(str, faults))


def told_to_nobody(component: Component, live: Path) -> str:
    return as_user(lambda: told(component, live), live).strip("'\"")


def test_what_can_be_moved_is_no_fault(component: Component, live: Path) -> None:
    (live / "folder").chmod(0o555)
    assert told(component, live) == ""
    assert told_to_nobody(component, live) == ""


@pytest.mark.parametrize("name", ["folder", "file"])
@pytest.mark.parametrize("flag", ["i", "a"])
def test_what_is_immutable_or_append_only_is_a_fault_for_root_too(
    component: Component, live: Path, changed_attributes: Callable[[str, Path], None], flag: str, name: str
) -> None:
    changed_attributes(flag, live / name)
    assert told(component, live) == (
        f"no switch can move {name} in {live}: immutable or append-only (chattr) (chattr -i -a them during the restore)"
    )


@pytest.mark.parametrize("flag", ["i", "a"])
def test_a_root_that_is_immutable_or_append_only_is_a_fault(
    component: Component, live: Path, changed_attributes: Callable[[str, Path], None], flag: str
) -> None:
    """As mount points are made by those who want nothing to be written while the disk is not mounted."""
    changed_attributes(flag, live)
    assert told(component, live) == (
        f"{live} is immutable or append-only (chattr) (is it mounted? chattr -i -a {live} during the restore)"
    )
    assert sorted(os.listdir(live)) == ["file", "folder"]


def test_a_folder_of_somebody_else_that_may_not_be_written_is_a_fault(
    component: Component, local_store: LocalStore, live: Path
) -> None:
    """As a fresh disk has one for a service that is not root: who moves a folder writes its `..`."""
    (live / "lost+found").mkdir(mode=0o700)
    (live / "file-of-root").touch(mode=0o600)
    assert told(component, live) == ""
    said = told_to_nobody(component, live)
    assert said.startswith(f"no switch can move lost+found in {live}: of somebody else, and not to be written to")
    assert "remove them" in said
    os.chown(live / "lost+found", 0, NOBODY)
    (live / "lost+found").chmod(0o770)
    assert told_to_nobody(component, live) == "", "as a volume is whose owner is a group"


def test_entries_of_others_in_a_sticky_root_are_a_fault_unless_it_is_ours(component: Component, live: Path) -> None:
    (live / "of-root").touch()
    live.chmod(0o1777)
    assert told_to_nobody(component, live) == "", "the root's owner may move anything"
    os.chown(live, 0, 0)
    assert "no switch can move of-root in" in told_to_nobody(component, live)
    assert told(component, live) == ""


def test_many_are_one_fault_that_names_some(
    component: Component, live: Path, changed_attributes: Callable[[str, Path], None]
) -> None:
    for number in range(8):
        (live / f"fixed-{number}").touch()
        changed_attributes("i", live / f"fixed-{number}")
    said = told(component, live)
    assert said.count("fixed-") == SOME
    assert f" and 3 more in {live}" in said


def test_folders_of_a_lower_layer_are_a_fault_and_are_not_moved(
    component: Component, local_store: LocalStore, tmp_path: Path
) -> None:
    """As in a container without a volume: the rename that would tell in the switch is tried where it can't succeed."""

    def work() -> None:
        low, up, live = tmpfs(tmp_path / "low", "size=4m"), tmpfs(tmp_path / "up", "size=4m"), tmp_path / "overlaid"
        for folder in (low / "lower", low / "replaced", up / "upper", up / "work", live):
            folder.mkdir()
        (low / "lower-file").touch()
        options = f"lowerdir={low},upperdir={up}/upper,workdir={up}/work,redirect_dir=off"
        mount("-t", "overlay", "-o", options, "overlay", live)
        (live / "own").mkdir()
        (live / "own" / "file").touch()
        said = told(component, live)
        assert f" in {live}: of a lower layer" in said
        assert all(name in said for name in ("lower", "replaced"))
        assert "own" not in said.partition(" in ")[0]
        assert sorted(os.listdir(live)) == ["lower", "lower-file", "own", "replaced"]
        assert os.listdir(live / "own") == ["file"]
        for name in ("lower", "replaced"):
            (live / name).rmdir()
        (live / "replaced").mkdir()
        assert told(component, live) == ""
        stage_volume(component, local_store, live, RESTORE_ID, Operation())
        switch_volume(live, RESTORE_ID, Operation())
        assert os.listdir(live) == ["new"]

    in_own_mounts(work)
