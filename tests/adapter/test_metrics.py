"""The metrics page: what an alert can rely on, from no backup at all to a copy that failed after good ones."""

from datetime import UTC, datetime
from uuid import uuid4

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapter.metrics import metrics
from athena_backup.catalog import CatalogEntry, SetState
from athena_backup.names import SetId
from flows.runs import OperationRun

FIRST, SECOND = "2023-02-02t16-00-00", "2023-02-03t16-00-00"


def instant(timestamp: str) -> float:
    return SetId.parse(timestamp, "app").timestamp.instant.timestamp()


def a_set(timestamp: str, state: SetState) -> CatalogEntry:
    return CatalogEntry(SetId.parse(timestamp, "app"), state, state.value)


def a_copy(timestamp: str, to: str, outcome: str) -> OperationRun:
    now = datetime.now(UTC)
    return OperationRun(
        uuid4(), "copy", SetId.parse(timestamp, "app"), True, True, outcome, "", now, now, to=to  # type: ignore[arg-type]
    )  # fmt: skip


def seen(page: bytes) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = ",".join(value for name, value in sorted(sample.labels.items()) if name != "namespace")
            found[f"{sample.name.removeprefix('athena_backup_')}[{labels}]"] = sample.value
    return found


def test_where_there_never_was_a_success_its_age_is_that_of_the_epoch() -> None:
    page = seen(metrics("app", [a_set(FIRST, SetState.FAILED)], [], []))
    assert page["last_success_timestamp_seconds[]"] == 0
    assert page["sets[failed]"] == 1
    assert page["sets[success]"] == 0


def test_the_newest_success_counts_whatever_failed_after_it() -> None:
    page = seen(metrics("app", [a_set(FIRST, SetState.SUCCESS), a_set(SECOND, SetState.FAILED)], [], []))
    assert page["last_success_timestamp_seconds[]"] == instant(FIRST)


@pytest.mark.parametrize(("newest", "value"), [("failed", 0), ("cancelled", 0), ("success", 1)])
def test_a_copy_is_as_good_as_the_newest_one_to_its_store(newest: str, value: int) -> None:
    copies = [a_copy(SECOND, "second", newest), a_copy(FIRST, "second", "success"), a_copy(FIRST, "third", "failed")]
    page = seen(metrics("app", [], copies, ["second"]))
    assert page["copy_success[second]"] == value
    assert page["copy_success[third]"] == 0
    assert page["copy_last_success_timestamp_seconds[second]"] == instant(SECOND if value else FIRST)


def test_a_further_store_that_never_got_a_copy_is_not_left_out() -> None:
    page = seen(metrics("app", [a_set(FIRST, SetState.SUCCESS)], [], ["second"]))
    assert page["copy_success[second]"] == 0
    assert page["copy_last_success_timestamp_seconds[second]"] == 0
