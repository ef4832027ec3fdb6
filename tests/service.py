"""A whole service as a user starts it, in a process tree of its own: what the tests talk to, kill and start again."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

KEY = "a-test-key"
ODD_KEY = 'schlüssel " 鍵'
ROOT = Path(__file__).parent.parent
_START_SECONDS = 150


def await_true(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait for a condition; the test fails naming it if it doesn't come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.05)


class Service:
    """`athena-backup up` with an environment of its own; may be started again after it was stopped or killed."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self.home = home
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "ATHENA_HOME": str(home / "athena"),
            "ATHENA_API_PORT": "0",
            "ATHENA_PREFECT_PORT": "0",
            "ATHENA_API_KEYS": json.dumps([KEY, ODD_KEY]),
            **environment,
        }
        self.api_url = ""
        self.prefect_url = ""
        self.output: list[str] = []
        self._process: subprocess.Popen[str] | None = None

    def begin(self) -> "queue.Queue[str | None]":
        """Start it without waiting; the lines that it prints from now on, None at their end."""
        command = [sys.executable, "-m", "deployments.cli", "up"]
        self._process = subprocess.Popen(
            command, env=self.environment, cwd=self.home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, lines), daemon=True).start()
        return lines

    def start(self) -> None:
        """Start it and wait until it has said where it is."""
        lines = self.begin()
        deadline = time.monotonic() + _START_SECONDS
        while (line := lines.get(timeout=max(0.1, deadline - time.monotonic()))) is not None:
            if found := re.match(r"(API|Prefect UI): +(http\S+)", line):
                if found.group(1) == "API":
                    self.api_url = found.group(2).removesuffix("/athena/api/v1")
                else:
                    self.prefect_url = found.group(2)
            if line.startswith("Ctrl-C"):
                return
        raise AssertionError("the service did not start:\n" + "\n".join(self.output[-40:]))

    def _read(self, process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.output.append(line.rstrip("\n"))
            lines.put(line.rstrip("\n"))
        lines.put(None)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self, sig: int = signal.SIGINT) -> int:
        """Stop it as Ctrl-C does, and return the exit code."""
        assert self._process is not None
        self._process.send_signal(sig)
        return self.wait()

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(120)

    def close(self) -> None:
        """Whatever state it is in, leave nothing behind."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def processes(self) -> dict[int, str]:
        """Every living process of this service, found by the home in its environment: pid to command line."""
        found = {}
        for directory in Path("/proc").iterdir():
            if not directory.name.isdigit() or int(directory.name) == os.getpid():
                continue
            try:
                environment = (directory / "environ").read_bytes()
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue
            if f"ATHENA_HOME={self.home / 'athena'}".encode() in environment.split(b"\0") and command:
                found[int(directory.name)] = command
        return found

    def pid_of(self, part: str) -> int:
        """The process whose command line holds ``part``."""
        (pid, *_) = [pid for pid, command in self.processes().items() if part in command]
        return pid

    def call(self, method: str, path: str, body: str | bytes | None = None, **headers: str) -> httpx.Response:
        """A call of the API, with the key unless a header says otherwise."""
        sent = {"Authorization": KEY, "Content-Type": "application/json", **headers}
        return httpx.request(
            method, f"{self.api_url}/athena/api/v1{path}", content=body, headers=sent, timeout=60, trust_env=False
        )

    def status(self, path: str = "/backup/latest", body: str | None = None) -> str:
        return str(self.call("GET", path, body).json().get("status"))

    def start_backup(self) -> str:
        """Start a backup and return its timestamp."""
        answer = self.call("POST", "/ondemandbackup", "{}")
        assert answer.status_code == 202, answer.text
        return str(answer.json()["message"]).rpartition(" ")[2]

    def back_up(self) -> tuple[str, str]:
        """Take a backup to its end; its timestamp and status."""
        timestamp = self.start_backup()
        await_true(lambda: "ongoing" not in self.status(), "the backup's end", 180)
        return timestamp, self.status("/backup/status", json.dumps({"timestamp": timestamp}))

    def restore(self, timestamp: str, **members: object) -> str:
        """Restore a set to its end; the status."""
        body = json.dumps({"timestamp": timestamp, "sourceNamespace": "app", **members})
        answer = self.call("POST", "/ondemandrestore", body)
        assert answer.status_code == 202, answer.text
        asked = json.dumps({"timestamp": timestamp})
        await_true(lambda: "ongoing" not in self.status("/restore/status", asked), "the restore's end", 180)
        return self.status("/restore/status", asked)

    def command(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Another `athena-backup` command beside the service, with the service's environment."""
        return subprocess.run(
            [sys.executable, "-m", "deployments.cli", *arguments],
            env={**self.environment, **environment},
            cwd=self.home,
            capture_output=True,
            text=True,
        )

    def prefect(self, method: str, path: str, body: dict[str, object] | None = None) -> Any:
        """A call of the Prefect server's own API, as its UI makes it."""
        deadline = time.monotonic() + 30
        while True:
            answer = httpx.request(method, f"{self.prefect_url}/api{path}", json=body, timeout=60, trust_env=False)
            # So it says, before it has done anything, that its database is locked by another writer for a moment.
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def press_run(self, flow: str, parameters: dict[str, object], namespace: str = "app") -> str:
        """Start a run as Prefect's UI does, without our tags, lease or name; the run's id."""
        deployment = self.prefect("GET", f"/deployments/name/{flow}/{namespace}")["id"]
        asked = {"parameters": parameters, "enforce_parameter_schema": False, "state": {"type": "SCHEDULED"}}
        return str(self.prefect("POST", f"/deployments/{deployment}/create_flow_run", asked)["id"])

    def run_state(self, run: str) -> str:
        return str(self.prefect("GET", f"/flow_runs/{run}")["state_type"])

    @contextmanager
    def stopped_child(self, program: str, seconds: float = 60.0) -> Iterator[int]:
        """Catch the next of this service's processes of the program, and hold it still (SIGSTOP) while the block lasts."""
        found: list[int] = []
        before = set(self._children(program))

        def catch() -> bool:
            for pid in set(self._children(program)) - before:
                try:
                    os.kill(pid, signal.SIGSTOP)
                except ProcessLookupError:
                    continue
                found.append(pid)
                return True
            return False

        deadline = time.monotonic() + seconds
        while not catch():
            assert time.monotonic() < deadline, f"no {program} was started within {seconds:.0f} s"
            time.sleep(0.002)
        try:
            yield found[0]
        finally:
            with suppress(ProcessLookupError):
                os.kill(found[0], signal.SIGCONT)

    def _children(self, program: str) -> Iterator[int]:
        """The descendants of `up` that run the program: nobody else's of the same name, which may be at real work."""
        for directory in Path("/proc").iterdir():
            if not directory.name.isdigit():
                continue
            try:
                if (directory / "comm").read_text().strip() != program:
                    continue
                arguments = (directory / "cmdline").read_bytes().decode("utf-8", "replace")
                # A zombie has none, and can't be held. pg_dumpall asks pg_dump's version with -V.
                if not arguments or {"--version", "-V"} & set(arguments.split("\0")):
                    continue
                if self.pid in _ancestors(int(directory.name)):
                    yield int(directory.name)
            except OSError:
                continue


@contextmanager
def volume_service(home: Path, **environment: str) -> Iterator[Service]:
    """A started service of one volume and no database, which is quick to back up."""
    (home / "store").mkdir()
    (home / "edweb").mkdir()
    (home / "edweb" / "file").write_text("content")
    settings = {
        "OBJECT_STORE_LOCATION_LOCAL": str(home / "store"),
        "ATHENA_DATABASES": "{}",
        "ATHENA_VOLUMES": json.dumps({"edweb": str(home / "edweb")}),
        "ATHENA_CATCH_UP": "false",
    }
    service = Service(home, settings | environment)
    try:
        service.start()
        yield service
    finally:
        service.close()


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid
