"""Ours: the whole service as `athena-backup up` starts it, asked by its API, timed by what Prefect says of the flow run.

It is started anew before each of its turns, on an empty home, and stands in no other's. To hold it still meanwhile would not do:
when it wakes, all that Prefect's server does now and then is due at once and locks its database, so that more requests have to be
sent again than otherwise (measured: in 4 of 16 operations against 1 of 16).
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from athena_backup.process import die_with_parent
from benchmarks.measuring import (
    Meter,
    Usage,
    children_of,
    pss_bytes,
    tree_cpu_seconds,
    waited_cpu_seconds,
    watching,
)

JOBS = 2
_KEY = "a-key-of-the-benchmark"
_ROOT = Path(__file__).parent.parent
_START_SECONDS = 240
_LIMIT_SECONDS = 7200
_POLL_SECONDS = 2
"""As somebody with curl would look; Prefect's server takes processor time for each answer."""
_BUSY_SECONDS = 0.5
_EXIT_SECONDS = 20
_WARM_SECONDS = 5
"""After its start: what Prefect's server does once is no part of what is asked of it."""
_ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_PARTS = {
    "deployments.prefect_server": "Prefect server",
    "deployments.runner": "runner",
    "deployments.api": "API",
    "deployments.cli": "up",
}


class OursFailedError(Exception):
    """An operation of ours did not end as Success; the message has why."""


@dataclass(frozen=True)
class Service:
    """A started service."""

    pid: int
    api_url: str
    prefect_url: str
    http: httpx.Client
    """Made once: each new one would read all certificate authorities of the machine, on the cores that are measured."""

    def parts(self) -> dict[str, int]:
        """Its standing processes: what each is, and its pid."""
        found = {}
        for pid in [self.pid, *children_of(self.pid)]:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text()
                found.update({name: pid for mark, name in _PARTS.items() if mark in command})
        return found

    def operate(self, kind: str, timestamp: str | None, meter: Meter) -> tuple[str, Usage]:
        """Take a backup (no timestamp) or restore one, to its end; the set's timestamp and what it cost."""
        runner = self.parts()["runner"]
        before, service, ended_runs = meter.read(), tree_cpu_seconds([self.pid]), waited_cpu_seconds(runner)
        with watching(lambda: children_of(runner)) as seen:
            posted = time.time()
            timestamp = self._post(kind, timestamp)
            run = self._await_end(kind, timestamp)
            whole = time.time() - posted
            # The run's process ends a moment after the run.
            deadline = time.monotonic() + _EXIT_SECONDS
            while children_of(runner) and time.monotonic() < deadline:
                time.sleep(0.05)
        spent = meter.read().since(before)
        client = waited_cpu_seconds(runner) - ended_runs
        standing = tree_cpu_seconds([self.pid]) - service - client
        began, ended = self._running(run)
        first = self._first_task(run)
        usage = Usage(
            seconds=ended - began,
            client_cpu_seconds=client,
            server_cpu_seconds=spent.server_cpu_seconds,
            other_cpu_seconds=spent.other_cpu_seconds + standing,
            peak_bytes=seen.peak_bytes,
            resident_bytes=seen.resident_bytes,
            disk_busy_seconds=spent.disk_busy_seconds,
            start_cpu_seconds=seen.cpu_seconds_at(began),
            first_seconds=first - posted,
            whole_seconds=whole,
        )
        return timestamp, usage

    def _post(self, kind: str, timestamp: str | None) -> str:
        body = {"timestamp": timestamp, "sourceNamespace": "app"} if timestamp is not None else {}
        answer = self.http.post(
            f"{self.api_url}/ondemand{kind}",
            content=json.dumps(body),
            headers={"Authorization": _KEY, "Content-Type": "application/json"},
        )
        if answer.status_code != httpx.codes.ACCEPTED:
            raise OursFailedError(f"the POST was answered with {answer.status_code}: {answer.text}")
        return timestamp or str(answer.json()["message"]).rpartition(" ")[2]

    def _await_end(self, kind: str, timestamp: str) -> str:
        asked = {
            "flows": {"name": {"any_": [kind]}},
            "flow_runs": {"tags": {"all_": [f"timestamp:{timestamp}"]}},
            "sort": "EXPECTED_START_TIME_DESC",
            "limit": 1,
        }
        deadline = time.monotonic() + _LIMIT_SECONDS
        while time.monotonic() < deadline:
            found = self._prefect("POST", "/flow_runs/filter", asked)
            if found and found[0]["state_type"] in _ENDED:
                if found[0]["state_type"] != "COMPLETED":
                    raise OursFailedError(
                        f"the {kind} ended as {found[0]['state']['name']}: {found[0]['state']['message']}"
                    )
                return str(found[0]["id"])
            time.sleep(_POLL_SECONDS)
        raise OursFailedError(f"the {kind} did not end within {_LIMIT_SECONDS} s")

    def _running(self, run: str) -> tuple[float, float]:
        """When it was first Running and when it ended."""
        states = self._prefect("GET", f"/flow_run_states/?flow_run_id={run}", None)
        began = min(_instant(one["timestamp"]) for one in states if one["type"] == "RUNNING")
        return began, max(_instant(one["timestamp"]) for one in states if one["type"] in _ENDED)

    def _first_task(self, run: str) -> float:
        tasks = self._prefect("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return min(_instant(one["start_time"]) for one in tasks if one["start_time"])

    def _prefect(self, method: str, path: str, body: Mapping[str, object] | None) -> Any:
        deadline = time.monotonic() + 30
        while True:
            answer = self.http.request(method, f"{self.prefect_url}/api{path}", json=body)
            # Its database is locked by another writer for a moment.
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                answer.raise_for_status()
                return answer.json()
            time.sleep(_BUSY_SECONDS)

    def at_rest(self, seconds: float) -> dict[str, tuple[int, float]]:
        """Memory (PSS) of each standing process, and its CPU as a share of one core, over some seconds of rest."""
        parts = self.parts()
        before = {name: tree_cpu_seconds([pid]) for name, pid in parts.items() if name != "up"}
        time.sleep(seconds)
        return {
            name: (pss_bytes(pid), (tree_cpu_seconds([pid]) - before[name]) / seconds if name in before else 0.0)
            for name, pid in parts.items()
        }


def _instant(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@contextlib.contextmanager
def running_service(
    home: Path,
    *,
    databases: Mapping[str, str],
    volumes: Mapping[str, Path],
    store: Mapping[str, str],
    jobs: int = JOBS,
) -> Iterator[Service]:
    """Start `athena-backup up` on an empty home, and stop it at the end of the block."""
    home.mkdir(parents=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(_ROOT),
        "PYTHONUNBUFFERED": "1",
        "ATHENA_HOME": str(home / "athena"),
        "ATHENA_API_PORT": "0",
        "ATHENA_PREFECT_PORT": "0",
        "ATHENA_API_KEYS": json.dumps([_KEY]),
        "ATHENA_DATABASES": json.dumps(dict(databases)),
        "ATHENA_VOLUMES": json.dumps({name: str(path) for name, path in volumes.items()}),
        "ATHENA_JOBS": str(jobs),
        **store,
    }
    process = subprocess.Popen(
        die_with_parent([sys.executable, "-m", "deployments.cli", "up"]),
        env=environment,
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said: list[str] = []
    ready = threading.Event()
    threading.Thread(target=_listen, args=(process, said, ready), daemon=True).start()
    try:
        ready.wait(_START_SECONDS)
        addresses = _addresses(said)
        if len(addresses) < 2:
            raise OursFailedError("the service did not start:\n" + "\n".join(said[-30:]))
        with httpx.Client(timeout=60, trust_env=False) as http:
            yield Service(process.pid, addresses["API"], addresses["Prefect UI"], http)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        (home.parent / f"{home.name}.log").write_text("\n".join(said) + "\n")


def _listen(process: "subprocess.Popen[str]", said: list[str], ready: threading.Event) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line.rstrip("\n"))
        if line.startswith("Ctrl-C"):
            ready.set()
    ready.set()


def _addresses(said: list[str]) -> dict[str, str]:
    found = (re.match(r"(API|Prefect UI): +(http\S+)", line) for line in said)
    return {match.group(1): match.group(2) for match in found if match}


@dataclass
class Ours:
    """Ours as a contender; see `benchmarks.contenders.Contender`."""

    name: str
    start: Callable[[], contextlib.AbstractContextManager[Service]]
    meter: Meter
    damage: Callable[[], None]
    """Makes what lives differ from what was backed up, so that a restore that does nothing is seen."""
    check: Callable[[], None]
    stored: Callable[[], int]
    clean: Callable[[], None]
    repair: Callable[[], None]
    """Makes the data anew, after a restore that did not bring them back."""
    timestamp: str = ""
    damaged: bool = False
    service: Service | None = None

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """The service, started on an empty home."""
        try:
            with self.start() as self.service:
                time.sleep(_WARM_SECONDS)
                yield
        finally:
            self.service = None

    def at_rest(self, seconds: float) -> dict[str, tuple[int, float]]:
        """See `Service.at_rest`."""
        return self._running().at_rest(seconds)

    def back_up(self) -> Usage:
        """By the API, as a user does."""
        self.timestamp, usage = self._running().operate("backup", None, self.meter)
        return usage

    def stored_bytes(self) -> int:
        """The set's objects."""
        return self.stored()

    def prepare_restore(self) -> None:
        """Damage what lives, or lose it."""
        self.damaged = True
        self.damage()

    def restore(self) -> Usage:
        """Into the live names, by staging and switch."""
        return self._running().operate("restore", self.timestamp, self.meter)[1]

    def verify(self) -> None:
        """Against what lived."""
        self.check()
        self.damaged = False

    def forget(self) -> None:
        """Delete the set, and make the data anew where a restore did not bring them back: others need them."""
        try:
            self.clean()
        finally:
            if self.damaged:
                self.repair()
                self.damaged = False

    def _running(self) -> Service:
        if self.service is None:
            raise OursFailedError("the service was asked before it stood")
        return self.service
