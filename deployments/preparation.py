"""What has to stand in Prefect and the store before the service's parts can do their work; all of it may be repeated."""

from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound

from athena_backup.catalog import SetState, list_sets
from athena_backup.settings import Settings
from blocks.keys import ApiKeys, load_hashes, make_key
from blocks.stores import open_store
from flows.requests import BackupRequest
from flows.runs import BACKUP, RESTORE, OperationRunningError, reconcile, skip_missed, start_backup
from flows.slot import ensure_limit


def prepare(settings: Settings) -> str | None:
    """Make the slot's limit and the API key, open the store, drop missed runs; returns the key if it is new.

    Raises the store's errors: a service that can't reach its store must not say that it runs.
    """
    store = open_store(settings)
    namespace = settings.athena_namespace
    with get_client(sync_client=True) as client:
        ensure_limit(client, namespace)
        reconcile(client, store, namespace)
        skip_missed(client, namespace)
    ApiKeys.register_type_and_schema()
    if settings.athena_api_keys or load_hashes(namespace):
        return None
    return make_key(namespace)


def is_served(settings: Settings, mark: str) -> bool:
    """Whether the runner with this start mark has registered both deployments."""
    with get_client(sync_client=True) as client:
        return all(_version(client, f"{flow}/{settings.athena_namespace}") == mark for flow in (BACKUP, RESTORE))


def _version(client: SyncPrefectClient, name: str) -> str | None:
    try:
        return client.read_deployment_by_name(name).version
    except ObjectNotFound:
        return None


def catch_up(settings: Settings, now: datetime) -> bool:
    """Start one backup if the schedule is on and no successful set is as young as its last instant (contract, section 1)."""
    if not settings.enable_regular_backups or not settings.athena_catch_up:
        return False
    due = settings.schedule.last_at_or_before(now.astimezone(UTC))
    store = open_store(settings)
    good = [
        one.set_id.timestamp.instant
        for one in list_sets(store, settings.athena_namespace)
        if one.state is SetState.SUCCESS
    ]
    if due is None or (good and max(good) >= due):
        return False
    with get_client(sync_client=True) as client:
        try:
            start_backup(client, store, settings.athena_namespace, BackupRequest())
        except OperationRunningError:
            return False
    return True
