"""BACKUP_FREQUENCY as Prefect schedules that fire at exactly the same instants.

Never passed through: Prefect's cron takes a sixth field as seconds too, but at the end, and refuses ``?`` and ``@every``
(`0 0 0 * * *` would mean every second of midnight on the first of each month). Every field is written as explicit numbers.
"""

from datetime import UTC, datetime, timedelta

from prefect.schedules import Cron, Interval, Schedule

from athena_backup.schedule import CronSchedule, EverySchedule
from athena_backup.schedule import Schedule as BackupSchedule

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def prefect_schedules(schedule: BackupSchedule) -> list[Schedule]:
    """The Prefect schedules, in UTC, whose instants together are those of ``schedule``; today always one."""
    if isinstance(schedule, EverySchedule):
        return [Interval(timedelta(seconds=schedule.interval_seconds), anchor_date=_EPOCH, timezone="UTC")]
    return [_cron(schedule)]


def _cron(schedule: CronSchedule) -> Schedule:
    days, weekdays = schedule.days_of_month, schedule.days_of_week
    every_day, every_weekday = len(days) == 31, len(weekdays) == 7
    is_or = not (schedule.any_day_of_month or schedule.any_day_of_week)
    if is_or and (every_day or every_weekday):
        # One side of the "or" is always true; Prefect would take its star for unrestricted and look at the other alone.
        every_day = every_weekday = True
    fields = [
        _numbers(schedule.minutes, is_all=len(schedule.minutes) == 60),
        _numbers(schedule.hours, is_all=len(schedule.hours) == 24),
        _numbers(days, is_all=every_day),
        _numbers(schedule.months, is_all=len(schedule.months) == 12),
        _numbers(weekdays, is_all=every_weekday),
    ]
    if schedule.seconds != {0}:
        fields.append(_numbers(schedule.seconds, is_all=len(schedule.seconds) == 60))
    return Cron(" ".join(fields), timezone="UTC", day_or=is_or)


def _numbers(numbers: frozenset[int], *, is_all: bool) -> str:
    return "*" if is_all else ",".join(str(number) for number in sorted(numbers))
