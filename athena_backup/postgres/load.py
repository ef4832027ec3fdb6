"""A database's streams into its staging database ("PostgreSQL", section 4).

First the schema, then the dump's data and all streams of bulk tables at once, and the indexes and keys of a big table as soon as
its last row is in; then everything else: other indexes, foreign keys, triggers and the rights: an owner may have taken his own
right to write from himself. What runs the database's own code comes last of all, when the rows have been compared: a query of a
materialized view may draw from a sequence, an event trigger may keep a log.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from sqlalchemy import text

from athena_backup.crew import Crew, Turn, Unit
from athena_backup.errors import AthenaError, FinalError, PassingError, UnavailableError
from athena_backup.manifest import Component, Stream
from athena_backup.operation import Operation
from athena_backup.pipeline import read_part, read_stream
from athena_backup.postgres.archive_head import ArchiveHead, unnamed_file
from athena_backup.postgres.clients import client_version, lost_connection
from athena_backup.postgres.contents import but_rights, lines_of
from athena_backup.postgres.copy_in import LOADING_SETTINGS, load_ranges
from athena_backup.postgres.load_plan import WORKERS, IndexWorkers, Plan
from athena_backup.postgres.order import order_dependent_tables
from athena_backup.postgres.sessions import (
    Database,
    cancelled_with,
    child_connection,
    libpq_environment,
    quoted,
    run_sql,
    session,
)
from athena_backup.process import Ended, running
from athena_backup.store import Store

# pg_restore sets it whatever server it talks to, since version 17; an older server doesn't know it.
_TRANSACTION_TIMEOUT_SINCE = 170_000
_IDLE_SESSION_TIMEOUT_SINCE = 140_000
_ANALYZE_ONLY_SINCE = 180_000
_SECTIONS = ("pre-data", "data", "post-data")
# A table with foreign descendants is not among them: their servers would be asked, and may be gone.
_ANALYZED = text(
    "WITH RECURSIVE asking(oid) AS (SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class f"
    " ON f.oid OPERATOR(pg_catalog.=) i.inhrelid WHERE f.relkind OPERATOR(pg_catalog.=) 'f'"
    " UNION SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN asking a ON a.oid OPERATOR(pg_catalog.=) i.inhrelid)"
    " SELECT n.nspname AS schema_name, c.relname AS name, c.relkind OPERATOR(pg_catalog.=) 'p' AS is_partitioned,"
    " coalesce(pg_catalog.pg_table_size(c.oid), 0)::bigint AS size_bytes"
    " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " WHERE c.relkind::text OPERATOR(pg_catalog.=) ANY (CAST(:kinds AS text[])) AND n.nspname <> 'information_schema'"
    " AND n.nspname !~ '^pg_toast'"
    " AND c.relpersistence <> 't' AND c.oid NOT IN (SELECT oid FROM asking) ORDER BY size_bytes DESC, c.oid"
)
_TABLES, _VIEWS = ("r", "p"), ("m",)
_BATCH_BYTES = 64 << 20
_BATCH_LIMIT = 500
logger = logging.getLogger("athena_backup.postgres")
# As in our own sessions; all else that could hinder a load pg_restore sets itself.
_CHILD_SETTINGS = {"default_transaction_read_only": "off"}
SOON_BYTES = 64 << 20
"""Of smaller tables the indexes are made by one parallel pg_restore at the end, without a process for each."""


@dataclass(frozen=True)
class Loading:
    """What is loaded into which staging database, and by which `pg_restore`."""

    component: Component
    staging: Database
    client: Path
    server: int
    """The destination's version, such as 180006."""
    store: Store
    operation: Operation
    soon_bytes: int = SOON_BYTES
    """From how many raw bytes on a table's indexes are made while other tables load."""

    @contextlib.contextmanager
    def loaded(self, crew: Crew) -> Iterator[Callable[[], Sequence[str]]]:
        """Load all rows and what belongs to them, and analyze it; raises the first thing that fails.

        Yields what is to be called once the rows have been compared: it enables row-level security, fills materialized views,
        returns those that it could not fill, with the reasons, and makes event triggers. The staging database is of no use where
        anything was raised.
        """
        head = self._head(self.component.streams[0])
        with unnamed_file(head.content) as archive:
            sections = {section: lines_of(head.listing(f"--section={section}")) for section in _SECTIONS}
            schema = but_rights(sections["pre-data"])
            # As much waits for it: a database whose schema comes late would be left alone at the end.
            making = Unit(self.component.raw_size_bytes, lambda _: self.restore(archive, entries=schema))
            crew.run([making], self.operation.check)
            with session(self.staging.url) as connection:
                last = list(order_dependent_tables(connection).values())
                workers = IndexWorkers.of(connection)
            plan = Plan(self, archive, head.listing("--verbose"), sections, last, crew.jobs, workers)
            crew.run(plan.units, self.operation.check)
            self._analyze_rest(crew, _TABLES, frozenset(plan.analyzed))
            yield partial(self._run_code, crew, plan)

    def _run_code(self, crew: Crew, plan: Plan) -> Sequence[str]:
        crew.run(plan.row_security, self.operation.check)
        if plan.filling_views:
            crew.run(plan.filling_views, self.operation.check)
            self._analyze_rest(crew, _VIEWS)
        # After the views, each of which they would be told of, and behind the last login but that of who makes them.
        crew.run(plan.event_triggers, self.operation.check)
        return plan.unfilled

    def _head(self, dump: Stream) -> ArchiveHead:
        head = ArchiveHead(self.client, "latin-1", self.operation)
        with contextlib.closing(read_part(dump.parts[0], self.store, self.operation)) as chunks:
            for chunk in chunks:
                head.feed(chunk)
                if head.is_whole:
                    break
        return head

    def load(self, streams: Sequence[Stream], turn: Turn, *, are_all: bool) -> None:
        """Load some streams of a table's rows; see `load_ranges`."""
        load_ranges(self.component.name, streams, self.staging, self.store, self.operation, turn, are_all=are_all)

    def restore(
        self,
        archive: str | None = None,
        *,
        entries: Sequence[bytes] | None = None,
        jobs: int = 1,
        workers: int | None = None,
        feed: Stream | None = None,
        turn: Turn | None = None,
    ) -> None:
        """One run of pg_restore, of the archive or of the stream that is fed to it: all of it, or some ``entries``.

        ``workers``: how many the server may take to help each of its sessions with an index; None: what it is set to.
        ``turn`` stops it when another unit of the component has failed.
        """
        command = [str(self.client), "--no-password", f"--dbname={child_connection(self.staging.database)}"]
        sets_unknown = self.server < _TRANSACTION_TIMEOUT_SINCE <= client_version(self.client)
        if not sets_unknown:
            command += ["--exit-on-error", f"--jobs={jobs}"] if jobs > 1 else ["--exit-on-error"]
        url = self.staging.url
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", **libpq_environment(url)}
        wanted = LOADING_SETTINGS | _CHILD_SETTINGS | ({WORKERS: str(workers)} if workers is not None else {})
        if self.server >= _IDLE_SESSION_TIMEOUT_SINCE:
            wanted["idle_session_timeout"] = "0"  # of one worker, while another makes the last index
        given = environment["PGOPTIONS"]  # which the URL may have
        environment["PGOPTIONS"] += "".join(f" -c {one}={value}" for one, value in wanted.items() if one not in given)
        feeding = None
        with contextlib.ExitStack() as stack:
            if entries is not None:
                chosen = b"".join(entry + b"\n" for entry in entries)
                command.append(f"--use-list={stack.enter_context(unnamed_file(chosen))}")
            if archive is not None:
                command.append(archive)
            child = stack.enter_context(
                running(command, self.operation, environment=environment, reads=feed is not None)
            )
            if feed is not None:
                feeding = _Feeding(child.stdin, self.component.name, feed, self.store, self.operation, turn)
            ended = child.wait(self.operation, turn.check if turn is not None else lambda: None)
            if feeding is not None:
                # The pipe's read end is gone with the child, so a feeder that still writes gets EPIPE and ends.
                feeding.join()
        self.operation.check()  # a cancelled operation kills the child: that is no failure of pg_restore
        if feeding is not None and feeding.error is not None:
            raise feeding.error
        if ended.exit_code != 0 and not (sets_unknown and failed_only_to_set_transaction_timeout(ended)):
            if any("deadlock detected" in line for line in ended.stderr):
                raise PassingError(ended.how())
            if lost_connection(ended.stderr):
                raise UnavailableError(ended.how())
            raise FinalError(
                ended.how(), next_step="the live database is untouched; correct the cause and restore again"
            )
        if feeding is not None and not feeding.finished:
            raise FinalError("pg_restore ended before it had read the whole dump")

    def _analyze_rest(self, crew: Crew, kinds: Sequence[str], analyzed: Collection[str] = ()) -> None:
        """ANALYZE what a bare ANALYZE would, of some kinds (as in pg_class) and not ``analyzed``, the biggest first."""
        with session(self.staging.url) as connection:
            tables = [
                # Without ONLY all of its partitions again, which have their own turns.
                (f"ONLY {name}" if row.is_partitioned and self.server >= _ANALYZE_ONLY_SINCE else name, row.size_bytes)
                for row in connection.execute(_ANALYZED, {"kinds": list(kinds)})
                if (name := f"{quoted(row.schema_name)}.{quoted(row.name)}") not in analyzed
            ]
        batches: list[tuple[list[str], int]] = []
        for name, size_bytes in tables:
            if not batches or batches[-1][1] + size_bytes > _BATCH_BYTES or len(batches[-1][0]) >= _BATCH_LIMIT:
                batches.append(([], 0))
            names, batch_bytes = batches[-1]
            batches[-1] = ([*names, name], batch_bytes + size_bytes)
        units = [Unit(size_bytes, partial(self.analyze, names)) for names, size_bytes in batches]
        crew.run(units, self.operation.check)

    def analyze(self, tables: Sequence[str], turn: Turn) -> None:
        """ANALYZE some tables, one after the other, by their quoted names.

        One that can't be is told in the log: its rows are there, and autovacuum looks at it again. A server that went away is
        no such one: what it had not written to the disk yet is not there.
        """
        turn.check()
        try:
            with session(self.staging.url, LOADING_SETTINGS) as connection, cancelled_with(connection, self.operation):
                run_sql(connection, f"ANALYZE {', '.join(tables)}")
        except UnavailableError:
            self.operation.check()
            raise
        except AthenaError as error:
            self.operation.check()
            if len(tables) > 1:
                for table in tables:
                    self.analyze([table], turn)
            else:
                logger.warning("%s of %s is not analyzed: %s", tables[0], self.component.name, error)


def failed_only_to_set_transaction_timeout(ended: Ended) -> bool:
    """Whether the one error of a `pg_restore` that went on after errors was that the server is too old for that setting.

    A dump of `pg_dump` 17 or newer can be read by no older `pg_restore`, so there is none that suits an older server.
    """
    errors = [line for line in ended.stderr if line.startswith("pg_restore: error:")]
    return (
        ended.exit_code == 1
        and len(errors) == 1
        and "Command was: SET transaction_timeout = 0;" in ended.stderr
        and ended.stderr[-1] == "pg_restore: warning: errors ignored on restore: 1"
    )


class _Feeding:
    """A thread that hands a stored stream to a child's stdin, to its verified end."""

    def __init__(
        self,
        stdin: IO[bytes],
        component: str,
        stream: Stream,
        store: Store,
        operation: Operation,
        turn: Turn | None = None,
    ) -> None:
        # The thread owns a descriptor of its own, and the pipe object is closed as such: closing the bare number under it
        # would let the object close it once more, when it may already be some other thread's file (seen).
        self._descriptor = os.dup(stdin.fileno())
        stdin.close()
        self._component = component
        self._stream = stream
        self._store = store
        self._operation = operation
        self._turn = turn
        self.error: AthenaError | None = None
        self.finished = False
        self._thread = threading.Thread(target=self._run, name=f"feed-{component}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until it has written everything, or found nobody who reads."""
        self._thread.join()

    def _run(self) -> None:
        try:
            for chunk in read_stream(self._component, self._stream.parts, self._store, self._operation):
                if self._turn is not None:
                    self._turn.check()
                view = memoryview(chunk)
                while view:
                    view = view[os.write(self._descriptor, view) :]
            self.finished = True
        except BrokenPipeError:
            return  # the child's exit code tells why it stopped reading
        except AthenaError as error:
            self.error = error
        finally:
            os.close(self._descriptor)
