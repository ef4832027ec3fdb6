"""The deployments: which flows can be run, under which names, on which schedule.

One deployment a flow and namespace (``backup/app``), so that services of several namespaces can share a Prefect server.
"""

from collections.abc import Sequence
from typing import Any

from prefect.deployments.runner import RunnerDeployment
from prefect.flows import Flow
from prefect.schedules import Schedule
from prefect.types.entrypoint import EntrypointType

from athena_backup.backup import software
from athena_backup.settings import Settings
from deployments.schedules import prefect_schedules
from flows.backup import backup
from flows.copying import copy
from flows.recovery import recover
from flows.restore import restore
from flows.runs import BACKUP, COPY, RECOVER, RESTORE

DESCRIPTIONS: dict[str, str] = {
    BACKUP: "Takes a full backup of every configured database and volume. Scheduled by BACKUP_FREQUENCY.",
    RESTORE: "Overwrites this service's databases and volumes with the state of a backup set. Use with extreme caution.",
    RECOVER: "Finishes or throws away what a killed restore left; the service starts it by itself.",
    COPY: "Copies a backup set into the store of another block, every byte checked. Follows every backup by ATHENA_COPY_TO.",
}


def deployments(settings: Settings, version: str | None = None) -> Sequence[RunnerDeployment]:
    """The deployments of one namespace; the backup has its schedule if ENABLE_REGULAR_BACKUPS is on."""
    tags = [f"namespace:{settings.athena_namespace}"]
    schedules = prefect_schedules(settings.schedule) if settings.enable_regular_backups else []
    return [
        _deployment(backup, settings.athena_namespace, tags, schedules, version),
        _deployment(restore, settings.athena_namespace, tags, [], version),
        _deployment(recover, settings.athena_namespace, tags, [], version),
        # One at a time, the others waiting in Prefect: waiting processes would take the runner's places from backups.
        _deployment(copy, settings.athena_namespace, tags, [], version, concurrency_limit=1),
    ]


def _deployment(
    flow: Flow[..., Any],
    name: str,
    tags: list[str],
    schedules: list[Schedule],
    version: str | None,
    concurrency_limit: int | None = None,
) -> RunnerDeployment:
    made = flow.to_deployment(
        name,
        description=DESCRIPTIONS[flow.name],
        tags=tags,
        schedules=schedules,
        concurrency_limit=concurrency_limit,
        version=version or software(),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    if not isinstance(made, RunnerDeployment):
        raise TypeError("deployments are defined outside of an event loop")
    return made
