"""What has to stand in Prefect and the store before the service's parts can do their work; all of it may be repeated."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from athena_backup.catalog import SetState, list_sets
from athena_backup.errors import AthenaError, FinalError, UnavailableError
from athena_backup.settings import Settings
from athena_backup.store import Store
from blocks.keys import ApiKeys, load_hashes, make_key
from blocks.store_blocks import NoBlockError, register
from blocks.stores import open_store
from deployments.checkup import refuse_overlaps
from flows.components import volumes_of
from flows.copies import bury_dead_copies
from flows.dead_runs import reconcile, skip_missed
from flows.recovery import half_switched_volumes
from flows.requests import BackupRequest
from flows.runs import (
    BACKUP,
    COPY,
    RECOVER,
    RESTORE,
    OperationRunningError,
    start_backup,
    start_recovery,
)
from flows.slot import ensure_limit

SETTLE_SECONDS = 5
SETTLE_LIMIT_SECONDS = 60
STOP_SECONDS = 10

logger = logging.getLogger("athena_backup.preparation")


def prepare(settings: Settings) -> str | None:
    """Make the slot's limit, the store's block and the API key, open the store, drop missed runs; returns the key if it is new.

    Raises the store's final errors: a service that its store refuses must not say that it runs.
    """
    # First: a store block that is missing can then be made in the UI of a Prefect server that is not our own.
    register(settings)
    store = _opened_store(settings)
    if settings.athena_store_block is not None and store.location.type == "local":
        refuse_overlaps(settings, store.location.place)
    namespace = settings.athena_namespace
    try:
        # A client of an object store asks nothing when it is made: this is where a wrong key or name shows.
        next(store.folders(f"{namespace}/"), None)
    except UnavailableError as error:
        # It may come back, and what a killed restore left has to be recovered meanwhile.
        logger.warning("the store does not answer: %s", error)
    with get_client(sync_client=True) as client:
        ensure_limit(client, namespace)
        reconcile(client, store, namespace)
        bury_dead_copies(client, namespace)
        skip_missed(client, namespace)
    ApiKeys.register_type_and_schema()
    if settings.athena_api_keys or load_hashes(namespace):
        return None
    return make_key(namespace)


def _opened_store(settings: Settings) -> Store:
    try:
        return open_store(settings, adopt=True)
    except NoBlockError as error:
        if settings.prefect_api_url is not None:
            raise
        # Our own server ends with this start, and its UI with it.
        raise FinalError(
            f"{error.cause}: the service's own server has its blocks in {settings.prefect_home}",
            next_step="unset ATHENA_STORE_BLOCK and give the store's own variables, or start once without it, make the block in"
            " Prefect's UI, and start again",
        ) from None


def is_served(settings: Settings, mark: str) -> bool:
    """Whether the runner with this start mark has registered all deployments."""
    with get_client(sync_client=True) as client:
        return all(
            _version(client, f"{flow}/{settings.athena_namespace}") == mark for flow in (BACKUP, RESTORE, RECOVER, COPY)
        )


def _version(client: SyncPrefectClient, name: str) -> str | None:
    try:
        return client.read_deployment_by_name(name).version
    except ObjectNotFound:
        return None


def recover(settings: Settings) -> bool:
    """Start a recovery if a killed restore left a volume of this machine half-switched; True once none is."""
    if not half_switched_volumes(volumes_of(settings)):
        return True
    with get_client(sync_client=True) as client:
        start_recovery(client, settings.athena_namespace)
    return False


def catch_up(settings: Settings, now: datetime) -> bool:
    """Start one backup if the schedule is on and no successful set is as young as its last instant (contract, section 1).

    True once there is nothing to catch up on; False while another operation keeps it from being started.
    """
    if not settings.enable_regular_backups or not settings.athena_catch_up:
        return True
    due = settings.schedule.last_at_or_before(now.astimezone(UTC))
    store = open_store(settings)
    good = [
        one.set_id.timestamp.instant
        for one in list_sets(store, settings.athena_namespace)
        if one.state is SetState.SUCCESS
    ]
    if due is None or (good and max(good) >= due):
        return True
    with get_client(sync_client=True) as client:
        try:
            start_backup(client, store, settings.athena_namespace, BackupRequest())
        except OperationRunningError:
            return False
    return True


@contextlib.contextmanager
def settling(settings: Settings, now: datetime) -> Iterator[None]:
    """While the block lasts, recover and then catch up, each until it is done; whatever fails is logged and tried again.

    Beside the service's own work, because a predecessor that was killed may have the slot for up to 75 s.
    """
    stopped = threading.Event()

    def settle() -> None:
        duties = [lambda: recover(settings), lambda: catch_up(settings, now)]
        pause_seconds = SETTLE_SECONDS
        while duties and not stopped.is_set():
            try:
                while duties and duties[0]():
                    duties.pop(0)
            except (AthenaError, httpx.HTTPError, PrefectHTTPStatusError) as error:
                logger.warning("could not recover, or catch up on a missed backup, yet: %s", error)
            except Exception:
                logger.exception("could not recover, or catch up on a missed backup, yet")
            if duties:
                stopped.wait(pause_seconds)
                pause_seconds = min(2 * pause_seconds, SETTLE_LIMIT_SECONDS)

    thread = threading.Thread(target=settle, name="settle", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        # A volume whose server is gone keeps it for ever, and must not keep the service from stopping.
        thread.join(STOP_SECONDS)
