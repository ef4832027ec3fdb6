"""The copy of a set into another store: the second copy of "3-2-1", by hand or after every backup (ATHENA_COPY_TO).

How a copy stands beside backups, restores and deletions, and why it does not hold their slot, is said in `flows.copies`.
After a backup each further store gets a run of its own: that the backup succeeded stands by then, whatever becomes of them.
"""

from typing import Any

import httpx
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelled, Completed, Failed

from athena_backup.copying import Copied, copy_set
from athena_backup.errors import AthenaError, fault_of
from athena_backup.settings import load_settings
from blocks.stores import open_block, open_store
from flows.copies import start_copy
from flows.operating import (
    RETRYING,
    SlotTakenError,
    Working,
    component_work,
    free_slot,
    operating,
    run_log,
    task_threads,
)
from flows.progress import in_units
from flows.requests import CopyRequest
from flows.runs import COPY

STREAMS = 4
"""A copy reads and writes one part at a time, but through two stores, of which each divides a budget of its own among its
streams: opened as for so many, both together took 211 MB for parts of any size, 319 MB as for two, and no less time."""


@flow(name=COPY, task_runner=task_threads(), persist_result=False, on_crashed=[free_slot], on_cancellation=[free_slot])
def copy(request: CopyRequest) -> State[Any]:
    """Copy a backup set into the store of a block, every byte checked; one that was broken off is completed."""
    try:
        with operating(COPY, request.set_id(load_settings().athena_namespace)) as working:
            done = copy_objects.with_options(task_run_name=request.to).submit(request.to)
            copied = done.result(raise_on_failure=False)
            faults = working.fault_list() or working.why_stopped()
            was_cancelled = working.was_cancelled()
    except SlotTakenError:
        return Failed(message="error copying: another copy of the namespace is running (copy again after it)")
    except Exception as error:  # noqa: BLE001 - here the flow ends, and its last state has to say why
        run_log().error("the copy failed", exc_info=True)
        return Failed(message=str(fault_of(error, step="preparing the copy")))
    what = f"copy of {working.set_id} to {request.to}"
    if isinstance(copied, Copied):
        stood = copied.size_bytes - copied.sent_bytes
        standing = f", {in_units(stood)} of them stood there already" if stood else ""
        return Completed(message=f"{what}: {copied.parts} parts, {in_units(copied.size_bytes)}{standing}")
    ended = Cancelled if was_cancelled else Failed
    return ended(message=f"{what} failed: " + "; ".join(str(fault) for fault in faults))


@task(name="copy objects", tags=["step:copy"], **RETRYING)
def copy_objects(to: str) -> Copied:
    """Copy every object of the set; a retry goes on where the last try broke off."""
    copied: list[Copied] = []

    def work(working: Working) -> None:
        shared = working.settings.model_copy(update={"athena_jobs": STREAMS})
        source, target = open_store(shared), open_block(to, shared, adopt=True)
        copied.append(copy_set(source, target, working.set_id, working.operation))

    component_work(to, "copying", work)
    return copied[0]


def order_copies(working: Working) -> list[str]:
    """Start a copy of the set that was just written to each of ATHENA_COPY_TO; what to tell of those that can't be started."""
    untold = []
    for to in working.settings.athena_copy_to:
        request = CopyRequest(timestamp=str(working.set_id.timestamp), to=to)
        try:
            with get_client(sync_client=True) as client:
                start_copy(client, working.settings.athena_namespace, request)
        except (AthenaError, httpx.HTTPError, PrefectHTTPStatusError) as error:
            run_log().error("no copy to %s was started", to, exc_info=True)
            untold.append(f"not copied to {to}: {error}")
    return untold
