"""What is in a stream of zstd frames, fed in pieces of any size, in bounded memory whatever the frames say (RFC 8878).

A frame that says how little it holds, as those do that `pipeline` writes, is gathered and decompressed by one call. Any other
goes through a decompressor for streams in tiny slices, as that has no bound on what one call returns.
"""

from collections.abc import Iterator

import zstandard

_SLICE_BYTES = 1_024
PIECE_LIMIT_BYTES = _SLICE_BYTES << 15
"""The largest piece that is handed out: a run of equal bytes expands 32,768 times (4 bytes for 128 KiB, RFC 8878, 3.1.1.2).

With slices of 4 KiB two restores side by side of files full of zeros took 550 MB; smaller ones than 1 cost more time than they
save memory (tried).
"""
# As a hostile frame could ask for gigabytes: what every decoder should support (3.1.1.1.2), and no level that we write exceeds.
_WINDOW_LIMIT_BYTES = 8 << 20
_GATHERED_LIMIT_BYTES = 16 << 20
"""Of raw bytes in a frame that is gathered; `pipeline` writes 4 MiB, or little more than its source hands out at once."""
_MAGIC = (0xFD2FB528).to_bytes(4, "little")
_BLOCK_HEADER_BYTES = 3
_CHECKSUM_BYTES = 4
_RLE_BLOCK, _RESERVED_BLOCK = 1, 3
_BLOCKS_LIMIT = 4_096
"""Of a frame that is gathered, which has some 130 of them: another may hold nothing in each of a million."""


class FrameReader:
    """Frames in, their raw bytes out; `zstandard.ZstdError` for what is no frame, or not what its header says."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT_BYTES)
        self._waiting = bytearray()
        self._outline = _Outline()
        self._streamed: zstandard.ZstdDecompressionObj | None = None
        self._is_begun = False

    @property
    def is_whole(self) -> bool:
        """Whether there was a frame, and the last one has come to its end."""
        return self._is_begun and not self._waiting and self._streamed is None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The raw bytes of all frames that end in ``chunk``, and of one that has to be streamed what is known of it.

        An empty piece says that there is more to do: whoever has to look around can.
        """
        self._waiting += chunk
        while self._waiting:
            self._is_begun = True
            if self._streamed is None and not self._outline.read(self._waiting):
                return
            if self._streamed is None and self._outline.is_bounded:
                yield from self._gathered()
            else:
                yield from self._sliced()

    def _gathered(self) -> Iterator[bytes]:
        with memoryview(self._waiting) as waiting, waiting[: self._outline.end] as frame:
            raw = self._context.decompress(frame)
        del self._waiting[: self._outline.end]
        self._outline = _Outline()
        if raw:
            yield raw

    def _sliced(self) -> Iterator[bytes]:
        frame = self._streamed = self._streamed or self._context.decompressobj()
        while self._waiting and not frame.eof:
            piece = bytes(self._waiting[:_SLICE_BYTES])
            raw = frame.decompress(piece)
            del self._waiting[: len(piece) - len(frame.unused_data)]
            yield raw
        if frame.eof:
            self._streamed, self._outline = None, _Outline()


class _Outline:
    """Where a frame ends, by its header and those of its blocks (RFC 8878, 3.1.1)."""

    def __init__(self) -> None:
        self.is_bounded = True
        """Whether it says to hold something, but little, and needs no more than that."""
        self.end = 0
        """How many bytes it has, once it is known."""
        self._block_at = 0
        self._blocks = 0
        self._limit_bytes = 0
        self._checksum_bytes = 0

    def read(self, data: bytearray) -> bool:
        """Look on in the bytes from the frame's start; returns whether it is there whole, or is not bounded."""
        if not self._block_at and not self._read_header(data):
            return not self.is_bounded
        while not self.end and len(data) >= self._block_at + _BLOCK_HEADER_BYTES:
            block = int.from_bytes(data[self._block_at : self._block_at + _BLOCK_HEADER_BYTES], "little")
            is_last, kind, size_bytes = block & 1, block >> 1 & 3, block >> 3
            self._block_at += _BLOCK_HEADER_BYTES + (1 if kind == _RLE_BLOCK else size_bytes)
            self._blocks += 1
            if kind == _RESERVED_BLOCK or self._blocks > _BLOCKS_LIMIT or self._block_at > self._limit_bytes:
                self.is_bounded = False
                return True
            if is_last:
                self.end = self._block_at + self._checksum_bytes
        return 0 < self.end <= len(data)

    def _read_header(self, data: bytearray) -> bool:
        """Whether the header is there, and that of a frame that may be gathered."""
        if not _MAGIC.startswith(data[: len(_MAGIC)]):
            self.is_bounded = False  # a skippable frame, or none
            return False
        if len(data) <= len(_MAGIC):
            return False
        descriptor = data[len(_MAGIC)]
        is_single_segment = descriptor >> 5 & 1
        content_bytes_at = len(_MAGIC) + 1 + (1 - is_single_segment) + (0, 1, 2, 4)[descriptor & 3]
        header_bytes = content_bytes_at + (is_single_segment, 2, 4, 8)[descriptor >> 6]
        if len(data) < header_bytes:
            return False
        content_bytes = zstandard.frame_content_size(bytes(data[:header_bytes]))
        if not 0 < content_bytes <= _GATHERED_LIMIT_BYTES:
            self.is_bounded = False  # for one that says to hold nothing python-zstandard does not look whether it does
            return False
        self._block_at = header_bytes
        self._limit_bytes = header_bytes + content_bytes + _BLOCKS_LIMIT * _BLOCK_HEADER_BYTES
        self._checksum_bytes = _CHECKSUM_BYTES * (descriptor >> 2 & 1)
        return True
