"""A slot that is taken and that nobody has: how that is seen, and that it is given back.

Prefect counts a claim in its database before it writes the lease that ends it. A server that is killed in between, or whose disk is
full at that moment, leaves the slot taken for ever, and every backup from then on would be refused.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.exceptions import ObjectNotFound

from flows.copies import has_unfinished_copy
from flows.runs import BACKUP, RECOVER, RESTORE, ongoing_run
from flows.slot import copy_slot, limit_name

STUCK_SECONDS = 600.0
"""Long enough for every rightful holder without a run: a claim whose run is being made has a minute (`LEASE_SECONDS`), and an
operation whose run was deleted in Prefect's UI ends itself within minutes."""

_GAP_SECONDS = 120.0
"""After a longer time without a look nobody knows who had the slot meanwhile, and the count begins anew."""

logger = logging.getLogger("athena_backup.slot")


@dataclass
class StuckSlots:
    """The namespace's slots as one process has seen them look after look; `free` is called every now and then."""

    namespace: str
    limit_seconds: float = STUCK_SECONDS
    _seen: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each slot that looks stuck, by the name of its limit: the first and the last look, by the monotonic clock in seconds."""

    def free(self, client: SyncPrefectClient) -> list[str]:
        """Free each slot that was taken at every look for `limit_seconds`, and had no run at any; the names of their limits."""
        holders: dict[str, Callable[[], bool]] = {
            limit_name(self.namespace): lambda: _has_operation(client, self.namespace),
            limit_name(copy_slot(self.namespace)): lambda: has_unfinished_copy(client, self.namespace),
        }
        return [name for name, has_holder in holders.items() if self._free_one(client, name, has_holder)]

    def _free_one(self, client: SyncPrefectClient, name: str, has_holder: Callable[[], bool]) -> bool:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return False
        if not limit.active_slots or has_holder():
            self._seen.pop(name, None)
            return False
        now = time.monotonic()
        first, last = self._seen.get(name, (now, now))
        if now - last > _GAP_SECONDS:
            first = now
        self._seen[name] = (first, now)
        if now - first < self.limit_seconds:
            return False
        client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active_slots=0))
        del self._seen[name]
        logger.warning(
            "the slot %s was taken for %.0f s by nobody (Prefect's server could not write the claim's lease), and is free again",
            *(name, self.limit_seconds),
        )
        return True


def _has_operation(client: SyncPrefectClient, namespace: str) -> bool:
    """Whether a run works, or was handed a lease; one that waits for its time has no part in the slot."""
    run = ongoing_run(client, namespace, (BACKUP, RESTORE, RECOVER))
    return run is not None and (run.begun or run.lease is not None)
