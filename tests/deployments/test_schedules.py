"""The Prefect schedules fire at exactly the instants of BACKUP_FREQUENCY, by Prefect's own evaluation."""

import asyncio
import importlib.util
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from prefect.schedules import Schedule
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule

from athena_backup.schedule import ScheduleError, parse_schedule, upcoming
from deployments.schedules import prefect_schedules

_spec = importlib.util.spec_from_file_location(
    "schedule_texts", Path(__file__).parents[1] / "engine" / "test_schedule.py"
)
assert _spec is not None
assert _spec.loader is not None
schedule_texts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(schedule_texts)


def instants(schedule: Schedule, start: datetime, count: int) -> list[datetime]:
    """What Prefect's server would schedule after ``start``."""
    if schedule.cron is not None:
        served = CronSchedule(cron=schedule.cron, timezone=schedule.timezone, day_or=schedule.day_or)
    else:
        assert schedule.interval is not None
        served = IntervalSchedule(
            interval=schedule.interval, anchor_date=schedule.anchor_date, timezone=schedule.timezone
        )
    dates = asyncio.run(served.get_dates(n=count, start=start + timedelta(seconds=1)))
    return [datetime.fromtimestamp(date.timestamp(), UTC) for date in dates]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(schedule_texts.EXPRESSIONS, schedule_texts.INSTANTS)
def test_prefect_fires_at_the_instants_of_any_expression(text: str, start: datetime) -> None:
    try:
        schedule = parse_schedule(text)
    except ScheduleError:
        return
    start = start.replace(microsecond=0)
    (made,) = prefect_schedules(schedule)
    found = instants(made, start, 100)
    assert found == upcoming(schedule, start, 100)[: len(found)]
    assert found


@pytest.mark.parametrize(
    "text", ["@every 1h30m", "@every 1s", "@every 100h", "@daily", "0 0 0 * * *", "30 0 0 1,15 * MON", "0 0 0 1-31 * 3"]
)
def test_the_next_hundred_instants_are_the_same(text: str) -> None:
    start = datetime(2026, 11, 23, 18, 0, 0, tzinfo=UTC)
    schedule = parse_schedule(text)
    (made,) = prefect_schedules(schedule)
    assert instants(made, start, 100) == upcoming(schedule, start, 100)


def test_the_default_fires_at_the_coming_midnights_utc() -> None:
    (made,) = prefect_schedules(parse_schedule("0 0 0 * * *"))
    start = datetime(2026, 11, 23, 18, 0, 0, tzinfo=UTC)
    assert instants(made, start, 3) == [datetime(2026, 11, day, tzinfo=UTC) for day in (24, 25, 26)]
