"""The driver's pieces become blocks of about a frame, each byte once, and a large one is not kept behind them."""

import asyncio
from collections.abc import Sequence

import pytest

from athena_backup.pipeline import FRAME_BYTES
from athena_backup.postgres.copy_pieces import Gathered

PATTERN = bytes(range(251))


def piece_of(size_bytes: int) -> bytearray:
    return bytearray((PATTERN * (size_bytes // len(PATTERN) + 1))[:size_bytes])


def gathered_of(pieces: Sequence[bytes | bytearray]) -> Gathered:
    gathered = Gathered()

    async def put() -> None:
        for piece in pieces:
            await gathered.put(piece)

    asyncio.run(put())
    return gathered


@pytest.mark.parametrize("rest_bytes", [0, 1])
def test_a_large_piece_is_empty_behind_its_last_block(rest_bytes: int) -> None:
    """The driver refers to it for as long as it waits for the next one."""
    small, large = piece_of(1_000), piece_of(3 * FRAME_BYTES + rest_bytes)
    whole = bytes(small + large)
    gathered = gathered_of([small, large])
    blocks = list(gathered.take())
    assert b"".join(blocks) == whole
    assert [len(block) for block in blocks] == [1_000, *[FRAME_BYTES] * 3, *[rest_bytes] * bool(rest_bytes)]
    assert large == b""
    assert list(gathered.take()) == []
    assert not gathered.is_full


def test_a_large_piece_that_nobody_takes_to_its_end_is_empty_too() -> None:
    large = piece_of(2 * FRAME_BYTES)
    taking = gathered_of([large]).take()
    assert next(taking) == large[:FRAME_BYTES]
    taking.close()
    assert large == b""


def test_a_large_piece_that_can_not_be_emptied_is_handed_on_as_any() -> None:
    large = bytes(piece_of(2 * FRAME_BYTES))
    assert b"".join(gathered_of([large]).take()) == large


def test_pieces_of_ordinary_size_are_one_block() -> None:
    pieces = [piece_of(FRAME_BYTES // 3) for _ in range(4)]
    whole = b"".join(pieces)
    assert list(gathered_of(pieces).take()) == [whole]
