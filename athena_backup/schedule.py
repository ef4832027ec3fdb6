"""BACKUP_FREQUENCY: the grammar of robfig/cron, and the instants that it means.

The page that the contract links (pkg.go.dev/github.com/robfig/cron, "CRON Expression Format") is that of v1: six fields,
seconds first, of which the last, day of week, may be left out; ``?``, names, ranges, steps and lists; predefined schedules;
``@every`` with a Go duration. All instants are UTC. Pure: the clock comes in as a value.

Two rules of the original that surprise: day of month and day of week are joined by *or* where both are restricted, and a
field counts as unrestricted as soon as one item of its list begins with ``*`` or ``?`` (its "star bit"), ``*/2`` too; only
v3 changed that. The zone prefix ``TZ=`` came later as well. Where the original takes a slip for something (``1,,2``,
``*-5``, ``@every -1h``), it is refused here: a backup should not run by a typing error.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from itertools import product

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST_GAP_YEARS = 40
"""29 February on one given weekday, across a year like 2100 that has none; everything else comes back sooner."""
_LONGEST_DURATION_SECONDS = (2**63 - 1) // 10**9
"""A Go duration is a signed 64-bit number of nanoseconds: 292 years."""
_TIMES_IN_WORDS = 4
"""A day with more times than this is described by its fields."""


class ScheduleError(ValueError):
    """A schedule that can't be; the message names the field, the text, and what would be right."""


@dataclass(frozen=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = f" or {self.names[0][:3].upper()} to {self.names[-1][:3].upper()}" if self.names else ""
        return f"{self.name}: {self.low} to {self.high}{names}"


_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_FIELDS = (
    _Field("seconds", 0, 59),
    _Field("minutes", 0, 59),
    _Field("hours", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 6, _DAYS),
)
_PREDEFINED = {
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *",
    "@midnight": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}
_NANOSECONDS = {
    "h": 3_600_000_000_000,
    "m": 60_000_000_000,
    "s": 1_000_000_000,
    "ms": 1_000_000,
    "us": 1_000,
    "µs": 1_000,  # the micro sign
    "μs": 1_000,  # the Greek letter
    "ns": 1,
}
_GO_PIECE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(h|ms|us|µs|μs|ns|m|s)")


@dataclass(frozen=True)
class DayRule:
    """On which days of its months a schedule is due, without the star bits' riddles; None means unrestricted."""

    days_of_month: frozenset[int] | None
    days_of_week: frozenset[int] | None
    either: bool
    """Both are restricted, and one of them is enough."""


@dataclass(frozen=True)
class CronSchedule:
    """Six sets of numbers (Sunday is 0); ``any_day_of_month``, ``any_day_of_week`` are the star bits of their fields."""

    seconds: frozenset[int]
    minutes: frozenset[int]
    hours: frozenset[int]
    days_of_month: frozenset[int]
    months: frozenset[int]
    days_of_week: frozenset[int]
    any_day_of_month: bool
    any_day_of_week: bool

    def fires_on(self, day: date) -> bool:
        """Whether any instant of a day is due."""
        if day.month not in self.months:
            return False
        by_month = day.day in self.days_of_month
        by_week = day.isoweekday() % 7 in self.days_of_week
        return by_month and by_week if self.any_day_of_month or self.any_day_of_week else by_month or by_week

    def day_rule(self) -> DayRule:
        """The same as `fires_on` says, in its plainest form."""
        days = None if len(self.days_of_month) == 31 else self.days_of_month
        weekdays = None if len(self.days_of_week) == 7 else self.days_of_week
        if self.any_day_of_month or self.any_day_of_week:
            return DayRule(days, weekdays, either=False)
        if days is None or weekdays is None:
            return DayRule(None, None, either=False)
        if not _month_has_day(self.months, days):
            return DayRule(None, weekdays, either=False)
        return DayRule(days, weekdays, either=True)

    def next_after(self, instant: datetime) -> datetime | None:
        """The first instant due strictly after ``instant`` (aware); None if the calendar ends before (year 9999)."""
        return self._nearest(_utc(instant), forwards=True)

    def last_at_or_before(self, instant: datetime) -> datetime | None:
        """The last instant due at or before ``instant`` (aware); None if the calendar begins after it (year 1)."""
        return self._nearest(_utc(instant), forwards=False)

    def _nearest(self, instant: datetime, *, forwards: bool) -> datetime | None:
        """Day by day to the first one that fits, then the first fitting time within it."""
        day, one_day = instant.date(), timedelta(days=1 if forwards else -1)
        while abs(day.year - instant.year) <= _LONGEST_GAP_YEARS:
            if self.fires_on(day):
                for candidate in self._instants_of(day, instant, forwards=forwards):
                    if candidate > instant if forwards else candidate <= instant:
                        return candidate
            try:
                day += one_day
                while day.month not in self.months:
                    # To the month's far edge and one step over it.
                    edge = day.replace(day=28) + timedelta(days=4) if forwards else day
                    day = edge.replace(day=1) if forwards else edge.replace(day=1) + one_day
            except OverflowError:
                return None
        return None

    def _instants_of(self, day: date, instant: datetime, *, forwards: bool) -> Iterator[datetime]:
        """The due instants of a day in order (or backwards), without the hours and minutes on the wrong side of ``instant``."""
        is_today = day == instant.date()
        for hour in sorted(self.hours, reverse=not forwards):
            if is_today and (hour < instant.hour if forwards else hour > instant.hour):
                continue
            is_now = is_today and hour == instant.hour
            for minute in sorted(self.minutes, reverse=not forwards):
                if is_now and (minute < instant.minute if forwards else minute > instant.minute):
                    continue
                for second in sorted(self.seconds, reverse=not forwards):
                    yield datetime(day.year, day.month, day.day, hour, minute, second, tzinfo=UTC)


@dataclass(frozen=True)
class EverySchedule:
    """Every so many seconds, counted from the Unix epoch, so that a restart does not shift it.

    The original counts from the start of its process, which would let every restart put a backup off.
    """

    interval_seconds: int

    def next_after(self, instant: datetime) -> datetime | None:
        """The first instant due strictly after ``instant`` (aware); None if the calendar ends before (year 9999)."""
        return self._at((_utc(instant) - _EPOCH) // timedelta(seconds=self.interval_seconds) + 1)

    def last_at_or_before(self, instant: datetime) -> datetime | None:
        """The last instant due at or before ``instant`` (aware); None if the calendar begins after it (year 1)."""
        return self._at((_utc(instant) - _EPOCH) // timedelta(seconds=self.interval_seconds))

    def _at(self, number: int) -> datetime | None:
        try:
            return _EPOCH + number * timedelta(seconds=self.interval_seconds)
        except OverflowError:
            return None


Schedule = CronSchedule | EverySchedule


def parse_schedule(text: str) -> Schedule:
    """Read a schedule; raises `ScheduleError` for what is none, and for one that would never be due."""
    stripped = text.strip()
    if stripped.startswith(("TZ=", "CRON_TZ=")):
        raise ScheduleError(f"{text!r}: there is no time zone in this grammar; write the fields alone, they are UTC")
    if stripped.partition(" ")[0] == "@every":
        return _parse_every(stripped)
    if stripped.startswith("@"):
        if stripped not in _PREDEFINED:
            raise ScheduleError(f"{text!r} is not a schedule; there are {', '.join(_PREDEFINED)} and '@every 1h30m'")
        stripped = _PREDEFINED[stripped]
    items = stripped.split()
    if len(items) == 5:
        items.append("*")
    if len(items) != 6:
        raise ScheduleError(
            f"{text!r} has {len(items)} fields; there are six: seconds, minutes, hours, day of month, month, day of week, "
            "such as '0 0 0 * * *' for every midnight"
        )
    sets = [_parse_field(item, field) for item, field in zip(items, _FIELDS, strict=True)]
    (seconds, _), (minutes, _), (hours, _), (days, any_day), (months, _), (weekdays, any_weekday) = sets
    if (any_day or any_weekday) and not _month_has_day(months, days):
        raise ScheduleError(
            f"day of month {items[3]!r} with month {items[4]!r}: never due, as no such month has such a day; "
            "February has 29 at most, April, June, September and November have 30"
        )
    return CronSchedule(seconds, minutes, hours, days, months, weekdays, any_day, any_weekday)


def _parse_every(text: str) -> EverySchedule:
    """A Go duration in whole seconds, rounded down, at least one, as in the original."""
    duration = text.removeprefix("@every").strip()
    unsigned = duration.removeprefix("+")
    pieces: list[tuple[str, str]] = _GO_PIECE.findall(unsigned)
    if unsigned != "0" and (not pieces or "".join(number + unit for number, unit in pieces) != unsigned):
        raise ScheduleError(
            f"@every {duration!r} is not a duration; write numbers with h, m, s, ms, us or ns, such as 1h30m, 90s or 1.5h"
        )
    nanoseconds = sum(int(Fraction(number) * _NANOSECONDS[unit]) for number, unit in pieces)
    seconds = max(1, nanoseconds // 10**9)
    if seconds > _LONGEST_DURATION_SECONDS:
        raise ScheduleError(f"@every {duration!r} is too long; a duration of Go ends at 292 years (2562047h)")
    return EverySchedule(seconds)


def _month_has_day(months: frozenset[int], days: frozenset[int]) -> bool:
    """Whether there is any date with one of the months and one of the days; 2000 is a leap year."""
    return any((date(2000 + month // 12, month % 12 + 1, 1) - timedelta(days=1)).day >= min(days) for month in months)


def _parse_field(text: str, field: _Field) -> tuple[frozenset[int], bool]:
    """The numbers of a field and its star bit."""
    numbers: set[int] = set()
    has_star = False
    for item in text.split(","):
        item_numbers, is_star = _parse_item(item, text, field)
        numbers |= item_numbers
        has_star |= is_star
    return frozenset(numbers), has_star


def _parse_item(item: str, text: str, field: _Field) -> tuple[set[int], bool]:
    """``*``, ``?``, ``N``, ``N-M``, each with an optional ``/STEP``; ``N/STEP`` means from N to the field's end."""
    span, slash, step_text = item.partition("/")
    low_text, dash, high_text = span.partition("-")
    is_star = low_text in ("*", "?")
    if not item:
        raise _wrong(field, text, "an item of its list is empty")
    if is_star and dash:
        raise _wrong(field, text, f"{span!r} is no range")
    if is_star:
        low, high = field.low, field.high
    else:
        low = _number(low_text, text, field)
        high = _number(high_text, text, field) if dash else field.high if slash else low
    if slash and not re.fullmatch(r"[0-9]{1,9}", step_text):
        raise _wrong(field, text, f"the step {step_text!r} is no number")
    step = int(step_text) if slash else 1
    if step == 0:
        raise _wrong(field, text, "a step of 0 would never move on")
    if low > high:
        raise _wrong(field, text, f"the range {span!r} runs backwards; write two of them, with a comma")
    return set(range(low, high + 1, step)), is_star


def _number(text: str, whole: str, field: _Field) -> int:
    names = [name[:3].upper() for name in field.names]
    if text.upper() in names:
        return names.index(text.upper()) + field.low
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise _wrong(field, whole, f"{text!r} is no number" + (" and no name" if names else ""))
    number = int(text)
    if not field.low <= number <= field.high:
        raise _wrong(field, whole, f"{number} is out of range")
    return number


def _wrong(field: _Field, text: str, why: str) -> ScheduleError:
    return ScheduleError(
        f"{field.name} {text!r}: {why} ({field}; *, ?, N, N-M, each with /STEP, and lists with commas)"
    )


def _utc(instant: datetime) -> datetime:
    if instant.tzinfo is None:
        raise ValueError(f"{instant} has no time zone")
    return instant.astimezone(UTC)


def upcoming(schedule: Schedule, instant: datetime, count: int) -> list[datetime]:
    """The next ``count`` due instants after ``instant``; fewer only where the calendar ends."""
    found: list[datetime] = []
    following = schedule.next_after(instant)
    while following is not None and len(found) < count:
        found.append(following)
        following = schedule.next_after(following)
    return found


def in_words(schedule: Schedule) -> str:
    """The schedule in English, such as "every day at 00:00:00 UTC"; different instants never read the same."""
    if isinstance(schedule, EverySchedule):
        return f"every {_duration_in_words(schedule.interval_seconds)}, counted from 1970-01-01 00:00:00 UTC"
    return f"{_days_in_words(schedule)} at {_times_in_words(schedule)} UTC"


def _duration_in_words(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    return " ".join(f"{number} {unit}" for number, unit in ((hours, "h"), (minute, "min"), (second, "s")) if number)


def _times_in_words(schedule: CronSchedule) -> str:
    if len(schedule.hours) * len(schedule.minutes) * len(schedule.seconds) <= _TIMES_IN_WORDS:
        times = product(sorted(schedule.hours), sorted(schedule.minutes), sorted(schedule.seconds))
        return _listed([f"{hour:02}:{minute:02}:{second:02}" for hour, minute, second in times])
    numbers = (schedule.seconds, schedule.minutes, schedule.hours)
    return " of ".join(_runs(these, field) for these, field in zip(numbers, _FIELDS[:3], strict=True))


def _days_in_words(schedule: CronSchedule) -> str:
    rule = schedule.day_rule()
    months = _runs(schedule.months, _FIELDS[4])
    in_months = "" if len(schedule.months) == 12 else f" in {months}"
    month_days = f"on {_runs(rule.days_of_month, _FIELDS[3])} of {months}" if rule.days_of_month else ""
    week_days = _runs(rule.days_of_week, _FIELDS[5]) if rule.days_of_week else ""
    if month_days and week_days:
        joined = f"{month_days} and also every {week_days}{in_months}"
        return joined if rule.either else f"{month_days}, but only if it is {week_days.replace(' and ', ' or ')},"
    return month_days or f"every {week_days or 'day'}{in_months}"


def _runs(numbers: frozenset[int], field: _Field) -> str:
    """A set of numbers as a list of runs: "minutes 0, 15, 30 and 45", "Monday to Friday", "every hour"."""
    unit = "day" if field.name == "day of month" else field.name.removesuffix("s")
    if len(numbers) == field.high - field.low + 1:
        return f"every {unit}"
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(number) for number in range(field.low, field.high + 1)] if not field.names else list(field.names)
    listed = _listed(
        [" to ".join(words[number - field.low] for number in dict.fromkeys((run[0], run[-1]))) for run in runs]
    )
    return listed if field.names else f"{unit}{'s' if len(numbers) > 1 else ''} {listed}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
