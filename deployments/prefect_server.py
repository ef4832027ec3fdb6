"""Prefect's server as `athena-backup up` runs it: as it comes, but a refused request may be tried again sooner, a lost one too.

With SQLite a write is refused with 503 whenever another one was at work ("database is locked"), for which Prefect's clients
wait two seconds, then four, eight and so on, in the middle of a backup. The other write takes milliseconds. So each 503 says
when to come again: soon after the first, then later and later, as without it.

Whoever waits for SQLite's lock waits for one second, not for Prefect's minute. While a connection's thread waits, Python's
garbage collection in the thread of the event loop may free a statement of the same connection, and SQLite keeps it until the wait
is over: the loop stands still, with the very transaction that has the lock, and nobody is answered (of 20 times eight requests at
once, one ended so; now it is a second at most).

A read that has no answer after half a minute for another reason is refused in the same way; a write is left alone, as it may yet be
done. Where either stands is logged.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from prefect.server.api.server import create_app as create_prefect_app
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import set_database_config
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

_RETRY_SECONDS = (0.2, 2.0, 6.0, 16.0, 40.0)
"""After the first refusal, the second and so on; then the last."""
_FORGET_SECONDS = 120.0
_KEPT_LIMIT = 1_000
_UNAVAILABLE = 503
_ANSWER_LIMIT_SECONDS = 30.0
"""Half of what Prefect's clients wait for by default (PREFECT_API_REQUEST_TIMEOUT)."""
_TOLD_LIMIT_CALLS = 12
_LOCK_WAIT_MILLISECONDS = 1_000
"""Hundreds of times what a write takes. The API waits for a busy server (`adapter.patience`) as long as for several of these."""
logger = logging.getLogger("uvicorn.error")

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


@dataclass
class Refusals:
    """How often each request was refused lately, by method and path."""

    _seen: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def seconds(self, request: tuple[str, str]) -> float:
        """After how many seconds whoever was refused just now shall come again."""
        now = time.monotonic()
        with self._lock:
            count, at = self._seen.get(request, (0, now))
            if now - at > _FORGET_SECONDS:
                count = 0
            self._seen.pop(request, None)
            self._seen[request] = (count + 1, now)
            if len(self._seen) > _KEPT_LIMIT:
                self._seen.pop(next(iter(self._seen)))
        return _RETRY_SECONDS[min(count, len(_RETRY_SECONDS) - 1)]

    def forget(self, request: tuple[str, str]) -> None:
        """It was answered."""
        with self._lock:
            self._seen.pop(request, None)


class _BrieflyWaiting(AioSqliteConfiguration):
    def setup_sqlite(self, conn: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        """Prefect's own settings of a connection, with a shorter wait for the lock (https://sqlite.org/pragma.html#pragma_busy_timeout)."""
        super().setup_sqlite(conn, record)
        cursor = conn.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_LOCK_WAIT_MILLISECONDS}")
        cursor.close()


def create_app() -> App:
    """Prefect's ASGI application with its answers to refused requests completed (RFC 9110, 10.2.3)."""
    url = str(PREFECT_API_DATABASE_CONNECTION_URL.value())
    if make_url(url).get_backend_name() == "sqlite":
        set_database_config(_BrieflyWaiting(connection_url=url))
    return telling_when_to_retry(answering_in_time(create_prefect_app()), Refusals())


def answering_in_time(app: App, limit_seconds: float = _ANSWER_LIMIT_SECONDS) -> App:
    """``app`` with a 503 for each read whose answer has not begun after so long; what it does goes on, and is heard by nobody.

    It is not cancelled: a database session that is being closed would swallow that, again and again. Of a write is logged where
    it stands; it may yet be done, so its answer is awaited.
    """
    left: set[asyncio.Future[None]] = set()

    async def wrapped(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        has_begun = asyncio.Event()
        is_given_up = False

        async def sending(message: Message) -> None:
            if not is_given_up:
                has_begun.set()
                await send(message)

        async def answer() -> None:
            await app(scope, receive, sending)

        answering = asyncio.create_task(answer())
        beginning = asyncio.create_task(has_begun.wait())
        try:
            await asyncio.wait({answering, beginning}, timeout=limit_seconds, return_when=asyncio.FIRST_COMPLETED)
            if has_begun.is_set() or answering.done():
                await answering
                return
            if not _is_read(scope):
                _tell(scope, limit_seconds, "its answer is awaited", answering)
                await answering
                return
        except asyncio.CancelledError:
            answering.cancel()
            raise
        finally:
            beginning.cancel()
        is_given_up = True
        left.add(answering)
        answering.add_done_callback(left.discard)
        await send({"type": "http.response.start", "status": _UNAVAILABLE, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        # Behind the answer, which must not hang on what others' frames are like.
        _tell(scope, limit_seconds, "is refused for now", answering)

    return wrapped


def _tell(scope: Message, seconds: float, what_now: str, answering: "asyncio.Task[None]") -> None:
    logger.warning(
        "%s %s has no answer after %g s, and %s. It waits in: %s",
        *(scope["method"], scope["path"], seconds, what_now, "; ".join(_places(answering))),
    )


def _is_read(scope: Message) -> bool:
    """Whether a request is sure to ask only: of those with a body, Prefect's questions by a filter."""
    return scope["method"] in ("GET", "HEAD") or str(scope["path"]).endswith("/filter")


def _places(task: "asyncio.Task[None]") -> list[str]:
    """Where a task and those that it has started stand, each with the innermost call first."""
    family = {id(task)}
    found = [_calls(task.get_coro())]
    tasks = anyio.get_running_tasks()
    for _ in tasks:
        children = [one for one in tasks if one.parent_id in family and one.id not in family]
        if not children:
            break
        family |= {one.id for one in children}
        found += [_calls(one.coro) for one in children]
    return found


def _calls(awaited: Any) -> str:
    names: list[str] = []
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            names.append(f"{frame.f_code.co_qualname} ({frame.f_globals.get('__name__')}:{frame.f_lineno})")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return " < ".join(names[::-1][:_TOLD_LIMIT_CALLS])


def telling_when_to_retry(app: App, refusals: Refusals) -> App:
    """``app`` with a Retry-After, in seconds that may be fractions (Prefect's clients read them so), in each 503 without one."""

    async def wrapped(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        request = (str(scope["method"]), str(scope["path"]))

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                if message["status"] != _UNAVAILABLE:
                    refusals.forget(request)
                elif not any(name.lower() == b"retry-after" for name, _ in headers):
                    message["headers"] = [*headers, (b"retry-after", f"{refusals.seconds(request):g}".encode("ascii"))]
            await send(message)

        await app(scope, receive, sending)

    return wrapped
