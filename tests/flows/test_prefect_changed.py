"""What people change in Prefect's own UI, and answers that get lost, let no two operations begin and stop no service."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Completed, Scheduled
from service import Service, await_true, volume_service

from adapter import app
from athena_backup.errors import CancelledError, FinalError
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.settings import Settings
from flows import operating
from flows.dead_runs import PENDING_LIMIT, end_run, skip_missed
from flows.runs import BACKUP, create_run
from flows.slot import claim, ensure_limit, release

SET_ID = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with volume_service(
        tmp_path_factory.mktemp("changed"), ENABLE_REGULAR_BACKUPS="true", BACKUP_FREQUENCY="0 0 3 1 1 *"
    ) as started:
        yield started


@pytest.fixture
def client(service: Service) -> SyncPrefectClient:
    return SyncPrefectClient(f"{service.prefect_url}/api")


@pytest.mark.parametrize("change", [{"active": False}, {"limit": 2}])
def test_a_limit_that_was_switched_off_or_raised_is_put_right_before_the_next_claim(
    service: Service, client: SyncPrefectClient, change: dict[str, object]
) -> None:
    service.prefect("PATCH", "/v2/concurrency_limits/athena-app", change)
    ensure_limit(client, "app")
    first = claim(client, "app")
    assert first is not None
    try:
        assert claim(client, "app") is None
        assert service.call("POST", "/ondemandbackup", "{}").status_code == 409
    finally:
        release(client, first)


def test_a_limit_that_somebody_set_to_nothing_stays_so(service: Service, client: SyncPrefectClient) -> None:
    """It holds everybody off, as whoever did it wanted."""
    service.prefect("PATCH", "/v2/concurrency_limits/athena-app", {"limit": 0})
    try:
        ensure_limit(client, "app")
        with pytest.raises(FinalError, match="athena-app is 0 in Prefect, so no operation may begin"):
            claim(client, "app")
        answer = service.call("POST", "/ondemandbackup", "{}")
        assert answer.is_error
        assert "set it to 1 in Prefect's UI" in answer.text
    finally:
        service.prefect("PATCH", "/v2/concurrency_limits/athena-app", {"limit": 1})


def test_a_run_that_is_asked_for_again_since_its_answer_was_lost_is_no_second_one(client: SyncPrefectClient) -> None:
    ensure_limit(client, "app")
    lease = claim(client, "app")
    assert lease is not None
    first, again = (create_run(client, BACKUP, "app", SET_ID, lease) for _ in range(2))
    try:
        assert first.id == again.id
    finally:
        end_run(client, first.id, Completed())
        release(client, lease)


def test_a_run_that_somebody_deleted_meanwhile_needs_no_end(client: SyncPrefectClient) -> None:
    end_run(client, uuid4(), Completed())


def test_however_many_runs_were_missed_none_of_them_begins(service: Service, client: SyncPrefectClient) -> None:
    """As of a Prefect server of one's own that went on alone for days: they are more than one page."""
    flow = service.prefect("GET", f"/deployments/name/{BACKUP}/app")["flow_id"]
    deployment = client.create_deployment(flow, name="away", tags=["namespace:away"])
    now = datetime.now(UTC)
    missed = 230

    def scheduled(name: str, due: datetime) -> FlowRun:
        made: list[FlowRun] = []

        def is_made() -> bool:
            # While another writer has its database locked the server says 503, in the end also to who has asked again.
            with contextlib.suppress(PrefectHTTPStatusError):
                made.append(
                    client.create_flow_run_from_deployment(
                        deployment,
                        tags=["namespace:away"],
                        state=Scheduled(scheduled_time=due),
                        idempotency_key=f"away-{name}",
                    )
                )
            return bool(made)

        await_true(is_made, "the run's creation")
        return made[0]

    for number in range(missed):
        scheduled(str(number), now - PENDING_LIMIT - timedelta(minutes=1 + number))
    future = scheduled("future", now + timedelta(days=1))
    assert skip_missed(client, "away") == missed
    assert skip_missed(client, "away") == 0
    state = client.read_flow_run(future.id).state
    assert state is not None
    assert state.is_scheduled()


def test_a_schedule_that_somebody_named_in_prefects_ui_keeps_the_service_from_no_start(service: Service) -> None:
    deployment = service.prefect("GET", f"/deployments/name/{BACKUP}/app")
    (schedule,) = deployment["schedules"]
    service.prefect("PATCH", f"/deployments/{deployment['id']}/schedules/{schedule['id']}", {"slug": "nightly"})
    assert service.stop() == 0
    service.environment["BACKUP_FREQUENCY"] = "0 0 4 1 1 *"
    service.start()
    (schedule,) = service.prefect("GET", f"/deployments/name/{BACKUP}/app")["schedules"]
    assert schedule["schedule"]["cron"] == "0 4 1 1 *"
    assert schedule["active"]


def test_the_look_for_dead_operations_goes_on_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    enough = asyncio.Event()

    def reconcile(*_: object) -> None:
        looked.append("operations")
        raise ValueError("an answer that is no JSON")

    def copies(*_: object) -> None:
        looked.append("copies")
        if looked.count("copies") == 3:
            loop.call_soon_threadsafe(enough.set)

    monkeypatch.setattr(app, "reconcile", reconcile)
    monkeypatch.setattr(app, "bury_dead_copies", copies)
    monkeypatch.setattr(app.StuckSlots, "free", lambda *_: looked.append("slots"))
    monkeypatch.setattr(app, "RECONCILE_SECONDS", 0.01)
    service = cast("Any", SimpleNamespace(namespace="app", client=None, store=lambda: None))

    async def look() -> None:
        looking = asyncio.create_task(app._bury_the_dead(service))
        await asyncio.wait_for(enough.wait(), 30)
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(look())
    finally:
        loop.close()
    assert looked[:6] == ["operations", "copies", "slots"] * 2


def test_a_slot_that_is_lost_while_predecessors_are_buried_lets_nothing_begin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their store may answer so slowly that the lease ends: its holder has to keep it from the first moment on."""
    held: list[Operation] = []

    @contextlib.contextmanager
    def hold(_lease: object, operation: Operation, **_: object) -> Iterator[None]:
        held.append(operation)
        yield

    def reconcile(*_: object, **__: object) -> None:
        (operation,) = held
        operation.cancel("the slot was lost: its lease has ended")

    run = FlowRun(id=uuid4(), flow_id=uuid4(), expected_start_time=datetime.now(UTC))
    client = SimpleNamespace(update_flow_run=lambda *_, **__: None)
    replacements: dict[str, Callable[..., object]] = {
        "load_settings": lambda: Settings(object_store_location_local=str(tmp_path), athena_home=tmp_path),
        "_own_run": lambda: run,
        "_adopt": lambda *_: uuid4(),
        "get_client": lambda **_: contextlib.nullcontext(client),
        "open_store": lambda _: None,
        "held": hold,
        "reconcile": reconcile,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(operating, name, replacement)
    with pytest.raises(CancelledError, match="the slot was lost"), operating.operating(BACKUP):
        pytest.fail("the operation began")
