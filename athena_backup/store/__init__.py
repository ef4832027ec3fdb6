"""Where sets live: one small interface over every kind of store, and the rules that every kind keeps.

Keys are relative paths with `/`, such as ``app/2023-02-02t16-00-00/manifest.json``. Names that begin with ``.athena-`` are
the store's own and never keys. The algorithms over a store (catalog, closing a set, copying) are plain functions elsewhere.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

from athena_backup.errors import FinalError, UnavailableError

OWN_PREFIX = ".athena-"
CHUNK_SIZE_BYTES = 1 << 20
"""The largest piece that `Store.read` hands out."""

LOOKS_AT_ONCE = 16
"""About as many as hide the time that each waits for the store."""
StoreType = Literal["local", "s3", "azure-blob-storage", "gcp-cloud-storage"]
DOCUMENT_LIMIT_BYTES = 256 << 20
"""What `read_document` takes at most: a manifest of 100,000 tables and parts stays well below."""


@dataclass(frozen=True)
class StoreLocation:
    """Which store: its type, and the directory as the configuration writes it, the bucket, or the container's URL."""

    type: StoreType
    place: str
    region: str = ""
    """Of a bucket in S3; else empty."""
    endpoint: str = ""
    """The server of a bucket in S3, since two of them may each have one of that name and region; else empty."""


@dataclass(frozen=True)
class Entry:
    """One object as a listing or a look shows it."""

    key: str
    size_bytes: int
    modified: datetime


class UnsettledError(UnavailableError):
    """A write's last answer was lost, but an object of the right size stands: whoever knows its hash can settle it."""

    def __init__(self, cause: str, *, entry: Entry) -> None:
        super().__init__(cause, step="storing")
        self.entry = entry


class Store(Protocol):
    """A store of objects.

    All methods raise `AbsentError` (no such object, where one is needed), `DeniedError` (credentials or permissions),
    `FullError` (no room) and `UnavailableError` (unreachable or broken off; a write's outcome is then unknown).
    Any method may be called from several threads.
    """

    @property
    def location(self) -> StoreLocation:
        """Where the store is; never holds a secret."""

    @property
    def proof(self) -> str:
        """How it is known that stored bytes are those that were sent, in the words of the manifest's ``proved_by``.

        ``fsync+size``: synced to the disk; ``digest``: checked by the store against a hash that was sent along; ``tls+size``,
        ``read-back``: not checked by the store, so with ``read-back`` the writer reads every part again and hashes it.
        """

    def entries(self, prefix: str) -> Iterator[Entry]:
        """All objects below the folder ``prefix`` (which ends with ``/`` or is empty), in the order of their keys."""

    def folders(self, prefix: str) -> Iterator[str]:
        """The names, one level deep and in order, of the folders directly below ``prefix``."""

    def head(self, key: str) -> Entry | None:
        """A look at one object; None where there is none."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``end`` (exclusive; None: all) in chunks of at most `CHUNK_SIZE_BYTES`.

        An empty chunk says that the next bytes are still on their way: the reader looks whether it was cancelled.
        """

    def write(self, key: str, chunks: Iterable[bytes]) -> Entry:
        """Store what ``chunks`` yields: wholly visible on return, not at all when the call (or an iteration) raises.

        A key is written once: an object that exists already is kept, and `FinalError` raised. Raises `UnsettledError` where
        it may be whole although the last answer was lost.
        """

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Store a small document in one piece, replacing an older one; with ``if_absent``: False if there was one."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; an absent one counts as deleted."""

    def sweep(self, prefix: str) -> int:
        """Remove what writers that were killed left invisible below ``prefix``; returns how many such pieces.

        Only the holder of the namespace's slot may call it: a living writer's pieces would go too.
        """


def check_key(key: str) -> tuple[str, ...]:
    """The segments of a key; raises `FinalError` for one that could leave the store or name something of its own."""
    segments = tuple(key.split("/"))
    for segment in segments:
        if segment in ("", ".", "..") or "\0" in segment or segment.startswith(OWN_PREFIX):
            raise FinalError(
                f"{key!r} is not a key of a store", next_step="the set's manifest may have been tampered with"
            )
    return segments


def check_prefix(prefix: str) -> tuple[str, ...]:
    """The segments of a folder's prefix; raises `FinalError` like `check_key`."""
    if prefix == "":
        return ()
    if not prefix.endswith("/"):
        raise FinalError(f"{prefix!r} is not a folder of a store: it lacks the closing '/'")
    return check_key(prefix[:-1])


def look_at(store: Store, keys: Sequence[str]) -> list[Entry | None]:
    """`Store.head` of many objects, many at a time: a set of many parts in a distant store is looked at in seconds."""
    with ThreadPoolExecutor(LOOKS_AT_ONCE, "look") as pool:
        return list(pool.map(store.head, keys))


def look_into(store: Store, keys: Sequence[str]) -> FinalError | None:
    """Read a byte of many objects, many at a time; returns what keeps the first of them from being read, and how many more.

    `Store.head` shows what lies in an archive class as anything else. Raises `UnavailableError`.
    """

    def refusal(key: str) -> FinalError | None:
        try:
            for _ in store.read(key, 0, 1):
                pass
        except FinalError as error:
            return error
        return None

    with ThreadPoolExecutor(LOOKS_AT_ONCE, "look") as pool:
        refused = [error for error in pool.map(refusal, keys) if error is not None]
    if len(refused) > 1:
        refused[0].cause += f"; {len(refused) - 1} more objects can't be read either"
    return refused[0] if refused else None


def read_document(store: Store, key: str) -> bytes:
    """A small document in one piece; raises `AbsentError`, and `FinalError` for one beyond `DOCUMENT_LIMIT_BYTES`."""
    document = bytearray()
    for chunk in store.read(key):
        document += chunk
        if len(document) > DOCUMENT_LIMIT_BYTES:
            raise FinalError(f"{key} is larger than {DOCUMENT_LIMIT_BYTES >> 20} MiB: it is no document of ours")
    return bytes(document)
