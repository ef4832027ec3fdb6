"""A slot that is taken and that nobody has: how that is seen, and that it is given back.

Prefect counts a claim in its database before it writes the lease that ends it, and throws the lease away before it counts back. A
server that is killed in between, or whose disk is full at that moment, leaves the slot taken for ever, and every backup from then on
would be refused. So would a run that died with it: it still says Running, and is buried only by who gets the slot (`dead_runs`).
So a run counts as the slot's holder only as long as its lease can be renewed.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.exceptions import ObjectNotFound

from flows.copies import copy_leases
from flows.runs import BACKUP, RECOVER, RESTORE, list_runs
from flows.slot import LEASE_SECONDS, copy_slot, limit_name, renew

STUCK_SECONDS = 600.0
"""Long enough for every rightful holder without a run: a claim whose run is being made has a minute (`LEASE_SECONDS`), and an
operation whose run was deleted in Prefect's UI ends itself within minutes."""

_GAP_SECONDS = 120.0
"""After a longer time without a look nobody knows who had the slot meanwhile, and the count begins anew."""
_LOST_SECONDS = 2.0 * LEASE_SECONDS
"""By then an operation that lives has seen that its lease is lost, and has ended."""

logger = logging.getLogger("athena_backup.slot")


@dataclass(frozen=True)
class _Looks:
    """At a slot that was taken at each of them, and whose runs bore the same leases: the first and the last, by the monotonic clock
    in seconds.
    """

    first: float
    last: float
    leases: frozenset[UUID]
    lost: float | None = None
    """When none of the leases could be renewed for the first time; not tried at each look, which would keep a dead run's for ever."""


@dataclass
class StuckSlots:
    """The namespace's slots as one process has seen them look after look; `free` is called every now and then."""

    namespace: str
    limit_seconds: float = STUCK_SECONDS
    lost_seconds: float = _LOST_SECONDS
    _seen: dict[str, _Looks] = field(default_factory=dict)
    """Of each slot that is taken, by the name of its limit."""

    def free(self, client: SyncPrefectClient) -> list[str]:
        """Free each slot that was taken at every look for `limit_seconds` and that no run has; the names of their limits.

        A run has it whose lease lives; that it is lost has to be seen twice, `lost_seconds` apart. One that claims the slot
        meanwhile begins the time anew.
        """
        slots: dict[str, Callable[[], frozenset[UUID]]] = {
            limit_name(self.namespace): lambda: _leases(client, self.namespace),
            limit_name(copy_slot(self.namespace)): lambda: copy_leases(client, self.namespace),
        }
        return [name for name, leases_of in slots.items() if self._free_one(client, name, leases_of)]

    def _free_one(self, client: SyncPrefectClient, name: str, leases_of: Callable[[], frozenset[UUID]]) -> bool:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return False
        looks = self._seen.pop(name, None)
        if not limit.active_slots:
            return False
        now, leases = time.monotonic(), leases_of()
        if looks is None or now - looks.last > _GAP_SECONDS or looks.leases != leases:
            looks = _Looks(now, now, leases)
        looks = replace(looks, last=now)
        if now - looks.first < self.limit_seconds or (looks.lost is not None and now - looks.lost < self.lost_seconds):
            self._seen[name] = looks
            return False
        if any(renew(client, lease) for lease in leases):
            return False
        if leases and looks.lost is None:
            # Whoever gives it back in this moment is seen to have done so by the next look.
            self._seen[name] = replace(looks, lost=now)
            return False
        client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active_slots=0))
        logger.warning(
            "the slot %s was taken, and nobody had it (Prefect's server lost its lease, or could not write it): it is free again",
            name,
        )
        return True


def _leases(client: SyncPrefectClient, namespace: str) -> frozenset[UUID]:
    """Those of the unfinished operations; a run that works without one has no part in the slot, nor one that waits for its time."""
    runs = [run for kind in (BACKUP, RESTORE, RECOVER) for run in list_runs(client, kind, namespace, unfinished=True)]
    return frozenset(run.lease for run in runs if run.lease is not None)
