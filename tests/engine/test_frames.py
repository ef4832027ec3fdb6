"""Frames in, raw bytes out: whatever the borders of the pieces, and never more memory than a piece for what a frame claims."""

import os
import time
import tracemalloc
from collections.abc import Iterable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from athena_backup.frames import PIECE_LIMIT_BYTES, FrameReader

COMPRESSOR = zstandard.ZstdCompressor(level=1, write_checksum=True)
UNSIZED = zstandard.ZstdCompressor(level=1, write_content_size=False)
RLE_BLOCK_OF_128_KIB = (0b010 | (128 << 10) << 3).to_bytes(3, "little") + b"x"
LAST_EMPTY_BLOCK = (1).to_bytes(3, "little")


def read(pieces: Iterable[bytes]) -> tuple[bytes, bool]:
    """What comes out, and whether it was whole."""
    reader = FrameReader()
    return b"".join(raw for piece in pieces for raw in reader.feed(piece)), reader.is_whole


def header(content_bytes: int) -> bytes:
    """Of a frame in a single segment that says to hold so much, without a checksum."""
    return b"\x28\xb5\x2f\xfd" + bytes([0b1110_0000]) + content_bytes.to_bytes(8, "little")


RAW = st.one_of(st.binary(max_size=300), st.integers(0, 300_000).map(bytes), st.integers(0, 300_000).map(os.urandom))
FRAME = st.tuples(RAW, st.sampled_from([COMPRESSOR, UNSIZED, zstandard.ZstdCompressor(level=19)]))


@given(st.lists(FRAME, min_size=1, max_size=5), st.integers(1, 100_000))
def test_any_frames_come_back_from_pieces_of_any_size(
    frames: list[tuple[bytes, zstandard.ZstdCompressor]], piece_bytes: int
) -> None:
    stored = b"".join(compressor.compress(raw) for raw, compressor in frames)
    pieces = [stored[start : start + piece_bytes] for start in range(0, len(stored), piece_bytes)]
    assert read(pieces) == (b"".join(raw for raw, _ in frames), True)


def test_frames_byte_by_byte_with_every_length_of_their_headers() -> None:
    contents = [b"", b"a", bytes(255), bytes(256), bytes(65_791), bytes(65_792), os.urandom(1_000)]
    stored = b"".join(COMPRESSOR.compress(raw) + UNSIZED.compress(raw) for raw in contents)
    raw, is_whole = read(bytes([one]) for one in stored)
    assert raw == b"".join(one + one for one in contents)
    assert is_whole


@pytest.mark.parametrize("compressor", [COMPRESSOR, UNSIZED])
def test_a_frame_that_is_cut_off_anywhere_is_not_whole(compressor: zstandard.ZstdCompressor) -> None:
    stored = compressor.compress(os.urandom(300) + bytes(300))
    assert [length for length in range(len(stored)) if read([stored[:length]])[1]] == []
    assert read([stored])[1]


def test_frames_that_zstd_skips_are_skipped_and_many_tiny_ones_take_no_long_time() -> None:
    skipped, empty = b"\x50\x2a\x4d\x18" + bytes(4), UNSIZED.compress(b"")
    reader = FrameReader()
    began = time.process_time()
    pieces = list(reader.feed((skipped + empty) * 50_000 + COMPRESSOR.compress(b"end")))
    assert time.process_time() - began < 20  # each moved all that came behind it: many minutes
    assert (b"".join(pieces), reader.is_whole) == (b"end", True)
    assert len(pieces) > 100_000  # whoever reads can look around meanwhile


def test_a_window_that_no_level_of_ours_has_is_refused() -> None:
    def streamed(window_log: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return stream.compress(bytes(1_000)) + stream.flush()

    assert read([streamed(23)]) == (bytes(1_000), True)
    with pytest.raises(zstandard.ZstdError):
        read([streamed(24)])


def test_nothing_is_no_whole_stream() -> None:
    assert read([]) == (b"", False)
    assert read([b"", b""]) == (b"", False)


@pytest.mark.parametrize("garbage", [b"x", b"\x28\xb5\x2f\xfe", bytes(64), b"\x28\xb5\x2f\xfd" + b"\xff" * 64])
def test_what_is_no_frame_is_refused_or_not_whole(garbage: bytes) -> None:
    for stored in (garbage, COMPRESSOR.compress(b"before") + garbage):
        try:
            assert not read([stored])[1]
        except zstandard.ZstdError:
            continue


@pytest.mark.parametrize("claimed_bytes", [(128 << 10) - 1, (128 << 10) + 1, 0, PIECE_LIMIT_BYTES])
def test_a_frame_that_holds_another_number_of_bytes_than_it_says_is_refused(claimed_bytes: int) -> None:
    with pytest.raises(zstandard.ZstdError):
        read([header(claimed_bytes) + RLE_BLOCK_OF_128_KIB + LAST_EMPTY_BLOCK])
    assert read([header(128 << 10) + RLE_BLOCK_OF_128_KIB + LAST_EMPTY_BLOCK]) == (b"x" * (128 << 10), True)


CLAIMED = [0, 1 << 20, 16 << 20, (16 << 20) + 1, PIECE_LIMIT_BYTES, PIECE_LIMIT_BYTES + 1, 1 << 60]


@pytest.mark.parametrize("block", [RLE_BLOCK_OF_128_KIB, (128 << 10 << 3).to_bytes(3, "little") + bytes(128 << 10)])
@pytest.mark.parametrize("claimed_bytes", CLAIMED)
def test_a_frame_of_gigabytes_that_says_anything_takes_little_memory(claimed_bytes: int, block: bytes) -> None:
    bomb = header(claimed_bytes) + block * (32_768 if len(block) < 10 else 1_024) + LAST_EMPTY_BLOCK
    reader, got_bytes = FrameReader(), 0
    tracemalloc.start()
    try:
        with pytest.raises(zstandard.ZstdError):
            for start in range(0, len(bomb), 65_536):
                for raw in reader.feed(bomb[start : start + 65_536]):
                    assert len(raw) <= PIECE_LIMIT_BYTES
                    got_bytes += len(raw)
                    if got_bytes > 256 << 20:
                        raise zstandard.ZstdError(
                            "as the manifest promises less, the reader would have stopped long ago"
                        )
        assert tracemalloc.get_traced_memory()[1] < (24 << 20 if len(block) > 10 else 48 << 20)
    finally:
        tracemalloc.stop()


def test_a_frame_of_nothing_but_block_headers_is_not_gathered_for_ever() -> None:
    empty_block = (0).to_bytes(3, "little")
    reader = FrameReader()
    tracemalloc.start()
    try:
        list(reader.feed(header(5)))
        for _ in range(64):
            list(reader.feed(empty_block * 50_000))
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        raw = b"".join(reader.feed((0b001 | 5 << 3).to_bytes(3, "little") + b"hello"))
    finally:
        tracemalloc.stop()
    assert (raw, reader.is_whole) == (b"hello", True)
