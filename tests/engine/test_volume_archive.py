"""A volume comes back from its archives exactly as it was, by our reader and by GNU tar alike; and its promises are kept."""

import contextlib
import hashlib
import os
import resource
import socket
import stat
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from tree_picture import picture

from athena_backup import volume_members
from athena_backup.errors import CancelledError, DamagedError, FinalError
from athena_backup.manifest import Component, Part, Stream, VolumeFacts
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.pipeline import read_stream
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_entry import Entry
from athena_backup.volume_extract import read_volume
from athena_backup.volume_read import verify_volume

SET_ID = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
AS_ROOT = os.geteuid() == 0
# Gives its lease up a moment after it is told to, as a server that first has to ask its client.
LEASE_HOLDER = """
import fcntl, os, signal, sys, time
file = os.open(sys.argv[1], os.O_RDWR)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
try:
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
except OSError:
    sys.exit()
print("held", flush=True)
signal.sigwait([signal.SIGIO])
time.sleep(0.3)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
sys.exit(7)
"""
NAMES = [
    b"plain",
    b"with space",
    b"new\nline",
    "ümläut-名".encode(),
    b"not-utf8-\xff\xfe",
    b"-rf",
    b"n" * 120,
    b"f" * 255,
]


def back_up(root: Path, store: LocalStore, *, part_limit_bytes: int = 1 << 30, torn_limit: float = 0.01) -> Component:
    return write_volume(
        Volume("gitserver", root), store, SET_ID, "run", Operation(),
        part_limit_bytes=part_limit_bytes, torn_limit=torn_limit,
    )  # fmt: skip


def restored(component: Component, store: LocalStore, target: Path) -> Path:
    target.mkdir(mode=0o700)
    read_volume(component, store, target, Operation())
    return target


def stored(component: Component, store: LocalStore) -> bytes:
    """The raw tar of a component, decompressed by zstandard alone."""
    whole = b"".join((Path(store.location.place) / part.key).read_bytes() for part in component.parts)
    raw = b""
    while whole:
        frame = zstandard.ZstdDecompressor().decompressobj()
        raw += frame.decompress(whole)
        assert frame.eof
        whole = frame.unused_data
    return raw


def replaced(component: Component, store: LocalStore, raw: bytes, *, cut_bytes: int = 0) -> Component:
    """The component with another tar in its place and a manifest that fits it: only the structure can tell."""
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    packed = packed[: len(packed) - cut_bytes]
    key = "app/replaced/0000.tar.zst.0000"
    (Path(store.location.place) / key).parent.mkdir(parents=True, exist_ok=True)
    (Path(store.location.place) / key).write_bytes(packed)
    part = Part(key=key, size_bytes=len(packed), raw_size_bytes=len(raw), sha256=hashlib.sha256(packed).hexdigest())
    return component.model_copy(update={"streams": (Stream(name="0000.tar.zst", parts=(part,)),)})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with everything that a volume may hold."""
    root = tmp_path / "live"
    root.mkdir()
    top = os.fsencode(root)
    for number, name in enumerate(NAMES):
        place = os.path.join(top, name)
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o640))
        Path(os.fsdecode(place)).write_bytes(name * number)
        os.utime(place, ns=(1, 1_700_000_000_123_456_789 + number))
    folder = top
    for _ in range(6):  # a path of far more than 255 bytes
        folder = os.path.join(folder, b"d" * 100)
        os.mkdir(folder, 0o750)
    Path(os.fsdecode(folder), "deep").write_text("deep")
    (root / "empty").mkdir()
    (root / "empty.txt").touch()
    (root / "large").write_bytes(os.urandom(volume_members.REREAD_LIMIT_BYTES + 12_345))
    (root / "first").write_text("one inode")
    os.link(root / "first", root / "zweiter")
    os.link(root / "first", root / "a-third")
    os.symlink("first", root / "link")
    os.symlink(b"/nowhere/\xff" + b"x" * 300, root / "dangling")
    os.symlink("..", root / "up")
    with (root / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"in the middle")
        file.truncate(40 << 20)
    with (root / "hole").open("wb") as file:
        file.truncate(1 << 20)
    os.mkfifo(root / "fifo", 0o620)
    (root / "program").write_text("#!/bin/sh\n")
    (root / "program").chmod(0o4755)
    (root / "shared").mkdir()
    (root / "shared").chmod(0o3777)
    (root / "unreadable-later").write_text("x")
    (root / "unreadable-later").chmod(0)
    os.utime(root / "empty.txt", ns=(0, -1_500_000_001))
    for attribute, value in (("user.note", b"\x00\xff=\n"), ("user.a=b%c", b"1")):
        with contextlib.suppress(OSError):  # a file system without attributes
            os.setxattr(root / "first", attribute, value)
            os.setxattr(root / "empty", attribute, value)
    if AS_ROOT:
        os.chown(root / "plain", 1234, 2_500_000)
        os.chown(root / "link", 3_000_000_000, 77, follow_symlinks=False)
        os.chown(root / "empty", 65534, 65534)
    os.utime(root / "empty", ns=(5, 1_600_000_000_000_000_001))
    os.utime(root, ns=(5, 1_500_000_000_999_999_999))
    return root


def test_a_tree_comes_back_entry_by_entry(tree: Path, local_store: LocalStore, tmp_path: Path) -> None:
    before = picture(tree)
    component = back_up(tree, local_store)
    target = restored(component, local_store, tmp_path / "new")
    assert picture(target) == before
    assert picture(tree) == before
    assert os.stat(target / "sparse").st_blocks * 512 < 1 << 20
    assert os.stat(target / "hole").st_blocks * 512 < 1 << 20
    assert component.volume is not None
    assert component.volume.special_modes
    assert component.raw_size_bytes < 12 << 20, "holes are not in the archive"


def test_gnu_tar_restores_the_same_tree(tree: Path, local_store: LocalStore, tmp_path: Path) -> None:
    component = back_up(tree, local_store)
    target = tmp_path / "by-tar"
    target.mkdir()
    # GNU tar does not know hdrcharset, and says so; the times before 1970 are what this tree wants.
    quiet = ["--warning=no-unknown-keyword", "--warning=no-timestamp"]
    command = ["tar", "-x", "-p", "--numeric-owner", "--xattrs", "--xattrs-include=*", *quiet, "-f", "-"]
    if AS_ROOT:
        command.append("--same-owner")
    ended = subprocess.run(command, cwd=target, input=stored(component, local_store), capture_output=True)
    assert (ended.returncode, ended.stderr.decode()) == (0, "")
    assert picture(target) == picture(tree)


def test_an_archive_of_many_parts_comes_back_and_each_part_is_a_frame(
    tree: Path, local_store: LocalStore, tmp_path: Path
) -> None:
    component = back_up(tree, local_store, part_limit_bytes=1 << 20)
    keys = [part.key for part in component.parts]
    assert len(keys) >= 3
    folder = f"app/2023-02-02t16-00-00/volumes/gitserver/{component.attempt}/"
    assert keys == [f"{folder}0000.tar.zst.{number:04}" for number in range(len(keys))]
    assert picture(restored(component, local_store, tmp_path / "new")) == picture(tree)


def test_a_time_far_beyond_all_others_comes_back_or_as_near_as_it_can(tmp_path: Path, local_store: LocalStore) -> None:
    """Milliseconds that somebody took for seconds: not every file system can keep them."""
    far = 1_790_000_000_000
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("no file system here that keeps such times")
    with tempfile.TemporaryDirectory(dir=memory) as place:
        root, again = Path(place) / "live", Path(place) / "again"
        root.mkdir()
        (root / "file").write_text("content")
        os.utime(root / "file", ns=(far * 10**9 + 7, far * 10**9 + 7))
        if (root / "file").stat().st_mtime_ns != far * 10**9 + 7:
            pytest.skip("nor does this one")
        component = back_up(root, local_store)
        assert (restored(component, local_store, again) / "file").stat().st_mtime_ns == far * 10**9 + 7
    assert (restored(component, local_store, tmp_path / "new") / "file").read_text() == "content"


def test_a_file_that_a_file_server_has_a_lease_on_is_waited_for(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    root.mkdir()
    (root / "file").write_text("content")
    holder = subprocess.Popen([sys.executable, "-c", LEASE_HOLDER, str(root / "file")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        said = holder.stdout.readline()
        if said != b"held\n":
            pytest.skip("no leases here")
        component = back_up(root, local_store)
        assert holder.wait(60) == 7, "it was told to give the lease up, and did"
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (restored(component, local_store, tmp_path / "new") / "file").read_text() == "content"


@pytest.mark.skipif(not AS_ROOT, reason="only root may make access control lists and capabilities of others")
def test_access_control_lists_and_capabilities_come_back(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    root.mkdir()
    (root / "file").write_text("x")
    # user::rw-,user:1234:r--,group::r--,mask::r--,other::---; revision 2 capability cap_net_raw=ep
    entries = [(1, 6, -1), (2, 4, 1234), (4, 4, -1), (16, 4, -1), (32, 0, -1)]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, bits, who in entries
    )
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    try:
        os.setxattr(root / "file", "system.posix_acl_access", acl)
        os.setxattr(root, "system.posix_acl_default", acl)
        os.setxattr(root / "file", "security.capability", capability)
    except OSError as error:
        pytest.skip(f"this file system has none: {error}")
    component = back_up(root, local_store)
    assert b"SCHILY.acl.access=user::rw-,user:1234:r--" in stored(component, local_store)
    assert component.volume is not None
    assert component.volume.xattr_classes == ("security", "system")
    assert picture(restored(component, local_store, tmp_path / "new")) == picture(root)


def test_sockets_are_left_out_and_counted_and_stagings_are_left_out(
    tree: Path, local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = picture(tree)
    (tree / ".athena-0123456789ab").mkdir()
    (tree / ".athena-0123456789ab" / "old").write_text("not ours to keep")
    monkeypatch.chdir(tree)  # a socket's path is at most 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        component = back_up(tree, local_store)
    target = restored(component, local_store, tmp_path / "new")
    assert component.volume is not None
    assert component.volume.sockets == 1
    assert picture(target).keys() == expected.keys()


@pytest.mark.skipif(not AS_ROOT, reason="only root makes device nodes")
def test_device_nodes_are_restored_only_where_they_are_allowed(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    root.mkdir()
    try:
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no device nodes in this container")
    component = back_up(root, local_store)
    with pytest.raises(FinalError, match="device node"):
        restored(component, local_store, tmp_path / "refused")
    (tmp_path / "new").mkdir()
    read_volume(component, local_store, tmp_path / "new", Operation(), allow_devices=True)
    assert picture(tmp_path / "new") == picture(root)


def test_facts_count_members_files_and_bytes(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    (root / "sub").mkdir(parents=True)
    (root / "a").write_bytes(b"12345")
    os.link(root / "a", root / "b")
    os.symlink("a", root / "c")
    facts = back_up(root, local_store).volume
    assert isinstance(facts, VolumeFacts)
    assert (facts.members, facts.files, facts.content_bytes) == (5, 1, 5)
    assert facts.uids == (os.geteuid(),)


class TestTornFiles:
    def test_a_file_that_changes_once_is_read_again_and_whole(
        self, tmp_path: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = tmp_path / "live"
        root.mkdir()
        (root / "log").write_bytes(b"a" * 1000)
        self.write_during_reads(monkeypatch, root / "log", b"b" * 2000, times=1)
        component = back_up(root, local_store)
        assert component.volume is not None
        assert component.volume.torn == ()
        assert (restored(component, local_store, tmp_path / "new") / "log").read_bytes() == b"b" * 2000

    def test_a_file_that_keeps_growing_is_cut_at_its_headers_size_and_torn(
        self, tmp_path: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = tmp_path / "live"
        root.mkdir()
        (root / "log").write_bytes(b"a" * 1000)
        with (root / "log").open("ab") as log:
            real = volume_members._read_all

            def growing(descriptor: int, size_bytes: int) -> bytes:
                content = real(descriptor, size_bytes)
                log.write(b"more")
                log.flush()
                return content

            monkeypatch.setattr(volume_members, "_read_all", growing)
            component = back_up(root, local_store, torn_limit=1)
        assert component.volume is not None
        assert component.volume.torn == ("log",)
        content = (restored(component, local_store, tmp_path / "new") / "log").read_bytes()
        assert content == b"a" * 1000 + b"more" * 2

    def test_a_large_file_that_shrinks_is_padded_and_torn(
        self, tmp_path: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(volume_members, "REREAD_LIMIT_BYTES", 100)
        root = tmp_path / "live"
        root.mkdir()
        (root / "image").write_bytes(b"a" * 1000)
        real = volume_members._segments

        def shrinking(descriptor: int, status: os.stat_result) -> volume_members._Segments | None:
            segments = real(descriptor, status)
            os.truncate(root / "image", 300)
            return segments

        monkeypatch.setattr(volume_members, "_segments", shrinking)
        component = back_up(root, local_store, torn_limit=1)
        assert component.volume is not None
        assert component.volume.torn == ("image",)
        content = (restored(component, local_store, tmp_path / "new") / "image").read_bytes()
        assert content == b"a" * 300 + b"\0" * 700

    def test_more_than_the_limit_fails_the_component_and_names_the_files(
        self, tmp_path: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = tmp_path / "live"
        root.mkdir()
        for number in range(99):
            (root / f"file-{number}").write_text("quiet")
        (root / "log").write_text("loud")
        self.write_during_reads(monkeypatch, root / "log", b"x", times=50)
        component = back_up(root, local_store, torn_limit=0.01)
        assert component.volume is not None
        assert component.volume.torn == ("log",), "one of a hundred is at the limit, not beyond it"
        self.write_during_reads(monkeypatch, root / "log", b"x", times=50)
        with pytest.raises(FinalError, match=r"1 of 100 files changed or vanished.*log"):
            back_up(root, local_store, torn_limit=0.009)

    def write_during_reads(self, monkeypatch: pytest.MonkeyPatch, path: Path, data: bytes, *, times: int) -> None:
        real = volume_members._read_all
        left = [times]
        inode = path.stat().st_ino

        def disturbed(descriptor: int, size_bytes: int) -> bytes:
            content = real(descriptor, size_bytes)
            if os.fstat(descriptor).st_ino == inode and left[0]:
                left[0] -= 1
                path.write_bytes(data)
                os.utime(path, ns=(0, left[0]))
            return content

        monkeypatch.setattr(volume_members, "_read_all", disturbed)


def test_an_inode_that_was_given_to_another_file_is_no_hard_link(
    tmp_path: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "live"
    root.mkdir()
    (root / "a").write_text("first")
    os.link(root / "a", root / "b")
    real = volume_members.Members._file

    def rewriting(members: volume_members.Members, entry: Entry) -> Iterator[bytes]:
        yield from real(members, entry)
        if entry.path == b"a":
            (root / "b").write_text("other content")

    monkeypatch.setattr(volume_members.Members, "_file", rewriting)
    with pytest.raises(FinalError, match="changed or vanished while they were read: b"):
        back_up(root, local_store)
    (root / "b").write_text("first")
    component = back_up(root, local_store, torn_limit=1)
    assert component.volume is not None
    assert component.volume.torn == ("b",)
    target = restored(component, local_store, tmp_path / "new")
    assert (target / "a").read_text() == "first"
    assert (target / "b").read_text() == "other content"


class TestNeverReadAsWhole:
    def test_a_frame_that_is_cut_off(self, tree: Path, local_store: LocalStore) -> None:
        component = back_up(tree, local_store)
        raw = stored(component, local_store)
        verify_volume(replaced(component, local_store, raw), local_store, Operation())
        with pytest.raises(DamagedError):
            verify_volume(replaced(component, local_store, raw, cut_bytes=5), local_store, Operation())

    def test_a_second_archive_glued_on(self, tree: Path, local_store: LocalStore) -> None:
        component = back_up(tree, local_store)
        raw = stored(component, local_store)
        with pytest.raises(DamagedError, match="goes on behind its end"):
            verify_volume(replaced(component, local_store, raw + raw), local_store, Operation())
        with pytest.raises(DamagedError, match="goes on behind its end"):
            verify_volume(replaced(component, local_store, raw + b"\0" * 512), local_store, Operation())

    @pytest.mark.parametrize("zero_blocks", [0, 1, 2])
    def test_an_archive_cut_at_a_members_end(self, tmp_path: Path, local_store: LocalStore, zero_blocks: int) -> None:
        root = tmp_path / "live"
        root.mkdir()
        (root / "a").write_bytes(b"x" * 512)
        (root / "b").write_bytes(b"y" * 512)
        component = back_up(root, local_store)
        raw = stored(component, local_store)
        end_of_a = raw.index(b"x" * 512) + 512
        cut = raw[:end_of_a] + b"\0" * 512 * zero_blocks
        with pytest.raises(DamagedError):
            verify_volume(replaced(component, local_store, cut), local_store, Operation())

    def test_a_whole_archive_without_its_end_blocks(self, tree: Path, local_store: LocalStore) -> None:
        component = back_up(tree, local_store)
        raw = stored(component, local_store)
        for missing in (512, 1024):
            with pytest.raises(DamagedError, match="ends in the middle"):
                verify_volume(replaced(component, local_store, raw[:-missing]), local_store, Operation())

    @pytest.mark.parametrize("key", ["members", "files", "content_bytes"])
    @pytest.mark.parametrize("by", [-1, 1])
    def test_an_archive_with_more_or_less_than_was_promised(
        self, tree: Path, local_store: LocalStore, key: str, by: int
    ) -> None:
        component = back_up(tree, local_store)
        assert component.volume is not None
        facts = component.volume.model_copy(update={key: getattr(component.volume, key) + by})
        with pytest.raises(DamagedError, match="promises"):
            verify_volume(component.model_copy(update={"volume": facts}), local_store, Operation())

    def test_a_part_with_a_flipped_byte(self, tree: Path, local_store: LocalStore) -> None:
        component = back_up(tree, local_store)
        place = Path(local_store.location.place) / component.parts[0].key
        damaged = bytearray(place.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        place.write_bytes(damaged)
        with pytest.raises(DamagedError):
            verify_volume(component, local_store, Operation())


def test_a_header_with_a_flipped_byte_is_noticed_by_its_checksum(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    root.mkdir()
    (root / "a").write_text("x")
    component = back_up(root, local_store)
    raw = bytearray(stored(component, local_store))
    raw[1024] ^= 1
    with pytest.raises(DamagedError, match="checksum"):
        verify_volume(replaced(component, local_store, bytes(raw)), local_store, Operation())


def test_a_failed_backup_leaves_no_part_that_a_list_shows(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    root.mkdir()
    with pytest.raises(FinalError, match="is empty: is it mounted"):
        back_up(root, local_store)
    assert list(local_store.entries("app/")) == []


def test_a_disk_that_was_just_formatted_is_empty(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    (root / "lost+found").mkdir(parents=True)
    with pytest.raises(FinalError, match="is empty: is it mounted"):
        back_up(root, local_store)
    (root / "lost+found" / "#12").write_text("found by fsck")
    assert back_up(root, local_store).volume is not None
    (root / "lost+found" / "#12").unlink()
    (root / "lost+found").rmdir()
    (root / "lost+found").write_text("a file of that name")
    assert back_up(root, local_store).volume is not None


def test_a_cancelled_backup_stops_in_the_middle(tree: Path, local_store: LocalStore) -> None:
    operation = Operation()
    operation.cancel("somebody did")
    with pytest.raises(CancelledError):
        write_volume(Volume("gitserver", tree), local_store, SET_ID, "run", operation)


def test_memory_does_not_grow_with_the_size_of_files(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    root.mkdir()
    with (root / "large").open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    tracemalloc.start()
    try:
        component = back_up(root, local_store)
        verify_volume(component, local_store, Operation())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 32 << 20


def test_a_backup_needs_few_descriptors(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    for number in range(300):
        (root / str(number) / "inner").mkdir(parents=True)
        (root / str(number) / "inner" / "file").write_text("x")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 30, hard))
    try:
        component = back_up(root, local_store)
        restored(component, local_store, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_label_of_the_systems_policy_is_kept_but_asks_for_no_right(
    tmp_path: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attributes are made up: which of them may be set depends on the system and the file system."""
    root = tmp_path / "live"
    root.mkdir()
    (root / "file").touch()
    found = {"security.selinux": b"label", "system.nfs4_acl": b"acl", "user.note": b"x"}
    monkeypatch.setattr("athena_backup.volume_members.xattrs_of", lambda _: found)
    component = back_up(root, local_store)
    assert component.volume is not None
    assert component.volume.xattr_classes == ("system.nfs4_acl", "user")
    raw = b"".join(read_stream("v", component.streams[0].parts, local_store, Operation()))
    assert b"SCHILY.xattr.security.selinux=label" in raw


def test_attributes_that_change_while_a_file_is_read_are_those_of_its_last_reading(
    tmp_path: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right that is taken away in that moment would come back, as an ACL is set after the mode."""
    root = tmp_path / "live"
    root.mkdir()
    (root / "file").write_text("content")
    os.setxattr(root / "file", "user.right", b"old")
    read_all = volume_members._read_all

    def reading(descriptor: int, size_bytes: int) -> bytes:
        content = read_all(descriptor, size_bytes)
        if os.getxattr(root / "file", "user.right") == b"old":
            os.setxattr(root / "file", "user.right", b"new")
        return content

    monkeypatch.setattr(volume_members, "_read_all", reading)
    component = write_volume(Volume("edweb", root), local_store, SET_ID, "run", Operation())
    (tmp_path / "new").mkdir()
    read_volume(component, local_store, tmp_path / "new", Operation())
    assert os.getxattr(tmp_path / "new" / "file", "user.right") == b"new"
