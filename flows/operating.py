"""What every backup and restore does before and after its own work: identity, slot, signals, progress, the last state.

`operating` is entered as a flow's first act. Inside it the flow holds the namespace's slot, its run carries the name and
tags by which it is found again, every dead predecessor is buried, and SIGTERM or a lost slot reach the `Operation` first.
"""

import contextlib
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FrameType
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.flows import Flow
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task, exponential_backoff

from athena_backup.crew import Crew
from athena_backup.errors import AthenaError, Fault, FinalError, fault_of
from athena_backup.names import InvalidNameError, SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.postgres.copy_places import CopyPlaces
from athena_backup.postgres.cut import Cut
from athena_backup.postgres.staging import StagedDatabase
from athena_backup.process import give_memory_back
from athena_backup.settings import Settings, load_settings
from athena_backup.store import Store
from blocks.stores import open_store
from flows.copies import bury_dead_copies
from flows.dead_runs import reconcile
from flows.progress import ProgressArtifact
from flows.runs import COPY, Kind, run_name, run_tags
from flows.slot import LEASE_SECONDS, claim, copy_slot, ensure_limit, held, release, renew

COPY_WAIT_SECONDS = LEASE_SECONDS + 30
"""How long a copy waits for its slot: a predecessor that was killed keeps it until its lease ends."""

logger = logging.getLogger("athena_backup.flows")


class SlotTakenError(Exception):
    """Another operation has the slot: this run ends as skipped."""


@dataclass
class Working:
    """What a flow and its tasks share inside one process; never a task parameter, so nothing of it reaches Prefect."""

    settings: Settings
    store: Store
    operation: Operation
    run_id: UUID
    set_id: SetId
    crew: Crew
    places: CopyPlaces
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    faults: dict[str, Fault] = field(default_factory=dict)
    """The last fault of each component; a later success takes it away."""
    cut: Cut | None = None
    """Of a backup: the cut that the flow holds while its tasks read."""
    staged: dict[str, StagedDatabase] = field(default_factory=dict)
    """Of a restore: the staged databases by component, which their switches address."""
    begun: set[str] = field(default_factory=set)
    """Of a restore: the databases that were begun to be loaded."""
    notes: dict[str, Sequence[str]] = field(default_factory=dict)
    """Of a restore: what of each component did not come back as it was, in words."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each component took, by name."""

    def fault_list(self) -> list[Fault]:
        """The faults in the order in which they happened."""
        return sorted(self.faults.values(), key=lambda fault: fault.at)

    def why_stopped(self) -> list[Fault]:
        """Why the operation was told to stop, if it was: a set that lost the slot at its very end is none."""
        try:
            self.operation.check()
        except AthenaError as error:
            return [error.fault()]
        return []

    def was_cancelled(self) -> bool:
        """Whether somebody cancelled the run in Prefect; a lost slot, a time-out or a stopped service is none."""
        if not self.operation.cancelled:
            return False
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(self.run_id).state
        except (httpx.HTTPError, PrefectHTTPStatusError, ObjectNotFound):
            return False
        return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)


WORKING: ContextVar[Working] = ContextVar("working")
"""Set by the flow, read by its tasks, which run in copies of its context."""


@contextlib.contextmanager
def operating(kind: Kind, source: SetId | None = None) -> Iterator[Working]:
    """Hold the slot for one operation; ``source`` is the set of a restore or copy, a backup's own timestamp is the run's.

    A copy holds the slot of copies instead (see `flows.copies`).

    Raises `SlotTakenError`, `ConfigurationError` and the store's errors before anything was begun.
    """
    settings = load_settings()
    run = _own_run()
    namespace = settings.athena_namespace
    set_id = source or SetId(namespace, _timestamp(run))
    rate = settings.athena_rate_limit_mb
    operation = Operation.lasting(
        settings.athena_operation_timeout_seconds, bytes_per_second=rate * 1_000_000 if rate is not None else None
    )
    give_memory_back()
    # For the run's own process, which its children are like; the service's others answer people.
    os.nice(settings.athena_nice)
    with get_client(sync_client=True) as client:
        lease = _adopt(client, namespace, run) if kind != COPY else _own_copy_slot(client, namespace)
        try:
            client.update_flow_run(run.id, name=run_name(kind, set_id), tags=_tags(run, namespace, set_id, kind, lease))
        except BaseException:
            release(client, lease)
            raise
    progress = ProgressArtifact(operation, run.id)
    with held(lease, operation, run_id=run.id, every_look=progress.publish), _signals(operation):
        store = open_store(settings)
        with get_client(sync_client=True) as client:
            if kind == COPY:
                bury_dead_copies(client, namespace, lease=lease, own=run.id)
            else:
                reconcile(client, store, namespace, lease=lease, own=run.id)
        # A store that answers slowly may have kept us for minutes: whoever lost the slot meanwhile begins nothing.
        operation.check()
        jobs = settings.athena_jobs
        working = Working(settings, store, operation, run.id, set_id, Crew(jobs), CopyPlaces(jobs))
        token = WORKING.set(working)
        # What was imported and made so far is kept until this process ends: looked through again and again for garbage, it
        # took a fortieth of a backup's processor time.
        gc.freeze()
        try:
            yield working
        finally:
            WORKING.reset(token)
            progress.publish(last=True)


def component_work(component: str, step: str, work: Callable[[Working], None]) -> None:
    """The body of every component's task: run ``work``, and keep the fault if it fails. What moves bytes is the crew's.

    The error goes on to Prefect, which logs its trace and decides on a retry (`is_passing`).
    """
    working = WORKING.get()
    began = time.monotonic()
    try:
        working.operation.check()
        work(working)
    except Exception as error:
        working.faults[component] = fault_of(error, component=component, step=step)
        raise
    working.faults.pop(component, None)
    working.seconds[component] = working.seconds.get(component, 0) + time.monotonic() - began


def is_passing(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task may be tried again (a `retry_condition_fn`)."""
    del task, state
    working = WORKING.get(None)
    fault = working.faults.get(run.name) if working is not None else None
    return fault is not None and fault.passing and working is not None and not working.operation.cancelled


RETRYING: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": is_passing,
}
"""Of every task that does a component's work."""


def task_threads() -> TaskRunner[PrefectFuture[Any]]:
    """Threads for a flow's tasks, which hand their work to the crew and wait; ATHENA_JOBS is read when the flow begins."""
    return cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=16))


def free_slot(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of the runner for a crashed run: its process is gone, so its lease need not run out by itself."""
    del flow, state
    with get_client(sync_client=True) as client:
        # Read anew: the runner knows the tags that the run was created with, and many a run claims its lease itself.
        for tag in client.read_flow_run(flow_run.id).tags:
            if tag.startswith("lease:"):
                release(client, UUID(tag.removeprefix("lease:")))


def was_killed(flow_run: FlowRun) -> bool:
    """Whether a run that is being cancelled did not end by itself in its thirty seconds; for hooks of the runner."""
    with get_client(sync_client=True) as client:
        ended = client.read_flow_run(flow_run.id).state
    return ended is None or not ended.is_final()  # by itself it would have said how


def _own_run() -> FlowRun:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise FinalError("this runs only as a Prefect flow", next_step="start it through its deployment")
    return context.flow_run


def _timestamp(run: FlowRun) -> Timestamp:
    for tag in run.tags:
        if tag.startswith("timestamp:"):
            with contextlib.suppress(InvalidNameError):
                return Timestamp.parse(tag.removeprefix("timestamp:"))
    return Timestamp.of(run.expected_start_time or datetime.now(UTC))


def _adopt(client: SyncPrefectClient, namespace: str, run: FlowRun) -> UUID:
    """The lease that was handed to this run, or, where there is none or it has ended, one of its own."""
    for tag in run.tags:
        if tag.startswith("lease:"):
            lease = UUID(tag.removeprefix("lease:"))
            if renew(client, lease):
                return lease
    ensure_limit(client, namespace)
    own = claim(client, namespace)
    if own is None:
        raise SlotTakenError
    return own


def _own_copy_slot(client: SyncPrefectClient, namespace: str) -> UUID:
    ensure_limit(client, copy_slot(namespace))
    deadline = time.monotonic() + COPY_WAIT_SECONDS
    while (lease := claim(client, copy_slot(namespace))) is None:
        if time.monotonic() > deadline:
            raise SlotTakenError
        time.sleep(1)
    return lease


def _tags(run: FlowRun, namespace: str, set_id: SetId, kind: Kind, lease: UUID) -> list[str]:
    ours = ("namespace:", "timestamp:", "source:", "lease:")
    return [*(tag for tag in run.tags if not tag.startswith(ours)), *run_tags(namespace, set_id, kind, lease)]


@contextlib.contextmanager
def _signals(operation: Operation) -> Iterator[None]:
    """SIGTERM sets the token and nothing else: the flow puts its things in order, and its own last state says how it ended.

    Prefect's handler would have the run end as crashed, with a message that names neither component nor step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        operation.cancel("its process was told to end, as when the service is stopped")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_log() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The run's own log, which Prefect's UI shows; the process's log outside of a run."""
    try:
        return get_run_logger()
    except Exception:  # noqa: BLE001 - Prefect's own error type for it is not public
        return logger
