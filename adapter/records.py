"""Runs and sets as the answers of the Athena contract: pure functions, no server, no store, no clock.

The wording stands in the contract (section 2); every line of it that a client may parse is written here and nowhere else.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import TypedDict

from athena_backup.catalog import CatalogEntry, SetState
from athena_backup.names import SetId
from athena_backup.store import StoreLocation
from flows.runs import OperationRun


class Record(TypedDict):
    """One backup or restore as a client sees it."""

    backupurl: str
    namespace: str
    status: str
    timestamp: str


def backup_url(location: StoreLocation, set_id: SetId) -> str:
    """Where a set is, in the words of the contract: a page of the cloud's console, or what the configuration says."""
    folder = f"{set_id.namespace}/{set_id.timestamp}"
    match location.type:
        case "s3":
            return (
                f"https://s3.console.aws.amazon.com/s3/buckets/{location.place}"
                f"?region={location.region}&prefix={folder}/&showversions=false"
            )
        case "azure-blob-storage":
            return f"{location.place}{folder}/"
        case "gcp-cloud-storage":
            return f"https://console.cloud.google.com/storage/browser/{location.place}/{folder}"
        case "local":
            return location.place


def record(location: StoreLocation, set_id: SetId, status: str) -> Record:
    """The documented record."""
    return Record(
        backupurl=backup_url(location, set_id),
        namespace=set_id.namespace,
        status=status,
        timestamp=str(set_id.timestamp),
    )


def ongoing_line(databases: Sequence[str], volumes: Sequence[str], completed: Collection[str]) -> str:
    """The documented line for a running operation; names in the order of the configuration."""
    return (
        "backup/restore operation ongoing"
        f" with pending DBs: {_names(databases, completed, wanted=False)}"
        f" and pending Volumes: {_names(volumes, completed, wanted=False)}"
        f" and completed DBs: {_names(databases, completed, wanted=True)}"
        f" and completed Volumes: {_names(volumes, completed, wanted=True)}"
    )


def _names(names: Sequence[str], completed: Collection[str], *, wanted: bool) -> str:
    return "[" + " ".join(name for name in names if (name in completed) is wanted) + "]"


def run_status(run: OperationRun) -> str:
    """The ``status`` of a run that has ended, from the run alone."""
    match run.outcome:
        case "success":
            return "Success"
        case "cancelled":
            return "Cancelled"
        case _:
            return run.message or "failed, and nobody could say why"


def backup_records(
    location: StoreLocation, sets: Iterable[CatalogEntry], runs: Iterable[OperationRun], ongoing: OperationRun | None
) -> list[Record]:
    """All backups, oldest first: what the store says, and for runs of which it says nothing, what the run says.

    The one that is being written is no record yet.
    """
    statuses: dict[SetId, str] = {}
    for run in runs:
        if run.outcome != "success":  # success is what the store says, never a run (design.md, section 4)
            statuses.setdefault(run.set_id, run_status(run))
    for entry in sets:
        if entry.state is not SetState.UNFINISHED or entry.set_id not in statuses:
            statuses[entry.set_id] = entry.status
    if ongoing is not None:
        statuses.pop(ongoing.set_id, None)
    return [record(location, set_id, statuses[set_id]) for set_id in sorted(statuses)]
