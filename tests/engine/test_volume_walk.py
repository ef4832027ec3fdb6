"""A live tree is read as it is, whatever happens in it meanwhile; and git repositories are copied whole."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from athena_backup import volume_git, volume_members, volume_walk
from athena_backup.errors import FinalError
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_entry import Entry, open_entry, open_quietly
from athena_backup.volume_extract import read_volume
from athena_backup.volume_walk import Walk

SET_ID = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
AS_ROOT = os.geteuid() == 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "live"
    place.mkdir()
    return place


def walked(root: Path, at: Callable[[Entry], None] = lambda entry: None) -> tuple[Walk, list[str]]:
    """A walk to its end that reads every file as the archive does, and the paths in their order."""
    walk = Walk(root, Operation())
    paths = []
    for entry in walk.entries():
        at(entry)
        if stat.S_ISREG(entry.status.st_mode):
            opened = open_entry(entry)
            if opened is None:
                walk.note_vanished(entry)
                continue
            os.close(opened[0])
        paths.append(entry.path.decode())
    return walk, paths


def copied(root: Path, store: LocalStore, target: Path, *, torn_limit: float = 0.01) -> Path:
    component = write_volume(Volume("git", root), store, SET_ID, "run", Operation(), torn_limit=torn_limit)
    target.mkdir()
    read_volume(component, store, target, Operation())
    return target


def test_a_folder_comes_after_its_content_and_the_root_last(root: Path) -> None:
    (root / "b" / "c").mkdir(parents=True)
    (root / "b" / "c" / "file").touch()
    (root / "a").touch()
    assert walked(root)[1] == ["a", "b/c/file", "b/c", "b", "."]


def test_a_folder_keeps_the_time_that_it_was_found_with(root: Path) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "file").touch()
    os.utime(root / "sub", ns=(0, 42))

    def disturb(entry: Entry) -> None:
        if entry.path == b"sub/file":
            (root / "sub" / "new").touch()
        if entry.path == b"sub":
            assert entry.status.st_mtime_ns == 42

    walked(root, disturb)


@pytest.mark.parametrize("missing", ["absent", "a file"])
def test_a_root_that_is_no_directory_fails(root: Path, missing: str) -> None:
    if missing == "a file":
        (root / missing).touch()
    with pytest.raises(FinalError, match="can't be opened"):
        walked(root / missing)


def test_a_root_that_is_replaced_meanwhile_fails(root: Path) -> None:
    (root / "file").touch()

    def replace(entry: Entry) -> None:
        if entry.path == b"file":
            root.rename(root.with_name("elsewhere"))
            root.mkdir()

    with pytest.raises(FinalError, match="became another directory"):
        walked(root, replace)


def test_a_root_that_vanishes_meanwhile_fails(root: Path) -> None:
    (root / "file").touch()

    def remove(entry: Entry) -> None:
        if entry.path == b"file":
            root.rename(root.with_name("elsewhere"))

    with pytest.raises(FinalError, match="is gone"):
        walked(root, remove)


def test_a_file_that_is_swapped_for_a_link_in_between_is_never_followed(
    root: Path, local_store: LocalStore, tmp_path: Path
) -> None:
    (tmp_path / "shadow").write_text("secret")
    (root / "a").write_text("harmless")
    (root / "b").write_text("harmless")

    def swap(entry: Entry) -> None:
        if entry.path == b"a":
            (root / "a").unlink()
            os.symlink(tmp_path / "shadow", root / "a")

    walk, paths = walked(root, swap)
    assert paths == ["b", "."]
    assert walk.vanished == ["a"]


def test_a_folder_that_is_swapped_for_a_link_in_between_is_never_entered(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").touch()
    (root / "sub").mkdir()
    real = open_quietly

    def swapping(name: bytes, flags: int, folder: int) -> int:
        if name == b"sub" and not (root / "sub").is_symlink():
            (root / "sub").rmdir()
            os.symlink(tmp_path / "outside", root / "sub")
        return real(name, flags, folder)

    monkeypatch.setattr(volume_walk, "open_quietly", swapping)
    walk, paths = walked(root)
    assert (paths, walk.vanished) == (["."], ["sub"])


@pytest.mark.timeout(20)
def test_a_fifo_in_the_place_of_a_file_does_not_block(root: Path) -> None:
    (root / "a").write_text("x")
    os.mkfifo(root / "pipe")

    def swap(entry: Entry) -> None:
        if entry.path == b"a":
            (root / "a").unlink()
            os.mkfifo(root / "a")

    walk, paths = walked(root, swap)
    assert (paths, walk.vanished) == (["pipe", "."], ["a"])


def test_a_file_that_is_replaced_by_rename_is_read_in_its_new_form(root: Path) -> None:
    (root / "config").write_text("old")

    def replace(entry: Entry) -> None:
        if entry.path == b"config":
            (root / "next").write_text("new!")
            (root / "next").rename(root / "config")

    walk, paths = walked(root, replace)
    assert (paths, walk.vanished) == (["config", "."], [])


def test_a_vanished_file_is_listed(root: Path) -> None:
    (root / "a").touch()
    (root / "b").touch()
    walk, paths = walked(root, lambda entry: (root / "b").unlink() if entry.path == b"a" else None)
    assert (paths, walk.vanished) == (["a", "."], ["b"])


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN])
@pytest.mark.parametrize("call", ["stat", "open", "scandir", "pread"])
def test_an_entry_that_cannot_be_read_fails_the_component_and_is_named(
    root: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "bad").write_text("x")
    inode = (root / "sub").stat().st_ino if call == "scandir" else (root / "sub" / "bad").stat().st_ino
    real = getattr(os, call)

    def failing(target: object, *rest: object, **named: object) -> object:
        if target == b"bad" or (isinstance(target, int) and os.fstat(target).st_ino == inode):
            raise OSError(code, os.strerror(code))
        return real(target, *rest, **named)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(FinalError, match=f"sub(/bad|/)? can't be read: {os.strerror(code)}"):
        write_volume(Volume("git", root), local_store, SET_ID, "run", Operation())


def test_a_file_that_we_may_not_read_fails_the_component(root: Path, local_store: LocalStore) -> None:
    (root / "locked").touch()
    (root / "locked").chmod(0)
    script = (
        "import os, sys, pathlib\n"
        "from athena_backup.errors import FinalError\n"
        "from athena_backup.operation import Operation\n"
        "from athena_backup.volume_walk import Walk\n"
        "from athena_backup.volume_entry import open_entry\n"
        "os.chdir(sys.argv[1])\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try: [open_entry(entry) for entry in Walk(pathlib.Path('.'), Operation()).entries() if entry.path == b'locked']\n"
        "except FinalError as error: print(error)\n"
    )
    root.chmod(0o755)
    ended = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True)
    assert "locked can't be read: Permission denied" in ended.stdout, ended.stderr


def test_access_times_are_left_alone(root: Path) -> None:
    (root / "file").write_text("x")
    os.utime(root / "file", ns=(42, 43))
    os.utime(root, ns=(42, 43))
    opened = walked(root)
    assert opened[1] == ["file", "."]
    assert (root / "file").stat().st_atime_ns == 42


@pytest.mark.skipif(not AS_ROOT or not shutil.which("unshare"), reason="only root may mount")
def test_another_file_system_inside_is_not_entered_and_reported(root: Path) -> None:
    (root / "inner").mkdir()
    (root / "file").touch()
    script = (
        "import sys, pathlib\n"
        "from athena_backup.operation import Operation\n"
        "from athena_backup.volume_walk import Walk\n"
        "from athena_backup.volume_preflight import mount_points\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "(root / 'inner' / 'secret').touch()\n"
        "walk = Walk(root, Operation())\n"
        "print([entry.path for entry in walk.entries()], walk.other_file_systems, len(mount_points(root)))\n"
    )
    command = f'mount -t tmpfs none "{root}/inner" && exec "{sys.executable}" -c "$SCRIPT" "{root}"'
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, env={**os.environ, "SCRIPT": script}
    )
    if "mount" in ended.stderr:
        pytest.skip(f"no mounting here: {ended.stderr}")
    assert ended.stdout == "[b'file', b'inner', b'.'] ['inner'] 1\n", ended.stderr


def test_a_tree_that_is_too_deep_fails_and_one_that_is_deep_does_not(
    root: Path, local_store: LocalStore, tmp_path: Path
) -> None:
    def deepen(levels: int) -> None:
        here = os.open(root, os.O_RDONLY)
        for _ in range(levels):
            os.mkdir("d" * 20, dir_fd=here)
            below = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(os.open("file", os.O_CREAT, dir_fd=here))
        os.close(here)

    deepen(250)
    target = copied(root, local_store, tmp_path / "new")  # its longest path is beyond PATH_MAX
    assert walked(target)[1] == walked(root)[1]
    subprocess.run(["rm", "-r", root / ("d" * 20)], check=True)
    deepen(251)
    with pytest.raises(FinalError, match="folders deep"):
        walked(root)
    subprocess.run(["rm", "-r", root / ("d" * 20), target], check=True)


# --- git ---------------------------------------------------------------------------------------------------------------


def git(place: Path, *arguments: str, check: bool = True) -> str:
    if not shutil.which("git"):
        pytest.fail("git is not on this machine: the tests of git repositories need it")
    environment = {
        "PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    }  # fmt: skip
    ended = subprocess.run(["git", "-C", place, *arguments], capture_output=True, text=True, env=environment)
    if check and ended.returncode:
        raise AssertionError(f"git {' '.join(arguments)}: {ended.stderr}")
    return ended.stdout


@pytest.fixture
def repository(root: Path) -> Path:
    place = root / "project.git"
    place.mkdir()
    git(place, "init", "--bare", "--quiet", "--initial-branch=main")
    tree = git(place, "hash-object", "-t", "tree", "-w", "/dev/null").strip()
    commit = git(place, "commit-tree", tree, "-m", "first").strip()
    git(place, "update-ref", "refs/heads/main", commit)
    return place


def busy(place: Path, script: str) -> "subprocess.Popen[bytes]":
    """A shell loop in a repository, in a process group of its own."""
    environment = {
        **os.environ, "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    }  # fmt: skip
    return subprocess.Popen(
        ["sh", "-c", f"while :; do {script}; done"],
        cwd=place, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


COMMITTER = (
    'n=$((n+1)); b=$(echo "content $n" | git hash-object -w --stdin);'
    ' t=$(printf "100644 blob $b\\tfile\\n" | git mktree); c=$(git commit-tree $t -p main -m "$n");'
    " git update-ref refs/heads/main $c; git update-ref refs/tags/t$n $c"
)
REPACKER = "git repack -ad -q; git prune-packed -q"
PACKER_OF_REFS = "git pack-refs --all"


@pytest.fixture
def many_at_work(repository: Path) -> Iterator[Path]:
    children = [busy(repository, script) for script in (COMMITTER, REPACKER, PACKER_OF_REFS)]
    try:
        yield repository
    finally:
        for child in children:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def test_a_repository_with_committer_repacker_and_ref_packer_at_work_is_copied_whole(
    many_at_work: Path, local_store: LocalStore, tmp_path: Path
) -> None:
    for number in range(6):
        threading.Event().wait(0.3)  # new commits between the rounds
        copy = copied(many_at_work.parent, local_store, tmp_path / f"copy-{number}") / many_at_work.name
        git(copy, "fsck", "--connectivity-only", "--no-dangling")
        main = git(copy, "rev-parse", "main").strip()
        assert int(git(copy, "rev-list", "--count", main)) > 1
        git(copy, "update-ref", "refs/heads/main", main + "~0")
        assert not list(copy.rglob("*.lock"))
        shutil.rmtree(copy.parent)


def test_a_repository_is_read_refs_first_and_packs_last(repository: Path) -> None:
    git(repository, "repack", "-ad", "-q")
    git(repository, "pack-refs", "--all")
    commit = git(repository, "rev-parse", "main").strip()
    git(repository, "update-ref", "refs/heads/loose", commit)
    new = git(repository, "commit-tree", f"{commit}^{{tree}}", "-p", commit, "-m", "second").strip()
    _, paths = walked(repository)
    order = [
        "refs/heads/loose", "packed-refs", "HEAD", "config", f"objects/{new[:2]}/{new[2:]}",
        next(path for path in paths if path.endswith(".pack")), next(path for path in paths if path.endswith(".idx")),
        "objects", ".",
    ]  # fmt: skip
    assert sorted(order, key=paths.index) == order
    assert len(paths) == len(set(paths))
    present = {str(path.relative_to(repository)) for path in repository.rglob("*")} | {"."}
    assert set(paths) == present


def test_a_repositorys_first_packing_of_its_refs_takes_none_of_them_from_the_copy(repository: Path) -> None:
    """The file that has them is made while they are read: no listing of before has its name."""
    commit = git(repository, "rev-parse", "main").strip()
    for name in ("a", "b", "c"):
        git(repository, "update-ref", f"refs/heads/{name}", commit)
    assert not (repository / "packed-refs").exists()
    given = []
    for entry in Walk(repository, Operation()).entries():
        given.append(entry.path.decode())
        if entry.path == b"refs/heads/a":
            git(repository, "pack-refs", "--all")
    assert "refs/heads/main" not in given
    assert "packed-refs" in given
    assert given.index("packed-refs") < given.index("objects")


def test_objects_that_vanish_into_a_pack_are_found_in_it_and_count_as_nothing_lost(
    repository: Path, local_store: LocalStore, tmp_path: Path
) -> None:
    repacked: list[bytes] = []

    def repack(entry: Entry) -> None:
        if entry.is_object and not repacked:
            repacked.append(entry.path)
            git(repository, "repack", "-ad", "-q")
            git(repository, "prune-packed", "-q")

    walk, paths = walked(repository, repack)
    assert repacked
    assert walk.vanished == []
    assert any(path.endswith(".pack") for path in paths)
    assert len(paths) == len(set(paths))


def test_objects_that_vanish_without_end_fail_the_component(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_git, "PASSES", 3)
    (repository / "objects" / "00").mkdir(exist_ok=True)
    counter = iter(range(100))

    def disturb(entry: Entry) -> None:
        if entry.is_object:
            (repository / os.fsdecode(entry.path)).unlink()
            (repository / "objects" / "00" / f"{next(counter):038x}").write_text("x")

    with pytest.raises(FinalError, match="changed in each of 3 passes"):
        walked(repository, disturb)


def test_a_pack_that_is_touched_or_deleted_while_it_is_read_is_not_torn(
    repository: Path, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(repository, "repack", "-ad", "-q")
    real = volume_members._read_all

    def touching(descriptor: int, size_bytes: int) -> bytes:
        content = real(descriptor, size_bytes)
        if content.startswith(b"PACK"):
            for pack in (repository / "objects" / "pack").glob("*.pack"):
                pack.unlink()
        return content

    monkeypatch.setattr(volume_members, "_read_all", touching)
    component = write_volume(Volume("git", repository), local_store, SET_ID, "run", Operation())
    assert component.volume is not None
    assert (component.volume.torn, component.volume.vanished) == ((), ())


def test_locks_and_temporary_files_of_git_are_left_out(repository: Path) -> None:
    for name in (
        "refs/heads/main.lock",
        "packed-refs.lock",
        "packed-refs.new",
        "logs/HEAD.lock",
        "HEAD.lock",
        "objects/pack/tmp_pack_1",
        "objects/17/tmp_obj_1",
    ):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).touch()
    (repository / "objects" / "tmp_objdir-incoming-1" / "17").mkdir(parents=True)
    (repository / "hooks").mkdir(exist_ok=True)
    (repository / "hooks" / "user.lock").touch()
    _, paths = walked(repository)
    assert [path for path in paths if "lock" in path or "tmp_" in path or ".new" in path] == ["hooks/user.lock"]


def test_alternates_that_leave_the_volume_are_reported(repository: Path) -> None:
    (repository / "objects" / "info").mkdir(exist_ok=True)
    alternates = repository / "objects" / "info" / "alternates"
    alternates.write_text("../../other.git/objects\n/srv/shared.git/objects\n# a comment\n")
    walk, paths = walked(repository.parent)
    assert walk.alternates == ["project.git: /srv/shared.git/objects"]
    assert "project.git/objects/info/alternates" in paths


def test_folders_that_only_look_like_a_repository_are_read_like_any_other(root: Path) -> None:
    for name in ("linked", "odd"):
        (root / name / "refs").mkdir(parents=True)
        (root / name / "HEAD").touch()
    os.symlink("/nowhere", root / "linked" / "objects")
    (root / "odd" / "objects" / "17" / "deeper").mkdir(parents=True)
    (root / "odd" / "objects" / "17" / "deeper" / "file").touch()
    (root / "odd" / "objects" / "pack" / "folder").mkdir(parents=True)
    (root / "odd" / "objects" / "long name").mkdir()
    (root / "odd" / "objects" / "long name" / "file").touch()
    _, paths = walked(root)
    assert set(paths) == {str(path.relative_to(root)) for path in root.rglob("*")} | {"."}
    assert len(paths) == len(set(paths))


def test_more_packs_than_the_soft_limit_of_open_files_are_read(repository: Path) -> None:
    script = (
        "import os, resource, sys, pathlib\n"
        "from athena_backup.operation import Operation\n"
        "from athena_backup.volume_walk import Walk\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "for number in range(200): (root / 'objects' / 'pack' / f'pack-{number}.pack').touch()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000))\n"
        "print(len([entry for entry in Walk(root, Operation()).entries() if entry.name.endswith(b'.pack')]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(repository)], capture_output=True, text=True)
    assert ended.stdout == "200\n", ended.stderr
