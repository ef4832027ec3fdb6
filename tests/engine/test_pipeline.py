"""A stream comes back exactly as it went in, or an error says that it doesn't."""

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from athena_backup import pipeline
from athena_backup.errors import CancelledError, DamagedError, FinalError
from athena_backup.frames import PIECE_LIMIT_BYTES
from athena_backup.manifest import Part
from athena_backup.operation import Operation
from athena_backup.pipeline import Source, read_ahead, read_part, read_stream, write_stream
from athena_backup.store import Entry
from athena_backup.store.local import LocalStore


def source(*chunks: bytes) -> Source:
    return Source("asp", lambda operation: iter(chunks))


def write(store: LocalStore, *chunks: bytes, part_limit_bytes: int = 1 << 30) -> tuple[Part, ...]:
    return write_stream(
        source(*chunks), store, lambda number: f"set/dump.{number:04}", Operation(), part_limit_bytes=part_limit_bytes
    )


def read(store: LocalStore, parts: tuple[Part, ...]) -> bytes:
    return b"".join(read_stream("asp", parts, store, Operation()))


def path_of(store: LocalStore, part: Part) -> Path:
    return Path(store.location.place) / part.key


def noise(size_bytes: int) -> bytes:
    return random.Random(1).randbytes(size_bytes)


def promising(part: Part, data: bytes) -> Part:
    """A manifest's part that matches bytes which were put in its place: what is left is the structure."""
    import hashlib

    return part.model_copy(update={"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.lists(st.binary(max_size=5_000), max_size=20), limit=st.integers(1, 4_000))
def test_any_stream_comes_back_from_any_number_of_parts(
    chunks: list[bytes], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = LocalStore(str(tmp_path_factory.mktemp("store")))
    parts = write(store, *chunks, part_limit_bytes=limit)
    assert read(store, parts) == b"".join(chunks)


def test_a_stream_beyond_the_limit_goes_on_in_the_next_part_and_cat_joins_them(local_store: LocalStore) -> None:
    data = noise(5 << 20)
    parts = write(local_store, *(data[i : i + 100_000] for i in range(0, len(data), 100_000)), part_limit_bytes=1 << 20)
    assert len(parts) == 5
    joined = b"".join(path_of(local_store, part).read_bytes() for part in parts)
    assert zstandard.ZstdDecompressor().stream_reader(joined, read_across_frames=True).read() == data


def test_one_frame_more_is_under_way_than_may_be_compressed_at_that_moment(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, most, frames = [1, 1, 3, 3, 3, 3, 1, 1, 1, 2], [], 10
    at_once: list[int] = []

    class Pool(ThreadPoolExecutor):
        def submit(self, call: Callable[..., bytes], /, *arguments: object, **named: object) -> Future[bytes]:  # type: ignore[override]
            future = super().submit(call, *arguments, **named)
            at_once.append(1)
            real = future.result
            future.result = lambda *rest: (at_once.pop(), real(*rest))[1]  # type: ignore[method-assign]
            most.append(len(at_once))
            return future

    monkeypatch.setattr(pipeline, "ThreadPoolExecutor", Pool)
    data = noise(frames * pipeline.FRAME_BYTES)
    chunks = [data[start : start + pipeline.FRAME_BYTES] for start in range(0, len(data), pipeline.FRAME_BYTES)]
    answers = iter(allowed)
    parts = write_stream(
        source(*chunks), local_store, lambda number: f"set/dump.{number:04}", Operation(), threads=lambda: next(answers)
    )
    assert most == [1, 2, 3, 4, 4, 4, 2, 2, 2, 3]
    assert read(local_store, parts) == data


class Compressing:
    """Stands before zstd's compressor, and sees how many are at work when each begins.

    ``before`` is called with the number of the frame in that order, from 0, before it is compressed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]) -> None:
        self.seen: list[int] = []
        self._inside = 0
        self._lock = threading.Lock()
        self._before = before
        self._real = zstandard.ZstdCompressor
        monkeypatch.setattr(zstandard, "ZstdCompressor", self._made)

    def _made(self, **options: Any) -> "Compressing":
        self._options = options
        return self

    def compress(self, block: bytes) -> bytes:
        with self._lock:
            self._inside += 1
            self.seen.append(self._inside)
            number = len(self.seen) - 1
        self._before(number)
        frame = self._real(**self._options).compress(block)
        with self._lock:
            self._inside -= 1
        return frame


def test_the_next_frame_is_read_and_waits_while_one_is_compressed(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_read_on = threading.Event()

    def before(_: int) -> None:
        # Behind the frame at work one waits, one more has been read, and its reader has looked whether there is another.
        assert is_read_on.wait(20)

    def chunks(_: Operation) -> Iterator[bytes]:
        for number in range(6):
            if number == 3:
                is_read_on.set()
            yield noise(pipeline.FRAME_BYTES)

    compressing = Compressing(monkeypatch, before)
    write_stream(Source("asp", chunks), local_store, lambda number: f"set/dump.{number:04}", Operation())
    assert max(compressing.seen) == 1


def test_as_many_frames_are_compressed_at_once_as_are_allowed(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, wide = 12, 4
    are_read = [threading.Event() for _ in range(frames)]
    are_three = threading.Event()
    data = noise(pipeline.FRAME_BYTES)

    def before(number: int) -> None:
        if number == 2:
            are_three.set()
        assert are_three.wait(20)
        if number > 2:
            # By then the next frame has been there for long, and would be at work if it were let in.
            assert are_read[min(number + 3, frames - 1)].wait(20)

    def chunks(_: Operation) -> Iterator[bytes]:
        for is_read in are_read:
            is_read.set()
            yield data

    compressing = Compressing(monkeypatch, before)
    answers = iter([3] * wide + [1] * (frames - wide))
    parts = write_stream(
        Source("asp", chunks),
        local_store,
        lambda number: f"set/dump.{number:04}",
        Operation(),
        threads=lambda: next(answers),
    )
    monkeypatch.undo()
    assert compressing.seen[:3] == [1, 2, 3]
    assert max(compressing.seen) == 3
    assert set(compressing.seen[wide:]) == {1}
    assert read(local_store, parts) == data * frames


@pytest.mark.parametrize(("beside", "waiting"), [(0, 1), (3, 1), (4, 0), (7, 0)])
def test_a_frame_waits_unless_many_streams_are_written_beside(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch, beside: int, waiting: int
) -> None:
    are_read = [threading.Event() for _ in range(6)]

    def before(number: int) -> None:
        if number == 0:
            # Behind the frame at work and those that wait one more has been read, and looked whether there is another.
            assert are_read[waiting + 2].wait(20)
            assert not are_read[waiting + 3].wait(0.2)

    def chunks(_: Operation) -> Iterator[bytes]:
        for is_read in are_read:
            is_read.set()
            yield noise(pipeline.FRAME_BYTES)

    Compressing(monkeypatch, before)
    parts = write_stream(
        *(Source("asp", chunks), local_store, lambda number: f"set/{number}", Operation()), beside=beside
    )
    assert parts[0].raw_size_bytes == 6 * pipeline.FRAME_BYTES


def test_what_compressing_raises_reaches_the_caller_and_leaves_no_part(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(_: int) -> None:
        raise MemoryError

    Compressing(monkeypatch, before)
    with pytest.raises(MemoryError):
        write(local_store, *[noise(pipeline.FRAME_BYTES)] * 4)
    assert list(local_store.entries("")) == []


@pytest.mark.parametrize("size_bytes", [1, 1_000, pipeline.FRAME_BYTES])
def test_a_frame_says_how_much_it_holds_and_carries_a_checksum(local_store: LocalStore, size_bytes: int) -> None:
    (part,) = write(local_store, noise(size_bytes))
    said = zstandard.get_frame_parameters(path_of(local_store, part).read_bytes())
    assert (said.content_size, said.has_checksum) == (size_bytes, True)
    # What every decoder should support (RFC 8878, section 3.1.1.1.2).
    assert said.window_size <= 8 << 20


@pytest.mark.parametrize("noise_bytes", [1 << 20, 1 << 18])
def test_a_part_ends_late_by_a_chunk_at_most_and_early_by_what_is_under_way(
    local_store: LocalStore, noise_bytes: int
) -> None:
    chunk_bytes, limit_bytes = 1 << 20, 32 << 20
    chunks = [noise(noise_bytes) + bytes(chunk_bytes - noise_bytes)] * 200
    parts = write_stream(
        source(*chunks),
        local_store,
        lambda number: f"set/dump.{number:04}",
        Operation(),
        part_limit_bytes=limit_bytes,
        threads=lambda: 3,
    )
    assert len(parts) > 1
    under_way_bytes = 4 * pipeline.FRAME_BYTES
    assert all(limit_bytes - under_way_bytes < part.size_bytes < limit_bytes + chunk_bytes for part in parts[:-1])
    assert read(local_store, parts) == b"".join(chunks)


def test_what_can_not_be_compressed_is_stored_as_it_is(local_store: LocalStore) -> None:
    (part,) = write(local_store, noise(8 << 20))
    # A block of 128 KiB has a head of 3 bytes, a frame one of at most 18 and a checksum of 4 (RFC 8878, section 3.1.1).
    assert part.size_bytes <= part.raw_size_bytes + 64 * 3 + 2 * 22


def test_a_source_that_fails_at_its_end_leaves_no_part(local_store: LocalStore) -> None:
    def dying(operation: Operation) -> Iterator[bytes]:
        yield noise(1 << 20)
        raise FinalError("pg_dump ended with exit code 1")

    with pytest.raises(FinalError, match="exit code 1"):
        write_stream(Source("asp", dying), local_store, lambda number: f"set/{number}", Operation())
    assert list(local_store.entries("")) == []


def test_bytes_that_compress_to_nothing_come_back_in_pieces_that_fit_into_memory(local_store: LocalStore) -> None:
    parts = write(local_store, *(bytes(1 << 20) for _ in range(300)))
    sizes = [len(raw) for part in parts for raw in read_part(part, local_store, Operation())]
    assert sum(sizes) == 300 << 20
    assert max(sizes) <= PIECE_LIMIT_BYTES == 32 << 20


def test_a_cancelled_operation_stops_in_the_middle_of_a_stream(local_store: LocalStore) -> None:
    operation = Operation()

    def endless(_: Operation) -> Iterator[bytes]:
        for number in range(1_000_000):
            if number == 10:
                operation.cancel("cancelled by request")
            yield noise(1_000)

    with pytest.raises(CancelledError, match="by request"):
        write_stream(Source("asp", endless), local_store, lambda number: f"set/{number}", operation)
    assert list(local_store.entries("")) == []


def test_a_source_is_read_no_faster_than_is_allowed(local_store: LocalStore) -> None:
    operation = Operation.lasting(60, bytes_per_second=6 * pipeline.FRAME_BYTES)
    began = time.monotonic()
    frames = [noise(pipeline.FRAME_BYTES)] * 3
    write_stream(source(*frames), local_store, lambda number: f"set/{number}", operation)
    assert time.monotonic() - began >= 0.5


def test_a_cancel_is_told_as_such_though_the_source_hangs(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_GRACE_SECONDS", 0.01)
    operation, mended = Operation(), threading.Event()

    def hanging(_: Operation) -> Iterator[bytes]:
        yield noise(pipeline.FRAME_BYTES)
        operation.cancel("a person said so")
        assert mended.wait(20)
        yield b"late"

    try:
        with pytest.raises(CancelledError, match="a person said so"):
            write_stream(Source("asp", hanging), local_store, lambda number: f"set/{number}", operation)
    finally:
        mended.set()


class TestDamage:
    """Each of these was seen to pass unnoticed through the libraries below."""

    def test_a_flipped_byte(self, local_store: LocalStore) -> None:
        (part,) = write(local_store, noise(1 << 20))
        data = bytearray(path_of(local_store, part).read_bytes())
        data[len(data) // 2] ^= 1
        path_of(local_store, part).write_bytes(data)
        with pytest.raises(DamagedError):
            read(local_store, (part,))

    def test_an_object_that_is_cut_off(self, local_store: LocalStore) -> None:
        (part,) = write(local_store, noise(1 << 20))
        path_of(local_store, part).write_bytes(path_of(local_store, part).read_bytes()[:-1000])
        with pytest.raises(DamagedError, match="the manifest promises"):
            read(local_store, (part,))

    def test_a_frame_that_is_cut_off_even_if_its_checksum_were_right(self, local_store: LocalStore) -> None:
        (part,) = write(local_store, noise(1 << 20))
        data = path_of(local_store, part).read_bytes()[:-1000]
        path_of(local_store, part).write_bytes(data)
        with pytest.raises(DamagedError, match="cut off"):
            read(local_store, (promising(part, data),))

    def test_a_missing_second_frame_even_if_the_checksum_were_right(self, local_store: LocalStore) -> None:
        compress = zstandard.ZstdCompressor().compress
        data = compress(b"first") + compress(b"second")
        (part,) = write(local_store, b"firstsecond")
        path_of(local_store, part).write_bytes(data)
        assert read(local_store, (promising(part, data),)) == b"firstsecond"
        half = compress(b"first")
        path_of(local_store, part).write_bytes(half)
        with pytest.raises(DamagedError, match="holds 5 bytes"):
            read(local_store, (promising(part, half),))

    def test_more_inside_than_the_manifest_promises(self, local_store: LocalStore) -> None:
        (part,) = write(local_store, b"\0" * (64 << 20))
        promised = part.model_copy(update={"raw_size_bytes": 1 << 20})
        seen = 0
        with pytest.raises(DamagedError, match="more than"):
            for raw in read_part(promised, local_store, Operation()):
                seen += len(raw)
        assert seen <= 1 << 20

    def test_garbage_behind_the_last_frame(self, local_store: LocalStore) -> None:
        (part,) = write(local_store, b"data")
        data = path_of(local_store, part).read_bytes() + b"garbage behind"
        path_of(local_store, part).write_bytes(data)
        with pytest.raises(DamagedError):
            read(local_store, (promising(part, data),))

    def test_no_part_at_all(self, local_store: LocalStore) -> None:
        with pytest.raises(FinalError, match="no part"):
            read(local_store, ())


class SlowStore(LocalStore):
    """A store that takes a while after it has got its last byte."""

    def __init__(self, place: str, told: list[str]) -> None:
        super().__init__(place)
        self._told = told

    def write(self, key: str, chunks: Iterable[bytes]) -> Entry:
        def counted() -> Iterator[bytes]:
            for chunk in chunks:
                self._told.append("bytes")
                yield chunk

        entry = super().write(key, counted())
        self._told.append("written")
        return entry


def test_it_is_told_when_the_source_is_read_and_only_the_store_is_waited_for(local_store: LocalStore) -> None:
    told: list[str] = []
    store = SlowStore(local_store.location.place, told)
    pieces = source(*[noise(1 << 20)] * 3)
    write_stream(
        *(pieces, store, lambda number: f"set/dump.{number:04}", Operation()),
        part_limit_bytes=1 << 20,
        on_read=lambda: told.append("read"),
    )
    assert told == ["bytes", "written", "bytes", "written", "read", "bytes", "written"]


def test_it_is_told_once_when_no_frame_is_under_way_any_more(local_store: LocalStore) -> None:
    told: list[str] = []
    store = SlowStore(local_store.location.place, told)
    write_stream(
        *(source(*[noise(pipeline.FRAME_BYTES)] * 5), store, lambda number: f"set/dump.{number:04}", Operation()),
        threads=lambda: 2,
        on_read=lambda: told.append("read"),
    )
    assert told == ["bytes"] * 4 + ["read", "bytes", "written"]


def test_what_is_read_ahead_is_cut_so_that_little_waits() -> None:
    block = random.Random(5).randbytes(1 << 20)
    pieces = list(read_ahead(iter([b"small", block, b""]), limit_bytes=64 << 10))
    assert b"".join(pieces) == b"small" + block
    assert max(map(len, pieces)) == 64 << 10
