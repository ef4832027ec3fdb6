"""Prefect's server as `athena-backup up` runs it: as it comes, but a refused request may be tried again sooner.

With SQLite a write is refused with 503 whenever another one was at work ("database is locked"), for which Prefect's clients
wait two seconds, then four, eight and so on, in the middle of a backup. The other write takes milliseconds. So each 503 says
when to come again: soon after the first, then later and later, as without it.
"""

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
    return telling_when_to_retry(create_prefect_app(), Refusals())


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
