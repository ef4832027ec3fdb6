"""How quick the service answers: from the POST to the first ongoing line, and `GET /backup/latest` while a backup runs.

One command: `make bench-operations`. Starts the demo's databases, volumes and service, and prints what it measured.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from athena_backup.postgres.embedded import embedded_server
from deployments.demo import Api, demo_settings
from deployments.demo_databases import build_databases
from deployments.demo_stores import demo_store
from deployments.demo_volumes import build_volumes
from deployments.service import running_service

BACKUPS = 3


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="athena-bench-"))
    try:
        with embedded_server(root / "postgres") as server, demo_store("local", root / "backup") as (_, store):
            build_databases(server.url(), 1.0)
            settings = demo_settings(root, server.url(), build_volumes(root / "volumes", 1.0), store)
            with running_service(settings, say=print) as (running, _):
                api = Api(running)
                first, latest, whole = [], [], []
                for _ in range(BACKUPS):
                    posted = time.perf_counter()
                    code, answer = api.call("POST", "/ondemandbackup", "{}", quietly=True)
                    assert code == 202, answer
                    while True:
                        asked = time.perf_counter()
                        _, answer = api.call("GET", "/backup/latest", quietly=True)
                        now = time.perf_counter()
                        if "timestamp" in answer:
                            break
                        if len(first) == len(whole):
                            first.append(now - posted)
                        latest.append(now - asked)
                    whole.append(now - posted)
                    time.sleep(2)
        percentile = statistics.quantiles(latest, n=20)[-1]
        print(f"POST to first ongoing line: median {_ms(statistics.median(first))}, worst {_ms(max(first))}")
        print(
            f"GET /backup/latest during a backup: median {_ms(statistics.median(latest))}, 95th percentile {_ms(percentile)}"
        )
        print(f"POST to Success: median {statistics.median(whole):.1f} s")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


if __name__ == "__main__":
    main()
