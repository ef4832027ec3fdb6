"""`prefect.yaml` deploys the same flows to a work pool, whose worker runs them wherever it was started."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import ROOT, Service, await_true

NAMESPACE = "pool"


@pytest.fixture
def environment(service: Service) -> dict[str, str]:
    """That of a machine with a worker: the service's databases and volumes, and its Prefect server."""
    return {
        **service.environment,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",
        "PREFECT_API_URL": f"{service.prefect_url}/api",
        "ATHENA_NAMESPACE": NAMESPACE,
    }


@pytest.fixture
def worker(environment: dict[str, str], tmp_path: Path) -> Iterator[None]:
    """What the file's own comment says to do, under a namespace that is not the running service's."""
    text = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    file = tmp_path / "prefect.yaml"
    file.write_text(
        text.replace("namespace: &namespace app", f"namespace: &namespace {NAMESPACE}").replace(":app", f":{NAMESPACE}")
    )
    for arguments in (
        ["work-pool", "create", "athena", "--type", "process"],
        ["deploy", "--all", "--prefect-file", str(file)],
    ):
        command = ["prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    start = ["prefect", "worker", "start", "--pool", "athena"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(start, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    yield
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()  # once it hung after the signal (Prefect 3.8.8); whether a worker stops is not what is tested here
        process.wait()


@pytest.mark.usefixtures("worker")
def test_a_worker_backs_up_and_restores_and_no_schedule_is_on_unasked(service: Service) -> None:
    deployed = service.prefect("GET", f"/deployments/name/backup/{NAMESPACE}")
    assert [schedule["active"] for schedule in deployed["schedules"]] == [False]
    run = service.press_run("backup", {}, NAMESPACE)
    await_true(lambda: service.run_state(run) == "COMPLETED", "the backup's end", 120)
    tags = service.prefect("GET", f"/flow_runs/{run}")["tags"]
    [timestamp] = [tag.removeprefix("timestamp:") for tag in tags if tag.startswith("timestamp:")]
    file = Path(json.loads(service.environment["ATHENA_VOLUMES"])["edweb"]) / "folder" / "file"
    file.write_text("destroyed")
    run = service.press_run("restore", {"request": {"timestamp": timestamp}}, NAMESPACE)
    await_true(lambda: service.run_state(run) == "COMPLETED", "the restore's end", 120)
    assert file.read_text() == "content of edweb"
