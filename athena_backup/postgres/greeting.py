"""What a server says to whoever connects: a child's standard error has it too, and it is no word on what the child does."""

import contextlib
import select
import time

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_attempts, make_conninfo
from sqlalchemy import URL

from athena_backup.errors import PassingError
from athena_backup.postgres.sessions import CONNECT_SECONDS, libpq_environment


def greeting(url: URL) -> frozenset[str]:
    """The lines that a child of ours prints as it connects, in the server's own language.

    That the database's collation has another version is told so (since 15), and what a login's event trigger warns of (since
    17). libpq prints it as it comes ("libpq", 34.13); the driver's own sessions hear nothing before they stand. Raises
    `PassingError` where no session can be had at the moment.
    """
    parameters = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    parameters |= {
        name: str(value) for name, value in url.translate_connect_args(username="user", database="dbname").items()
    }
    parameters["options"] = libpq_environment(url)["PGOPTIONS"]
    with contextlib.suppress(psycopg.Error):  # a name may be unknown at the moment
        for attempt in conninfo_attempts(parameters):
            said: list[bytes] = []
            if _connected(
                make_conninfo("", **{name: str(value) for name, value in attempt.items() if value is not None}), said
            ):
                return frozenset(b"".join(said).decode("utf-8", "replace").splitlines())
    raise PassingError("the server could not be asked what it tells whoever connects", step="dumping")


def _connected(address: str, said: list[bytes]) -> bool:
    """Connect and leave, as "libpq", 34.1, has it for whoever does not wait inside; ``said`` gets what the server says."""
    connection = pq.PGconn.connect_start(address.encode())
    connection.notice_handler = lambda notice: said.append(notice.error_message)
    deadline = time.monotonic() + CONNECT_SECONDS
    status: int = pq.PollingStatus.WRITING
    try:
        while connection.status != pq.ConnStatus.BAD:
            ready = select.poll()
            ready.register(connection.socket, select.POLLIN if status == pq.PollingStatus.READING else select.POLLOUT)
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1_000):
                return False
            status = connection.connect_poll()
            if status in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
                return status == pq.PollingStatus.OK
        return False
    finally:
        connection.finish()
