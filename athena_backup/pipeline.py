"""The way of the bytes: a source, compressed, hashed and stored as parts; and the same way back.

One pass, in bounded memory, without a copy on a local disk (design.md, section 3). What may be believed about a stream's
end stands here and nowhere else ("volumes", section 3): a source's iterator ends without an exception only if the source
is whole, and `read_part` ends without one only if every byte that was written has been seen.
"""

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import zstandard

from athena_backup.errors import AthenaError, DamagedError, FinalError, UnavailableError
from athena_backup.frames import FrameReader
from athena_backup.manifest import Part
from athena_backup.operation import LOOK_SECONDS, Operation
from athena_backup.store import Store, UnsettledError

PART_LIMIT_BYTES = 64 << 30
"""A part ends here and its stream goes on in the next one (design.md, section 3)."""
COMPRESSION_LEVEL = 1
FRAME_BYTES = 4 << 20
"""Of raw bytes in a zstd frame: eight windows of this level, so that little is lost at its borders (1 MiB cost 6 %)."""
THREADS_LIMIT = 64
"""The most threads that compress one stream."""
_FRAMES_AHEAD = 1
"""Raw frames that wait to be compressed: who reads and who compresses take turns at the cores, and neither is to wait until the
other has had one. Without it a core was idle for 4 % more of a backup (tried).
"""
_CROWD = 4
"""Beside so many streams no frame waits: some thread always has work, and of eight streams it would be 32 MiB."""
_AHEAD_BYTES = 4 << 20
_GRACE_SECONDS = 5.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Source:
    """Bytes to be backed up: of which component, and how to read them from the beginning.

    The iterator that ``open`` returns raises unless the source was read to its verified end (a child's exit code seen, a
    tree walked to its last entry); it must not raise `OSError`, which would be taken for the store's.
    """

    component: str
    open: Callable[[Operation], Iterator[bytes]]


def write_stream(
    source: Source,
    store: Store,
    key_of: Callable[[int], str],
    operation: Operation,
    *,
    part_limit_bytes: int = PART_LIMIT_BYTES,
    threads: Callable[[], int] = lambda: 1,
    on_read: Callable[[], None] = lambda: None,
    beside: int = 0,
) -> tuple[Part, ...]:
    """Store the whole of ``source`` as one part or more; ``key_of`` gives the key of part 0, 1, …

    A part is a whole number of zstd frames, each with its content checksum; ``cat part.* | zstd -d`` gives the stream back.
    ``part_limit_bytes`` is what a part holds compressed, at which the next begins; ``threads`` is asked before each frame
    how many may compress at once; ``on_read`` is called when the source has been read and only the store is waited for;
    ``beside`` is how many other streams are about to be written at the same time.
    Raises what the source or store raises.
    """
    parts: list[Part] = []
    chunks = source.open(operation)
    frames_ahead = _FRAMES_AHEAD if beside < _CROWD else 0

    def compressed(blocks: Iterator[bytes]) -> Iterator[bytes]:
        return _compressed(blocks, threads, frames_ahead)

    with contextlib.closing(_Lookahead(chunks)) as ahead:
        while ahead.more or not parts:
            parts.append(
                _write_part(
                    *(ahead, source.component, store, key_of(len(parts)), operation),
                    *(part_limit_bytes, compressed, on_read),
                )
            )
    return tuple(parts)


class _Lookahead:
    """An iterator that knows whether there is more, so that no empty part is begun."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._next: bytes | None = next(chunks, None)

    @property
    def more(self) -> bool:
        return self._next is not None

    def take(self, size_bytes: int) -> bytes:
        """The next chunks as one block of ``size_bytes`` or little more; less at the end, nothing behind it."""
        taken: list[bytes] = []
        left = size_bytes
        while left > 0 and self._next is not None:
            taken.append(self._next)
            left -= len(self._next)
            self._next = next(self._chunks, None)
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def close(self) -> None:
        close = getattr(self._chunks, "close", None)
        if close is not None:
            # ValueError: a thread that was left to itself, as its read hangs, is still inside.
            with contextlib.suppress(ValueError):
                close()


def _compressed(blocks: Iterator[bytes], threads: Callable[[], int], frames_ahead: int) -> Iterator[bytes]:
    """Each block as a zstd frame, in order; while some are compressed the next are read and the one before is stored.

    ``frames_ahead`` blocks more than threads are read, and wait.
    One call a frame: where zstd is fed piece by piece it first copies what it gets, and then finds matches more slowly.
    """
    idle: list[zstandard.ZstdCompressor] = []  # each is for one thread at a time
    waiting: deque[Future[bytes]] = deque()
    gate = _Gate()

    def compress(number: int, block: bytes) -> bytes:
        with gate.entered(number):
            try:
                compressor = idle.pop()
            except IndexError:
                compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=True)
            frame = compressor.compress(block)
            idle.append(compressor)
        return frame

    with ThreadPoolExecutor(THREADS_LIMIT + frames_ahead, "zstd") as pool:
        for number, block in enumerate(blocks):
            limit = min(threads(), THREADS_LIMIT)
            gate.limit_to(limit)
            frames = [waiting.popleft().result() for _ in range(len(waiting) + 1 - limit - frames_ahead)]
            waiting.append(pool.submit(compress, number, block))
            yield from frames
        while waiting:
            yield waiting.popleft().result()


class _Gate:
    """Lets threads in by their numbers, from 0, each while fewer are inside than was said last; the others wait."""

    def __init__(self) -> None:
        self._limit = 1
        self._inside = 0
        self._next = 0
        self._changed = threading.Condition()

    def limit_to(self, limit: int) -> None:
        """Let no more in from now on; if more are inside, nobody is sent out."""
        with self._changed:
            self._limit = limit
            self._changed.notify_all()

    @contextlib.contextmanager
    def entered(self, number: int) -> Iterator[None]:
        """Wait until it is this number's turn, and be inside for the block."""
        with self._changed:
            self._changed.wait_for(lambda: number == self._next and self._inside < self._limit)
            self._next += 1
            self._inside += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()


def _write_part(
    ahead: _Lookahead,
    component: str,
    store: Store,
    key: str,
    operation: Operation,
    limit_bytes: int,
    compress: Callable[[Iterator[bytes]], Iterator[bytes]],
    on_read: Callable[[], None],
) -> Part:
    digest = hashlib.sha256()
    size_bytes = raw_size_bytes = 0
    compressing: deque[int] = deque()

    def blocks() -> Iterator[bytes]:
        nonlocal raw_size_bytes
        # What is not compressed yet is counted as if it could not be: a part may end early, and late by no more than what the
        # source hands out at once and the frames' heads.
        while raw_size_bytes == 0 or (ahead.more and size_bytes + sum(compressing) < limit_bytes):
            operation.check()
            block = ahead.take(min(FRAME_BYTES, limit_bytes - size_bytes - sum(compressing)))
            operation.pace(len(block))
            raw_size_bytes += len(block)
            compressing.append(len(block))
            operation.advance(component, len(block))
            yield block
            if not ahead.more:
                return

    def compressed() -> Iterator[bytes]:
        nonlocal size_bytes
        for frame in compress(blocks()):
            digest.update(frame)
            compressing.popleft()
            size_bytes += len(frame)
            if not ahead.more and not compressing:
                on_read()
            yield frame

    try:
        entry = watched(lambda: store.write(key, compressed()), operation)
        is_proven = store.proof != "read-back"
    except UnsettledError as error:
        entry, is_proven = error.entry, False
    if entry.size_bytes != size_bytes:
        raise DamagedError(
            f"the store has {entry.size_bytes} bytes of {key}, {size_bytes} were written",
            next_step="the store loses bytes: do not rely on it before its owner has found out why",
            step="storing",
        )
    if not is_proven:
        read_back(store, key, digest.hexdigest(), operation)
    return Part(key=key, size_bytes=size_bytes, raw_size_bytes=raw_size_bytes, sha256=digest.hexdigest())


def read_back(store: Store, key: str, sha256: str, operation: Operation) -> None:
    """Read what was written and hash it; raises `UnavailableError` for other bytes: another try may send them whole."""
    digest = hashlib.sha256()
    for chunk in store.read(key):
        operation.check()
        digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise UnavailableError(
            f"{key} is not what was sent: some byte was changed on the way to the store or in it",
            next_step="if it happens again, the store or the way to it is broken: use https, or another one",
            step="reading back",
        )


def watched(call: Callable[[], _Result], operation: Operation) -> _Result:
    """Make a call that may hang in the store's client, and don't hang with it: raises like `Operation.check` within seconds.

    A call that doesn't notice the cancel within `_GRACE_SECONDS` is left to its own time-outs, in a thread that keeps nobody.
    """
    done = threading.Event()
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
            errors.append(error)
        done.set()

    threading.Thread(target=run, name="store", daemon=True).start()
    while not done.wait(LOOK_SECONDS):
        try:
            operation.check()
        except AthenaError:
            if not done.wait(_GRACE_SECONDS):
                raise
    if errors:
        raise errors[0]
    return results[0]


def read_part(
    part: Part, store: Store, operation: Operation, check: Callable[[], None] = lambda: None
) -> Generator[bytes, None, None]:
    """The raw bytes of a part; raises `DamagedError`, at its end at the latest, unless they are exactly what was written.

    ``check`` raises to stop, as the operation does, also while the store lets us wait.
    """
    digest = hashlib.sha256()
    size_bytes = raw_size_bytes = 0
    frames = FrameReader()
    try:
        for chunk in store.read(part.key):
            operation.check()
            check()
            digest.update(chunk)
            size_bytes += len(chunk)
            for raw in frames.feed(chunk):
                operation.check()
                raw_size_bytes += len(raw)
                if raw_size_bytes > part.raw_size_bytes:
                    raise _damaged(
                        part, f"it holds more than the {part.raw_size_bytes} bytes that the manifest promises"
                    )
                if raw:
                    yield raw
    except zstandard.ZstdError as error:
        raise _damaged(part, f"it is no whole zstd stream: {error}") from error
    if size_bytes != part.size_bytes:
        raise _damaged(part, f"it has {size_bytes} bytes, the manifest promises {part.size_bytes}")
    if digest.hexdigest() != part.sha256:
        raise _damaged(part, "its SHA-256 differs from the manifest's")
    if not frames.is_whole:
        raise _damaged(part, "its last zstd frame is cut off")
    if raw_size_bytes != part.raw_size_bytes:
        raise _damaged(part, f"it holds {raw_size_bytes} bytes, the manifest promises {part.raw_size_bytes}")


def read_stream(
    component: str,
    parts: Sequence[Part],
    store: Store,
    operation: Operation,
    check: Callable[[], None] = lambda: None,
) -> Iterator[bytes]:
    """The raw bytes of all parts in order, counted as the component's progress; raises like `read_part`."""
    if not parts:
        raise FinalError(
            f"the manifest names no part for {component}", next_step="the set is damaged: restore another one"
        )
    for part in parts:
        for raw in read_part(part, store, operation, check):
            operation.advance(component, len(raw))
            yield raw


def read_ahead(pieces: Iterator[bytes], limit_bytes: int = _AHEAD_BYTES) -> Generator[bytes, None, None]:
    """The same bytes, read by a thread of its own that is ``limit_bytes`` ahead of who uses them, or one piece more.

    Larger pieces are cut, so that what waits is no multiple of what a hostile frame makes of a few bytes.
    While a server takes some, the next are read and decompressed. Raises what reading them raises, behind those before it.
    """
    waiting: deque[bytes] = deque()
    errors: list[BaseException] = []
    changed = threading.Condition()
    waiting_bytes = 0
    has_ended, is_wanted = False, True

    def may_go_on() -> bool:
        return waiting_bytes < limit_bytes or not is_wanted

    def run() -> None:
        nonlocal waiting_bytes, has_ended
        try:
            for piece in (cut for whole in pieces for cut in sliced(whole, limit_bytes)):
                with changed:
                    changed.wait_for(may_go_on)
                    if not is_wanted:
                        break
                    waiting.append(piece)
                    waiting_bytes += len(piece)
                    changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that uses the pieces
            errors.append(error)
        finally:
            with changed:
                has_ended = True
                changed.notify_all()

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or has_ended)
                if not waiting:
                    break
                piece = waiting.popleft()
                waiting_bytes -= len(piece)
                changed.notify_all()
            yield piece
        if errors:
            raise errors[0]
    finally:
        with changed:
            is_wanted = False
            changed.notify_all()
        thread.join(_GRACE_SECONDS)


def sliced(block: bytes, limit_bytes: int) -> Iterator[bytes]:
    """A block as it is, or if it is more than twice as large as the limit, in pieces of that."""
    if len(block) <= 2 * limit_bytes:
        if block:
            yield block
        return
    view = memoryview(block)
    for start in range(0, len(block), limit_bytes):
        yield bytes(view[start : start + limit_bytes])


def _damaged(part: Part, what: str) -> DamagedError:
    return DamagedError(
        f"{part.key} is damaged: {what}",
        next_step="restore another set, or this one from its second copy",
        step="reading",
    )
