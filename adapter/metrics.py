"""What a monitoring system asks for, in Prometheus' text format: derived from runs and sets at each scrape, as all answers are.

Alert on the *age* of the last success, not on a failure: that fires when there never was one, and clears by itself.
"""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from athena_backup.catalog import CatalogEntry, SetState
from flows.runs import OperationRun

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics(
    namespace: str, sets: Iterable[CatalogEntry], copies: Sequence[OperationRun], further_stores: Iterable[str]
) -> bytes:
    """The page; ``copies`` are the copy runs that have ended, newest first, ``further_stores`` those of ATHENA_COPY_TO."""
    registry = CollectorRegistry()
    registry.register(_Page([*_of_sets(namespace, list(sets)), *_of_copies(namespace, copies, further_stores)]))
    return generate_latest(registry)


class _Page(Collector):
    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return self._families


def _of_sets(namespace: str, sets: Sequence[CatalogEntry]) -> list[GaugeMetricFamily]:
    good = [one.set_id.timestamp.instant.timestamp() for one in sets if one.state is SetState.SUCCESS]
    last = GaugeMetricFamily(
        "athena_backup_last_success_timestamp_seconds",
        "When the newest successful backup set was taken, in seconds since 1970; 0 if there is none.",
        labels=["namespace"],
    )
    last.add_metric([namespace], max(good, default=0))
    count = GaugeMetricFamily("athena_backup_sets", "Backup sets in the store by state.", labels=["namespace", "state"])
    for state in (SetState.SUCCESS, SetState.FAILED):
        count.add_metric([namespace, state.value.lower()], sum(one.state is state for one in sets))
    return [last, count]


def _of_copies(
    namespace: str, copies: Sequence[OperationRun], further_stores: Iterable[str]
) -> list[GaugeMetricFamily]:
    labels = ["namespace", "to"]
    success = GaugeMetricFamily(
        "athena_backup_copy_success",
        "Whether the newest copy to this store succeeded; 0 too where none was ever made.",
        labels=labels,
    )
    last = GaugeMetricFamily(
        "athena_backup_copy_last_success_timestamp_seconds",
        "The timestamp of the newest set that was copied to this store, in seconds since 1970; 0 if there is none.",
        labels=labels,
    )
    for to in dict.fromkeys([*further_stores, *(run.to for run in copies)]):
        own = [run for run in copies if run.to == to]
        done = [run.set_id.timestamp.instant.timestamp() for run in own if run.outcome == "success"]
        success.add_metric([namespace, to], bool(own) and own[0].outcome == "success")
        last.add_metric([namespace, to], max(done, default=0))
    return [success, last]
