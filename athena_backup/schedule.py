"""BACKUP_FREQUENCY: the grammar of robfig/cron, and the instants that it means.

The page that the contract links (pkg.go.dev/github.com/robfig/cron, "CRON Expression Format") describes six fields, seconds
first, of which the last, day of week, may be left out; `?`, names, ranges, steps and lists; predefined schedules; and
``@every`` with a Go duration. All instants are UTC. Pure: the clock comes in as a value.

Two rules of the original that surprise: day of month and day of week are joined by *or* where both are restricted, and a
field counts as unrestricted as soon as one item of its list begins with ``*`` or ``?`` (its "star bit"), ``*/2`` too.
"""

import calendar
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SEARCH_YEARS = 8
"""29 February comes back after eight years at the latest (1896, 1904; 2096, 2104)."""


class ScheduleError(ValueError):
    """A schedule that can't be; the message names the field, the text, and what would be right."""


@dataclass(frozen=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()


_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
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
_GO_UNITS = {
    "h": Fraction(3600),
    "m": Fraction(60),
    "s": Fraction(1),
    "ms": Fraction(1, 1_000),
    "us": Fraction(1, 1_000_000),
    "µs": Fraction(1, 1_000_000),
    "μs": Fraction(1, 1_000_000),
    "ns": Fraction(1, 1_000_000_000),
}
_GO_PIECE = re.compile(r"(\d+\.?\d*|\.\d+)(h|ms|us|µs|μs|ns|m|s)")


@dataclass(frozen=True)
class CronSchedule:
    """Six sets of numbers; ``any_day_of_month`` and ``any_day_of_week`` are the star bits of their fields."""

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

    def next_after(self, instant: datetime) -> datetime | None:
        """The first instant due after ``instant``; None if there is none within eight years."""
        return _step(self, instant.astimezone(UTC), forwards=True)

    def last_at_or_before(self, instant: datetime) -> datetime | None:
        """The last instant due at or before ``instant``; None if there was none within eight years."""
        return _step(self, instant.astimezone(UTC) + timedelta(microseconds=1), forwards=False)


@dataclass(frozen=True)
class EverySchedule:
    """Every so many seconds, counted from the Unix epoch, so that a restart does not shift it.

    The original counts from the start of its process, which would let every restart put a backup off.
    """

    interval_seconds: int

    def next_after(self, instant: datetime) -> datetime | None:
        """The first instant due after ``instant``."""
        return self._at((instant - _EPOCH) // timedelta(seconds=self.interval_seconds) + 1)

    def last_at_or_before(self, instant: datetime) -> datetime | None:
        """The last instant due at or before ``instant``."""
        return self._at((instant - _EPOCH) // timedelta(seconds=self.interval_seconds))

    def _at(self, number: int) -> datetime:
        return _EPOCH + number * timedelta(seconds=self.interval_seconds)


Schedule = CronSchedule | EverySchedule


def parse_schedule(text: str) -> Schedule:
    """Read a schedule; raises `ScheduleError` for what is none, and for one that would never be due."""
    stripped = text.strip()
    if stripped.startswith("@every"):
        return _parse_every(stripped)
    if stripped.startswith("@"):
        expression = _PREDEFINED.get(stripped)
        if expression is None:
            raise ScheduleError(f"{stripped!r} is not a schedule; there are {', '.join(_PREDEFINED)} and @every 1h30m")
        stripped = expression
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
    schedule = CronSchedule(seconds, minutes, hours, days, months, weekdays, any_day, any_weekday)
    if schedule.next_after(datetime(2000, 1, 1, tzinfo=UTC)) is None:
        raise ScheduleError(f"{text!r} is never due: no month of it has such a day")
    return schedule


def _parse_every(text: str) -> EverySchedule:
    duration = text.removeprefix("@every").strip()
    pieces = _GO_PIECE.findall(duration)
    if not pieces or "".join(number + unit for number, unit in pieces) != duration:
        raise ScheduleError(f"{text!r}: {duration!r} is not a duration; write it like 1h30m or 90s")
    seconds = sum((Fraction(number) * _GO_UNITS[unit] for number, unit in pieces), Fraction(0))
    # As in the original: whole seconds, rounded down, at least one.
    whole = max(1, int(seconds))
    if whole > 100 * 366 * 86_400:
        raise ScheduleError(f"{text!r} is longer than a hundred years")
    return EverySchedule(whole)


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
    if is_star and dash:
        raise _wrong(field, text, f"{item!r} is no range")
    if is_star:
        low, high = field.low, field.high
    else:
        low = _number(low_text, text, field)
        high = _number(high_text, text, field) if dash else field.high if slash else low
    step = 1
    if slash:
        if not re.fullmatch(r"[0-9]{1,9}", step_text):
            raise _wrong(field, text, f"the step {step_text!r} is no number")
        step = int(step_text)
        if step == 0:
            raise _wrong(field, text, "a step of 0 would never move on")
    if low > high:
        raise _wrong(field, text, f"the range {span!r} runs backwards")
    return set(range(low, high + 1, step)), is_star


def _number(text: str, whole: str, field: _Field) -> int:
    if text.upper() in field.names:
        return field.names.index(text.upper()) + field.low
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise _wrong(
            field, whole, f"{text!r} is no number" + (f" or one of {', '.join(field.names)}" if field.names else "")
        )
    number = int(text)
    if not field.low <= number <= field.high:
        raise _wrong(field, whole, f"{number} is outside {field.low} to {field.high}")
    return number


def _wrong(field: _Field, text: str, why: str) -> ScheduleError:
    return ScheduleError(f"{field.name} {text!r}: {why}")


def _step(schedule: CronSchedule, instant: datetime, *, forwards: bool) -> datetime | None:
    """The nearest due instant strictly after (or before) ``instant``: the first fitting day, then the time within it."""
    day, sign = instant.date(), 1 if forwards else -1
    limit = _SEARCH_YEARS * 366
    for _ in range(limit):
        if schedule.fires_on(day):
            for candidate in _instants_of(schedule, day, instant, forwards=forwards):
                if candidate > instant if forwards else candidate < instant:
                    return candidate
        try:
            day = _next_fitting_month(schedule, day, sign)
        except OverflowError:
            return None
    return None


def _next_fitting_month(schedule: CronSchedule, day: date, sign: int) -> date:
    """The next day in a direction, over months of the schedule only."""
    day += timedelta(days=sign)
    while day.month not in schedule.months:
        if sign > 0:
            day = day.replace(day=1) + timedelta(days=calendar.monthrange(day.year, day.month)[1])
        else:
            day = day.replace(day=1) - timedelta(days=1)
    return day


def _instants_of(schedule: CronSchedule, day: date, instant: datetime, *, forwards: bool) -> Iterator[datetime]:
    """The due instants of a day in order (or backwards), those far on the wrong side of ``instant`` left out."""
    is_today = day == instant.date()
    for hour in sorted(schedule.hours, reverse=not forwards):
        if is_today and (hour < instant.hour if forwards else hour > instant.hour):
            continue
        for minute in sorted(schedule.minutes, reverse=not forwards):
            if is_today and hour == instant.hour and (minute < instant.minute if forwards else minute > instant.minute):
                continue
            for second in sorted(schedule.seconds, reverse=not forwards):
                yield datetime(day.year, day.month, day.day, hour, minute, second, tzinfo=UTC)


def upcoming(schedule: Schedule, instant: datetime, count: int) -> list[datetime]:
    """The next ``count`` due instants after ``instant``."""
    found: list[datetime] = []
    following = schedule.next_after(instant)
    while following is not None and len(found) < count:
        found.append(following)
        following = schedule.next_after(following)
    return found


def in_words(schedule: Schedule) -> str:
    """The schedule in English."""
    if isinstance(schedule, EverySchedule):
        return (
            f"every {timedelta(seconds=schedule.interval_seconds)} (hours:minutes:seconds), counted from the Unix epoch"
        )
    return f"{_time_in_words(schedule)} {_days_in_words(schedule)}, UTC"


def _time_in_words(schedule: CronSchedule) -> str:
    if len(schedule.hours) == len(schedule.minutes) == len(schedule.seconds) == 1:
        (hour,), (minute,), (second,) = schedule.hours, schedule.minutes, schedule.seconds
        return f"at {hour:02}:{minute:02}:{second:02}"
    return (
        f"at second {_numbers(schedule.seconds, _FIELDS[0])} of minute {_numbers(schedule.minutes, _FIELDS[1])}"
        f" of hour {_numbers(schedule.hours, _FIELDS[2])}"
    )


def _days_in_words(schedule: CronSchedule) -> str:
    every_month = len(schedule.days_of_month) == 31
    every_week = len(schedule.days_of_week) == 7
    months = "" if len(schedule.months) == 12 else " in " + _numbers(schedule.months, _FIELDS[4])
    month_days = f"on day {_numbers(schedule.days_of_month, _FIELDS[3])} of the month"
    week_days = f"on {_numbers(schedule.days_of_week, _FIELDS[5])}"
    are_joined_by_or = not (schedule.any_day_of_month or schedule.any_day_of_week)
    if (every_month and every_week) or (are_joined_by_or and (every_month or every_week)):
        return f"every day{months}"
    if every_month or every_week:
        return (week_days if every_month else month_days) + months
    return f"{month_days} {'or' if are_joined_by_or else 'and only if it is'} {week_days}{months}"


def _numbers(numbers: frozenset[int], field: _Field) -> str:
    """A set of numbers as a list of runs; names where the field has them."""
    if len(numbers) == field.high - field.low + 1:
        return "any"
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])

    def word(number: int) -> str:
        return field.names[number - field.low].title() if field.names else str(number)

    return ", ".join(word(run[0]) if len(run) == 1 else f"{word(run[0])} to {word(run[-1])}" for run in runs)
