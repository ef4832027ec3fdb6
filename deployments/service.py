"""`athena-backup up`: the whole service as one process tree in the foreground.

A Prefect server with its UI (unless PREFECT_API_URL names one), the runner of the served deployments, and the adapter.
When any of them ends, all end: whoever supervises the command starts it again, and it picks up where it stopped.
"""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import certifi
import httpx

from athena_backup.errors import FinalError
from athena_backup.process import ARENAS
from athena_backup.settings import Settings, masked_url
from blocks.stores import local_directory
from deployments.checkup import refuse_overlaps
from deployments.tree import ProcessTree

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_LEASES_ON_DISK = "prefect.server.concurrency.lease_storage.filesystem"
_ANSWER_SECONDS = 10.0
_END_OF_ONE = "-----END CERTIFICATE-----\n"
_READY_MARK = "ATHENA_START_MARK"
"""Names the environment variable that lets `up` tell its own runner's deployments from those of an earlier start."""


@dataclass(frozen=True)
class Running:
    """Where a started service can be reached."""

    api_url: str
    prefect_url: str
    new_key: str | None
    """The API key, if this start made it: it can't be shown again."""


def service_environment(settings: Settings, prefect_api_url: str, *, own_server: bool) -> dict[str, str]:
    """The environment of every process of the service; ``own_server``: Prefect's is one of them."""
    return {
        **(_few_authorities(settings) if own_server else {}),
        **os.environ,
        "PREFECT_API_URL": prefect_api_url,
        "PREFECT_HOME": str(settings.prefect_home.absolute()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # In the server's memory, the default, a killed server leaves the slot taken for ever (tried).
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": _LEASES_ON_DISK,
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "INFO"),
        "PREFECT_LOGGING_SERVER_LEVEL": os.environ.get("PREFECT_LOGGING_SERVER_LEVEL", "WARNING"),
        "PREFECT_CLI_PROMPT": "false",
        "MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", str(ARENAS)),
    }


def _few_authorities(settings: Settings) -> dict[str, str]:
    """Have Prefect's clients read one certificate authority instead of all: our own server speaks http to them, on loopback.

    A run makes some twenty clients, each of which took 20 ms of processor time to read what it never used (tried).
    """
    path = settings.athena_home.absolute() / "prefect-authority.pem"
    try:
        authorities = Path(certifi.where()).read_text()
        path.write_text(authorities[: authorities.index(_END_OF_ONE) + len(_END_OF_ONE)])
    except (OSError, ValueError):
        return {}
    return {"PREFECT_API_SSL_CERT_FILE": str(path)}


@contextlib.contextmanager
def running_service(
    settings: Settings, *, say: Callable[[str], None], is_stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Running, ProcessTree]]:
    """Start the service; the block has it running, and leaving the block stops it.

    Raises `FinalError` if another one runs on the same ATHENA_HOME, volumes lie in one another, a port is taken, a part
    won't start, or ``is_stopped`` came true before all had started.
    """
    # Of a store that is a block, only Prefect knows the place: `prepare` looks again.
    refuse_overlaps(settings, None if settings.athena_store_block else local_directory(settings))
    with _only_one(settings), ProcessTree(is_stopped=is_stopped) as tree:
        own_server = settings.prefect_api_url is None
        prefect_port = _port("127.0.0.1", settings.athena_prefect_port, "ATHENA_PREFECT_PORT") if own_server else 0
        prefect_api_url = settings.prefect_api_url or f"http://127.0.0.1:{prefect_port}/api"
        api_port = _port(settings.athena_api_host, settings.athena_api_port, "ATHENA_API_PORT")
        environment = service_environment(settings, prefect_api_url, own_server=own_server)
        os.environ.update({name: value for name, value in environment.items() if name.startswith("PREFECT_")})
        if own_server:
            _forget_lease_lock(settings)
            say("starting the Prefect server ...")
            tree.start(
                "the Prefect server",
                _uvicorn("deployments.prefect_server:create_app", "127.0.0.1", prefect_port),
                environment,
                is_ready=lambda: _answers(f"{prefect_api_url}/health"),
            )
        elif why := _why_no_answer():
            raise FinalError(
                f"the Prefect server at {masked_url(prefect_api_url)} does not answer: {why}",
                next_step="check PREFECT_API_URL, which ends in /api",
            )
        elif _forgets_leases():
            say(
                f"warning: that Prefect server keeps its leases in memory: killed in the middle of an operation, it leaves"
                f" the slot taken for ever; set PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={_LEASES_ON_DISK} there"
            )
        # Imported only now: Prefect reads its settings, the server's address among them, when it is imported.
        from deployments import preparation

        new_key = preparation.prepare(settings)
        say("starting the runner ...")
        mark = secrets.token_hex(8)
        tree.start(
            "the runner",
            [sys.executable, "-m", "deployments.runner"],
            {**environment, _READY_MARK: mark},
            is_ready=lambda: preparation.is_served(settings, mark),
        )
        say("starting the API ...")
        tree.start(
            "the API",
            _uvicorn("deployments.api:create", settings.athena_api_host, api_port),
            # With Prefect's five retries a caller would wait a minute to hear that its server is gone.
            {**environment, "PREFECT_CLIENT_MAX_RETRIES": "1"},
            is_ready=lambda: _answers(f"{_url(settings.athena_api_host, api_port)}/athena/api/v1/openapi.json"),
        )
        with _announced(settings, prefect_api_url), preparation.settling(settings, datetime.now(UTC)):
            yield Running(_url(settings.athena_api_host, api_port), prefect_api_url.removesuffix("/api"), new_key), tree


def up(settings: Settings, *, say: Callable[[str], None]) -> int:
    """Run the service until Ctrl-C, SIGTERM, SIGHUP or the end of one of its parts; the exit code of the command."""
    with stop_signals() as stopped:
        try:
            with running_service(settings, say=say, is_stopped=stopped.is_set) as (running, tree):
                for line in announcement(running):
                    say(line)
                ended = None
                while not stopped.wait(0.5) and ended is None:
                    ended = tree.ended()
                say("stopping ...")
        except FinalError:
            if not stopped.is_set():
                raise
            ended = None
        if ended is not None:
            say(f"{ended[0]} ended with exit code {ended[1]}, so the service was stopped; start it again")
            return 1
        say("stopped")
        return 0


def announcement(running: Running) -> Sequence[str]:
    """What a person wants to know of a service that has started."""
    key = ["", f"API key (shown only this once; `athena-backup key` makes another): {running.new_key}"]
    return [
        "",
        f"API:          {running.api_url}/athena/api/v1",
        f"OpenAPI page: {running.api_url}/athena/api/v1/docs",
        f"Prefect UI:   {masked_url(running.prefect_url)}",
        f"Prefect API:  {masked_url(running.prefect_url)}/api",
        *(key if running.new_key else []),
        "",
        "Ctrl-C stops everything.",
    ]


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that is set by Ctrl-C, SIGTERM or a closed terminal while the block lasts; a second Ctrl-C interrupts at once."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    # Under nohup, which ignores SIGHUP, a closed terminal is no reason to stop.
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    try:
        settings.athena_home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock_file = (settings.athena_home / "up.lock").open("a")
    except OSError as error:
        raise FinalError(
            f"ATHENA_HOME: {error.filename} can't be written: {error.strerror}",
            next_step="make it writable, or set ATHENA_HOME to a directory that is",
        ) from None
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FinalError(
                f"the service runs already on {settings.athena_home}",
                next_step="stop it first, or set another ATHENA_HOME",
            ) from None
        yield


def _forget_lease_lock(settings: Settings) -> None:
    """Remove the lock file of a Prefect server that was killed while it wrote a lease.

    It holds a process id, by which Prefect sees whether its owner lives. In a container that starts again the id is soon another
    process's, often the new server's own, and every operation would wait for the slot without end.
    """
    with contextlib.suppress(FileNotFoundError):
        (settings.prefect_home / "concurrency_leases" / "expirations.lock").unlink()


@contextlib.contextmanager
def _announced(settings: Settings, prefect_api_url: str) -> Iterator[None]:
    """Leave the address of the own Prefect server where the other commands of this ATHENA_HOME find it."""
    note = settings.athena_home / "service.json"
    note.write_text(json.dumps({"prefect_api_url": prefect_api_url}), encoding="utf-8")
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _port(host: str, port: int, variable: str) -> int:
    """``port`` if nobody listens there, a free one for 0; raises `FinalError` that names the setting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FinalError(
                f"can't listen on {host} port {port}: {error.strerror}",
                next_step=f"free it, or set {variable} to another port",
            ) from None
        chosen: int = probe.getsockname()[1]
        return chosen


def _uvicorn(factory: str, host: str, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "uvicorn", "--factory", factory, "--host", host, "--port", str(port)),
        *("--log-level", "warning", "--timeout-graceful-shutdown", "5"),
    ]


def _url(host: str, port: int) -> str:
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@contextlib.contextmanager
def _asking() -> "Iterator[SyncPrefectClient]":
    """A client of Prefect's that waits `_ANSWER_SECONDS` for an answer and asks once, where others would ask for minutes."""
    # Imported only now: Prefect reads its settings, the server's address among them, when it is imported.
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings={"timeout": _ANSWER_SECONDS}) as client,
    ):
        yield client


def _why_no_answer() -> str:
    """Why the server of PREFECT_API_URL does not answer Prefect's clients, which know its authority and proxy; empty if it does."""
    try:
        with _asking() as client:
            problem = client.api_healthcheck()
    except (httpx.InvalidURL, ValueError, OSError) as error:
        problem = error
    # Its text would name the address with what it may hold of passwords.
    if isinstance(problem, httpx.HTTPStatusError):
        return f"HTTP status {problem.response.status_code}"
    if isinstance(problem, (httpx.InvalidURL, ValueError)):
        return "it, or a proxy's address, is no URL: percent-encode what is special in user and password"
    return "" if problem is None else str(problem) or type(problem).__name__


def _forgets_leases() -> bool:
    """Whether that server says that it keeps leases in its memory; one that does not tell is taken at its word."""
    try:
        with _asking() as client:
            told = client.request("GET", "/admin/settings").json()
        return str(told["server"]["concurrency"]["lease_storage"]).endswith(".memory")
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False
