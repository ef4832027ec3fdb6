"""How asyncpg logs in where libpq would: what both know, and why it can't where only libpq can."""

import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import asyncpg
from sqlalchemy import URL

from athena_backup.errors import FullError, PassingError, UnavailableError
from athena_backup.postgres.session_settings import KEEPALIVE_SETTINGS
from athena_backup.postgres.sessions import APPLICATION_NAME, CONNECT_SECONDS, translated_state

# Of libpq's parameters, those that asyncpg knows by the same name (asyncpg manual, "Connection").
_SHARED_PARAMETERS = frozenset(
    {
        "host",
        "port",
        "passfile",
        "sslmode",
        "sslcert",
        "sslkey",
        "sslrootcert",
        "sslcrl",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "target_session_attrs",
    }
)
# What libpq takes from the environment and asyncpg does not (libpq, 34.15).
_UNKNOWN_VARIABLES = frozenset(
    {"PGCHANNELBINDING", "PGREQUIREAUTH", "PGREQUIREPEER", "PGSSLCERTMODE", "PGSSLCRLDIR", "PGSSLNEGOTIATION"}
)

_PASSING = (TimeoutError, ConnectionRefusedError, ConnectionResetError)
_TRIES = 3


def unreachable(url: URL) -> str:
    """Why asyncpg can't log in where libpq could; empty if it can.

    Raises `UnavailableError` and its like where a login fails for now.
    """
    if unknown := sorted(url.query.keys() - _SHARED_PARAMETERS):
        return f"its driver does not know {', '.join(unknown)}"
    if unknown := sorted(name for name in os.environ if name in _UNKNOWN_VARIABLES):
        return f"its driver does not know {', '.join(unknown)}"
    if "system" in (url.query.get("sslrootcert"), os.environ.get("PGSSLROOTCERT")):
        return "its driver does not know sslrootcert=system, and would not verify the server"

    async def try_it() -> None:
        connection = await connect(url)
        await connection.close(timeout=CONNECT_SECONDS)

    def tried(left: int) -> None:
        # libpq has just reached the same server: it may only be busy, and without parallel COPY a backup takes many times as long.
        try:
            asyncio.run(try_it())
        except _PASSING:
            if not left:
                raise
            tried(left - 1)

    try:
        # In a thread of its own: whoever calls may stand in an event loop.
        with ThreadPoolExecutor(1, "copy") as pool:
            pool.submit(tried, _TRIES - 1).result()
    except asyncpg.PostgresError as error:
        problem = translated_state(error.sqlstate or "", str(error))
        if isinstance(problem, PassingError | UnavailableError | FullError):
            raise problem from error  # not of the login's kind: the next try may get in
        return f"its driver can't log in: {error}"
    # RuntimeError: of a login by GSSAPI without its library; ValueError: of parameters.
    except (OSError, TimeoutError, RuntimeError, ValueError, asyncpg.InterfaceError) as error:
        return f"its driver can't log in: {error or type(error).__name__}"
    return ""


async def connect(url: URL) -> Any:
    """A connection of asyncpg's to a database; raises its errors, `OSError` and `TimeoutError`."""
    ours = {name: url.query[name] for name in url.query if name not in ("host", "port")}
    host, port = url.host or url.query.get("host"), url.port or url.query.get("port")
    connection = await asyncpg.connect(
        f"postgresql://?{urlencode(ours)}",
        host=list(host) if isinstance(host, tuple) else host,
        port=[int(one) for one in port] if isinstance(port, tuple) else port and int(port),
        user=url.username,
        password=url.password,
        database=url.database,
        timeout=CONNECT_SECONDS,
        statement_cache_size=0,
        server_settings={"application_name": APPLICATION_NAME, "search_path": "", **KEEPALIVE_SETTINGS},
    )
    _keep_alive(connection._transport.get_extra_info("socket"))  # noqa: SLF001 - it has no other way
    return connection


def _keep_alive(sock: Any) -> None:
    """As in all other sessions (`sessions.session`): a connection that is cut without a word is noticed."""
    if sock is None or sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 60_000),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
