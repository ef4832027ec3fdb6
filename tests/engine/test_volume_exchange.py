"""A restored volume takes the live one's place: whatever instant a kill comes, it is wholly old or wholly new at the end."""

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from unprivileged import NOBODY, as_user

from athena_backup import volume_exchange, volume_preflight
from athena_backup.errors import AthenaError, DeniedError, FinalError, FullError, PassingError
from athena_backup.manifest import Component, Stream
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_exchange import (
    discard_volume,
    leftovers,
    recover_volume,
    stage_volume,
    switch_volume,
)
from athena_backup.volume_preflight import preflight_room, preflight_volume
from athena_backup.volume_staging import half_switched

RESTORE_ID = "0123456789ab"
STAGING = f".athena-{RESTORE_ID}"
AS_ROOT = os.geteuid() == 0

Picture = dict[str, tuple[int, int, str]]


class Killed(BaseException):
    """What a SIGKILL is to the code: nothing after it runs that changes anything."""


def picture(root: Path) -> Picture:
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_text() if path.is_file() else "",
        )
        for path in [root, *root.rglob("*")]
    }  # fmt: skip


def fill(root: Path, what: str) -> None:
    """A tree with entries of its own and entries of the same names with other content."""
    for name in (f"only-{what}", "both/inner", f"both/{what}", "changing"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(what)
        os.utime(root / name, ns=(0, 7 if what == "old" else 8))
    os.utime(root / "both", ns=(0, 10 if what == "old" else 11))
    if what == "old":
        (root / "turns" / "locked").mkdir(parents=True)
        (root / "turns" / "locked").chmod(0)
    else:
        (root / "turns").write_text("a file now")
    os.utime(root / "turns", ns=(0, 5))
    root.chmod(0o751 if what == "new" else 0o700)
    os.utime(root, ns=(0, 1_000 if what == "old" else 2_000))


@pytest.fixture
def component(tmp_path: Path, local_store: LocalStore) -> Component:
    source = tmp_path / "source"
    source.mkdir()
    fill(source, "new")
    set_id = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
    return write_volume(Volume("repos", source), local_store, set_id, "run", Operation())


@pytest.fixture
def live(tmp_path: Path) -> Path:
    root = tmp_path / "live"
    root.mkdir()
    fill(root, "old")
    return root


@pytest.fixture
def new(tmp_path: Path, component: Component) -> Picture:
    return picture(tmp_path / "source")


def staged(component: Component, store: LocalStore, live: Path) -> None:
    stage_volume(component, store, live, RESTORE_ID, Operation())


def test_a_switch_replaces_everything_and_keeps_the_roots_inode(
    component: Component, local_store: LocalStore, live: Path, new: Picture
) -> None:
    inode, old = live.stat().st_ino, picture(live)
    staged(component, local_store, live)
    assert picture(live).items() >= old.items(), "what is live is untouched by the staging, the root's time included"
    assert leftovers(live) == [RESTORE_ID]
    assert switch_volume(live, RESTORE_ID, Operation()) == []
    assert picture(live) == new
    assert live.stat().st_ino == inode
    assert leftovers(live) == []


def test_a_switch_into_an_empty_directory_works(
    component: Component, local_store: LocalStore, tmp_path: Path, new: Picture
) -> None:
    (tmp_path / "empty").mkdir()
    staged(component, local_store, tmp_path / "empty")
    switch_volume(tmp_path / "empty", RESTORE_ID, Operation())
    assert picture(tmp_path / "empty") == new


STEPS = ["rename", "renameat2", "symlink", "replace", "fsync", "unlink", "rmdir", "utime", "mkdir", "fchmod"]


def killing(monkeypatch: pytest.MonkeyPatch, step: int, *, after: bool) -> list[int]:
    """From the ``step``-th change of the file system on, nothing is changed any more; returns the counter of the changes."""
    count = [0]

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*values: object, **named: object) -> object:
            count[0] += 1
            if count[0] > step or (count[0] == step and not after):
                raise Killed
            result = real(*values, **named)
            if count[0] == step:
                raise Killed
            return result

        return call

    for name in STEPS:
        if name == "renameat2":
            monkeypatch.setattr(volume_exchange, "_rename", counted(volume_exchange._rename))
        else:
            monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return count


@pytest.mark.parametrize("after", [False, True], ids=["before the step", "after the step"])
def test_a_switch_killed_at_any_step_is_recovered_to_wholly_old_or_wholly_new(
    component: Component, local_store: LocalStore, tmp_path: Path, new: Picture, *, after: bool
) -> None:
    outcomes = []
    for step in range(1, 200):
        live = tmp_path / f"live-{step}"
        live.mkdir()
        fill(live, "old")
        old = picture(live)
        staged(component, local_store, live)
        with pytest.MonkeyPatch.context() as monkeypatch:
            count = killing(monkeypatch, step, after=after)
            with contextlib.suppress(Killed):
                switch_volume(live, RESTORE_ID, Operation())
        if count[0] < step:
            break
        # The recovery is killed too, at steps of its own, before one comes through.
        for second in (2, 5, 9):
            with pytest.MonkeyPatch.context() as monkeypatch:
                killing(monkeypatch, second, after=after)
                with contextlib.suppress(Killed):
                    recover_volume(live, RESTORE_ID)
        recover_volume(live, RESTORE_ID)
        assert recover_volume(live, RESTORE_ID) is False, "a second recovery has nothing to do"
        assert leftovers(live) == []
        found = picture(live)
        # Between the last removal and the setting of the time lies one instant at which the root's time can be lost.
        for tree in (found, old):
            tree["."] = (tree["."][0], new["."][1], "")
        assert found in (old, new), step
        outcomes.append(found == new)
        subprocess.run(["rm", "-r", live], check=True)
    assert outcomes == sorted(outcomes), "once begun, a switch only goes forward"
    assert set(outcomes) == {False, True}
    assert len(outcomes) > 20


def test_a_real_kill_in_the_middle_is_recovered(
    component: Component, local_store: LocalStore, live: Path, new: Picture
) -> None:
    staged(component, local_store, live)
    script = (
        "import os, pathlib, signal, sys\n"
        "from athena_backup import volume_exchange\n"
        "from athena_backup.operation import Operation\n"
        "real, left = volume_exchange._rename, [6]\n"
        "def rename(*values):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(*values)\n"
        "volume_exchange._rename = rename\n"
        "volume_exchange.switch_volume(pathlib.Path(sys.argv[1]), sys.argv[2], Operation())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(live), RESTORE_ID], capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert recover_volume(live, RESTORE_ID) is True
    assert picture(live) == new


def test_a_staging_whose_switch_was_not_begun_is_thrown_away(
    component: Component, local_store: LocalStore, live: Path
) -> None:
    old = picture(live)
    staged(component, local_store, live)
    assert recover_volume(live, RESTORE_ID) is False
    assert picture(live) == old


def test_a_failed_staging_leaves_nothing(component: Component, local_store: LocalStore, live: Path) -> None:
    old = picture(live)
    local_store.delete([component.parts[0].key])
    with pytest.raises(AthenaError):
        staged(component, local_store, live)
    assert picture(live) == old


@pytest.mark.skipif(not AS_ROOT, reason="a default list for another user")
def test_what_the_live_root_would_give_to_new_entries_is_not_given_to_restored_ones(
    component: Component, local_store: LocalStore, live: Path
) -> None:
    """Of the set no entry has an access control list."""
    # user::rwx,user:1234:rwx,group::rwx,mask::rwx,other::--- as a default
    entries = [(1, 7, -1), (2, 7, 1234), (4, 7, -1), (16, 7, -1), (32, 0, -1)]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, bits, who in entries
    )
    try:
        os.setxattr(live, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"this file system has none: {error}")
    staged(component, local_store, live)
    switch_volume(live, RESTORE_ID, Operation())
    lists = {path.name: os.listxattr(path) for path in [live, *live.rglob("*")]}
    assert set(lists) >= {"live", "both", "inner", "only-new"}
    assert not any(name.startswith("system.posix_acl") for names in lists.values() for name in names), lists


def test_a_begun_switch_is_never_discarded(
    component: Component, local_store: LocalStore, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(component, local_store, live)
    with monkeypatch.context() as patch:
        killing(patch, 20, after=True)
        with pytest.raises(Killed):
            switch_volume(live, RESTORE_ID, Operation())
    with pytest.raises(FinalError, match="has begun and not ended"):
        discard_volume(live, RESTORE_ID)
    assert recover_volume(live, RESTORE_ID) is True


def test_a_switch_without_a_staging_touches_nothing(live: Path) -> None:
    old = picture(live)
    with pytest.raises(FinalError, match="no staged entries"):
        switch_volume(live, RESTORE_ID, Operation())
    (live / STAGING).mkdir()
    with pytest.raises(FinalError, match="no staged entries"):
        switch_volume(live, RESTORE_ID, Operation())
    discard_volume(live, RESTORE_ID)
    os.utime(live, ns=(0, 1_000))
    assert picture(live) == old


def test_two_processes_never_exchange_one_volume(component: Component, local_store: LocalStore, live: Path) -> None:
    staged(component, local_store, live)
    with (live / STAGING / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for act in (lambda: switch_volume(live, RESTORE_ID, Operation()), lambda: recover_volume(live, RESTORE_ID)):
            with pytest.raises(PassingError, match="another process"):
                act()
    switch_volume(live, RESTORE_ID, Operation())


def test_what_cannot_be_moved_out_brings_everything_back(
    component: Component, local_store: LocalStore, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = picture(live)
    staged(component, local_store, live)
    real = volume_exchange._rename

    def busy(source: int, target: int, name: bytes, new_name: bytes) -> None:
        if name == b"turns":  # the last one
            raise OSError(16, "Device or resource busy", "turns")
        real(source, target, name, new_name)

    monkeypatch.setattr(volume_exchange, "_rename", busy)
    with pytest.raises(FinalError, match="busy"):
        switch_volume(live, RESTORE_ID, Operation())
    assert recover_volume(live, RESTORE_ID) is False
    assert picture(live) == old


def test_what_was_written_during_a_switch_that_is_taken_back_stays_beside_what_is_back(
    component: Component, local_store: LocalStore, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(component, local_store, live)
    real = volume_exchange._rename
    made: list[bytes] = []

    def busy(source: int, target: int, name: bytes, new_name: bytes) -> None:
        if name == b"turns":
            raise OSError(16, "Device or resource busy", "turns")
        real(source, target, name, new_name)
        if name == b"changing" and not made:
            (live / "changing").write_text("by a live writer")
            made.append(name)

    monkeypatch.setattr(volume_exchange, "_rename", busy)
    with pytest.raises(FinalError, match="busy"):
        switch_volume(live, RESTORE_ID, Operation())
    discard_volume(live, RESTORE_ID)
    assert made
    assert (live / "changing").read_text() == "old"
    [beside] = live.glob("changing.athena-*")
    assert beside.read_text() == "by a live writer"


def test_what_a_live_writer_makes_during_the_switch_is_put_aside_and_replaces_nothing(
    component: Component, local_store: LocalStore, live: Path, new: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(component, local_store, live)
    real = volume_exchange._rename
    made: list[bytes] = []

    def disturbed(source: int, target: int, name: bytes, new_name: bytes) -> None:
        real(source, target, name, new_name)
        if len(made) < 12 and not (live / "changing").exists():
            (live / "changing").write_text("by a live writer")
            made.append(name)

    monkeypatch.setattr(volume_exchange, "_rename", disturbed)
    [told] = switch_volume(live, RESTORE_ID, Operation())
    assert made
    assert picture(live) == new
    assert "written by somebody else during the switch, and lost: changing; " in told
    assert "stop whatever uses the volume, and restore again" in told


def test_what_a_live_writer_adds_during_the_switch_stays_and_is_told(
    component: Component, local_store: LocalStore, live: Path, new: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a database does that makes a new log beside a file that is not its own any more."""
    staged(component, local_store, live)
    real = volume_exchange._rename

    def disturbed(source: int, target: int, name: bytes, new_name: bytes) -> None:
        real(source, target, name, new_name)
        if os.readlink(live / STAGING / "state") == "moving in":
            (live / "changing-wal").write_text("by a live writer")

    monkeypatch.setattr(volume_exchange, "_rename", disturbed)
    [told] = switch_volume(live, RESTORE_ID, Operation())
    assert "made by somebody else during the switch, and beside what was restored: changing-wal;" in told
    assert (live / "changing-wal").read_text() == "by a live writer"
    assert picture(live).keys() == {*new, "changing-wal"}


def test_a_recovery_takes_nothing_that_it_finds_moved_in_for_a_live_writers(
    component: Component, local_store: LocalStore, live: Path, new: Picture, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    staged(component, local_store, live)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(volume_exchange, "_take_over_attributes", die)
        switch_volume(live, RESTORE_ID, Operation())
    assert recover_volume(live, RESTORE_ID) is True
    assert picture(live) == new
    assert caplog.text == ""


def test_who_still_uses_what_was_replaced_is_named(
    component: Component, local_store: LocalStore, live: Path, tmp_path: Path
) -> None:
    """With its open file, or as the folder that it works in; one that uses another volume is not."""
    script = "import os, sys; os.chdir(sys.argv[1]); file = open(sys.argv[2]); print(flush=True); sys.stdin.read()"
    elsewhere = tmp_path / "other" / STAGING / "old" / "both" / "inner"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.touch()
    places = [("/", live / "both" / "inner"), (live / "both", "/dev/null"), ("/", elsewhere)]
    staged(component, local_store, live)
    users = []
    try:
        for folder, file in places:
            command = [sys.executable, "-c", script, str(folder), str(file)]
            users.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            assert users[-1].stdout is not None
            users[-1].stdout.readline()
        [told] = switch_volume(live, RESTORE_ID, Operation())
    finally:
        for user in users:
            user.communicate()
    assert told.startswith("still using what was replaced, where what they write is lost: ")
    assert [f"(pid {user.pid})" in told for user in users] == [True, True, False]
    assert "python" in told


def test_a_file_system_without_renaming_that_replaces_nothing_is_switched_too(
    component: Component, local_store: LocalStore, live: Path, new: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_exchange, "_RENAME_NOREPLACE", 1 << 20)  # EINVAL, as on NFS
    staged(component, local_store, live)
    switch_volume(live, RESTORE_ID, Operation())
    assert picture(live) == new


def test_removing_a_staging_follows_no_link_and_takes_any_depth(live: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "victim").touch()
    (live / STAGING / "new").mkdir(parents=True)
    (live / STAGING / "new" / "link").symlink_to(tmp_path / "outside")
    here = live / STAGING / "new"
    for _ in range(300):
        here = here / "d"
        here.mkdir()
    (here / "file").touch()
    discard_volume(live, RESTORE_ID)
    assert (tmp_path / "outside" / "victim").exists()
    assert leftovers(live) == []


def test_leftovers_are_folders_with_the_id_of_a_restore_only(live: Path) -> None:
    for name in (STAGING, ".athena-xyz", ".athena-0123456789ABCD", ".athenaX0123456789ab"):
        (live / name).mkdir()
    (live / ".athena-ffffffffffff").write_text("a file")
    assert leftovers(live) == [RESTORE_ID]
    assert leftovers(live / "missing") == []


@pytest.mark.parametrize("bad", ["", "../../etc", "0123456789a", "0123456789AB", "0123456789ab\n", "0123456789ab/x"])
def test_what_is_no_id_of_a_restore_is_refused(live: Path, bad: str) -> None:
    for act in (recover_volume, discard_volume):
        with pytest.raises(FinalError, match="not the id"):
            act(live, bad)


@pytest.mark.skipif(not AS_ROOT, reason="only root has attributes that others have not")
def test_attributes_of_the_live_root_that_the_set_has_not_go(
    component: Component, local_store: LocalStore, live: Path
) -> None:
    try:
        os.setxattr(live, "user.old", b"1")
    except OSError as error:
        pytest.skip(f"no attributes here: {error}")
    os.chown(live, 1234, 1234)
    staged(component, local_store, live)
    switch_volume(live, RESTORE_ID, Operation())
    assert os.listxattr(live) == []
    assert (live.stat().st_uid, stat.S_IMODE(live.stat().st_mode)) == (0, 0o751)


def test_a_root_with_an_acl_gets_its_mode_too(tmp_path: Path, local_store: LocalStore, live: Path) -> None:
    """Into what its owner may not write nothing could be moved, so it is made writable meanwhile, and its ACL with it."""
    source = tmp_path / "with-acl"
    source.mkdir()
    (source / "file").touch()
    entries = [
        (0x01, 5, 0xFFFFFFFF),
        (0x02, 7, 4242),
        (0x04, 5, 0xFFFFFFFF),
        (0x10, 5, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    ]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(source, "system.posix_acl_access", acl)
    except OSError as error:
        pytest.skip(f"no ACLs here: {error}")
    assert stat.S_IMODE(source.stat().st_mode) == 0o550
    set_id = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
    staged(write_volume(Volume("repos", source), local_store, set_id, "run", Operation()), local_store, live)
    switch_volume(live, RESTORE_ID, Operation())
    assert stat.S_IMODE(live.stat().st_mode) == 0o550
    assert os.getxattr(live, "system.posix_acl_access") == acl
    live.chmod(0o750)


def in_own_mounts(command: str, script: str, component: Component) -> str:
    """What a shell command prints whose mounts nobody else sees; $SCRIPT and $DOCUMENT are the script and the component."""
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True,
        env={**os.environ, "SCRIPT": script, "DOCUMENT": component.model_dump_json()},
    )  # fmt: skip
    if "mount:" in ended.stderr or "unshare:" in ended.stderr:
        pytest.skip(f"no mounting here: {ended.stderr}")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.skipif(not AS_ROOT or not shutil.which("unshare"), reason="only root may mount")
def test_another_file_system_inside_that_no_list_of_mounts_shows_is_a_fault_and_never_emptied(
    component: Component, live: Path
) -> None:
    """A subvolume of btrfs has no line there, and is renamed and removed like any folder."""
    script = (
        "import sys, pathlib\n"
        "from athena_backup import volume_preflight\n"
        "from athena_backup.manifest import Component\n"
        "from athena_backup.volume_exchange import discard_volume\n"
        "volume_preflight.mount_points = lambda root: []\n"
        "live = pathlib.Path(sys.argv[1])\n"
        "precious = live / 'both' / 'sub' / 'precious'\n"
        "precious.touch()\n"
        "component = Component.model_validate_json(sys.argv[2])\n"
        "facts = component.volume.model_copy(update={'other_file_systems': ('both/sub', 'gone')})\n"
        "component = component.model_copy(update={'volume': facts})\n"
        f"[fault] = volume_preflight.preflight_volume(component, live, '{RESTORE_ID}')\n"
        "print(fault)\n"
        f"old = live / '{STAGING}' / 'old'\n"
        "old.mkdir()\n"
        "(old / 'sub').mkdir()\n"
        "import subprocess\n"
        "subprocess.run(['mount', '--bind', str(precious.parent), str(old / 'sub')], check=True)\n"
        "try:\n"
        f"    discard_volume(live, '{RESTORE_ID}')\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print(precious.exists())\n"
    )
    (live / "both" / "sub").mkdir()
    command = f'mount -t tmpfs none "{live}/both/sub" && exec "{sys.executable}" -c "$SCRIPT" "{live}" "$DOCUMENT"'
    fault, kept, is_there = in_own_mounts(command, script, component).splitlines()
    assert f"{live}/both/sub is another file system inside {live}" in fault
    assert "another file system, which is not removed" in kept
    assert is_there == "True"


def test_other_file_systems_are_found_once_each_without_keeping_all_names_of_the_root(
    component: Component, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert component.volume is not None
    for number in range(2_000):
        os.mknod(live / f"a-file-with-a-name-{number}")
    (live / STAGING).mkdir()
    (live / "both" / "sub").mkdir()
    (live / "link").symlink_to("both")
    named = ("both", "both/inner", "both/sub", "both/sub", "gone", "link", "../live/both", str(live / "both"))
    facts = component.volume.model_copy(update={"other_file_systems": named})
    assert volume_preflight._other_file_systems(live, facts) == []
    elsewhere = os.stat("/proc")
    tracemalloc.start()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", lambda _: elsewhere)
            found = volume_preflight._other_file_systems(live, facts)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sorted(found) == [str(live / place) for place in ("both", "both/sub", "turns")]
    assert peak_bytes < 100_000


def test_volumes_on_one_file_system_need_room_for_all_of_them(
    component: Component, live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert component.volume is not None
    facts = component.volume.model_copy(update={"content_bytes": 1 << 40})
    large = component.model_copy(update={"volume": facts, "streams": _claiming(component, 1 << 40)})
    (tmp_path / "other").mkdir()
    real = os.statvfs(live)
    free = [*real[:4], int(1.5 * (1 << 40)) // real.f_frsize, *real[5:]]
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(free))
    assert preflight_room([(large, live)]) == []
    [fault] = preflight_room([(large, live), (large.model_copy(update={"name": "edweb"}), tmp_path / "other")])
    assert isinstance(fault, FullError)
    assert fault.cause.startswith("repos, edweb, on one file system: ")
    gone = (large.model_copy(update={"name": "gone"}), tmp_path / "not there")
    assert preflight_room([(large, live), gone]) == []


def _claiming(component: Component, raw_bytes: int) -> tuple[Stream, ...]:
    (stream,) = component.streams
    parts = tuple(part.model_copy(update={"raw_size_bytes": raw_bytes}) for part in stream.parts)
    return (stream.model_copy(update={"parts": parts}),)


@pytest.mark.skipif(not AS_ROOT, reason="only root can become somebody else")
def test_who_may_not_look_at_a_volume_is_advised_to_read_it_not_to_restore(
    local_store: LocalStore, live: Path, tmp_path: Path
) -> None:
    def back_up() -> object:
        set_id = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
        return write_volume(Volume("repos", live), local_store, set_id, "run", Operation())

    live.chmod(0o700)
    for look in (back_up, lambda: leftovers(live), lambda: half_switched(live)):
        said = as_user(look, live.parent)
        assert said.startswith(f"DeniedError: {live}: Permission denied")
        assert said.endswith("(give the service the right to read it)")


def give(root: Path, uid: int) -> None:
    for path in [root, *root.rglob("*")]:
        os.chown(path, uid, uid, follow_symlinks=False)


@pytest.mark.skipif(not AS_ROOT, reason="only root can become somebody else")
class TestWithoutPrivileges:
    """Of an ordinary user's volume."""

    def prepared(self, tmp_path: Path, store: LocalStore, uid: int = NOBODY) -> tuple[Component, Picture]:
        """A user's set with a folder and a root that he may not write to, and what is in it."""
        source = tmp_path / "read-only"
        (source / "folder" / "inner").mkdir(parents=True)
        (source / "folder" / "inner" / "file").write_text("new")
        for folder in (source / "folder" / "inner", source / "folder", source):
            folder.chmod(0o555)
            os.utime(folder, ns=(0, 3_000))
        give(source, uid)
        set_id = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
        component = write_volume(Volume("repos", source), store, set_id, "run", Operation())
        for path in Path(store.location.place).rglob("*"):
            path.chmod(0o755)
        return component, picture(source)

    def test_folders_that_may_not_be_written_take_their_places(
        self, tmp_path: Path, local_store: LocalStore, live: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        component, wanted = self.prepared(tmp_path, local_store)
        give(live, NOBODY)
        (live / "both").chmod(0o555)
        staged(component, local_store, live)

        def die(*_: object) -> None:
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(volume_exchange, "_set_state", die)
            switch_volume(live, RESTORE_ID, Operation())
        give(live / STAGING, NOBODY)
        assert stat.S_IMODE((live / STAGING / "new").stat().st_mode) == 0o755
        assert not half_switched(live), "killed when all was made ready, and nothing moved"
        assert as_user(lambda: switch_volume(live, RESTORE_ID, Operation()), live) == "[]"
        assert picture(live) == wanted

    def test_a_root_of_somebody_else_is_refused_before_anything_is_moved(
        self, tmp_path: Path, local_store: LocalStore, live: Path
    ) -> None:
        component, _ = self.prepared(tmp_path, local_store, uid=4242)
        give(live, NOBODY)
        live.chmod(0o777)
        before = picture(live)
        refusal = f"the owner, mode and time of {live} can't be set: it belongs to uid {NOBODY} ("

        def check() -> list[str]:
            return [str(fault) for fault in preflight_volume(component, live, RESTORE_ID)]

        def restore() -> None:
            staged(component, local_store, live)
            switch_volume(live, RESTORE_ID, Operation())

        found = as_user(check, live, uid=4242)
        assert refusal in found
        assert "acceptMetadataLoss" in found.partition(refusal)[2]
        assert as_user(restore, live, uid=4242).startswith(f"DeniedError: {refusal}")
        discard_volume(live, RESTORE_ID)
        after = picture(live)
        assert after.pop(".")[0] == before.pop(".")[0]
        assert after == before

    @pytest.mark.parametrize("is_killed", [False, True], ids=["in one go", "killed and recovered"])
    def test_a_root_of_somebody_else_keeps_its_own_attributes_where_the_loss_is_accepted(
        self, tmp_path: Path, local_store: LocalStore, live: Path, *, is_killed: bool
    ) -> None:
        """As a volume of Kubernetes, whose root belongs to uid 0 and to the group of the service."""
        component, wanted = self.prepared(tmp_path, local_store, uid=4242)
        give(live, 4242)
        os.chown(live, 0, 4242)
        live.chmod(0o2775)

        def die(*_: object) -> None:
            raise Killed

        def restore() -> object:
            assert preflight_volume(component, live, RESTORE_ID, accept_metadata_loss=True) == []
            stage_volume(component, local_store, live, RESTORE_ID, Operation(), accept_metadata_loss=True)
            if not is_killed:
                return switch_volume(live, RESTORE_ID, Operation())
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                patch.setattr(volume_exchange, "_take_over_attributes", die)
                switch_volume(live, RESTORE_ID, Operation())
            return recover_volume(live, RESTORE_ID)

        loss = "could not be set here: owner, mode, time of the root, which belongs to uid 0"
        assert as_user(restore, live, uid=4242) == repr(True if is_killed else [loss])
        found = picture(live)
        del found["."], wanted["."]
        assert found == wanted
        assert (live.stat().st_uid, stat.S_IMODE(live.stat().st_mode)) == (0, 0o2775)


class TestPreflight:
    def test_a_volume_that_can_be_restored_has_no_fault(self, component: Component, live: Path) -> None:
        old = picture(live)
        assert preflight_volume(component, live, RESTORE_ID) == []
        discard_volume(live, RESTORE_ID)
        assert picture(live) == old

    @pytest.mark.parametrize("place", ["missing", "a file"])
    def test_a_root_that_is_no_directory_is_a_fault(self, component: Component, live: Path, place: str) -> None:
        if place == "a file":
            (live / place).touch()
        assert [str(fault) for fault in preflight_volume(component, live / place, RESTORE_ID)] == [
            f"{live / place} is no directory (mount or make it, or correct ATHENA_VOLUMES)"
        ]

    def test_too_little_room_is_a_fault(
        self, component: Component, live: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.statvfs(live)
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([*real[:4], 0, *real[5:]]))
        [fault] = preflight_volume(component, live, RESTORE_ID)
        assert isinstance(fault, FullError)

    def test_what_the_file_system_refuses_is_a_fault_unless_the_loss_is_accepted(
        self, component: Component, live: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert component.volume is not None
        wanted = {"uids": (0, 4242), "gids": (4243,), "special_modes": True, "xattr_classes": ("security", "user")}
        wanting = component.model_copy(update={"volume": component.volume.model_copy(update=wanted)})

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        for name in ("fchown", "fchmod", "setxattr"):
            monkeypatch.setattr(os, name, refuse)
        faults = preflight_volume(wanting, live, RESTORE_ID)
        assert all(isinstance(fault, DeniedError) for fault in faults)
        said = " ".join(fault.cause for fault in faults)
        for what in ("owner 4242", "group 4243", "set-id", "class security", "class user"):
            assert what in said
        assert preflight_volume(wanting, live, RESTORE_ID, accept_metadata_loss=True) == []

    @pytest.mark.skipif(not AS_ROOT, reason="only root may set these")
    def test_root_may_set_all_of_it(self, component: Component, live: Path) -> None:
        assert component.volume is not None
        wanted = {
            "uids": (0, 4242), "gids": (4243,), "special_modes": True,
            "xattr_classes": ("security", "system", "trusted", "user"),
        }  # fmt: skip
        wanting = component.model_copy(update={"volume": component.volume.model_copy(update=wanted)})
        assert preflight_volume(wanting, live, RESTORE_ID) == []

    def test_device_nodes_are_a_fault_unless_allowed(self, component: Component, live: Path) -> None:
        assert component.volume is not None
        wanting = component.model_copy(update={"volume": component.volume.model_copy(update={"devices": 2})})
        [fault] = preflight_volume(wanting, live, RESTORE_ID)
        assert "2 device nodes" in fault.cause
        assert preflight_volume(wanting, live, RESTORE_ID, allow_devices=True) == []

    def test_attributes_that_the_file_system_does_not_know_are_a_fault_unless_the_loss_is_accepted(
        self, component: Component, live: Path
    ) -> None:
        """As of a volume that was on NFS or btrfs."""
        assert component.volume is not None
        wanted = {"xattr_classes": ("system.nfs4_acl", "system.posix_acl_access", "unheard-of", "user")}
        wanting = component.model_copy(update={"volume": component.volume.model_copy(update=wanted)})
        said = " ".join(str(fault) for fault in preflight_volume(wanting, live, RESTORE_ID))
        assert "class system.nfs4_acl can't be set here" in said
        assert "class unheard-of can't be set here" in said
        assert "acceptMetadataLoss" in said
        assert "posix_acl" not in said
        assert preflight_volume(wanting, live, RESTORE_ID, accept_metadata_loss=True) == []

    def test_a_file_system_without_symbolic_links_is_a_fault(
        self, component: Component, live: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As an SMB share is: the switch would find it when the databases are switched already."""

        def refuse(*_: object, **__: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "symlink", refuse)
        [fault] = preflight_volume(component, live, RESTORE_ID, accept_metadata_loss=True)
        assert "takes no symbolic links" in fault.cause

    def test_a_mount_inside_is_a_fault_and_nothing_is_moved(
        self, component: Component, local_store: LocalStore, live: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        staged(component, local_store, live)
        before = picture(live)
        for module in (volume_exchange, volume_preflight):
            monkeypatch.setattr(module, "mount_points", lambda root: [f"{root}/both"])
        [fault] = preflight_volume(component, live, RESTORE_ID)
        assert "is mounted inside" in fault.cause
        with pytest.raises(FinalError, match="is mounted inside"):
            switch_volume(live, RESTORE_ID, Operation())
        after = picture(live)
        assert after.pop(STAGING)[0] == before.pop(STAGING)[0]  # the probe touched its time
        assert after == before

    @pytest.mark.skipif(not AS_ROOT or not shutil.which("unshare"), reason="only root may mount")
    def test_a_root_that_may_not_be_written_is_a_fault(self, component: Component, live: Path) -> None:
        script = (
            "import sys, pathlib\n"
            "from athena_backup.manifest import Component\n"
            "from athena_backup.volume_preflight import preflight_volume\n"
            "component = Component.model_validate_json(sys.argv[2])\n"
            f"print(preflight_volume(component, pathlib.Path(sys.argv[1]), '{RESTORE_ID}'))\n"
        )
        command = f'mount -t tmpfs -o ro none "{live}" && exec "{sys.executable}" -c "$SCRIPT" "{live}" "$DOCUMENT"'
        said = in_own_mounts(command, script, component)
        assert "DeniedError" in said
        assert "Read-only file system" in said
