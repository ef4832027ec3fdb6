"""The store in an object store, through obstore: one class for S3, Azure Blob Storage and Google Cloud Storage.

What may be believed about an object store stands in "stores": an error of a put or completion means *unknown* (section 2),
nothing of the client's defaults is relied on (section 4). How a client is made, and from which credentials, is `clients`'
business; here is only what is done with it.
"""

import contextlib
import functools
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
)
from obstore.store import ObjectStore as Client

from athena_backup.errors import (
    AbsentError,
    AthenaError,
    DamagedError,
    DeniedError,
    FinalError,
    UnavailableError,
)
from athena_backup.store import (
    CHUNK_SIZE_BYTES,
    OWN_PREFIX,
    Entry,
    StoreLocation,
    UnsettledError,
    check_key,
    check_prefix,
)
from athena_backup.store.refusals import ChangedError, cause_of, is_denied, is_past_the_end, is_timeout, told

if TYPE_CHECKING:
    from obstore import GetOptions, PutMode

UPLOAD_PART_BYTES = 8 << 20
"""Size of an upload part and of a range that is read; 10,000 of them are more than the 64 GiB at which a part ends."""
BUFFER_BUDGET_BYTES = 128 << 20
"""What all streams of one process together may hold in upload parts and ranges ("stores", section 4)."""
_ENOUGH_BYTES = 80 << 20
"""So much is used as long as it lets each stream have two parts or ranges under way: with 96 MiB a backup with two jobs held up
to 391 MB in its process, where 400 are allowed (design.md, section 7), instead of 335 to 350, for the same processor time.
"""
_PARALLEL_LIMIT = 8
_TRIES = 4
PAUSE_SECONDS = 0.5
"""Before the second try of a call; twice as long before each further one."""
_DELETE_BATCH = 500
_WAITING_SECONDS = 0.5

_Result = TypeVar("_Result")
logger = logging.getLogger("athena_backup.store")


class ObjectStore:
    """A `Store` in a bucket or container."""

    def __init__(
        self,
        location: StoreLocation,
        connect: Callable[[], tuple[Client, Client]],
        *,
        streams: int = 2,
        pause_seconds: float = PAUSE_SECONDS,
        proof: str = "digest",
        abandon: Callable[[str], int] = lambda _: 0,
    ) -> None:
        """``connect`` makes a client, and one for reading, whose stalls are noticed sooner, with fresh credentials; it is
        called at first use and when credentials are refused.

        ``streams``: how many objects are written or read at once, among which `BUFFER_BUDGET_BYTES` are divided. ``proof``:
        how written bytes are known to be right, see `Store.proof`. ``abandon`` aborts the uploads that killed writers left
        below a prefix and returns how many ("stores", section 7).
        """
        self._location = location
        self._connect = connect
        self._clients: tuple[Client, Client] | None = None
        self._proof = proof
        self._pause_seconds = pause_seconds
        self._abandon = abandon
        enough, limit = (size // UPLOAD_PART_BYTES // max(1, streams) for size in (_ENOUGH_BYTES, BUFFER_BUDGET_BYTES))
        # One buffer of each stream is the one that is being filled.
        buffers = max(enough, min(3, limit))
        self._parallel = max(1, min(_PARALLEL_LIMIT, buffers - 1))

    def __repr__(self) -> str:
        return f"ObjectStore({self._location.type!r}, {self._location.place!r})"

    @property
    def location(self) -> StoreLocation:
        """Where the store is."""
        return self._location

    @property
    def proof(self) -> str:
        """See `Store.proof`."""
        return self._proof

    def entries(self, prefix: str) -> Iterator[Entry]:
        """See `Store.entries`."""
        check_prefix(prefix)

        def listed() -> list[Entry]:
            found: list[Entry] = []
            for page in obstore.list(self._connected(), prefix=prefix.rstrip("/") or None, chunk_size=1_000):
                found += [Entry(one["path"], one["size"], one["last_modified"]) for one in page]
            return found

        found = self._patiently(prefix, listed)
        # Stores differ in the order of keys that hold a slash.
        yield from sorted(
            (entry for entry in found if not _is_own(entry.key) and entry.key.startswith(prefix)),
            key=lambda one: one.key,
        )

    def folders(self, prefix: str) -> Iterator[str]:
        """See `Store.folders`."""
        check_prefix(prefix)
        listed = self._patiently(
            prefix, lambda: obstore.list_with_delimiter(self._connected(), prefix=prefix.rstrip("/") or None)
        )
        names = (folder.rstrip("/").rpartition("/")[2] for folder in listed["common_prefixes"])
        yield from sorted(name for name in names if not name.startswith(OWN_PREFIX))

    def head(self, key: str) -> Entry | None:
        """See `Store.head`."""
        check_key(key)
        try:
            found = self._patiently(key, lambda: obstore.head(self._connected(), key))
        except AbsentError:
            return None
        return Entry(key, found["size"], found["last_modified"])

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See `Store.read`. Ranges are read in parallel, each retried alone, all of the object that the first one saw."""
        check_key(key)
        if end is not None and end - start <= UPLOAD_PART_BYTES:
            # What fits into one range takes one request: a list looks at a thousand manifests so.
            content = self._patiently(key, lambda: self._beginning(key, start, end)) if start < end else b""
            yield from (content[at : at + CHUNK_SIZE_BYTES] for at in range(0, len(content), CHUNK_SIZE_BYTES))
            return
        entry = self._patiently(key, lambda: obstore.head(self._connected(), key))
        tag, stop = entry["e_tag"], min(entry["size"], end if end is not None else entry["size"])
        if start >= stop:
            return
        ranges = ((begin, min(stop, begin + UPLOAD_PART_BYTES)) for begin in range(start, stop, UPLOAD_PART_BYTES))
        with contextlib.closing(_Ahead(self._parallel)) as ahead:
            for begin, finish in itertools.islice(ranges, self._parallel):
                ahead.submit(functools.partial(self._range, key, tag, begin, finish))
            while ahead.pending:
                yield from ahead.waiting()
                piece = memoryview(ahead.take())
                if self._parallel > 1:
                    self._read_on(ahead, key, tag, ranges)
                for offset in range(0, len(piece), CHUNK_SIZE_BYTES):
                    yield bytes(piece[offset : offset + CHUNK_SIZE_BYTES])
                piece.release()
                if self._parallel == 1:
                    self._read_on(ahead, key, tag, ranges)

    def _beginning(self, key: str, start: int, end: int) -> bytes:
        """A range of an object whose size nobody has asked for: cut off, or empty, where the object ends."""
        try:
            found = obstore.get(self._connected(to_read=True), key, options={"range": (start, end)})
        except BaseError as error:
            if is_past_the_end(error):
                return b""
            raise
        content = bytes(found.bytes())
        wanted = min(end, found.meta["size"]) - start
        if len(content) != wanted:
            raise UnavailableError(f"{key}: the store sent {len(content)} of {wanted} bytes")
        return content

    def _read_on(self, ahead: "_Ahead", key: str, tag: str | None, ranges: Iterator[tuple[int, int]]) -> None:
        following = next(ranges, None)
        if following is not None:
            ahead.submit(functools.partial(self._range, key, tag, *following))

    def _range(self, key: str, tag: str | None, start: int, end: int) -> obstore.Bytes:
        def get() -> obstore.Bytes:
            options: GetOptions = {"range": (start, end)}
            if tag:
                options["if_match"] = tag
            return obstore.get(self._connected(to_read=True), key, options=options).bytes()

        try:
            content = self._patiently(key, get)
        except ChangedError:
            raise DamagedError(
                f"{key} was replaced while it was read", next_step="who writes into the store?"
            ) from None
        if len(content) != end - start:
            raise UnavailableError(f"{key}: the store sent {len(content)} of {end - start} bytes")
        return content

    def write(self, key: str, chunks: Iterable[bytes]) -> Entry:
        """See `Store.write`. What fits into one upload part is put in one piece, anything larger as a multipart upload."""
        check_key(key)
        if self.head(key) is not None:
            raise FinalError(f"{key} exists already in {self._location.place}, and nothing is written twice")
        feed = _Feed(chunks)
        try:
            self._send(key, feed)
        except (BaseError, OSError, ValueError) as error:
            if feed.failure is not None:
                raise feed.failure from (error if error is not feed.failure else None)
            if not feed.ended:
                raise self._unsent(key, error) from error
            self._settle(key, feed.size_bytes, error)
        entry = self.head(key)
        if entry is None:
            raise UnavailableError(f"{key} is not in {self._location.place}, although it was stored", step="storing")
        return entry

    def _send(self, key: str, feed: "_Feed") -> None:
        """Send all that the feed gives; credentials that are refused are renewed once ("stores", section 6)."""
        held = [feed.first(UPLOAD_PART_BYTES)]
        is_whole = feed.ended

        def pieces() -> Iterator[bytes]:
            yield held[0]
            # From here on only the client has it: a buffer less for as long as the upload lasts.
            held.clear()
            yield from feed

        def send() -> None:
            if is_whole:
                obstore.put(self._connected(), key, held[0], mode="create", use_multipart=False)
            else:
                self._upload(key, pieces())

        try:
            send()
        except (BaseError, OSError) as error:
            if not is_denied(error):
                raise
            self._clients = None
            if not held:
                # What was taken from the source is gone: only the component's next try, with its renewed credentials,
                # can tell whether they had expired or were withdrawn.
                raise UnavailableError(
                    self._told(key, error).cause, next_step="the credentials are renewed for another try"
                ) from error
            send()

    def _upload(self, key: str, chunks: Iterable[bytes]) -> None:
        try:
            obstore.put(
                self._connected(),
                key,
                iter(chunks),
                use_multipart=True,
                chunk_size=UPLOAD_PART_BYTES,
                max_concurrency=self._parallel,
            )
        except BaseError as error:
            if is_timeout(error):
                # Too many at once for this line: the next try of this and every other object goes one by one.
                self._parallel = 1
            raise

    def _settle(self, key: str, size_bytes: int, error: Exception) -> None:
        """Look whether an object stands although its last call failed ("stores", section 2); raises what is to be told."""
        problem = self._unsent(key, error)
        if isinstance(problem, DeniedError):
            raise problem from error
        try:
            entry = self.head(key)
        except AthenaError:
            raise problem from error
        if entry is None or entry.size_bytes != size_bytes:
            raise problem from error
        raise UnsettledError(f"it is unknown whether {key} was written whole: {problem.cause}", entry=entry) from error

    def _unsent(self, key: str, error: Exception) -> AthenaError:
        """What an upload's error means: "not found" is the upload, which somebody aborted, and another try begins a new one."""
        problem = self._told(key, error)
        if isinstance(problem, AbsentError):
            return UnavailableError(problem.cause, next_step="the unfinished upload is gone: did somebody abort it?")
        return problem

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """See `Store.put`."""
        check_key(key)
        mode: PutMode = "create" if if_absent else "overwrite"

        def put() -> bool:
            try:
                obstore.put(self._connected(), key, data, mode=mode, use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

        if if_absent:
            # Asked once: what a second call would say of the first one's object is the caller's to understand.
            return self._once(key, put)
        return self._patiently(key, put)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        for batch in _batched(keys, _DELETE_BATCH):
            for key in batch:
                check_key(key)
            try:
                self._patiently(batch[0], functools.partial(self._delete, batch))
            except AbsentError:
                for key in batch:
                    with contextlib.suppress(AbsentError):
                        self._patiently(key, functools.partial(self._delete, [key]))

    def _delete(self, keys: list[str]) -> None:
        obstore.delete(self._connected(), keys)

    def sweep(self, prefix: str) -> int:
        """See `Store.sweep`."""
        check_prefix(prefix)
        try:
            return self._abandon(prefix)
        except AthenaError as error:
            # `check` says so too, and asks for a lifecycle rule instead; no operation depends on it.
            logger.warning("what killed writers left below %s is not swept: %s", prefix, error)
            return 0

    def _connected(self, *, to_read: bool = False) -> Client:
        clients = self._clients
        if clients is None:
            try:
                clients = self._clients = self._connect()
            except (BaseError, ValueError) as error:
                # Nothing was asked of the store yet: what can't be read is a key, an address, a certificate.
                raise FinalError(
                    f"{self._location.type} store {self._location.place}: {cause_of(error)}",
                    next_step="correct the store's settings",
                ) from None
        return clients[1] if to_read else clients[0]

    def _once(self, key: str, call: Callable[[], _Result]) -> _Result:
        """One call, with errors told; credentials that are refused are renewed once ("stores", section 6)."""
        try:
            return call()
        except (BaseError, OSError, ValueError) as error:
            if not is_denied(error):
                raise self._told(key, error) from error
            self._clients = None
        try:
            return call()
        except (BaseError, OSError, ValueError) as error:
            raise self._told(key, error) from error

    def _patiently(self, key: str, call: Callable[[], _Result]) -> _Result:
        """A call that does no harm when it is made again, until it is answered or `_TRIES` have failed."""
        for attempt in range(1, _TRIES + 1):
            try:
                return self._once(key, call)
            except UnavailableError:
                if attempt == _TRIES:
                    raise
            time.sleep(self._pause_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        raise AssertionError("the loop above returns or raises")

    def _told(self, key: str, error: Exception) -> AthenaError:
        return told(self._location, key, error)


class _Feed:
    """The chunks of an object on their way: how many bytes they were, and whether they came to their end."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self.size_bytes = 0
        self.ended = False
        self.failure: BaseException | None = None

    def first(self, size_bytes: int) -> bytes:
        """The first chunks joined, at least ``size_bytes`` of them or all."""
        gathered: list[bytes] = []
        for chunk in self:
            gathered.append(chunk)
            if self.size_bytes >= size_bytes:
                break
        return b"".join(gathered)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            chunk = next(self._chunks)
        except StopIteration:
            self.ended = True
            raise
        except BaseException as error:
            self.failure = error
            raise
        self.size_bytes += len(chunk)
        return chunk


class _Ahead:
    """Pieces that are fetched ahead of their turn, a bounded number of them, and handed out in order."""

    def __init__(self, parallel: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=parallel, thread_name_prefix="range")
        self._futures: list[Future[obstore.Bytes]] = []

    @property
    def pending(self) -> bool:
        return bool(self._futures)

    def submit(self, fetch: Callable[[], obstore.Bytes]) -> None:
        self._futures.append(self._pool.submit(fetch))

    def waiting(self) -> Iterator[bytes]:
        """Nothing, again and again, until the next piece is there: the reader looks whether it was cancelled."""
        while True:
            try:
                self._futures[0].exception(timeout=_WAITING_SECONDS)
            except FutureTimeoutError:
                yield b""
            else:
                return

    def take(self) -> obstore.Bytes:
        return self._futures.pop(0).result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _is_own(key: str) -> bool:
    return any(segment.startswith(OWN_PREFIX) for segment in key.split("/"))


def _batched(keys: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(keys)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
