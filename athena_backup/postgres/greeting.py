"""What a server says to whoever connects: a child's standard error has it too, and it is no word on what the child does."""

import select
import time

from psycopg import pq
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL

from athena_backup.postgres.sessions import CONNECT_SECONDS, libpq_environment


def greeting(url: URL) -> frozenset[str]:
    """The lines that a child of ours prints as it connects, in the server's own language; none where the server can't be asked.

    That the database's collation has another version is told so (since 15), and what a login's event trigger warns of (since
    17). libpq prints it as it comes ("libpq", 34.13); the driver's own sessions hear nothing before they stand.
    """
    parameters = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    parameters |= {
        name: str(value) for name, value in url.translate_connect_args(username="user", database="dbname").items()
    }
    parameters["options"] = libpq_environment(url)["PGOPTIONS"]
    said: list[bytes] = []
    connection = pq.PGconn.connect_start(make_conninfo(**parameters).encode())
    connection.notice_handler = lambda notice: said.append(notice.error_message)
    try:
        deadline = time.monotonic() + CONNECT_SECONDS
        while (status := connection.connect_poll()) not in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
            ready = select.poll()
            ready.register(connection.socket, select.POLLIN if status == pq.PollingStatus.READING else select.POLLOUT)
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1_000):
                break
    finally:
        connection.finish()
    return frozenset(b"".join(said).decode("utf-8", "replace").splitlines())
