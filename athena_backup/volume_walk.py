"""The walk over a live tree: every entry once, by descriptors from one opened root, in an order that keeps git whole.

What can go wrong in a tree that people write to stands in "volumes", section 1. An `OSError` never leaves this module: an
entry that is gone is `vanished`, anything else that can't be read is a `FinalError` that names the entry.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from athena_backup.errors import FinalError
from athena_backup.operation import Operation

STAGING_PREFIX = b".athena-"
"""Names at the root of a volume that are ours; never backed up."""
DEPTH_LIMIT = 400
GIT_PASSES = 20
_GONE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Entry:
    """One entry, found a moment ago: its path from the root, its status, and the open folder in which it lies.

    ``opened`` is a descriptor of a file that had to be opened early (git's packs); the walk closes it.
    """

    path: bytes
    status: os.stat_result
    folder: int
    opened: int | None = None

    @property
    def name(self) -> bytes:
        """The last segment of the path."""
        return self.path.rpartition(b"/")[2]


@dataclass
class Walk:
    """A walk over one volume, and what it could not give."""

    root: Path
    operation: Operation
    vanished: list[str] = field(default_factory=list)
    sockets: int = 0
    other_file_systems: list[str] = field(default_factory=list)
    alternates: list[str] = field(default_factory=list)
    missing: set[bytes] = field(default_factory=set)
    """Entries that vanished between being listed and being read; whoever reads an entry adds to it."""

    def entries(self) -> Iterator[Entry]:
        """Every entry below the root, a directory after its content, the root itself (path ``.``) last.

        Raises `FinalError` for a root that is not there or is another one at the end, and for what can't be read.
        """
        try:
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise FinalError(
                f"{self.root} can't be opened: {error.strerror}", next_step="mount it, or correct ATHENA_VOLUMES"
            ) from None
        try:
            status = os.fstat(descriptor)
            self._device = status.st_dev
            yield from self._directory(descriptor, b"", 0)
            yield Entry(b".", os.fstat(descriptor), descriptor)
            self._check_root(status)
        finally:
            os.close(descriptor)

    def _check_root(self, status: os.stat_result) -> None:
        try:
            now = os.stat(self.root)
        except OSError as error:
            raise FinalError(
                f"{self.root} is gone: {error.strerror}", next_step="was it unmounted during the backup?"
            ) from None
        if (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino):
            raise FinalError(
                f"{self.root} became another directory during the backup", next_step="was it mounted over?"
            )

    def _directory(self, descriptor: int, path: bytes, depth: int) -> Iterator[Entry]:
        """The content of an open directory; ``path`` is its own with the closing slash, empty for the root."""
        if depth > DEPTH_LIMIT:
            raise FinalError(f"{shown(path)} lies more than {DEPTH_LIMIT} folders deep")
        names = self._names(descriptor, path)
        if _is_git(names):
            yield from self._git(descriptor, path, names, depth)
            return
        for name in names:
            yield from self._one(descriptor, path, name, depth)

    def _names(self, descriptor: int, path: bytes) -> list[bytes]:
        self.operation.check()
        with self._reading(path or b"."):
            names = sorted(os.fsencode(name) for name in os.listdir(descriptor))
        return [name for name in names if path or not name.startswith(STAGING_PREFIX)]

    def _one(self, folder: int, path: bytes, name: bytes, depth: int) -> Iterator[Entry]:
        """An entry and all that is below it; one that is gone is noted and passed over."""
        own = path + name
        with self._reading(own):
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                inner = os.open(name, _DIRECTORY_FLAGS, dir_fd=folder) if stat.S_ISDIR(status.st_mode) else None
            except OSError as error:
                if error.errno in _GONE:
                    self._note_vanished(own)
                    return
                raise
        if inner is None:
            if stat.S_ISSOCK(status.st_mode):
                self.sockets += 1
            else:
                yield Entry(own, status, folder)
            return
        try:
            if status.st_dev == self._device:
                yield from self._directory(inner, own + b"/", depth + 1)
            else:
                self.other_file_systems.append(shown(own))
            # Its content has been read by now, but what is promised is the folder as it was found.
            yield Entry(own, status, folder)
        finally:
            os.close(inner)

    def _note_vanished(self, path: bytes) -> None:
        self.missing.add(path)
        self.vanished.append(shown(path))

    def _git(self, descriptor: int, path: bytes, names: list[bytes], depth: int) -> Iterator[Entry]:
        """A repository: refs before the objects that they name, loose objects before the packs that may swallow them."""
        first = [name for name in (b"refs", b"reftable", b"packed-refs", b"HEAD", b"config") if name in names]
        others = [name for name in names if name not in (*first, b"objects")]
        for name in (*first, *others):
            yield from self._one(descriptor, path, name, depth)
        try:
            objects = os.open(b"objects", _DIRECTORY_FLAGS, dir_fd=descriptor)
        except OSError as error:
            raise FinalError(f"{shown(path)}objects can't be read: {error.strerror}") from None
        try:
            self._note_alternates(objects, path)
            yield from self._git_objects(objects, path + b"objects/", depth + 1)
            with self._reading(path + b"objects"):
                status = os.fstat(objects)
            yield Entry(path + b"objects", status, descriptor)
        finally:
            os.close(objects)

    def _git_objects(self, objects: int, path: bytes, depth: int) -> Iterator[Entry]:
        done: set[bytes] = set()
        for _ in range(GIT_PASSES):
            vanished_before, missing_before = len(self.vanished), set(self.missing)
            # info first: an older commit-graph names only objects that the later reads still find.
            for name in sorted(self._names(objects, path), key=lambda name: name != b"info"):
                if name != b"pack" and not name.startswith(b"tmp_"):
                    yield from self._fresh(objects, path, name, depth, done)
            yield from self._git_packs(objects, path, depth, done)
            if self.missing == missing_before:
                break
            # What vanished was repacked, not lost: the next pass finds it in a pack.
            del self.vanished[vanished_before:]
            self.missing = missing_before
        else:
            raise FinalError(
                f"{shown(path)} changed in each of {GIT_PASSES} passes over its objects",
                next_step="back up when git gc is not running without end",
            )
        yield from self._object_folders(objects, path)

    def _fresh(self, folder: int, path: bytes, name: bytes, depth: int, done: set[bytes]) -> Iterator[Entry]:
        """What is below ``name`` and was not given yet; folders come at the end, once, when all passes are over."""
        for entry in self._one(folder, path, name, depth):
            if not stat.S_ISDIR(entry.status.st_mode) and entry.path not in done and not entry.name.startswith(b"tmp_"):
                yield entry
                if entry.path not in self.missing:
                    done.add(entry.path)

    def _git_packs(self, objects: int, path: bytes, depth: int, done: set[bytes]) -> Iterator[Entry]:
        own = path + b"pack/"
        with contextlib.ExitStack() as stack:
            try:
                folder = os.open(b"pack", _DIRECTORY_FLAGS, dir_fd=objects)
            except OSError as error:
                if error.errno in _GONE:
                    return
                raise FinalError(f"{shown(own)} can't be read: {error.strerror}") from None
            stack.callback(os.close, folder)
            opened = []
            for name in sorted(self._names(folder, own), key=_pack_order):
                if name.startswith(b"tmp_") or own + name in done:
                    continue
                with self._reading(own + name):
                    try:
                        if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                            yield from self._fresh(folder, own, name, depth, done)
                            continue
                        descriptor = os.open(name, _FILE_FLAGS, dir_fd=folder)
                    except OSError as error:
                        if error.errno in _GONE:
                            self._note_vanished(own + name)
                            continue
                        raise
                    stack.callback(os.close, descriptor)
                    opened.append(Entry(own + name, os.fstat(descriptor), folder, descriptor))
            for entry in opened:
                yield entry
                done.add(entry.path)

    def _object_folders(self, folder: int, path: bytes) -> Iterator[Entry]:
        """The folders below ``path``, once, each after those inside it; one that gc removed meanwhile is no loss."""
        for name in self._names(folder, path):
            try:
                inner = os.open(name, _DIRECTORY_FLAGS, dir_fd=folder)
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise unreadable(path + name, error) from None
            try:
                yield from self._object_folders(inner, path + name + b"/")
                yield Entry(path + name, os.fstat(inner), folder)
            finally:
                os.close(inner)

    def _note_alternates(self, objects: int, path: bytes) -> None:
        try:
            descriptor = os.open(b"info/alternates", _FILE_FLAGS, dir_fd=objects)
        except OSError:
            return
        with open(descriptor, "rb") as file:
            lines = file.read(64 << 10).splitlines()
        here = os.path.realpath(os.path.join(os.fsencode(self.root), path, b"objects"))
        root = os.path.realpath(os.fsencode(self.root))
        for line in lines:
            target = os.path.realpath(os.path.join(here, line))
            if line and not target.startswith(root + b"/"):
                self.alternates.append(f"{shown(path)}: {shown(line)}")

    @contextlib.contextmanager
    def _reading(self, path: bytes) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unreadable(path, error) from None


def unreadable(path: bytes, error: OSError) -> FinalError:
    """The error for an entry that is there and can't be read: EIO, ESTALE, EACCES, ENOTCONN and their like."""
    return FinalError(
        f"{shown(path)} can't be read: {error.strerror}", next_step="mend it, or give the service the right to read it"
    )


def open_entry(entry: Entry) -> int | None:
    """A descriptor of an entry's file, None if it is gone or is no longer the file that was found.

    Never follows a link and never blocks on a FIFO that took the file's place.
    """
    if entry.opened is not None:
        return os.dup(entry.opened)
    try:
        try:
            descriptor = os.open(entry.name, _FILE_FLAGS | os.O_NOATIME, dir_fd=entry.folder)
        except PermissionError:
            # O_NOATIME is for a file's owner only (open(2)).
            descriptor = os.open(entry.name, _FILE_FLAGS, dir_fd=entry.folder)
    except OSError as error:
        if error.errno in _GONE or error.errno == errno.ENXIO:
            return None
        raise unreadable(entry.path, error) from None
    now = os.fstat(descriptor)
    if not stat.S_ISREG(now.st_mode) or (now.st_dev, now.st_ino) != (entry.status.st_dev, entry.status.st_ino):
        os.close(descriptor)
        return None
    return descriptor


def shown(path: bytes) -> str:
    """A path for people, whatever bytes it has."""
    return path.decode("utf-8", "backslashreplace")


def _is_git(names: list[bytes]) -> bool:
    present = set(names)
    return b"HEAD" in present and b"objects" in present and bool(present & {b"refs", b"reftable"})


def _pack_order(name: bytes) -> tuple[bytes, int, bytes]:
    stem, _, ending = name.rpartition(b".")
    return stem, 0 if ending == b"pack" else 1, ending
