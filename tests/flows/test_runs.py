"""Runs as everybody above sees them, from Prefect's own types alone."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import cast
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Pending, Scheduled

from adapter.records import run_status
from athena_backup.store import Store
from blocks.keys import block_name
from flows import dead_runs, runs
from flows.dead_runs import reconcile
from flows.runs import BACKUP, RECOVER, RESTORE, OperationRun, operation_run


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


@pytest.mark.parametrize("kind", [BACKUP, RESTORE, RECOVER])
@pytest.mark.parametrize(
    ("make_state", "since", "is_dead"),
    [
        (Pending, timedelta(minutes=20), True),
        (Pending, timedelta(minutes=10), False),
        (Scheduled, timedelta(minutes=20), False),
    ],
    ids=["long pending", "pending", "scheduled"],
)
def test_a_run_whose_runner_died_before_it_had_begun_is_ended(
    monkeypatch: pytest.MonkeyPatch, kind: runs.Kind, make_state: Callable[..., State], since: timedelta, is_dead: bool
) -> None:
    """As one that somebody pressed in Prefect's UI, which has no lease: it would be ongoing for ever."""
    state = make_state(timestamp=datetime.now(UTC) - since)
    run = FlowRun(id=uuid4(), flow_id=uuid4(), state=state, tags=["namespace:app"])
    run.state_type, run.expected_start_time = state.type, datetime.now(UTC) - timedelta(minutes=20)
    buried: list[UUID] = []

    def list_runs(_client: object, asked: runs.Kind, *_: object, **__: object) -> list[OperationRun]:
        return [operation_run(kind, "app", run)] if asked == kind else []

    monkeypatch.setattr(dead_runs, "list_runs", list_runs)
    monkeypatch.setattr(dead_runs, "_bury", lambda _client, _store, one: buried.append(one.id))
    assert reconcile(cast("SyncPrefectClient", None), cast("Store", None), "app", lease=uuid4()) == is_dead
    assert buried == [run.id] * is_dead
