"""`make demo`: five databases and five volumes are backed up, lost and restored through the documented calls.

Everything is real and embedded: a PostgreSQL server, the whole service, a store in a directory or, with ``--store``, in a
server of S3 or Azure. Each call is the document's curl line, printed as such before it is made. What came back is compared
with what was there, entry by entry and row by row.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
from sqlalchemy import URL

from athena_backup.errors import AthenaError, FinalError
from athena_backup.postgres.embedded import binaries, embedded_server
from athena_backup.settings import Settings, load_settings
from blocks.stores import open_store
from deployments.demo_databases import DATABASES, build_databases, destroy_databases, fingerprint_databases
from deployments.demo_stores import STORE_VARIABLES, STORES, DemoStore, demo_store
from deployments.demo_volumes import build_volumes, destroy_volumes, fingerprint_volumes
from deployments.service import Running, announcement, running_service, stop_signals

_POLL_SECONDS = 0.25
_LIMIT_SECONDS = 900


def main() -> int:
    """Entry point; the exit code is 0 only if everything is as it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave everything running until Ctrl-C")
    parser.add_argument("--store", choices=STORES, default="local", help="where the backup goes")
    parser.add_argument("--size", type=float, default=1.0, help="how much data: 1 is some hundred MB")
    arguments = parser.parse_args()
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="athena-demo-"))
    try:
        return run(root, store=arguments.store, size=arguments.size, keep=arguments.keep, began=began)
    except AthenaError as error:
        _say(f"\nthe demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        _say("\ninterrupted")
        return 130
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run(root: Path, *, store: DemoStore, size: float, keep: bool, began: float) -> int:
    """The whole demo below ``root``; returns the exit code."""
    _say("starting an embedded PostgreSQL and a store ...")
    with embedded_server(root / "postgres") as server, demo_store(store, root / "backup") as (what, variables):
        _say(f"the store is {what}")
        _say(f"making five databases and five volumes (size {size:g}) ...")
        build_databases(server.url(), size)
        volumes = build_volumes(root / "volumes", size)
        settings = demo_settings(root, server.url(), volumes, variables)
        with running_service(settings, say=_say) as (running, tree):
            for line in announcement(running)[:-1]:
                _say(line)
            api = Api(running)
            before = fingerprints(server.url(), volumes)
            timestamp = back_up(api)
            _say("\ndestroying things:")
            for line in [*destroy_databases(server.url()), *destroy_volumes(volumes)]:
                _say(f"  {line}")
            lost = differences(before, fingerprints(server.url(), volumes, missing_ok=True))
            _say(f"  {len(lost)} of {len(before)} facts are now wrong")
            restore(api, timestamp)
            wrong = differences(before, fingerprints(server.url(), volumes))
            stored = sum(entry.size_bytes for entry in open_store(settings).entries(""))
            code = report(before, lost, wrong, stored, time.monotonic() - began)
            if keep and code == 0:
                # Once more, because the operations have pushed it out of sight.
                for line in announcement(running):
                    _say(line)
                with stop_signals() as stopped:
                    while not stopped.wait(0.5) and tree.ended() is None:
                        continue
            return code


def demo_settings(root: Path, server: URL, volumes: Mapping[str, Path], store: Mapping[str, str]) -> Settings:
    """The settings of the demo's service, in the environment, where its processes find them too.

    ``store``: the variables that name the store; whatever else the environment says of one is taken out.
    """
    databases = {name: server.set(database=name).render_as_string(hide_password=False) for name in DATABASES}
    values = {
        "ATHENA_HOME": str(root / "home"),
        "ATHENA_DATABASES": json.dumps(databases),
        "ATHENA_VOLUMES": json.dumps({name: str(path) for name, path in volumes.items()}),
        "ATHENA_PG_BIN": json.dumps([str(binaries())]),
        "ATHENA_API_PORT": os.environ.get("ATHENA_API_PORT", "0"),
        "ATHENA_PREFECT_PORT": os.environ.get("ATHENA_PREFECT_PORT", "0"),
        "ENABLE_REGULAR_BACKUPS": "false",
        **store,
    }
    ours = ("ATHENA_CONFIG", "ATHENA_API_KEYS", "PREFECT_API_URL", "PREFECT_HOME", "ATHENA_NAMESPACE")
    for name in (*ours, *STORE_VARIABLES):
        os.environ.pop(name, None)
    os.environ.update(values)
    return load_settings(env_file=None)


class Api:
    """The documented calls, each printed as its curl line."""

    def __init__(self, running: Running) -> None:
        self._base = f"{running.api_url}/athena/api/v1"
        self._key = running.new_key or ""
        self._client = httpx.Client(timeout=60, trust_env=False)

    def call(
        self, method: str, path: str, body: str | None = None, *, quietly: bool = False
    ) -> tuple[int, dict[str, object]]:
        """Make one call; returns the HTTP status and the answer."""
        if not quietly:
            data = f" \\\n--data-raw '{body}'" if body is not None else ""
            _say(
                f"\ncurl --location --request {method} '{self._base}{path}' \\\n--header 'Authorization: {{api-key}}'{data}"
            )
        headers = {"Authorization": self._key, "Content-Type": "application/json"}
        response = self._client.request(method, self._base + path, headers=headers, content=body)
        answer = response.json()
        if not quietly:
            _say(json.dumps(answer, indent=4, ensure_ascii=False))
        return response.status_code, answer

    def expect(self, code: int, method: str, path: str, body: str | None = None) -> dict[str, object]:
        """Make a call that has to be answered with ``code``; raises `FinalError` otherwise."""
        status, answer = self.call(method, path, body)
        if status != code:
            raise FinalError(f"{method} {path} was answered with {status}: {answer}")
        return answer

    def watch(self, path: str, body: str | None = None) -> str:
        """Ask for a status until the operation has ended, showing the line whenever it moves; returns the last status."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        shown = ""
        while time.monotonic() < deadline:
            _, answer = self.call("GET", path, body, quietly=True)
            status = str(answer.get("status", answer))
            if status != shown:
                _say(f"  {status}")
                shown = status
            if "timestamp" in answer:
                return status
            time.sleep(_POLL_SECONDS)
        raise FinalError(f"{path} did not end within {_LIMIT_SECONDS} s")


def back_up(api: Api) -> str:
    """Take a backup and return its timestamp; raises `FinalError` unless it ends as Success."""
    message = str(api.expect(202, "POST", "/ondemandbackup", "{\n}")["message"])
    timestamp = message.rpartition(" ")[2]
    began = time.monotonic()
    status = api.watch("/backup/latest")
    if status != "Success":
        raise FinalError(f"the backup failed: {status}")
    _say(f"  backed up in {time.monotonic() - began:.1f} s")
    api.expect(200, "GET", "/backup/list")
    return timestamp


def restore(api: Api, timestamp: str) -> None:
    """Restore a backup; raises `FinalError` unless it ends as Success."""
    svcs = '"svcs": {\n        "gitserver": {\n            "disable": false\n        },\n    }'
    body = f'{{\n    "timestamp": "{timestamp}",\n    "sourceNamespace": "app",\n    {svcs}\n}}'
    api.expect(202, "POST", "/ondemandrestore", body)
    began = time.monotonic()
    status = api.watch("/restore/status", f'{{\n"timestamp": "{timestamp}"\n}}')
    if status != "Success":
        raise FinalError(f"the restore failed: {status}")
    _say(f"  restored in {time.monotonic() - began:.1f} s")


def fingerprints(server: URL, volumes: Mapping[str, Path], *, missing_ok: bool = False) -> dict[str, str]:
    """Every fact that has to be the same before and after, of databases and volumes."""
    facts = fingerprint_volumes(dict(volumes))
    return facts | fingerprint_databases(server, binaries(), missing_ok=missing_ok)


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The names of the facts that differ."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def report(before: Mapping[str, str], lost: list[str], wrong: list[str], stored: int, seconds: float) -> int:
    """Print the result; the exit code. ``stored``: how many bytes the store lists."""
    tables = sum(": " in name and "." in name.partition(": ")[2] for name in before if name.split(":")[0] in DATABASES)
    _say(f"\n{len(before)} facts compared: {tables} tables row by row, schemas, properties, every file of every volume")
    _say(
        f"destroyed: {len(lost)}    wrong after the restore: {len(wrong)}    stored: {stored / 1e6:.0f} MB    {seconds:.0f} s in all"
    )
    for name in wrong[:20]:
        _say(f"  differs: {name}")
    _say("everything is as it was" if not wrong else "NOT everything is as it was")
    return 1 if wrong or not lost else 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
