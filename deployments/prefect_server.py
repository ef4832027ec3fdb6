"""Prefect's server as `athena-backup up` runs it: as it comes, but a refused request may be tried again sooner, and none hangs.

With SQLite a write is refused with 503 whenever another one was at work ("database is locked"), for which Prefect's clients
wait two seconds, then four, eight and so on, in the middle of a backup. The other write takes milliseconds. So each 503 says
when to come again: soon after the first, then later and later, as without it.

Of many thousand requests one never got an answer (seen; the cause is not known), and who asked waited for a minute, in which
others were answered. A read is refused in the same way then, and where it stood is logged.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from prefect.server.api.server import create_app as create_prefect_app

_RETRY_SECONDS = (0.2, 2.0, 6.0, 16.0, 40.0)
"""After the first refusal, the second and so on; then the last."""
_FORGET_SECONDS = 120.0
_KEPT_LIMIT = 1_000
_UNAVAILABLE = 503
_READ_LIMIT_SECONDS = 30.0
"""Half of what Prefect's clients wait for (PREFECT_API_REQUEST_TIMEOUT), so that another try is in time."""
_TOLD_LIMIT_TASKS = 40
_TOLD_LIMIT_FRAMES = 4
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


def create_app() -> App:
    """Prefect's ASGI application with its answers to refused requests completed (RFC 9110, 10.2.3)."""
    return telling_when_to_retry(answering_in_time(create_prefect_app()), Refusals())


def answering_in_time(app: App, limit_seconds: float = _READ_LIMIT_SECONDS) -> App:
    """``app`` with a 503 for each read that has no answer after so long; of a write that is only logged, as it may yet be done."""

    async def wrapped(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        task = asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await app(scope, receive, send)
            return
        is_answered = is_given_up = False

        async def sending(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            late.cancel()
            await send(message)

        def give_up() -> None:
            nonlocal is_given_up
            is_given_up = _is_read(scope)
            logger.warning(
                "%s %s has no answer after %g s%s. What waits, and where:\n%s",
                *(scope["method"], scope["path"], limit_seconds),
                ", and is refused" if is_given_up else "",
                "\n".join(_standing()),
            )
            if is_given_up:
                task.cancel()

        late = asyncio.get_running_loop().call_later(limit_seconds, give_up)
        try:
            await app(scope, receive, sending)
        except asyncio.CancelledError:
            if not is_given_up or is_answered:
                raise
            task.uncancel()
            await send({"type": "http.response.start", "status": _UNAVAILABLE, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        finally:
            late.cancel()

    return wrapped


def _is_read(scope: Message) -> bool:
    """Whether a request asks only; Prefect's questions with a body are POSTs to such paths."""
    return scope["method"] in ("GET", "HEAD") or str(scope["path"]).endswith("/filter")


def _standing() -> list[str]:
    """Where each task of the loop waits, the innermost call first."""
    return [
        f"  {task.get_name()}: {' < '.join(_frames(task.get_coro()))}"
        for task in list(asyncio.all_tasks())[:_TOLD_LIMIT_TASKS]
    ]


def _frames(awaited: Any) -> list[str]:
    found: list[str] = []
    while awaited is not None:
        frame = (
            getattr(awaited, "cr_frame", None)
            or getattr(awaited, "ag_frame", None)
            or getattr(awaited, "gi_frame", None)
        )
        if frame is not None:
            found.append(f"{frame.f_code.co_qualname} ({frame.f_globals.get('__name__')}:{frame.f_lineno})")
        awaited = (
            getattr(awaited, "cr_await", None)
            or getattr(awaited, "ag_await", None)
            or getattr(awaited, "gi_yieldfrom", None)
        )
    return found[::-1][:_TOLD_LIMIT_FRAMES]


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
