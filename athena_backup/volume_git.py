"""Git's order: a repository that people push to, read so that what its refs name is in the copy.

Refs come before the objects that they name, loose objects before the packs that may swallow them, and all packs are opened
before one of them is read ("volumes", section 1: in the order of names a copy was broken 12 times out of 12). Locks and
temporary files of git's own are left out: a copied ``main.lock`` would refuse every push to the restored repository.
"""

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from athena_backup.errors import FinalError
from athena_backup.volume_entry import (
    DIRECTORY_FLAGS,
    FILE_FLAGS,
    GONE,
    Entry,
    is_same,
    open_quietly,
    reading,
    shown,
)

if TYPE_CHECKING:
    from athena_backup.volume_walk import Walk

PASSES = 20
"""How often objects are listed again because listed ones vanished, before the repository is given up."""
_ALTERNATES_LIMIT_BYTES = 64 << 10
# What other entries of a repository depend on, and what depends on none of them and may be large.
_REFS, _FIRST, _LAST = (b"refs", b"reftable"), (b"packed-refs", b"HEAD", b"config"), (b"hooks", b"lfs", b"modules")
# What `git pack-refs` and `git gc` have only while they run.
_TRANSIENT = {b"packed-refs.new", b"gc.pid"}


def is_repository(folder: int, names: Sequence[bytes]) -> bool:
    """Whether an open directory with these names is a git repository (gitrepository-layout(5))."""
    present = set(names)
    if b"HEAD" not in present or b"objects" not in present or not present & {b"refs", b"reftable"}:
        return False
    try:
        # A linked one, or a file of that name, is nothing that has an order of its own.
        return stat.S_ISDIR(os.stat(b"objects", dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def repository(walk: "Walk", folder: int, path: bytes, names: Sequence[bytes], depth: int) -> Iterator[Entry]:
    """What lies in a repository, in the order that keeps it whole; raises as the walk does."""
    if b"refs" in names:
        # A loose ref that vanishes was packed, and packed-refs comes next; or its owner deleted it.
        yield from walk.one(folder, path, b"refs", depth, is_passing=True)
    if b"reftable" in names:
        yield from _together_with_folder(walk, folder, path, b"reftable", depth)
    # Once more: a repository's first `git pack-refs` makes packed-refs, and takes the refs that were not read yet.
    names = sorted({*names, *walk.names(folder, path)})
    first = [name for name in _FIRST if name in names]
    last = [name for name in _LAST if name in names]
    middle = [name for name in names if name not in (*_REFS, *first, *last, b"objects") and not _is_transient(name)]
    for name in (*first, *middle):
        # Of what git deletes with a ref its log; in info the temporary files of `git update-server-info` come and go.
        yield from walk.one(folder, path, name, depth, is_passing=name in (b"logs", b"info"))
    own = path + b"objects"
    status, objects = walk.look(folder, own, b"objects") or (None, None)
    if status is None or objects is None:
        raise FinalError(f"{shown(own)} can't be read: it is gone, or lies on another file system")
    try:
        _note_alternates(walk, objects, path)
        yield from _objects(walk, objects, own + b"/", depth + 1)
        yield Entry(own, status, folder, objects)
    finally:
        os.close(objects)
    for name in last:
        yield from walk.one(folder, path, name, depth)


def _is_transient(name: bytes) -> bool:
    return name in _TRANSIENT or name.endswith(b".lock")


def _objects(walk: "Walk", objects: int, path: bytes, depth: int) -> Iterator[Entry]:
    done: set[bytes] = set()
    folders: dict[bytes, os.stat_result] = {}
    # First, for an older commit-graph names only commits that the later reads still find.
    if b"info" in walk.names(objects, path):
        yield from _info(walk, objects, path, depth)
    for _ in range(PASSES):
        walk.gone_objects.clear()
        yield from _loose(walk, objects, path, depth, done, folders)
        yield from _packs(walk, objects, path, depth, done, folders)
        if not walk.gone_objects:
            break
        # What vanished was packed or packed again, not lost: the next pass finds it there.
    else:
        raise FinalError(
            f"{shown(path)} changed in each of {PASSES} passes over it",
            next_step="back up when git gc is not running without end",
        )
    # `repack -A` puts unreachable objects out of a pack and into files: those of a ref that moved since it was read. What
    # vanishes here is in no danger of being missed, the packs have been read.
    yield from _loose(walk, objects, path, depth, done, folders)
    walk.gone_objects.clear()
    for name in sorted(folders):
        found = walk.look(objects, path + name, name)
        inner = found[1] if found is not None else None
        try:
            # Without a descriptor: gc removed the folder when it was empty, and the files that we have need it.
            yield Entry(path + name, folders[name], objects, inner)
        finally:
            if inner is not None:
                os.close(inner)


def _info(walk: "Walk", objects: int, path: bytes, depth: int) -> Iterator[Entry]:
    """``objects/info``: its files, and the chain of commit-graphs, of which one names the other, at one instant."""
    own = path + b"info"
    found = walk.look(objects, own, b"info")
    if found is None:
        return
    status, info = found
    if info is None:
        yield Entry(own, status, objects)
        return
    try:
        for name in walk.names(info, own + b"/"):
            if name == b"commit-graphs":
                yield from _together_with_folder(walk, info, own + b"/", name, depth + 1)
            elif not _is_temporary(name):
                yield from walk.one(info, own + b"/", name, depth + 1, is_passing=True)
        yield Entry(own, status, objects, info)
    finally:
        os.close(info)


def _loose(
    walk: "Walk", objects: int, path: bytes, depth: int, done: set[bytes], folders: dict[bytes, os.stat_result]
) -> Iterator[Entry]:
    """Every object in a file of its own that was not given yet; what is no folder of objects once, as it is."""
    for name in walk.ahead(objects, walk.names(objects, path)):
        own = path + name
        if name in (b"pack", b"info") or _is_temporary(name) or own in done:
            continue
        found = walk.look(objects, own, name)
        if found is None:
            walk.gone_objects.add(own)
            continue
        status, inner = found
        if inner is None or len(name) != 2:
            if inner is not None:
                os.close(inner)
            done.add(own)
            yield from walk.one(objects, path, name, depth, is_passing=True)
            continue
        try:
            folders.setdefault(name, status)
            yield from _loose_in(walk, inner, own + b"/", depth + 1, done)
        finally:
            os.close(inner)


def _loose_in(walk: "Walk", folder: int, path: bytes, depth: int, done: set[bytes]) -> Iterator[Entry]:
    for name in walk.ahead(folder, walk.names(folder, path)):
        own = path + name
        if own in done or _is_temporary(name):
            continue
        found = walk.look(folder, own, name)
        if found is None:
            walk.gone_objects.add(own)
            continue
        status, inner = found
        if inner is not None or not stat.S_ISREG(status.st_mode):
            if inner is not None:
                os.close(inner)
            done.add(own)
            yield from walk.one(folder, path, name, depth)
            continue
        yield Entry(own, status, folder, is_object=True)
        if own not in walk.gone_objects:
            done.add(own)


def _packs(
    walk: "Walk", objects: int, path: bytes, depth: int, done: set[bytes], folders: dict[bytes, os.stat_result]
) -> Iterator[Entry]:
    own = path + b"pack"
    found = walk.look(objects, own, b"pack")
    if found is None:
        return
    status, folder = found
    if folder is None:
        if own not in done:
            done.add(own)
            yield from walk.one(objects, path, b"pack", depth)
        return
    try:
        folders.setdefault(b"pack", status)
        yield from _together(walk, folder, own + b"/", depth + 1, done)
    finally:
        os.close(folder)


def _together_with_folder(walk: "Walk", folder: int, path: bytes, name: bytes, depth: int) -> Iterator[Entry]:
    """A folder whose files name one another, and the folder itself."""
    own = path + name
    found = walk.look(folder, own, name)
    if found is None:
        return
    status, inner = found
    if inner is None:
        yield from walk.one(folder, path, name, depth)
        return
    try:
        yield from _together(walk, inner, own + b"/", depth + 1, set())
        yield Entry(own, status, folder, inner)
    finally:
        os.close(inner)


def _together(walk: "Walk", folder: int, path: bytes, depth: int, done: set[bytes]) -> Iterator[Entry]:
    """The files of a folder that were not given yet, all opened before one is read, none missing from their instant."""
    for _ in range(PASSES):
        with contextlib.ExitStack() as stack:
            names = _lasting(walk, folder, path)
            fresh = [name for name in sorted(names, key=_together_order) if path + name not in done]
            entries = _opened(stack, folder, path, fresh)
            # Equal listings before and after: nothing was packed again while we opened one after the other.
            if entries is None or _lasting(walk, folder, path) != names:
                continue
            for entry in entries:
                yield entry
                done.add(entry.path)
            opened = {entry.name for entry in entries}
            for name in (name for name in fresh if name not in opened):
                done.add(path + name)
                yield from walk.one(folder, path, name, depth)
            return
    raise FinalError(
        f"{shown(path)} changed in each of {PASSES} looks at it",
        next_step="back up when git gc is not running without end",
    )


def _opened(stack: contextlib.ExitStack, folder: int, path: bytes, names: Sequence[bytes]) -> list[Entry] | None:
    """An entry for each name that is a file, which is opened; None if one is gone."""
    entries = []
    for name in names:
        with reading(path + name):
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    continue
                descriptor = _open_one_more(name, folder)
                stack.callback(os.close, descriptor)
                now = os.fstat(descriptor)
            except OSError as error:
                if error.errno in GONE:
                    return None
                raise
        if not is_same(status, now):
            return None
        entries.append(Entry(path + name, now, folder, descriptor, is_object=True))
    return entries


def _open_one_more(name: bytes, folder: int) -> int:
    """Open a file; where the process may not open another, raise its soft limit to the hard one first."""
    try:
        return open_quietly(name, FILE_FLAGS, folder)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return open_quietly(name, FILE_FLAGS, folder)


def _lasting(walk: "Walk", folder: int, path: bytes) -> list[bytes]:
    return [name for name in walk.names(folder, path) if not _is_temporary(name)]


def _is_temporary(name: bytes) -> bool:
    return name.startswith((b"tmp_", b".tmp-", b"incoming-")) or name.endswith(b".lock")


def _together_order(name: bytes) -> tuple[bytes, int, bytes]:
    """A list of the others (multi-pack-index, tables.list, commit-graph-chain) first, an ``.idx`` after its ``.pack``."""
    stem, dot, ending = name.rpartition(b".")
    if not dot or name == b"tables.list":
        return b"", 0, name
    return stem, 0 if ending == b"pack" else 1, ending


def _note_alternates(walk: "Walk", objects: int, path: bytes) -> None:
    """Note those alternates of a repository that leave the volume: their objects are not in the copy."""
    try:
        info = os.open(b"info", DIRECTORY_FLAGS, dir_fd=objects)
        try:
            descriptor = os.open(b"alternates", FILE_FLAGS, dir_fd=info)
        finally:
            os.close(info)
    except OSError:
        return  # none; one that is there and can't be read is met again, and told, when it is archived
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        with reading(path + b"objects/info/alternates"):
            text = os.read(descriptor, _ALTERNATES_LIMIT_BYTES)
    finally:
        os.close(descriptor)
    root = os.path.realpath(os.fsencode(walk.root))
    here = os.path.join(root, path, b"objects")
    for line in text.splitlines():
        target = os.path.realpath(os.path.join(here, line))
        if line and not line.startswith(b"#") and not target.startswith(root + b"/"):
            walk.alternates.append(f"{shown(path.rstrip(b'/')) or '.'}: {shown(line)}")
