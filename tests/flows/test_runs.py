"""Runs as everybody above sees them, from Prefect's own types alone."""

import re
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled

from adapter.records import run_status
from blocks.keys import block_name
from flows.runs import BACKUP, operation_run


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("Flow run was cancelled successfully.", "Cancelled"),
        ("Runner is shutting down.", "error starting: the service was stopped before the operation had begun"),
    ],
)
def test_a_run_that_the_stopped_service_ended_was_cancelled_by_nobody(message: str, status: str) -> None:
    run = FlowRun(id=uuid4(), flow_id=uuid4(), state=Cancelled(message=message), tags=["namespace:app"])
    run.state_type, run.state_name = Cancelled().type, Cancelled().name
    assert run_status(operation_run(BACKUP, "app", run)) == status


def test_no_two_namespaces_share_their_keys() -> None:
    names = [block_name(namespace) for namespace in ("app", "a.b", "a-b", "A-B", "a_b")]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in names)
    assert names[0] == "app"
