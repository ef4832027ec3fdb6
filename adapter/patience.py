"""A Prefect client that asks again at once where the server only was busy for a moment.

Prefect's server answers 503 when its SQLite database is locked by another writer, which passes within milliseconds;
Prefect's own client then waits for two seconds and more, in which the caller of the API has waited too long already.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError

PATIENCE_SECONDS = 5.0
_PAUSE_SECONDS = 0.03


@contextmanager
def patient_client() -> Iterator[SyncPrefectClient]:
    """A client for the length of the block, whose calls may each wait `PATIENCE_SECONDS` for a busy server.

    A server that can't be reached is told as by Prefect's own client, after PREFECT_CLIENT_MAX_RETRIES.
    """
    settings = {
        "event_hooks": {"response": [_pass_on_at_once]},
        # Each call on a connection of its own: the server closes one right after such a 503, and whoever took it from the
        # pool next, perhaps another thread, would be told of a reset, which says nothing about what was done (seen).
        "limits": httpx.Limits(max_connections=16, max_keepalive_connections=0),
    }
    with get_client(sync_client=True, httpx_settings=settings) as client:
        yield cast("SyncPrefectClient", _Patient(client))


def _pass_on_at_once(response: httpx.Response) -> None:
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        # Whatever the server says of it: our own lets those wait longer and longer that ask in the middle of a backup, all who ask
        # the same together, so that of many posts at once the last would have been refused.
        response.headers["Retry-After"] = "0"


class _Patient:
    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return _patient(attribute) if callable(attribute) else attribute


def _patient(call: Callable[..., object]) -> Callable[..., object]:
    @wraps(call)
    def again(*arguments: object, **options: object) -> object:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return call(*arguments, **options)
            except PrefectHTTPStatusError as error:
                # 503 means that nothing was written, so that asking again does nothing twice.
                if error.response.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    return again
