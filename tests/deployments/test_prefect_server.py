"""A request that Prefect's server refuses for now is tried again soon, and not given up sooner than without it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from deployments.prefect_server import Refusals, telling_when_to_retry


def answers(statuses: Sequence[int], headers: Sequence[tuple[bytes, bytes]] = ()) -> list[httpx.Response]:
    """What a client is answered by an application that gives these statuses, one a request."""
    waiting = list(statuses)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": waiting.pop(0), "headers": list(headers)})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask() -> list[httpx.Response]:
        wrapped = telling_when_to_retry(app, Refusals())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://prefect") as client:
            return [await client.post("/api/flow_runs/") for _ in statuses]

    return asyncio.run(ask())


def test_each_refusal_of_a_request_says_later() -> None:
    found = [float(answer.headers["retry-after"]) for answer in answers([503] * 6)]
    assert found == pytest.approx([0.2, 2, 6, 16, 40, 40])
    # What Prefect's clients wait in all without it, over the same five tries, is no longer.
    assert sum(found[:5]) > sum(2**number for number in range(1, 6))


def test_a_request_that_was_answered_begins_anew_and_others_are_left_alone() -> None:
    found = [answer.headers.get("retry-after") for answer in answers([503, 503, 201, 503, 404])]
    assert found == ["0.2", "2", None, "0.2", None]


def test_what_the_server_itself_says_stands() -> None:
    [answer] = answers([503], [(b"Retry-After", b"7")])
    assert answer.headers.get_list("retry-after") == ["7"]
