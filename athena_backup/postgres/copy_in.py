"""A bulk table's streams into the staged table by COPY ("PostgreSQL", section 4): the server's work, so any driver will do."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from sqlalchemy import Connection

from athena_backup.crew import Turn
from athena_backup.errors import DamagedError, FinalError
from athena_backup.manifest import Stream, TableData
from athena_backup.operation import Operation
from athena_backup.pipeline import read_ahead, read_stream
from athena_backup.postgres.sessions import Database, cancelled_with, driver_of, quoted, run_sql, session
from athena_backup.store import Store

_PIECE_BYTES = 256 << 10
LOADING_SETTINGS = {"synchronous_commit": "off"}
"""What a staged database is filled with need not be on the disk before `staging.dress`, whose commits write all that came before."""


def load_ranges(
    component: str,
    streams: Sequence[Stream],
    target: Database,
    store: Store,
    operation: Operation,
    turn: Turn,
    *,
    are_all: bool,
) -> None:
    """Load some of a staged table's streams, one after the other, in one transaction; ``are_all`` says that it has no others.

    A table that is loaded so is emptied first, so that its rows can be written as frozen: nothing has to be written a second
    time when somebody first reads them (COPY, FREEZE). Raises `DamagedError` for other bytes or another number of rows than the
    manifest promises, and the driver's errors translated.
    """
    with session(target.url, LOADING_SETTINGS) as connection, cancelled_with(connection, operation):
        run_sql(connection, "BEGIN")
        for number, stream in enumerate(streams):
            data = stream.table
            if data is None:
                raise FinalError(f"{stream.name} holds no table's rows")
            if are_all and number == 0:
                run_sql(connection, f"TRUNCATE ONLY {_full_name(data)}")
            statement = copy_statement(data, *(["FREEZE"] if are_all else []))
            pieces = read_ahead(_gathered(read_stream(component, stream.parts, store, operation, turn.check)))
            with contextlib.closing(pieces):
                rows = _copy_in(connection, statement, pieces, turn)
            if rows != data.rows:
                raise DamagedError(
                    f"{_full_name(data)} got {rows} rows from {stream.name}, the manifest promises {data.rows}",
                    step="loading",
                )
        run_sql(connection, "COMMIT")


def _copy_in(connection: Connection, statement: str, pieces: Iterator[bytes], turn: Turn) -> int:
    driver = driver_of(connection)
    with driver.cursor() as cursor:
        with cursor.copy(statement.encode(driver.info.encoding)) as copy:
            for piece in pieces:
                turn.check()
                copy.write(piece)
        return cursor.rowcount


def _full_name(data: TableData) -> str:
    return f"{quoted(data.schema_name)}.{quoted(data.name)}"


def copy_statement(data: TableData, *options: str, quote: Callable[[str], str] = quoted) -> str:
    """The COPY that loads a stream of rows, its identifiers quoted by ``quote``."""
    columns = ", ".join(map(quote, data.columns))
    how = ", ".join([f"FORMAT {data.format}", *options])
    return f"COPY {quote(data.schema_name)}.{quote(data.name)} ({columns}) FROM STDIN ({how})"


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Small pieces joined: each one that is handed on costs the driver the same."""
    waiting: list[bytes] = []
    size_bytes = 0
    for piece in pieces:
        waiting.append(piece)
        size_bytes += len(piece)
        if size_bytes >= _PIECE_BYTES:
            yield b"".join(waiting)
            waiting.clear()
            size_bytes = 0
    if waiting:
        yield b"".join(waiting)


def rows_of(streams: Sequence[Stream]) -> dict[tuple[str, str], int]:
    """How many rows the streams of each table hold together, by schema and name."""
    rows: Counter[tuple[str, str]] = Counter()
    for data in (stream.table for stream in streams if stream.table is not None):
        rows[data.schema_name, data.name] += data.rows
    return dict(rows)
