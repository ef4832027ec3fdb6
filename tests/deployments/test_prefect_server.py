"""A request that Prefect's server refuses for now is tried again soon, and not given up sooner than without it; a lost read is refused."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments import prefect_server
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


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the server logs: uvicorn's logger hands nothing on once Prefect has set up logging."""
    prefect_server.logger.addHandler(caplog.handler)
    yield caplog
    prefect_server.logger.removeHandler(caplog.handler)


async def asked_of(app: App, method: str, path: str, limit_seconds: float = 0.05) -> httpx.Response:
    """The answer to one request of an application that is to answer in time."""
    transport = httpx.ASGITransport(telling_when_to_retry(answering_in_time(app, limit_seconds), Refusals()))
    async with httpx.AsyncClient(transport=transport, base_url="http://prefect") as client:
        return await asyncio.wait_for(client.request(method, path), 20)


async def passed_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/flow_runs/1"), ("POST", "/api/flow_runs/filter")])
def test_a_read_that_hangs_is_refused_for_now_and_where_it_stands_is_logged(
    method: str, path: str, said: pytest.LogCaptureFixture
) -> None:
    ended: list[str] = []

    async def check() -> None:
        is_found = asyncio.Event()

        async def lost_answer(request: Request) -> Response:
            del request
            await is_found.wait()
            ended.append("found")
            return Response("late")

        # As Prefect's server has it: the work is done in a task of a task.
        app = BaseHTTPMiddleware(Starlette(routes=[Route(path, lost_answer, methods=[method])]), passed_on)
        answer = await asked_of(app, method, path)
        assert (answer.status_code, answer.headers["retry-after"], answer.content) == (503, "0.2", b"")
        assert not ended
        is_found.set()
        while not ended:
            await asyncio.sleep(0)

    asyncio.run(check())
    assert f"{method} {path} has no answer after 0.05 s, and is refused for now" in said.text
    assert "lost_answer" in said.text


def test_a_write_that_takes_long_is_left_to_its_end_and_where_it_stands_is_logged(
    said: pytest.LogCaptureFixture,
) -> None:
    async def slow_write(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2)  # four times as long as a read has
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    assert asyncio.run(asked_of(slow_write, "POST", "/api/flow_runs/")).status_code == 201
    assert "POST /api/flow_runs/ has no answer after 0.05 s, and its answer is awaited" in said.text
    assert "slow_write" in said.text


def test_an_answer_that_has_begun_may_take_as_long_as_it_likes() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.2)  # four times as long as it had for its beginning
        await send({"type": "http.response.body", "body": b"log"})

    assert asyncio.run(asked_of(app, "GET", "/api/flow_runs/1/logs/download")).text == "log"


def test_what_a_read_raises_is_raised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("no such run")

    with pytest.raises(LookupError, match="no such run"):
        asyncio.run(asked_of(app, "GET", "/api/flow_runs/1"))


def test_a_server_that_stops_takes_its_reads_with_it() -> None:
    stopped: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append("read")
            raise

    async def stop() -> None:
        scope = {"type": "http", "method": "GET", "path": "/"}
        asking = asyncio.ensure_future(answering_in_time(app)(scope, None, None))  # type: ignore[arg-type]
        for _ in range(3):  # until the read is under way
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0)
        assert stopped == ["read"]

    asyncio.run(stop())
