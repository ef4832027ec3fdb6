"""The slot: the right to run a backup or restore of a namespace, one at a time (design.md, section 6).

It is a Prefect global concurrency limit of 1, held by a lease. Whoever starts an operation claims it before the run exists
and hands the lease on; the flow adopts it as its first act and renews it as long as it works. The lease is the only
heartbeat: whoever holds the slot may treat every other unfinished operation of the namespace as dead.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError

from athena_backup.errors import FinalError
from athena_backup.operation import Operation

LEASE_SECONDS = 60
"""The shortest that Prefect grants; its holder's death is seen after that at the latest."""
RENEW_SECONDS = 20
_ANSWER_SECONDS = 8.0
"""How long a renewal waits for its answer. In the minute of Prefect's clients one lost answer would cost the slot; so there is
time for two more tries before it is given up."""
_LOOK_SECONDS = 1.0
_ORPHAN_SECONDS = 15.0
_LOST_AFTER_SECONDS = LEASE_SECONDS - 10
_JOIN_SECONDS = 10
"""Then a thread whose call the server does not answer is left to itself."""
_CLOSED_STATES = {StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED}
_GONE = {httpx.codes.NOT_FOUND, httpx.codes.GONE}

logger = logging.getLogger("athena_backup.slot")


def limit_name(namespace: str) -> str:
    """The name of the namespace's concurrency limit in Prefect."""
    return f"athena-{namespace}"


def copy_slot(namespace: str) -> str:
    """What stands for the namespace in the slot of its copies; no namespace has a colon in its name."""
    return f"{namespace}:copy"


def ensure_limit(client: SyncPrefectClient, namespace: str) -> None:
    """Create the namespace's limit where there is none, and put right one that holds nobody off; several may do so at once."""
    name = limit_name(namespace)
    try:
        found = client.read_global_concurrency_limit_by_name(name)
        if not found.active or found.limit > 1:
            # Somebody switched it off or raised it in Prefect's UI: the server would grant every claim.
            logger.warning("the concurrency limit %s was changed in Prefect, and is put right: active, and 1", name)
            client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active=True, limit=1))
    except ObjectNotFound:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1, active=True))


def claim(client: SyncPrefectClient, namespace: str) -> UUID | None:
    """Take the slot for `LEASE_SECONDS` without waiting; the lease, or None while somebody else has it."""
    try:
        response = client.increment_concurrency_slots_with_lease(
            names=[limit_name(namespace)], slots=1, mode="concurrency", lease_duration=LEASE_SECONDS
        )
    except PrefectHTTPStatusError as error:
        if error.response.status_code == httpx.codes.LOCKED:
            return None
        # 0 holds everybody off, as whoever set it wanted.
        if "greater than the limit" in error.response.text:
            raise FinalError(
                f"the concurrency limit {limit_name(namespace)} is 0 in Prefect, so no operation may begin",
                next_step="set it to 1 in Prefect's UI, under Concurrency",
            ) from error
        raise
    answer = response.json()
    # The server grants a limit that it does not know (tried): such a grant holds nobody off.
    if not answer["limits"]:
        raise FinalError(
            f"Prefect has no concurrency limit {limit_name(namespace)}",
            next_step="somebody deleted it: restart the service, which makes it again",
        )
    return UUID(answer["lease_id"])


def renew(client: SyncPrefectClient, lease: UUID) -> bool:
    """Keep the slot for another `LEASE_SECONDS`; False if the lease has ended."""
    try:
        client.renew_concurrency_lease(lease_id=lease, lease_duration=LEASE_SECONDS)
    except PrefectHTTPStatusError as error:
        if error.response.status_code in _GONE:
            return False
        raise
    except ObjectNotFound:
        return False
    return True


def release(client: SyncPrefectClient, lease: UUID) -> None:
    """Free the slot; a lease that has ended already counts as freed."""
    try:
        client.release_concurrency_slots_with_lease(lease_id=lease)
    except ObjectNotFound:
        return
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in _GONE:
            raise


@contextlib.contextmanager
def held(
    lease: UUID, operation: Operation, *, run_id: UUID | None = None, every_look: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold the slot for the length of the block, and free it afterwards.

    ``operation`` is cancelled when the slot is lost or can't be renewed in time, the run was ended or deleted on the server, our
    parent has died, or the deadline has passed. ``every_look`` is called about once a second. Each has a thread of its own: a
    server that does not answer keeps a call of Prefect's client for minutes, and the clock runs on.
    """
    stopped, renewed = threading.Event(), _Renewed()
    works = {
        "slot": lambda: _renew_on(lease, operation, run_id, renewed, stopped),
        "clock": lambda: _watch(operation, renewed, stopped),
    }
    threads = [threading.Thread(target=_guard, args=(work, operation), name=name) for name, work in works.items()]
    if every_look is not None:
        threads.append(threading.Thread(target=_look_on, args=(every_look, stopped), name="progress"))
    for thread in threads:
        thread.daemon = True
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        until = time.monotonic() + _JOIN_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        freeing = threading.Thread(target=_free, args=(lease,), name="slot", daemon=True)
        freeing.start()
        freeing.join(_JOIN_SECONDS)
        if freeing.is_alive():
            logger.warning("the Prefect server does not answer: the slot frees itself within %s s", LEASE_SECONDS)


def _free(lease: UUID) -> None:
    try:
        with get_client(sync_client=True) as client:
            release(client, lease)
    except (httpx.HTTPError, PrefectHTTPStatusError):
        logger.warning("could not free the slot; it frees itself within %s s", LEASE_SECONDS, exc_info=True)


@dataclass
class _Renewed:
    """When the lease was renewed last, by the monotonic clock in seconds: when that was asked for, not when it was answered."""

    at: float = field(default_factory=time.monotonic)


def _guard(work: Callable[[], None], operation: Operation) -> None:
    try:
        work()
    except Exception as error:
        # Without a guard the slot is soon somebody else's, who takes what this operation has built for left behind.
        logger.exception("the guard of the slot failed")
        operation.cancel(f"the slot can't be guarded any more: {type(error).__name__}: {error}")


def _renew_on(
    lease: UUID, operation: Operation, run_id: UUID | None, renewed: _Renewed, stopped: threading.Event
) -> None:
    wait_seconds: float = RENEW_SECONDS
    with get_client(sync_client=True, httpx_settings={"timeout": _ANSWER_SECONDS}) as client:
        while not stopped.wait(wait_seconds):
            asked = time.monotonic()
            wait_seconds = RENEW_SECONDS
            try:
                if not renew(client, lease):
                    operation.cancel("the slot was lost: its lease has ended")
                elif run_id is not None and _ended(client, run_id):
                    operation.cancel("the run was ended on the Prefect server")
                renewed.at = asked
            except (httpx.HTTPError, PrefectHTTPStatusError) as error:
                wait_seconds = 2
                logger.warning("could not renew the slot's lease: %s", error)


def _watch(operation: Operation, renewed: _Renewed, stopped: threading.Event) -> None:
    parent = os.getppid()
    while not stopped.wait(_LOOK_SECONDS):
        now = time.monotonic()
        if os.getppid() != parent and not operation.cancelled:
            operation.cancel("the runner of this operation has died")
            _end_soon()
        if operation.deadline is not None and now >= operation.deadline:
            operation.cancel("the operation took longer than ATHENA_OPERATION_TIMEOUT_SECONDS allows")
        if now - renewed.at > _LOST_AFTER_SECONDS:
            operation.cancel("the slot was lost: the Prefect server does not answer")


def _look_on(every_look: Callable[[], None], stopped: threading.Event) -> None:
    while not stopped.wait(_LOOK_SECONDS):
        try:
            every_look()
        except Exception:
            logger.exception("looking on failed")
            return


def _end_soon() -> None:
    """End this process once it has had time to close its set: nobody is left to whom it could report."""
    last_act = threading.Timer(_ORPHAN_SECONDS, os._exit, (1,))
    last_act.daemon = True
    last_act.start()


def _ended(client: SyncPrefectClient, run_id: UUID) -> bool:
    try:
        state = client.read_flow_run(run_id).state
    except ObjectNotFound:  # somebody deleted it, in Prefect's UI for example
        return True
    return state is not None and state.type in _CLOSED_STATES
