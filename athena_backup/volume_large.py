"""Large files, which stand in archives of their own: how they are found, shared out, opened, and agreed on with the walk.

They are listed by a quick look over the tree before anything is read, so that several archives can be read at once. The tree
lives on meanwhile: `Shares` sees to it that each listed path is given once, by its archive or by the walk (`volume_walk`), and
that the archives together are a tree that a restore takes.
"""

import contextlib
import enum
import heapq
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from athena_backup.volume_ahead import Ahead
from athena_backup.volume_entry import (
    DIRECTORY_FLAGS,
    GONE,
    Entry,
    open_entry,
    open_quietly,
    reading,
    shown,
)
from athena_backup.volume_git import is_repository
from athena_backup.volume_members import xattrs_of
from athena_backup.volume_walk import DEPTH_LIMIT, STAGING_PREFIX

LARGE_BYTES = 32 << 20
"""From this size on a file may stand in another archive than its folder."""
ARCHIVE_BYTES = 1 << 30
"""An archive of large files is full when it has so many bytes."""
_ARCHIVES_LIMIT = 64
_FILES_LIMIT = 20_000
"""The most files that are listed, about 10 MB of memory; the biggest are, the others stay with their folders."""
_BATCH = 256
_ENTRY_BYTES = 32 << 10
"""What an entry of the last archive costs beyond its bytes: in the time for looking at it so many are compressed."""


class LargeFile(NamedTuple):
    """A large file: how many bytes it has on the disk, and its path from the root."""

    size_bytes: int
    path: bytes


@dataclass(frozen=True)
class Folder:
    """What stands in the headers of a folder."""

    status: os.stat_result
    xattrs: Mapping[str, bytes]


@dataclass(frozen=True)
class Layout:
    """Which large files make which archive, and the weight in bytes of everything else, which makes the last."""

    archives: tuple[tuple[LargeFile, ...], ...]
    rest_bytes: int
    folders: Mapping[bytes, Folder]
    """Every folder above a large file but the root, as it was found."""


def look(root: int, check: Callable[[], None], *, large_bytes: int, archive_bytes: int) -> Layout:
    """Look over the tree below the open ``root`` and share out its regular files of at least ``large_bytes``.

    Those with several names are left where they are, as are git repositories (whose order says when a file is read). What
    vanishes meanwhile or can't be read is passed over: the walk meets it again, and tells. ``check`` raises to stop.
    """
    device = os.fstat(root).st_dev
    with Ahead(check, content=False) as ahead:
        search = _Search(device, large_bytes, check, ahead)
        found = heapq.nlargest(_FILES_LIMIT, search.files(root, b"", 0))
    folders: dict[bytes, Folder | None] = {}
    for file in found:
        for path in folders_above(file.path):
            if path not in folders:
                check()
                folders[path] = _folder(root, path, device)
    files = [file for file in found if all(folders[path] is not None for path in folders_above(file.path))]
    return Layout(
        archives=_shared_out(files, archive_bytes),
        rest_bytes=search.weight_bytes - sum(file.size_bytes for file in files),
        folders={path: folder for path, folder in folders.items() if folder is not None},
    )


@dataclass
class _Search:
    """The look over a tree for its large files; ``weight_bytes`` is of all that it met."""

    device: int
    large_bytes: int
    check: Callable[[], None]
    ahead: Ahead
    weight_bytes: int = 0

    def files(self, folder: int, path: bytes, depth: int) -> Iterator[LargeFile]:
        """Those below an open folder, whose path has the closing slash or is empty."""
        self.check()
        if depth > DEPTH_LIMIT:
            return
        if _is_repository(folder):
            self.weight_bytes += _packs_bytes(folder, self.device)
            return
        folders: list[bytes] = []
        with contextlib.suppress(OSError), os.scandir(folder) as items:
            # Not all at once: a folder may have a million of them.
            while batch := list(itertools.islice(items, _BATCH)):
                self.check()
                for name in self.ahead.names(folder, self._plain(batch, folders, is_root=not path)):
                    if (status := _status(folder, name)) is not None:
                        size_bytes = _stored_bytes(status)
                        self.weight_bytes += size_bytes
                        if size_bytes >= self.large_bytes and status.st_nlink == 1 and status.st_dev == self.device:
                            yield LargeFile(size_bytes, path + name)
        for name in self.ahead.names(folder, folders):
            try:
                inner = open_quietly(name, DIRECTORY_FLAGS, folder)
            except OSError:
                continue
            try:
                if os.fstat(inner).st_dev == self.device:
                    yield from self.files(inner, path + name + b"/", depth + 1)
            finally:
                os.close(inner)

    def _plain(self, items: Sequence["os.DirEntry[str]"], folders: list[bytes], *, is_root: bool) -> list[bytes]:
        """The names of those that are regular files; folders are added to ``folders``."""
        plain = []
        for item in items:
            self.weight_bytes += _ENTRY_BYTES
            name = os.fsencode(item.name)
            if is_root and name.startswith(STAGING_PREFIX):
                continue
            if item.is_dir(follow_symlinks=False):
                folders.append(name)
            elif item.is_file(follow_symlinks=False):
                plain.append(name)
        return plain


def _status(folder: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None


def _stored_bytes(status: os.stat_result) -> int:
    """A file's size without its holes."""
    return min(status.st_size, status.st_blocks * 512)


def _is_repository(folder: int) -> bool:
    if not _exists(b"HEAD", folder):
        return False
    return is_repository(
        folder, [b"HEAD", *(name for name in (b"objects", b"refs", b"reftable") if _exists(name, folder))]
    )


def _exists(name: bytes, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def _packs_bytes(repository: int, device: int) -> int:
    """The size of a repository's packs, which are nearly all of a large one."""
    with contextlib.suppress(OSError):
        packs = _open_folder(repository, b"objects/pack", device)
        if packs is not None:
            try:
                with os.scandir(packs) as items:
                    return sum(
                        _stored_bytes(status) for item in items if (status := _status(packs, os.fsencode(item.name)))
                    )
            finally:
                os.close(packs)
    return 0


def _folder(root: int, path: bytes, device: int) -> Folder | None:
    try:
        descriptor = _open_folder(root, path, device)
        if descriptor is None:
            return None
        try:
            return Folder(os.fstat(descriptor), xattrs_of(descriptor))
        finally:
            os.close(descriptor)
    except OSError:
        return None


def _shared_out(files: Sequence[LargeFile], archive_bytes: int) -> tuple[tuple[LargeFile, ...], ...]:
    """The files, biggest first, as archives of at least ``archive_bytes`` each but the last, and a bounded number of them."""
    full_bytes = max(archive_bytes, sum(file.size_bytes for file in files) // _ARCHIVES_LIMIT)
    archives: list[list[LargeFile]] = []
    room_bytes = 0
    for file in files:
        if room_bytes <= 0:
            archives.append([])
            room_bytes = full_bytes
        archives[-1].append(file)
        room_bytes -= file.size_bytes
    return tuple(tuple(archive) for archive in archives)


def folders_above(path: bytes) -> Iterator[bytes]:
    """The folders in which a path lies, the innermost first, without the root."""
    while b"/" in path:
        path = path.rpartition(b"/")[0]
        yield path


@contextlib.contextmanager
def open_large(root: int, path: bytes) -> Iterator[Entry | None]:
    """Open a large file by descriptors from the open ``root``; None if no regular file of this file system is there any more.

    One that was replaced since the look is given as it is now. Raises `FinalError` for one that can't be read.
    """
    with reading(path), contextlib.ExitStack() as stack:
        device = os.fstat(root).st_dev
        parent, _, name = path.rpartition(b"/")
        folder = _open_folder(root, parent, device)
        if folder is None:
            yield None
            return
        stack.callback(os.close, folder)
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno not in GONE:
                raise
            yield None
            return
        is_ours = stat.S_ISREG(status.st_mode) and status.st_dev == device
        opened = open_entry(Entry(path, status, folder)) if is_ours else None
        if opened is None:
            yield None
            return
        descriptor, status = opened
        stack.callback(os.close, descriptor)
        yield Entry(path, status, folder, descriptor)


def has_inode(folder: int, inode: int | None) -> bool:
    """Whether an open folder has an entry of that inode; one that can't be listed has none."""
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        return any(item.inode() == inode for item in items)
    return False


def _open_folder(root: int, path: bytes, device: int) -> int | None:
    """A descriptor of a folder, followed through no link; None if there is none any more. Raises `OSError`."""
    current = os.dup(root)
    for segment in path.split(b"/") if path else ():
        try:
            below = open_quietly(segment, DIRECTORY_FLAGS, current)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return None
        finally:
            os.close(current)
        current = below
    if os.fstat(current).st_dev != device:
        os.close(current)
        return None
    return current


class _State(enum.Enum):
    """Of a listed path. Archive and walk come by in any order; whoever finds what it can give takes it."""

    WAITING = "neither came by"
    LEFT = "the walk came by, and left it to its archive"
    RETURNED = "its archive came by and could not give it, so the walk may"
    ARCHIVED = "its archive has it"
    WALKED = "the walk has it"
    LOST = "gone: nobody has it"


class Shares:
    """Who gives which of the listed paths: its archive or the walk. For any thread.

    No path is given twice, nothing is given below what is no folder, and every folder above a file that is given is given:
    a restore refuses all three. What nobody could give is told by `lost`.
    """

    def __init__(self, layout: Layout) -> None:
        self._states = {file.path: _State.WAITING for archive in layout.archives for file in archive}
        self._folders = dict(layout.folders)
        self._seen: dict[bytes, int] = {}
        """Of what the walk left to an archive: the inode that it saw."""
        self._given: set[bytes] = set()
        self._replaced: list[bytes] = []
        self._listed = frozenset((*self._states, *self._folders))
        self._lock = threading.Lock()

    def claim(self, path: bytes) -> bool:
        """Asked by a path's archive just before it gives it: whether it may."""
        with self._lock:
            if self._states[path] not in (_State.WAITING, _State.LEFT):
                return False
            self._states[path] = _State.ARCHIVED
            return True

    def seen_by_walk(self, path: bytes) -> int | None:
        """Which inode the walk saw there before it left the path to its archive; None if it did not come by, or saw no file."""
        with self._lock:
            return self._seen.get(path)

    def give_back(self, path: bytes, *, is_there: bool) -> bool:
        """Said by a path's archive that found no plain file there; with ``is_there`` one with several names.

        Such a one belongs beside its other names. False: the walk will not come by any more, the archive has to give it.
        """
        with self._lock:
            state = self._states[path]
            if state is _State.LEFT and is_there:
                return False
            if state in (_State.WAITING, _State.LEFT):
                self._states[path] = _State.RETURNED if state is _State.WAITING else _State.LOST
            return True

    def may_enter(self, path: bytes) -> bool:
        """Asked by the walk before it enters a folder: not if a file of that name is in an archive."""
        if path not in self._listed:
            return True
        with self._lock:
            return path not in self._states or self._is_walks(path, is_plain=False)

    def is_walks(self, entry: Entry) -> bool:
        """Asked by the walk's archive before it gives an entry: whether it may."""
        if entry.path not in self._listed:
            return True
        with self._lock:
            if entry.path in self._states:
                is_plain = stat.S_ISREG(entry.status.st_mode) and entry.status.st_nlink == 1 and not entry.is_object
                is_walks = self._is_walks(entry.path, is_plain=is_plain)
                if not is_walks and is_plain:
                    self._seen[entry.path] = entry.status.st_ino
                return is_walks
            if stat.S_ISDIR(entry.status.st_mode):
                self._given.add(entry.path)
                return True
            return self._may_replace(entry.path)

    def _is_walks(self, path: bytes, *, is_plain: bool) -> bool:
        state = self._states[path]
        if state is _State.WAITING and is_plain:
            self._states[path] = _State.LEFT
        elif state in (_State.WAITING, _State.RETURNED):
            self._states[path] = _State.WALKED
        return self._states[path] is _State.WALKED

    def _may_replace(self, folder: bytes) -> bool:
        """Whether what was a folder may be given as what it is now: not if a file that was in it is in an archive."""
        below = [path for path in self._states if path.startswith(folder + b"/")]
        if any(self._states[path] not in (_State.WAITING, _State.RETURNED) for path in below):
            self._replaced.append(folder)
            return False
        self._states |= dict.fromkeys(below, _State.LOST)
        return True

    def end_walk(self) -> list[tuple[bytes, Folder]]:
        """Said by the walk when only the root is left; returns the folders that it still has to give: they are gone."""
        with self._lock:
            for path, state in self._states.items():
                if state is _State.WAITING:
                    self._states[path] = _State.LEFT
                elif state is _State.RETURNED:
                    self._states[path] = _State.LOST
            needed = {
                folder
                for path, state in self._states.items()
                if state is not _State.LOST
                for folder in folders_above(path)
            }
            missing = sorted(needed - self._given, key=lambda path: path.count(b"/"), reverse=True)
            return [(path, self._folders[path]) for path in missing]

    def lost(self) -> list[str]:
        """The paths that nobody has, when all archives are written."""
        nobodys = [path for path, state in self._states.items() if state not in (_State.ARCHIVED, _State.WALKED)]
        return [shown(path) for path in (*nobodys, *self._replaced)]
