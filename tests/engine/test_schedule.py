"""BACKUP_FREQUENCY means what robfig/cron's page says, proven against a second evaluation that knows only that page."""

import dataclasses
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athena_backup.schedule import CronSchedule, EverySchedule, ScheduleError, in_words, parse_schedule, upcoming

NOW = datetime(2026, 11, 23, 18, 17, 5, tzinfo=UTC)
LIMITS = {"second": (0, 59), "minute": (0, 59), "hour": (0, 23), "dom": (1, 31), "month": (1, 12), "dow": (0, 6)}
NAMES = {
    "month": ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    "dow": ["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
}


# --- The second evaluation: from the page's text, a predicate over one instant, and the plainest of searches. ---------


def matches_field(text: str, kind: str, value: int) -> bool:
    low, high = LIMITS[kind]

    def number(word: str) -> int:
        names = NAMES.get(kind, [])
        return names.index(word.lower()) + low if word.lower() in names else int(word)

    for item in text.split(","):
        head, _, step = item.partition("/")
        if head in "*?":
            first, last = low, high
        elif "-" in head:
            first, last = (number(word) for word in head.split("-"))
        else:
            first = number(head)
            last = high if step else first
        if first <= value <= last and (value - first) % int(step or 1) == 0:
            return True
    return False


def is_due(text: str, at: datetime) -> bool:
    second, minute, hour, dom, month, dow = text.split()
    values = {"second": at.second, "minute": at.minute, "hour": at.hour, "month": at.month}
    for field, kind in ((second, "second"), (minute, "minute"), (hour, "hour"), (month, "month")):
        if not matches_field(field, kind, values[kind]):
            return False
    day = matches_field(dom, "dom", at.day)
    weekday = matches_field(dow, "dow", (at.weekday() + 1) % 7)
    starred = any(re.match(r"[*?]", item) for item in f"{dom},{dow}".split(","))
    return (day and weekday) if starred else (day or weekday)


def item(kind: str) -> st.SearchStrategy[str]:
    low, high = LIMITS[kind]
    one = st.integers(low, high).map(str)
    if kind in NAMES:
        one |= st.sampled_from(NAMES[kind]).flatmap(lambda name: st.sampled_from([name, name.upper(), name.title()]))
    span = st.tuples(st.integers(low, high), st.integers(low, high)).map(lambda pair: f"{min(pair)}-{max(pair)}")
    step = st.tuples(st.sampled_from(["*", "?"]) | one | span, st.integers(1, high)).map(
        lambda pair: f"{pair[0]}/{pair[1]}"
    )
    return st.sampled_from(["*", "?"]) | one | span | step


def field(kind: str) -> st.SearchStrategy[str]:
    return st.lists(item(kind), min_size=1, max_size=3).map(",".join)


EXPRESSIONS = st.tuples(*(field(kind) for kind in LIMITS)).map(" ".join)
INSTANTS = st.datetimes(datetime(2023, 1, 1), datetime(2029, 1, 1)).map(lambda naive: naive.replace(tzinfo=UTC))  # noqa: DTZ001


def is_due_on(text: str, day: date) -> bool:
    _, _, _, dom, month, dow = text.split()
    return is_due(f"* * * {dom} {month} {dow}", datetime.combine(day, time(), UTC))


def times_of(text: str) -> list[time]:
    second, minute, hour, *_ = text.split()
    return [
        time(*clock, tzinfo=UTC)
        for clock in product(
            [n for n in range(24) if matches_field(hour, "hour", n)],
            [n for n in range(60) if matches_field(minute, "minute", n)],
            [n for n in range(60) if matches_field(second, "second", n)],
        )
    ]


def search(text: str, start: datetime, step_days: int, is_wanted: Callable[[datetime], bool]) -> datetime:
    """The wanted instant nearest to ``start``, by a look at every day in one direction."""
    times = times_of(text)[::step_days]
    day = start.date()
    while True:
        if is_due_on(text, day):
            for at in times:
                if is_wanted(instant := datetime.combine(day, at)):
                    return instant
        day += timedelta(days=step_days)


def parsed(text: str) -> CronSchedule | None:
    try:
        schedule = parse_schedule(text)
    except ScheduleError as error:
        assert "never due" in str(error)  # noqa: PT017 - the only error that a well-formed text may give
        days = (date(2000, 1, 1) + timedelta(days=n) for n in range(366 * 2))
        assert not any(is_due_on(text, day) for day in days)
        return None
    assert isinstance(schedule, CronSchedule)
    return schedule


# --- Properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(EXPRESSIONS, INSTANTS)
def test_every_second_of_a_stretch_is_due_exactly_if_the_page_says_so(text: str, start: datetime) -> None:
    schedule = parsed(text)
    if schedule is None:
        return
    start = start.replace(microsecond=0)
    end = start + timedelta(minutes=5)
    due = {start + timedelta(seconds=n) for n in range(1, 301) if is_due(text, start + timedelta(seconds=n))}
    found = set()
    instant = schedule.next_after(start)
    while instant is not None and instant <= end:
        found.add(instant)
        instant = schedule.next_after(instant)
    assert found == due


@settings(max_examples=300)
@given(EXPRESSIONS, INSTANTS)
def test_the_neighbours_of_an_instant_are_those_that_a_look_at_every_day_finds(text: str, start: datetime) -> None:
    schedule = parsed(text)
    if schedule is None:
        return
    assert schedule.next_after(start) == search(text, start, 1, lambda instant: instant > start)
    assert schedule.last_at_or_before(start) == search(text, start, -1, lambda instant: instant <= start)


@settings(max_examples=200)
@given(EXPRESSIONS | st.integers(1, 10_000_000).map(lambda seconds: f"@every {seconds}s"), INSTANTS)
def test_looking_back_is_the_inverse_of_looking_ahead(text: str, start: datetime) -> None:
    schedule = parse_schedule(text) if text.startswith("@") else parsed(text)
    if schedule is None:
        return
    following = schedule.next_after(start)
    assert following is not None
    assert following > start
    assert schedule.last_at_or_before(following) == following
    before = schedule.last_at_or_before(following - timedelta(microseconds=1))
    assert before is not None
    assert before <= start
    assert schedule.next_after(before) == following


@settings(max_examples=100)
@given(st.integers(1, 10_000_000), INSTANTS)
def test_every_counts_from_the_epoch_whenever_it_is_asked(seconds: int, start: datetime) -> None:
    following = parse_schedule(f"@every {seconds}s").next_after(start)
    assert following is not None
    assert int(following.timestamp()) % seconds == 0
    assert timedelta(0) < following - start <= timedelta(seconds=seconds)


@settings(max_examples=200)
@given(EXPRESSIONS, st.sampled_from(list(LIMITS)), st.data())
def test_schedules_that_read_the_same_are_due_at_the_same_instants(text: str, kind: str, data: st.DataObject) -> None:
    items = text.split()
    items[list(LIMITS).index(kind)] = data.draw(field(kind))
    one, other = parsed(text), parsed(" ".join(items))
    if one is None or other is None:
        return
    if in_words(one) == in_words(other):
        assert (one.seconds, one.minutes, one.hours) == (other.seconds, other.minutes, other.hours)
        days = [date(2024, 1, 1) + timedelta(days=n) for n in range(366 * 4)]
        assert [one.fires_on(day) for day in days] == [other.fires_on(day) for day in days]


@settings(max_examples=300)
@given(
    st.text(max_size=20)
    | st.text("0123456789*?/-,@ amonjevry", max_size=30)
    | st.text("0159hmsun.+", max_size=9).map("@every ".__add__)
)
def test_any_text_is_a_schedule_or_refused_in_words(text: str) -> None:
    try:
        schedule = parse_schedule(text)
    except ScheduleError as error:
        assert str(error)  # noqa: PT017 - any other exception fails the test
    else:
        assert schedule.next_after(NOW) is not None


# --- Examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 0 0 * * *", ["2026-11-24 00:00:00", "2026-11-25 00:00:00"]),
        ("@daily", ["2026-11-24 00:00:00", "2026-11-25 00:00:00"]),
        ("@midnight", ["2026-11-24 00:00:00", "2026-11-25 00:00:00"]),
        ("@hourly", ["2026-11-23 19:00:00", "2026-11-23 20:00:00"]),
        ("@weekly", ["2026-11-29 00:00:00", "2026-12-06 00:00:00"]),
        ("@monthly", ["2026-12-01 00:00:00", "2027-01-01 00:00:00"]),
        ("@yearly", ["2027-01-01 00:00:00", "2028-01-01 00:00:00"]),
        ("@annually", ["2027-01-01 00:00:00", "2028-01-01 00:00:00"]),
        ("30 15 2 ? * MON-FRI", ["2026-11-24 02:15:30", "2026-11-25 02:15:30"]),
        ("0 0 0 29 feb ?", ["2028-02-29 00:00:00", "2032-02-29 00:00:00"]),
        ("0 0 12 13 * Fri", ["2026-11-27 12:00:00", "2026-12-04 12:00:00"]),
        ("0 0 12 */31 * 1", ["2027-02-01 12:00:00", "2027-03-01 12:00:00"]),
        ("5/20 * * * * *", ["2026-11-23 18:17:25", "2026-11-23 18:17:45"]),
        ("0 0 0 */2 * MON", ["2026-12-07 00:00:00", "2026-12-21 00:00:00"]),
        ("0 0 0 29 2 */7", ["2032-02-29 00:00:00", "2060-02-29 00:00:00"]),
        ("0 0 0 30 2 MON", ["2027-02-01 00:00:00", "2027-02-08 00:00:00"]),
        ("0 0 0 1-31 * MON", ["2026-11-24 00:00:00", "2026-11-25 00:00:00"]),
        ("0 0 0 ? * FRI/1", ["2026-11-27 00:00:00", "2026-11-28 00:00:00"]),
        ("0 10-50/20 0 1,*/31 jAn-Feb ?", ["2027-01-01 00:10:00", "2027-01-01 00:30:00"]),
        ("0 0 * * *", ["2026-11-23 19:00:00", "2026-11-23 20:00:00"]),
        ("  0 0\t0 * * *  ", ["2026-11-24 00:00:00", "2026-11-25 00:00:00"]),
        ("0 0 0 1 1", ["2027-01-01 00:00:00", "2028-01-01 00:00:00"]),
        ("@every 1h30m", ["2026-11-23 19:30:00", "2026-11-23 21:00:00"]),
        ("@every 1.5m", ["2026-11-23 18:18:00", "2026-11-23 18:19:30"]),
        ("@every 1500ms", ["2026-11-23 18:17:06", "2026-11-23 18:17:07"]),
        ("@every +1h0.5m1.s.5s", ["2026-11-23 19:01:51", "2026-11-23 20:02:22"]),
        ("@every 2000000us", ["2026-11-23 18:17:06", "2026-11-23 18:17:08"]),
    ],
)
def test_each_form_of_the_grammar(text: str, expected: list[str]) -> None:
    assert [f"{at:%Y-%m-%d %H:%M:%S}" for at in upcoming(parse_schedule(text), NOW, 2)] == expected


@pytest.mark.parametrize("weekday", range(7))
def test_a_leap_day_on_one_weekday_is_found_over_four_hundred_years(weekday: int) -> None:
    schedule = parse_schedule("0 0 0 29 2 */7")
    assert isinstance(schedule, CronSchedule)
    schedule = dataclasses.replace(schedule, days_of_week=frozenset({weekday}))
    leap_days = [date(year, 2, 29) for year in range(1904, 2400) if year % 4 == 0 and (year % 100 or year % 400 == 0)]
    expected = [day for day in leap_days if day.isoweekday() % 7 == weekday]
    found = upcoming(schedule, datetime(1900, 1, 1, tzinfo=UTC), len(expected))
    assert [instant.date() for instant in found] == expected
    last = datetime(2399, 12, 31, tzinfo=UTC)
    for day in reversed(expected):
        before = schedule.last_at_or_before(last)
        assert before is not None
        assert before.date() == day
        last = before - timedelta(seconds=1)


@pytest.mark.parametrize("text", ["0 0 0 29 2 */7", "* * * * * *", "@every 1h30m"])
def test_where_the_calendar_ends_there_is_no_instant(text: str) -> None:
    schedule = parse_schedule(text)
    assert schedule.next_after(datetime.max.replace(tzinfo=UTC)) is None
    assert upcoming(schedule, datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), 1) == []


@pytest.mark.parametrize("text", ["0 0 0 * * *", "@every 1h"])
def test_an_instant_of_another_zone_is_taken_as_what_it_is_and_one_without_is_refused(text: str) -> None:
    schedule = parse_schedule(text)
    elsewhere = NOW.astimezone(timezone(timedelta(hours=-7)))
    assert schedule.next_after(elsewhere) == schedule.next_after(NOW)
    assert schedule.last_at_or_before(elsewhere) == schedule.last_at_or_before(NOW)
    with pytest.raises(ValueError, match="no time zone"):
        schedule.next_after(NOW.replace(tzinfo=None))
    with pytest.raises(ValueError, match="no time zone"):
        schedule.last_at_or_before(NOW.replace(tzinfo=None))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("60 0 0 * * *", "seconds '60': 60 is out of range (seconds: 0 to 59"),
        ("0 60 0 * * *", "minutes '60': 60 is out of range (minutes: 0 to 59"),
        ("0 0 24 * * *", "hours '24': 24 is out of range (hours: 0 to 23"),
        ("0 0 0 0 * *", "day of month '0': 0 is out of range (day of month: 1 to 31"),
        ("0 0 0 * 13 *", "month '13': 13 is out of range (month: 1 to 12 or JAN to DEC"),
        ("0 0 0 * * 7", "day of week '7': 7 is out of range (day of week: 0 to 6 or SUN to SAT"),
        ("0 0 0 * * FUN", "day of week 'FUN': 'FUN' is no number and no name"),
        ("0 0 0 * JANUARY *", "month 'JANUARY': 'JANUARY' is no number and no name"),
        ("0 0 0 L * ?", "day of month 'L': 'L' is no number"),
        ("5-1 0 0 * * *", "seconds '5-1': the range '5-1' runs backwards"),
        ("0 0 0 * * FRI-MON", "day of week 'FRI-MON': the range 'FRI-MON' runs backwards"),
        ("*/0 0 0 * * *", "seconds '*/0': a step of 0"),
        ("*/x 0 0 * * *", "seconds '*/x': the step 'x' is no number"),
        ("1//2 0 0 * * *", "seconds '1//2': the step '/2'"),
        ("1-2-3 0 0 * * *", "seconds '1-2-3': '2-3' is no number"),
        ("*-5 0 0 * * *", "seconds '*-5': '*-5' is no range"),
        ("-1 0 0 * * *", "seconds '-1'"),
        ("+1 0 0 * * *", "seconds '+1'"),
        ("1,,2 0 0 * * *", "seconds '1,,2': an item of its list is empty"),
        ("0 0 0 * * MON,", "day of week 'MON,': an item of its list is empty"),
        ("٣ 0 0 * * *", "seconds '٣'"),
        ("0 0 *", "has 3 fields; there are six"),
        ("0 0 0 * * * 2026", "has 7 fields; there are six"),
        ("", "has 0 fields; there are six"),
        ("0 0 0 30 2 ?", "day of month '30' with month '2': never due"),
        ("0 0 0 31 4,6,9,11 *", "day of month '31' with month '4,6,9,11': never due"),
        ("0 0 0 30 FEB */2", "day of month '30' with month 'FEB': never due"),
        ("TZ=UTC 0 0 0 * *", "no time zone in this grammar"),
        ("CRON_TZ=Asia/Tokyo 0 0 0 * * *", "no time zone in this grammar"),
        ("@fortnightly", "@weekly"),
        ("@Daily", "@daily"),
        ("@every", "'' is not a duration"),
        ("@every1h", "'@every 1h30m'"),
        ("@every soon", "'soon' is not a duration"),
        ("@every 1d", "'1d' is not a duration"),
        ("@every 5", "'5' is not a duration"),
        ("@every -1h", "'-1h' is not a duration"),
        ("@every ٣s", "'٣s' is not a duration"),
        ("@every 99999999h", "292 years"),
    ],
)
def test_what_is_no_schedule_is_refused_with_field_text_and_remedy(text: str, named: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(named)):
        parse_schedule(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 0 0 * * *", "every day at 00:00:00 UTC"),
        ("@hourly", "every day at second 0 of minute 0 of every hour UTC"),
        ("0 30 2 * * MON-FRI", "every Monday to Friday at 02:30:00 UTC"),
        ("0 0 0,12 1,15 * ?", "on days 1 and 15 of every month at 00:00:00 and 12:00:00 UTC"),
        ("0 0 3 1 */6 *", "on day 1 of January and July at 03:00:00 UTC"),
        ("0 0 3 1 * SUN", "on day 1 of every month and also every Sunday at 03:00:00 UTC"),
        ("0 0 3 13 * */5", "on day 13 of every month, but only if it is Sunday or Friday, at 03:00:00 UTC"),
        ("0 0 3 30 2 MON", "every Monday in February at 03:00:00 UTC"),
        ("0 0 3 1-31 JUN MON", "every day in June at 03:00:00 UTC"),
        ("0 */15 * * * *", "every day at second 0 of minutes 0, 15, 30 and 45 of every hour UTC"),
        ("@every 90s", "every 1 min 30 s, counted from 1970-01-01 00:00:00 UTC"),
    ],
)
def test_a_schedule_in_words(text: str, words: str) -> None:
    assert in_words(parse_schedule(text)) == words


@pytest.mark.parametrize("duration", ["1ms", "0", "0s", "999999us", "1.9s"])
def test_every_is_rounded_down_to_whole_seconds_and_at_least_one(duration: str) -> None:
    assert parse_schedule(f"@every {duration}") == EverySchedule(1)
