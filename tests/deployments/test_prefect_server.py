"""A request that Prefect's server refuses for now is tried again soon, and not given up sooner than without it; none hangs."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from deployments.prefect_server import App, Refusals, answering_in_time, telling_when_to_retry


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


def asked_of(app: App, method: str, path: str, limit_seconds: float = 0.05) -> httpx.Response:
    """The answer to one request of an application that is to answer in time."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(telling_when_to_retry(answering_in_time(app, limit_seconds), Refusals()))
        async with httpx.AsyncClient(transport=transport, base_url="http://prefect") as client:
            return await asyncio.wait_for(client.request(method, path), 20)

    return asyncio.run(ask())


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/flow_runs/1"), ("POST", "/api/flow_runs/filter")])
def test_a_read_that_hangs_is_refused_for_now_and_where_it_stood_is_logged(
    method: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def lost_answer() -> None:
        await asyncio.Event().wait()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await lost_answer()

    answer = asked_of(app, method, path)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "0.2")
    assert f"{method} {path} has no answer after 0.05 s, and is refused" in caplog.text
    assert "lost_answer" in caplog.text


def test_a_write_that_takes_long_is_logged_and_left_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while "has no answer" not in caplog.text:
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    assert asked_of(app, "POST", "/api/flow_runs/").status_code == 201
    assert "is refused" not in caplog.text


def test_an_answer_that_has_begun_may_take_as_long_as_it_likes(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.2)  # four times as long as it had for its beginning
        await send({"type": "http.response.body", "body": b"log"})

    assert asked_of(app, "GET", "/api/flow_runs/1/logs/download").text == "log"
    assert caplog.text == ""


def test_a_server_that_stops_takes_its_reads_with_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def stop() -> None:
        scope = {"type": "http", "method": "GET", "path": "/"}
        asking = asyncio.ensure_future(answering_in_time(app)(scope, None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        asking.cancel()
        await asking

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(stop())
