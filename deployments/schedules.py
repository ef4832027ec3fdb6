"""BACKUP_FREQUENCY as Prefect schedules that fire at exactly the same instants.

Never passed through: Prefect's cron takes a sixth field as seconds too, but at the end, and refuses ``?`` and ``@every``
(`0 0 0 * * *` would mean every second of midnight on the first of each month). Every field is written as explicit numbers,
and whether the two day fields are joined by *or* is said outright instead of left to stars.

Seconds other than 0 take that sixth field as well, not an RRULE: Prefect evaluates an RRULE by walking from its first
instant in 2020 at every look of its scheduler, which takes 1 s of its event loop for 96 instants a day in 2026, and more
every year; the same cron expression takes 0.03 s. The price is the description in Prefect's UI, which reads six fields
with the seconds first; ``athena-backup check`` says it in right words.
"""

from datetime import UTC, datetime, timedelta

from prefect.schedules import Cron, Interval, Schedule

from athena_backup.schedule import CronSchedule, EverySchedule
from athena_backup.schedule import Schedule as BackupSchedule

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def prefect_schedules(schedule: BackupSchedule) -> list[Schedule]:
    """The Prefect schedules, in UTC, whose instants together are those of ``schedule``, none twice; today always one."""
    if isinstance(schedule, EverySchedule):
        return [Interval(timedelta(seconds=schedule.interval_seconds), anchor_date=_EPOCH, timezone="UTC")]
    return [_cron(schedule)]


def _cron(schedule: CronSchedule) -> Schedule:
    # The plain rule, not the sets: an "or" with a full side would lose it (Prefect takes 1-31 for a star), and one with a
    # day that never comes (30 February or Mondays) raises inside Prefect's scheduler.
    rule = schedule.day_rule()
    fields = [
        schedule.minutes if len(schedule.minutes) < 60 else None,
        schedule.hours if len(schedule.hours) < 24 else None,
        rule.days_of_month,
        schedule.months if len(schedule.months) < 12 else None,
        rule.days_of_week,
    ]
    if schedule.seconds != {0}:
        fields.append(schedule.seconds if len(schedule.seconds) < 60 else None)
    return Cron(" ".join(_field(numbers) for numbers in fields), timezone="UTC", day_or=rule.either)


def _field(numbers: frozenset[int] | None) -> str:
    return "*" if numbers is None else ",".join(str(number) for number in sorted(numbers))
