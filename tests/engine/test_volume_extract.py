"""An archive may come from anywhere: what it holds is made below the staging folder, or refused with nothing made outside."""

import contextlib
import errno
import hashlib
import os
import stat
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import zstandard
from unprivileged import NOBODY, as_user

from athena_backup import volume_hand, volume_read
from athena_backup.crew import Crew
from athena_backup.errors import AthenaError, DamagedError, DeniedError, FinalError, FullError
from athena_backup.manifest import Component, Part, Stream, VolumeFacts
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_extract import read_volume
from athena_backup.volume_hand import open_beneath
from athena_backup.volume_pax import (
    DIRECTORY,
    END,
    FILE,
    HARD_LINK,
    SYMLINK,
    Member,
    header,
    padding,
    sparse_map,
)
from athena_backup.volume_read import verify_volume

AS_ROOT = os.geteuid() == 0
OWN = (os.geteuid(), os.getegid())


def member(name: bytes, kind: bytes = FILE, *, size_bytes: int = 0, link: bytes = b"", mode: int = 0o755, owner: tuple[int, int] = OWN,
           xattrs: dict[str, bytes] | None = None) -> Member:  # fmt: skip
    return Member(
        name=name, type=kind, mode=mode, uid=owner[0], gid=owner[1], mtime_ns=1_000_000_001, size_bytes=size_bytes,
        stored_bytes=size_bytes, link=link, xattrs=xattrs or {},
    )  # fmt: skip


ROOT = member(b".", DIRECTORY)


def archive(*contents: tuple[Member, bytes] | Member) -> bytes:
    raw = b""
    for content in contents:
        one, data = content if isinstance(content, tuple) else (content, b"")
        raw += header(one) + data + padding(len(data))
    return raw + END


def counted(archives: tuple[bytes, ...]) -> tuple[int, int, int]:
    """Members, files and bytes of archives, as a manifest that was tampered with would promise them."""
    members = files = content_bytes = 0
    for raw in archives:
        reader = volume_read._Archive(iter([raw]))
        with contextlib.suppress(DamagedError):
            for one in reader.members():
                members += 1
                files += one.type == FILE
                content_bytes += min(one.size_bytes, 1 << 30)
                for _ in reader.content(one):
                    pass
    return members, files, content_bytes


def component_of(
    store: LocalStore, *archives: bytes, members: int | None = None, files: int = 100, content_bytes: int = 1 << 30
) -> Component:
    """A component whose manifest fits these archives, to the member unless ``members`` says otherwise."""
    if members is None:
        members, files, content_bytes = counted(archives)
    streams = []
    for number, raw in enumerate(archives):
        packed = zstandard.ZstdCompressor(write_checksum=True).compress(raw)
        key = f"app/hostile/{number:04}.tar.zst.0000"
        store.put(key, packed)
        part = Part(key=key, size_bytes=len(packed), raw_size_bytes=len(raw), sha256=hashlib.sha256(packed).hexdigest())
        streams.append(Stream(name=f"{number:04}.tar.zst", parts=(part,)))
    facts = VolumeFacts(
        members=members, files=files, content_bytes=content_bytes, torn=(), vanished=(), sockets=0, other_file_systems=(),
        alternates=(), uids=(), gids=(), special_modes=False, devices=0, xattr_classes=(),
    )  # fmt: skip
    now = datetime.now(UTC)
    return Component(
        name="hostile", kind="volume", attempt="0123456789ab", run_id="run", state="complete", began=now, ended=now,
        streams=tuple(streams), volume=facts,
    )  # fmt: skip


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    place = tmp_path / "volume" / "new"
    place.mkdir(parents=True)
    return place


def refused(store: LocalStore, staging: Path, raw: bytes, match: str, error: type[AthenaError] = FinalError) -> None:
    """Extraction refuses the archive, and nothing but the staging folder was touched."""
    outside = staging.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "victim").write_text("untouched")
    before = (outside / "victim").stat()
    with pytest.raises(error, match=match):
        read_volume(component_of(store, raw), store, staging, Operation())
    after = (outside / "victim").stat()
    assert (after.st_mode, after.st_uid, after.st_nlink, after.st_mtime_ns) == (
        before.st_mode, before.st_uid, before.st_nlink, before.st_mtime_ns,
    )  # fmt: skip
    assert (outside / "victim").read_text() == "untouched"
    assert sorted(path.name for path in staging.parent.iterdir()) == ["new", "outside"]
    assert [path.name for path in outside.iterdir()] == ["victim"]


@pytest.mark.parametrize(
    "name",
    [
        b"../outside/victim",
        b"..",
        b"a/../../outside/victim",
        b"/tmp/absolute",
        b"a//b",
        b"a/./b",
        b"a/",
        b"/",
        b"./../x",
        b"x\0y",
    ],
)
def test_a_name_that_could_lead_out_is_refused(local_store: LocalStore, staging: Path, name: bytes) -> None:
    raw = archive(member(name), ROOT)
    if b"\0" in name:  # ustar's field ends there, a record does not
        raw = archive(member(b"n" * 120), ROOT).replace(b"path=" + b"n" * 120, b"path=" + name + b"m" * 117)
    refused(local_store, staging, raw, "could lead out")


def test_verifying_refuses_such_names_too(local_store: LocalStore) -> None:
    with pytest.raises(FinalError, match="could lead out"):
        verify_volume(component_of(local_store, archive(member(b"../x"), ROOT)), local_store, Operation())


def test_names_of_restores_own_are_refused(local_store: LocalStore, staging: Path) -> None:
    raw = archive(member(b".athena-0123456789ab/state", SYMLINK, link=b"moving in"), ROOT)
    refused(local_store, staging, raw, "belongs to restores")


def test_a_link_that_is_then_written_through_leads_nowhere(local_store: LocalStore, staging: Path) -> None:
    link = member(b"way", SYMLINK, link=b"../outside")
    refused(local_store, staging, archive(link, member(b"way/victim"), ROOT), "stands twice")
    for entry in list(staging.iterdir()):
        subprocess.run(["rm", "-r", entry], check=True)
    (staging / "way").symlink_to("../outside")  # as if links were made first
    refused(local_store, staging, archive(member(b"way/victim"), ROOT), "lead through a link")


def test_a_folder_that_is_also_a_link_is_refused_and_never_dressed(local_store: LocalStore, staging: Path) -> None:
    link = member(b"way", SYMLINK, link=b"../outside")
    refused(local_store, staging, archive(link, member(b"way", DIRECTORY, mode=0o777), ROOT), "stands twice")


@pytest.mark.parametrize("kind", [FILE, DIRECTORY, SYMLINK, HARD_LINK])
def test_a_second_member_of_one_name_is_refused(local_store: LocalStore, staging: Path, kind: bytes) -> None:
    first = member(b"target")
    one = member(b"name", kind, link=b"target")
    refused(local_store, staging, archive(first, one, one, ROOT), "stands twice")


def test_a_file_and_a_folder_of_one_name_are_refused(local_store: LocalStore, staging: Path) -> None:
    refused(local_store, staging, archive(member(b"a"), member(b"a/b"), ROOT), "lead through a link or a file")


@pytest.mark.parametrize(
    ("target", "match"),
    [(b"../outside/victim", "could lead out"), (b"/etc/passwd", "could lead out"), (b"missing", "not there"),
     (b"sub", "no plain file"), (b"missing/deeper", "not there")],
)  # fmt: skip
def test_a_hard_link_to_what_this_restore_did_not_make_is_refused(
    local_store: LocalStore, staging: Path, target: bytes, match: str
) -> None:
    raw = archive(member(b"sub", DIRECTORY), member(b"link", HARD_LINK, link=target), ROOT)
    refused(local_store, staging, raw, match)


def test_a_hard_link_to_a_link_is_refused(local_store: LocalStore, staging: Path) -> None:
    raw = archive(member(b"way", SYMLINK, link=b"../outside/victim"), member(b"link", HARD_LINK, link=b"way"), ROOT)
    refused(local_store, staging, raw, "not there")


def test_an_entry_in_a_folder_that_is_no_member_is_refused(local_store: LocalStore, staging: Path) -> None:
    refused(local_store, staging, archive(member(b"a/b/c"), member(b"a", DIRECTORY), ROOT), "no members")


def test_an_archive_without_its_root_is_refused(local_store: LocalStore, staging: Path) -> None:
    refused(local_store, staging, archive(member(b"a")), "no members")


def test_a_root_that_is_no_folder_is_refused(local_store: LocalStore, staging: Path) -> None:
    refused(local_store, staging, archive(member(b".", SYMLINK, link=b"../outside")), "root is no folder")


def test_an_archive_that_promises_little_and_holds_much_is_stopped(local_store: LocalStore, staging: Path) -> None:
    raw = archive((member(b"bomb", size_bytes=50 << 20), bytes(50 << 20)), ROOT)
    with pytest.raises(DamagedError, match="more than the manifest promises"):
        read_volume(
            component_of(local_store, raw, members=2, files=1, content_bytes=1000), local_store, staging, Operation()
        )
    assert list(staging.iterdir()) == []


def test_a_sparse_file_of_an_impossible_size_is_stopped_by_the_promise(local_store: LocalStore, staging: Path) -> None:
    mapped = sparse_map([(1 << 60, 0)])
    bomb = Member(b"bomb", FILE, 0o644, *OWN, mtime_ns=0, size_bytes=1 << 60, stored_bytes=len(mapped), is_sparse=True)
    refused(local_store, staging, archive((bomb, mapped), ROOT), "more than the manifest promises", DamagedError)


@pytest.mark.parametrize(
    ("segments", "data"),
    [([(0, 10), (5, 10)], b"x" * 20), ([(0, 2000)], b"x" * 2000), ([(0, 10)], b"x" * 5), ([(0, 1)], b"x" * 1024),
     ([(2000, 1)], b"x")],
)  # fmt: skip
def test_a_map_of_holes_that_does_not_fit_is_refused(
    local_store: LocalStore, staging: Path, segments: list[tuple[int, int]], data: bytes
) -> None:
    mapped = sparse_map(segments)
    one = Member(b"s", FILE, 0o644, *OWN, mtime_ns=0, size_bytes=1000, stored_bytes=len(mapped + data), is_sparse=True)
    refused(local_store, staging, archive((one, mapped + data), ROOT), "map of", DamagedError)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"mtime=", b"mtim\xc3\xa4"),  # a record without '='
        (b"GNU.sparse.minor=0", b"GNU.sparse.minor=1"),
        (b"GNU.sparse.realsize", b"GNU.sparse.realsiz?"),
        (b"10 uid=999", b"99 uid=999"),
    ],
)  # fmt: skip
def test_broken_records_are_damage_and_never_an_unforeseen_error(
    local_store: LocalStore, staging: Path, old: bytes, new: bytes
) -> None:
    mapped = sparse_map([(1000, 0)])
    one = Member(b"s", FILE, 0o644, *OWN, mtime_ns=0, size_bytes=1000, stored_bytes=len(mapped), is_sparse=True)
    raw = archive((one, mapped), member(b"z", owner=(9_999_999, 0)), ROOT)
    raw = raw.replace(old, new) if old in raw else raw.replace(b"15 uid=9999999", b"95 uid=9999999")
    refused(local_store, staging, raw, "archive", DamagedError)


def test_any_flipped_byte_of_the_headers_ends_in_an_error_of_the_family_or_in_a_tree(
    local_store: LocalStore, tmp_path: Path
) -> None:
    mapped = sparse_map([(0, 3), (1000, 0)])
    sparse = Member(b"s", FILE, 0o644, *OWN, mtime_ns=0, size_bytes=1000, stored_bytes=len(mapped) + 3, is_sparse=True)
    raw = archive(
        (member(b"n" * 120, size_bytes=3, xattrs={"user.a": b"1"}), b"abc"), (sparse, mapped + b"abc"),
        member(b"l", SYMLINK, link=b"n"), member(b"h", HARD_LINK, link=b"n" * 120), ROOT,
    )  # fmt: skip
    for position in range(0, len(raw), 7):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << position % 8
        component = component_of(local_store, bytes(flipped), members=100)
        with pytest.raises(AthenaError):  # the promises of 100 members are never kept, so whole ones fail too
            verify_volume(component, local_store, Operation())
        target = tmp_path / f"flipped-{position}"
        target.mkdir()
        with pytest.raises(AthenaError):
            read_volume(component, local_store, target, Operation())
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"flipped", "store"}


@pytest.mark.parametrize("kind", [b"7", b"g", b"L", b"K", b"S", b"V"])
def test_types_that_we_never_write_are_refused(local_store: LocalStore, staging: Path, kind: bytes) -> None:
    refused(local_store, staging, archive(member(b"odd", kind), ROOT), "type|global header", DamagedError)


def test_a_name_as_deep_as_the_extended_header_allows_is_refused(local_store: LocalStore, staging: Path) -> None:
    refused(local_store, staging, archive(member(b"a/" * 100_000 + b"b"), ROOT), "could lead out")


def test_without_openat2_nothing_is_followed_either(
    local_store: LocalStore, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_hand, "_OPENAT2", 100_000)  # a system call that no kernel has
    (staging / "way").symlink_to("../outside")
    refused(local_store, staging, archive(member(b"way/victim"), ROOT), "lead through a link")
    os.unlink(staging / "way")
    raw = archive((member(b"a/b/c", size_bytes=1), b"x"), member(b"a/b", DIRECTORY), member(b"a", DIRECTORY), ROOT)
    read_volume(component_of(local_store, raw, members=4, files=1, content_bytes=1), local_store, staging, Operation())
    assert (staging / "a" / "b" / "c").read_text() == "x"


def test_opening_beneath_refuses_links_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        os.close(open_beneath(root, b"real/sub"))
        for path in (b"link/sub", b"link", b"../" + os.fsencode(tmp_path.name)):
            with pytest.raises(OSError):
                open_beneath(root, path)
    finally:
        os.close(root)


def test_several_archives_are_one_volume_and_the_last_one_dresses_the_folders(
    local_store: LocalStore, staging: Path
) -> None:
    first = archive((member(b"sub/a", size_bytes=1), b"a"))
    second = archive((member(b"sub/b", size_bytes=1), b"b"), member(b"sub/l", HARD_LINK, link=b"sub/b"))
    last = archive(member(b"sub", DIRECTORY, mode=0o711), ROOT)
    component = component_of(local_store, first, second, last, members=5, files=2, content_bytes=2)
    restored = read_volume(component, local_store, staging, Operation())
    assert (restored.members, restored.losses) == (5, ())
    assert (staging / "sub" / "l").read_text() == "b"
    assert stat.S_IMODE((staging / "sub").stat().st_mode) == 0o711
    assert (staging / "sub").stat().st_mtime_ns == 1_000_000_001


@pytest.mark.skipif(not AS_ROOT, reason="only root can become somebody else")
class TestWithoutPrivileges:
    """What an ordinary user may not set is refused, or left out and told where that was accepted."""

    @pytest.fixture
    def staging(self, staging: Path) -> Path:
        os.chown(staging, NOBODY, NOBODY)
        return staging

    def raw(self) -> bytes:
        return archive(
            (member(b"suid", mode=0o4755, owner=(1000, 1000), size_bytes=1), b"x"),
            member(b"link", SYMLINK, link=b"suid", owner=(1000, 1000)),
            member(b".", DIRECTORY, owner=(1000, 1000)),
        )

    def whole(self, store: LocalStore) -> Component:
        component = component_of(store, self.raw(), members=3, files=1, content_bytes=1)
        for path in Path(store.location.place).rglob("*"):
            path.chmod(0o755)
        return component

    def test_an_owner_that_may_not_be_set_is_refused(self, local_store: LocalStore, staging: Path) -> None:
        component = self.whole(local_store)
        said = as_user(lambda: read_volume(component, local_store, staging, Operation()), staging)
        assert said.startswith("DeniedError: suid: Operation not permitted")

    def test_an_accepted_loss_is_told_and_a_foreign_setuid_bit_is_never_given(
        self, local_store: LocalStore, staging: Path
    ) -> None:
        component = self.whole(local_store)
        said = as_user(
            lambda: read_volume(component, local_store, staging, Operation(), accept_metadata_loss=True).losses, staging
        )
        assert said == "('owner of 3 entries, the first suid',)"
        assert stat.S_IMODE((staging / "suid").stat().st_mode) == 0o755
        assert (staging / "suid").stat().st_mtime_ns == 1_000_000_001

    def test_what_is_read_only_has_its_attributes(self, local_store: LocalStore, staging: Path) -> None:
        owner = (65534, 65534)
        raw = archive(
            member(b"file", mode=0o444, owner=owner, xattrs={"user.note": b"x"}),
            member(b"folder", DIRECTORY, mode=0o555, owner=owner, xattrs={"user.note": b"y"}),
            member(b".", DIRECTORY, owner=owner),
        )
        component = component_of(local_store, raw)
        for path in Path(local_store.location.place).rglob("*"):
            path.chmod(0o755)
        said = as_user(lambda: read_volume(component, local_store, staging, Operation()).losses, staging)
        if "Operation not supported" in said:
            pytest.skip("no attributes here")
        assert said == "()"
        assert [os.getxattr(staging / name, "user.note") for name in ("file", "folder")] == [b"x", b"y"]

    def test_an_owner_map_lifts_it(self, local_store: LocalStore, staging: Path) -> None:
        component = self.whole(local_store)
        owner_map = {(1000, 1000): (65534, 65534)}
        said = as_user(
            lambda: read_volume(component, local_store, staging, Operation(), owner_map=owner_map).losses, staging
        )
        assert said == "()"
        assert stat.S_IMODE((staging / "suid").stat().st_mode) == 0o4755
        assert (staging / "suid").stat().st_uid == 65534


@pytest.mark.skipif(not AS_ROOT, reason="only root may give files away")
def test_an_owner_map_maps_exactly_the_pair(local_store: LocalStore, staging: Path) -> None:
    raw = archive(member(b"a", owner=(1000, 1000)), member(b"b", owner=(1000, 50)), ROOT)
    component = component_of(local_store, raw, members=3, files=2, content_bytes=0)
    read_volume(component, local_store, staging, Operation(), owner_map={(1000, 1000): (2000, 2001)})
    owners = [(path.stat().st_uid, path.stat().st_gid) for path in (staging / "a", staging / "b")]
    assert owners == [(2000, 2001), (1000, 50)]


def test_a_full_disk_is_told_as_such(local_store: LocalStore, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    raw = archive((member(b"a", size_bytes=1), b"x"), ROOT)
    with pytest.raises(FullError, match="a: No space left"):
        read_volume(component_of(local_store, raw), local_store, staging, Operation())


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_hard_link_may_come_before_its_target_from_another_archive(
    local_store: LocalStore, staging: Path, jobs: int
) -> None:
    links = archive(member(b"second", HARD_LINK, link=b"first"), member(b"first", HARD_LINK, link=b"folder/file"), ROOT)
    files = archive((member(b"folder/file", size_bytes=4), b"data"), member(b"folder", DIRECTORY))
    read_volume(component_of(local_store, links, files), local_store, staging, Operation(), crew=Crew(jobs))
    file = (staging / "folder" / "file").stat()
    assert {(staging / name).stat().st_ino for name in ("first", "second")} == {file.st_ino}
    assert file.st_nlink == 3


def test_hard_links_to_each_other_are_refused(local_store: LocalStore, staging: Path) -> None:
    links = (member(b"one", HARD_LINK, link=b"two"), member(b"two", HARD_LINK, link=b"one"))
    refused(local_store, staging, archive(*links, ROOT), "hard link to .*, which is not there", DamagedError)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.E2BIG, errno.ERANGE])
def test_an_attribute_that_is_too_large_here_is_named_and_may_be_lost(
    local_store: LocalStore, staging: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Of a set from XFS, say, on ext4: no room has to be made for it."""

    def refuse(target: object, attribute: str, value: bytes, **_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "setxattr", refuse)
    large = {"user.large": b"x" * 5000}
    raw = archive(
        member(b"file", xattrs=large), member(b"link", SYMLINK, link=b"file", xattrs={"trusted.l": b"y"}), ROOT
    )
    with pytest.raises(DeniedError, match=r"file: its attribute user\.large of 5000 bytes can't") as refused:
        read_volume(component_of(local_store, raw), local_store, staging, Operation())
    assert "acceptMetadataLoss" in refused.value.next_step
    (staging / "file").unlink()
    component = component_of(local_store, raw)
    if code == errno.ENOSPC:
        with monkeypatch.context() as patched, pytest.raises(FullError, match="file: No space left"):
            patched.setattr(os, "statvfs", lambda _: os.statvfs_result([4096, 4096, 100, 0, 0, 10, 10, 10, 0, 255]))
            read_volume(component, local_store, staging, Operation(), accept_metadata_loss=True)
        (staging / "file").unlink()
    restored = read_volume(component, local_store, staging, Operation(), accept_metadata_loss=True)
    assert restored.losses == ("trusted.l of 1 entries, the first link", "user.large of 1 entries, the first file")


def test_a_label_of_the_systems_policy_that_may_not_be_set_is_told_and_no_reason_to_refuse_a_set(
    local_store: LocalStore, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is made up: it takes a system whose policy is in force."""

    def refuse(target: object, attribute: str, *_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setxattr", refuse)
    raw = archive(member(b"file", xattrs={"security.selinux": b"system_u:object_r:container_file_t:s0"}), ROOT)
    restored = read_volume(component_of(local_store, raw), local_store, staging, Operation())
    assert restored.losses == ("security.selinux of 1 entries, the first file",)
    raw = archive(member(b"other", xattrs={"security.capability": b"x"}), ROOT)
    with pytest.raises(DeniedError, match="other: Operation not permitted"):
        read_volume(component_of(local_store, raw), local_store, staging, Operation())
