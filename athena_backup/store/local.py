"""The store in a mounted directory: our own code, synced to the disk (shared rules: "stores", section 3).

An object is written under a name of the store's own, synced, and renamed into place without replacing anything; then its
folder is synced. Everything is reached by directory descriptors that follow no symbolic link, so that a link somebody
put into the store leads nowhere. A directory is a store only if it carries an id: a missing mount is never written to.
"""

import contextlib
import ctypes
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from athena_backup.errors import AbsentError, DeniedError, FinalError, FullError, UnavailableError
from athena_backup.store import CHUNK_SIZE_BYTES, OWN_PREFIX, Entry, StoreLocation, check_key, check_prefix
from athena_backup.store.direct import write_direct

MARKER = ".athena-store"
_TEMPORARY_PREFIX = f"{OWN_PREFIX}tmp-"
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_OURS = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}
_LIBC = ctypes.CDLL(None, use_errno=True)


def store_id(root: Path) -> str | None:
    """The id that marks ``root`` as a store; None where it carries none. Raises like the store's methods."""
    try:
        return (root / MARKER).read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _translated(error, str(root / MARKER)) from error


def initialize(root: Path) -> str:
    """Make ``root`` a store and return its id (the one that it has, where it is one already)."""
    store = LocalStore(str(root))
    store.check_root()
    existing = store_id(root)
    if existing is not None:
        return existing
    new_id = secrets.token_hex(16)
    with store.opened_root() as descriptor:
        store.create_file(descriptor, MARKER, [f"{new_id}\n".encode("ascii")], replace=False)
    return new_id


class NoStoreYetError(FinalError):
    """The directory is empty, and was never known to be a store: a new one, or its mount is missing."""


def open_local(place: str, memory: Path, *, adopt: bool) -> "LocalStore":
    """The store in ``place``; ``memory`` is a file outside of it in which its id is remembered.

    With ``adopt``, as at a first start, an empty directory is made a store; whoever only looks leaves it as it is. Raises
    `NoStoreYetError` for an empty directory without it, `FinalError` for a directory that lost its id or has another one (the
    mount is missing, or another volume is mounted there), and for one with other people's files.
    """
    root = Path(place)
    known = _remembered(memory)
    remembered = known.get(str(root.absolute()))
    LocalStore(place).check_root()
    found = store_id(root)
    if remembered is not None and found != remembered:
        raise _not_mounted(
            *(root, found),
            f"; if this is the right one or a new one, run `athena-backup init`, which removes nothing (it updates {memory})",
        )
    if found is None:
        if any(name for name in os.listdir(root) if name != "lost+found"):
            raise FinalError(
                f"the store's directory {root} is not empty and carries no store id: is it the right one?",
                next_step="if it is, run `athena-backup init` once",
            )
        if not adopt:
            raise NoStoreYetError(
                f"the store's directory {root} is empty, and no store yet",
                next_step="mount it, or copy the store there; a new one is made by the start of `athena-backup up`, or by"
                " `athena-backup init`",
            )
        found = initialize(root)
    if remembered is None:
        remember(place, found, memory)
    return LocalStore(place, found)


def _not_mounted(root: Path, found: str | None, otherwise: str = "") -> FinalError:
    what = "carries no store id" if found is None else "carries the id of another store"
    return FinalError(
        f"the store's directory {root} {what}: is the right volume mounted there?", next_step=f"mount it{otherwise}"
    )


def remember(place: str, identifier: str, memory: Path) -> None:
    """Write down that the store at ``place`` has this id, so that a missing mount is noticed.

    Raises `FinalError` where ``memory`` can't be read or written.
    """
    document = {**_remembered(memory), str(Path(place).absolute()): identifier}
    temporary = memory.with_name(f"{memory.name}.{secrets.token_hex(4)}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(memory)
    except OSError as error:
        raise FinalError(
            f"ATHENA_HOME: {error.filename} can't be written: {error.strerror}",
            next_step="make it writable, or set ATHENA_HOME to a directory that is",
        ) from None


def _remembered(memory: Path) -> dict[str, str]:
    try:
        document = json.loads(memory.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # who can't make it either says so in `remember`
        return {}
    except (OSError, ValueError) as error:
        raise FinalError(
            f"{memory} can't be read: {error}", next_step="remove it if the right volume is mounted"
        ) from None
    return {str(place): str(identifier) for place, identifier in document.items()}


class LocalStore:
    """A `Store` in a directory. Files are made readable for their owner only: a set holds everybody's secrets."""

    def __init__(self, place: str, identifier: str | None = None) -> None:
        """``place``: the directory as the configuration writes it; it has to exist when the store is used.

        With ``identifier`` every call looks whether the directory still carries that id: unmounted in the middle of a backup
        it would be written on into the file system below, and what is read there would be listed as whole.
        """
        self._location = StoreLocation("local", place)
        self._root = Path(place)
        self._identifier = identifier

    def __repr__(self) -> str:
        return f"LocalStore({self._location.place!r})"

    @property
    def location(self) -> StoreLocation:
        """Where the store is."""
        return self._location

    @property
    def proof(self) -> str:
        """See `Store.proof`."""
        return "fsync+size"

    def check_root(self) -> None:
        """Raise `FinalError` or `DeniedError` if the store's directory isn't there or may not be read."""
        with self.opened_root():
            return

    def entries(self, prefix: str) -> Iterator[Entry]:
        """See `Store.entries`. Symbolic links and other things that are no plain files are foreign, and left out."""
        segments = check_prefix(prefix)
        with self._guard(prefix):
            descriptor = self._open_folder(segments)
            if descriptor is not None:
                yield from self._walk(descriptor, prefix)

    def _walk(self, descriptor: int, prefix: str) -> Iterator[Entry]:
        try:
            with os.scandir(descriptor) as found:
                # A folder's keys begin with its name and a slash: sorting by that gives the order of whole keys.
                named = [(f"{item.name}/" if item.is_dir(follow_symlinks=False) else item.name) for item in found]
            for name in sorted(name for name in named if not name.startswith(OWN_PREFIX)):
                if name.endswith("/"):
                    with contextlib.suppress(FileNotFoundError):
                        yield from self._walk(os.open(name[:-1], _DIRECTORY_FLAGS, dir_fd=descriptor), prefix + name)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield _entry(prefix + name, status)
        finally:
            os.close(descriptor)

    def folders(self, prefix: str) -> Iterator[str]:
        """See `Store.folders`."""
        segments = check_prefix(prefix)
        with self._guard(prefix):
            descriptor = self._open_folder(segments)
            if descriptor is None:
                return
            try:
                with os.scandir(descriptor) as found:
                    names = [item.name for item in found if item.is_dir(follow_symlinks=False)]
            finally:
                os.close(descriptor)
        yield from sorted(name for name in names if not name.startswith(OWN_PREFIX))

    def head(self, key: str) -> Entry | None:
        """See `Store.head`."""
        *folder, name = check_key(key)
        with self._guard(key), self._folder(folder) as descriptor:
            if descriptor is None:
                return None
            try:
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                return None
            return _entry(key, status) if stat.S_ISREG(status.st_mode) else None

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See `Store.read`."""
        *folder, name = check_key(key)
        with self._guard(key):
            with self._folder(folder) as descriptor:
                if descriptor is None:
                    raise AbsentError(f"{self._root}/{key} does not exist")
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise AbsentError(f"{self._root}/{key} is not a plain file")
                position = start
                while end is None or position < end:
                    length = CHUNK_SIZE_BYTES if end is None else min(CHUNK_SIZE_BYTES, end - position)
                    chunk = os.pread(file, length, position)
                    if not chunk:
                        return
                    position += len(chunk)
                    yield chunk
            finally:
                os.close(file)

    def write(self, key: str, chunks: Iterable[bytes]) -> Entry:
        """See `Store.write`."""
        *folder, name = check_key(key)
        with self._guard(key), self._made_folder(folder) as descriptor:
            if not self.create_file(descriptor, name, chunks, replace=False):
                raise FinalError(f"{self._root}/{key} exists already, and nothing is written twice")
            return _entry(key, os.stat(name, dir_fd=descriptor, follow_symlinks=False))

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """See `Store.put`."""
        *folder, name = check_key(key)
        with self._guard(key), self._made_folder(folder) as descriptor:
            return self.create_file(descriptor, name, [data], replace=not if_absent)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`. Folders that become empty go too, for people's sake."""
        for key in keys:
            *folder, name = check_key(key)
            with self._guard(key):
                with self._folder(folder) as descriptor:
                    if descriptor is None:
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=descriptor)
                        os.fsync(descriptor)
                self._remove_empty(folder)

    def _remove_empty(self, folder: list[str]) -> None:
        for depth in range(len(folder), 1, -1):
            with self._folder(folder[: depth - 1]) as parent:
                if parent is None:
                    continue
                try:
                    os.rmdir(folder[depth - 1], dir_fd=parent)
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        return
                    if error.errno not in _NOT_OURS:
                        raise

    def sweep(self, prefix: str) -> int:
        """See `Store.sweep`: here these are unfinished files under the store's own names."""
        segments = check_prefix(prefix)
        with self._guard(prefix):
            descriptor = self._open_folder(segments)
            return 0 if descriptor is None else self._sweep(descriptor)

    def _sweep(self, descriptor: int) -> int:
        swept = 0
        try:
            with os.scandir(descriptor) as found:
                items = [(item.name, item.is_dir(follow_symlinks=False)) for item in found]
            for name, is_folder in items:
                with contextlib.suppress(FileNotFoundError):
                    if is_folder:
                        swept += self._sweep(os.open(name, _DIRECTORY_FLAGS, dir_fd=descriptor))
                    elif name.startswith(_TEMPORARY_PREFIX):
                        os.unlink(name, dir_fd=descriptor)
                        swept += 1
            return swept
        finally:
            os.close(descriptor)

    def create_file(self, folder: int, name: str, chunks: Iterable[bytes], *, replace: bool) -> bool:
        """Write ``name`` into the open ``folder``, synced and wholly visible; False if it exists and may not be replaced.

        Anything that goes wrong, the close included (NFS and quotas tell only there), discards the new file.
        """
        temporary = f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(temporary, flags, 0o600, dir_fd=folder)
        try:
            try:
                write_direct(file, chunks)
                os.fsync(file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(file)
                raise
            os.close(file)
            if replace:
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            elif not _rename_without_replacing(folder, temporary, name):
                os.unlink(temporary, dir_fd=folder)
                return False
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        try:
            os.fsync(folder)
        except OSError:
            # A name that may be gone after a crash must not be found by whoever settles the outcome by reading.
            if not replace:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=folder)
            raise
        return True

    @contextlib.contextmanager
    def opened_root(self) -> Iterator[int]:
        """A descriptor of the root; the root itself may be a symbolic link, as operators make them."""
        try:
            descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FinalError(
                f"the store's directory {self._root} does not exist", next_step="mount or make it, then try again"
            ) from None
        except OSError as error:
            if error.errno in _NOT_OURS:
                raise FinalError(
                    f"the store's directory {self._root} can't be opened: {error.strerror}",
                    next_step="name a directory in OBJECT_STORE_LOCATION_LOCAL, or in the store's block",
                ) from None
            raise _translated(error, str(self._root)) from error
        try:
            if self._identifier is not None:
                found = _marker(descriptor)
                if found != self._identifier:
                    raise _not_mounted(self._root, found)
            yield descriptor
        finally:
            os.close(descriptor)

    def _open_folder(self, segments: Iterable[str]) -> int | None:
        with self.opened_root() as root:
            descriptor = os.dup(root)
        for segment in segments:
            try:
                below = os.open(segment, _DIRECTORY_FLAGS, dir_fd=descriptor)
            except OSError as error:
                if error.errno in _NOT_OURS:
                    return None
                raise
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor

    @contextlib.contextmanager
    def _folder(self, segments: Iterable[str]) -> Iterator[int | None]:
        descriptor = self._open_folder(segments)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    @contextlib.contextmanager
    def _made_folder(self, segments: Iterable[str]) -> Iterator[int]:
        with self.opened_root() as root:
            descriptor = os.dup(root)
        try:
            for segment in segments:
                try:
                    below = os.open(segment, _DIRECTORY_FLAGS, dir_fd=descriptor)
                except FileNotFoundError:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(segment, 0o700, dir_fd=descriptor)
                    os.fsync(descriptor)
                    below = os.open(segment, _DIRECTORY_FLAGS, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _guard(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _translated(error, f"{self._root}/{key}") from error


def _marker(root: int) -> str | None:
    """The id in an open directory; None where it carries none."""
    try:
        file = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return None
    try:
        return os.read(file, 100).decode("ascii", "replace").strip() or None
    finally:
        os.close(file)


def _entry(key: str, status: os.stat_result) -> Entry:
    return Entry(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _rename_without_replacing(folder: int, source: str, target: str) -> bool:
    """Rename within ``folder``; False if ``target`` exists. Falls back to link and unlink where renameat2(2) is missing."""
    if _LIBC.renameat2(folder, source.encode(), folder, target.encode(), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), target)
    try:
        os.link(source, target, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        return False
    os.unlink(source, dir_fd=folder)
    return True


def _translated(error: OSError, what: str) -> AbsentError | DeniedError | FullError | UnavailableError:
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return FullError(f"{what}: {reason}", next_step="free or add space in the store, then try again")
    if error.errno in _REFUSED:
        return DeniedError(f"{what}: {reason}", next_step="give the service's user the right to read and write there")
    if error.errno in _NOT_OURS:
        return AbsentError(f"{what}: {reason}")
    return UnavailableError(f"{what}: {reason}")
