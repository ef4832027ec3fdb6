"""The Prefect schedules fire at exactly the instants of BACKUP_FREQUENCY, by Prefect's own evaluation."""

import asyncio
import importlib.util
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prefect import flow
from prefect.deployments.runner import RunnerDeployment
from prefect.server.schemas.actions import DeploymentScheduleCreate, DeploymentScheduleUpdate
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

from athena_backup.schedule import Schedule, ScheduleError, parse_schedule, upcoming
from deployments.schedules import prefect_schedules

_spec = importlib.util.spec_from_file_location(
    "schedule_texts", Path(__file__).parents[1] / "engine" / "test_schedule.py"
)
assert _spec is not None
assert _spec.loader is not None
schedule_texts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(schedule_texts)

NOW = datetime(2026, 11, 23, 18, 0, tzinfo=UTC)
A_MOMENT = timedelta(microseconds=1)
HORIZON = timedelta(days=100)
"""How far ahead Prefect's scheduler looks, as set by default."""


@flow
def nothing() -> None:
    """What is scheduled is no matter here."""


def served(schedule: Schedule) -> list[IntervalSchedule | CronSchedule | RRuleSchedule]:
    """The schedules as Prefect's server reads them from the requests that make and later update a deployment."""
    deployment = nothing.to_deployment("test", schedules=prefect_schedules(schedule))
    assert isinstance(deployment, RunnerDeployment)
    made = deployment.schedules or []
    created = [DeploymentScheduleCreate.model_validate(one.model_dump(mode="json")).schedule for one in made]
    updates = [one.model_dump(mode="json", exclude_unset=True) for one in made]
    assert [DeploymentScheduleUpdate.model_validate(update).schedule for update in updates] == created
    return created


def instants(schedule: Schedule, start: datetime, count: int, end: datetime | None = None) -> list[datetime]:
    """What Prefect's server would schedule from ``start`` on, all schedules together, doubles kept.

    Rounded: after some centuries Prefect's floating-point steps are off by two microseconds.
    """
    dates = [date for one in served(schedule) for date in asyncio.run(one.get_dates(n=count, start=start, end=end))]
    return [datetime.fromtimestamp(round(date.timestamp()), UTC) for date in sorted(dates)][:count]


@settings(max_examples=200)
@given(
    schedule_texts.EXPRESSIONS | st.integers(1, 100_000_000).map(lambda seconds: f"@every {seconds}s"),
    schedule_texts.INSTANTS,
)
@example("0 0 0 30 2 MON", NOW)
@example("0 0 0 30-31 2 0-6", NOW)
@example("0 0 0 31 4,6 1,2", NOW)
def test_prefect_fires_at_the_next_hundred_instants_of_any_schedule(text: str, start: datetime) -> None:
    try:
        schedule = parse_schedule(text)
    except ScheduleError:
        return
    assert instants(schedule, start, 100) == upcoming(schedule, start - A_MOMENT, 100)


@pytest.mark.parametrize(
    "text",
    [
        *["@every 1h30m", "@every 1s", "@every 100h", "@every 400000h", "@hourly", "@daily", "@weekly", "@yearly"],
        *["* * * * * *", "*/7 * * * * *", "30 15 2 * * *", "30 0 0 1,15 * MON", "59 59 23 31 12 ?", "0 0 0 1-31 * 3"],
        *["0 0 0 13 * 0-6", "0 0 0 */2 * MON", "0 0 0 29 2 */7", "0 0 0 30 2 MON", "15 0 0 ? FEB,APR sat/1"],
    ],
)
@pytest.mark.parametrize("start", [NOW, datetime(2095, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)])
def test_prefect_s_scheduler_sees_the_same_within_its_horizon(text: str, start: datetime) -> None:
    schedule = parse_schedule(text)
    expected = [instant for instant in upcoming(schedule, start - A_MOMENT, 100) if instant <= start + HORIZON]
    assert instants(schedule, start, 100, end=start + HORIZON) == expected
    assert instants(schedule, start, 100) == upcoming(schedule, start - A_MOMENT, 100)


def test_the_default_fires_at_the_coming_midnights_utc() -> None:
    found = instants(parse_schedule("0 0 0 * * *"), NOW, 3)
    assert found == [datetime(2026, 11, day, tzinfo=UTC) for day in (24, 25, 26)]


@pytest.mark.parametrize(
    ("text", "cron"),
    [
        ("0 0 0 * * *", "0 0 * * *"),
        ("0 0 0 ? JAN MON-FRI", "0 0 * 1 1,2,3,4,5"),
        ("30 15 2 * * *", "15 2 * * * 30"),
        ("* * * * * ?", "* * * * * *"),
    ],
)
def test_a_cron_expression_is_written_in_explicit_numbers_with_other_seconds_at_its_end(text: str, cron: str) -> None:
    (made,) = prefect_schedules(parse_schedule(text))
    assert (made.cron, made.timezone) == (cron, "UTC")
