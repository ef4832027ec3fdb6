"""The demo's volumes: git repositories, many small files, large ones, links, odd names and rights; and their comparison."""

import hashlib
import os
import random
import shutil
import stat
from pathlib import Path

from dulwich import porcelain
from dulwich.objects import Blob, Commit, ObjectID, Tree
from dulwich.refs import Ref
from dulwich.repo import Repo

VOLUMES = ("artifactory", "edweb", "gitserver", "metagraph", "openidfederator")
_EPOCH_NS = 1_700_000_000_123_456_789


def build_volumes(root: Path, size: float) -> dict[str, Path]:
    """Make the five volumes below ``root``; ``size`` 1 is about a hundred MB. Returns name to directory."""
    directories = {name: root / name for name in VOLUMES}
    for directory in directories.values():
        directory.mkdir(parents=True)
    chance = random.Random(7)  # noqa: S311 - data, not secrets
    _large_files(directories["artifactory"], chance, size)
    _small_files(directories["edweb"], chance, int(4_000 * size))
    _repositories(directories["gitserver"], max(1, int(6 * size)))
    _odd_things(directories["metagraph"], chance)
    (directories["openidfederator"] / "config.json").write_text('{"issuer": "https://id.example.org"}\n')
    _set_times(root)
    return directories


def _large_files(directory: Path, chance: random.Random, size: float) -> None:
    for number in range(3):
        (directory / f"artifact-{number}.jar").write_bytes(chance.randbytes(int(20_000_000 * size)))
    with (directory / "image.sparse").open("wb") as file:
        file.truncate(int(200_000_000 * size))
        file.seek(5_000_000)
        file.write(b"an island in a sea of zeros")
    (directory / "compressible.log").write_bytes(b"2026-11-23 INFO all is well\n" * int(1_000_000 * size))


def _small_files(directory: Path, chance: random.Random, count: int) -> None:
    for number in range(count):
        folder = directory / f"{number % 97:02}" / f"{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file-{number}.txt").write_bytes(chance.randbytes(chance.randrange(0, 6_000)))


def _repositories(directory: Path, count: int) -> None:
    for number in range(count):
        bare = directory / f"user{number}" / f"project-{number}.git"
        bare.mkdir(parents=True)
        with Repo.init_bare(bare) as repository:
            parents: list[ObjectID] = []
            tree = Tree()
            for step in range(8):
                blob = Blob.from_string(b"print(%d)\n" % step * 200)
                tree.add(b"file-%d.py" % step, 0o100644, blob.id)
                commit = Commit()
                commit.tree, commit.parents, commit.message = tree.id, parents, b"step %d" % step
                commit.author = commit.committer = b"Demo <demo@example.org>"
                commit.author_time = commit.commit_time = 1_700_000_000 + step
                commit.author_timezone = commit.commit_timezone = 0
                for one in (blob, tree, commit):
                    repository.object_store.add_object(one)
                repository.refs[Ref(b"refs/heads/main")] = commit.id
                repository.refs[Ref(b"refs/tags/v%d" % step)] = commit.id
                parents = [commit.id]
            repository.refs.set_symbolic_ref(Ref(b"HEAD"), Ref(b"refs/heads/main"))
            if number % 2:
                porcelain.repack(repository)
                porcelain.pack_refs(repository, all=True)


def _odd_things(directory: Path, chance: random.Random) -> None:
    (directory / "empty").mkdir()
    (directory / "read-only").mkdir()
    (directory / "read-only" / "file").write_text("keep out")
    (directory / "read-only" / "file").chmod(0o400)
    (directory / "read-only").chmod(0o500)
    (directory / "script.sh").write_text("#!/bin/sh\n")
    (directory / "script.sh").chmod(0o4755)
    (directory / "name with spaces, \"quotes\" and 'more'").write_text("odd")
    (directory / "new\nline").write_text("odd")
    (directory / "-rf").write_text("odd")
    (directory / "größe-日本-🗄").write_text("odd")
    Path(os.fsdecode(os.fsencode(directory) + b"/not-utf8-\xff\xfe")).write_text("odd")
    (directory / "long" / ("x" * 120) / ("y" * 120)).mkdir(parents=True)
    (directory / "long" / ("x" * 120) / ("y" * 120) / ("z" * 200)).write_bytes(chance.randbytes(100))
    (directory / "link").symlink_to("script.sh")
    (directory / "dangling").symlink_to("/nowhere/at/all")
    (directory / "up").symlink_to("../..")
    os.link(directory / "script.sh", directory / "hard-link")
    os.mkfifo(directory / "pipe")


def _set_times(root: Path) -> None:
    """Give everything its own modification time with nanoseconds, deepest first, as no copy would by chance."""
    number = 0
    for folder, names, files in os.walk(root, topdown=False):
        for name in [*files, *names]:
            number += 1
            path = os.path.join(folder, name)
            os.utime(path, ns=(_EPOCH_NS, _EPOCH_NS + number * 1_000_000_007), follow_symlinks=False)


def destroy_volumes(directories: dict[str, Path]) -> list[str]:
    """Do to two volumes what people do on their worst day; returns what was done."""
    for repository in list(directories["gitserver"].iterdir())[:-1]:
        shutil.rmtree(repository)
    (directories["gitserver"] / "user0").mkdir(exist_ok=True)
    metagraph = directories["metagraph"]
    (metagraph / "script.sh").write_text("overwritten")
    (metagraph / "link").unlink()
    (metagraph / "link").symlink_to("elsewhere")
    (metagraph / "read-only").chmod(0o777)
    shutil.rmtree(metagraph / "long")
    (metagraph / "newcomer").write_text("was not there")
    return [
        "gitserver: repositories removed",
        "metagraph: files overwritten, links turned, rights changed, a tree removed",
    ]


def fingerprint_volumes(directories: dict[str, Path]) -> dict[str, str]:
    """Every entry with its type, mode, owner, time in nanoseconds, content or target, and the other names of its inode."""
    facts: dict[str, str] = {}
    for name, root in directories.items():
        inodes: dict[int, str] = {}
        for path in sorted([root, *root.rglob("*")], key=os.fsencode):
            status = path.lstat()
            entry = os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")
            first = inodes.setdefault(status.st_ino, entry)
            parts = [
                stat.filemode(status.st_mode),
                f"{status.st_uid}:{status.st_gid}",
                str(status.st_mtime_ns),
                f"as {first}",
            ]
            if path.is_symlink():
                parts.append(f"-> {path.readlink()}")
            elif stat.S_ISREG(status.st_mode):
                with path.open("rb") as file:
                    parts.append(hashlib.file_digest(file, "sha256").hexdigest())
            facts[f"{name}: {entry}"] = " ".join(parts)
    return facts
