"""BACKUP_FREQUENCY means what robfig/cron's page says, proven against a second evaluation that knows only that page."""

import re
from datetime import UTC, datetime, timedelta

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


# --- The second evaluation: from the page's text, a predicate over one instant, no search of its own. -----------------


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


def parsed(text: str) -> CronSchedule | None:
    try:
        schedule = parse_schedule(text)
    except ScheduleError as error:
        assert "never due" in str(error)  # noqa: PT017 - the only error that a well-formed text may give
        return None
    assert isinstance(schedule, CronSchedule)
    return schedule


# --- Properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
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


@settings(max_examples=300, deadline=None, derandomize=True)
@given(EXPRESSIONS, INSTANTS)
def test_between_an_instant_and_the_next_one_no_day_was_skipped(text: str, start: datetime) -> None:
    schedule = parsed(text)
    if schedule is None:
        return
    following = schedule.next_after(start)
    assert following is not None
    assert following > start
    assert is_due(text, following)
    clock = following.replace(day=1, month=1)
    day = start.date() + timedelta(days=1)
    while day < following.date():
        at = datetime(day.year, day.month, day.day, clock.hour, clock.minute, clock.second, tzinfo=UTC)
        assert not is_due(text, at)
        day += timedelta(days=1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(EXPRESSIONS, INSTANTS)
def test_looking_back_is_the_inverse_of_looking_ahead(text: str, start: datetime) -> None:
    schedule = parsed(text)
    if schedule is None:
        return
    following = schedule.next_after(start)
    assert following is not None
    assert schedule.last_at_or_before(following) == following
    before = schedule.last_at_or_before(following - timedelta(microseconds=1))
    assert before is None or (before <= start and schedule.next_after(before) == following)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 10_000_000), INSTANTS)
def test_every_counts_from_the_epoch_whenever_it_is_asked(seconds: int, start: datetime) -> None:
    schedule = parse_schedule(f"@every {seconds}s")
    following = schedule.next_after(start)
    assert following is not None
    assert int(following.timestamp()) % seconds == 0
    assert timedelta(0) < following - start <= timedelta(seconds=seconds)
    assert schedule.last_at_or_before(following) == following


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
        ("0 0 0 1 1", ["2027-01-01 00:00:00", "2028-01-01 00:00:00"]),
        ("@every 1h30m", ["2026-11-23 19:30:00", "2026-11-23 21:00:00"]),
        ("@every 1.5m", ["2026-11-23 18:18:00", "2026-11-23 18:19:30"]),
        ("@every 1500ms", ["2026-11-23 18:17:06", "2026-11-23 18:17:07"]),
    ],
)
def test_each_form_of_the_grammar(text: str, expected: list[str]) -> None:
    assert [f"{at:%Y-%m-%d %H:%M:%S}" for at in upcoming(parse_schedule(text), NOW, 2)] == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("60 0 0 * * *", "seconds"),
        ("0 60 0 * * *", "minutes"),
        ("0 0 24 * * *", "hours"),
        ("0 0 0 0 * *", "day of month"),
        ("0 0 0 * 13 *", "month"),
        ("0 0 0 * * 7", "day of week"),
        ("0 0 0 * * FUN", "FUN"),
        ("0 0 0 * JANUARY *", "JANUARY"),
        ("5-1 0 0 * * *", "backwards"),
        ("*/0 0 0 * * *", "step of 0"),
        ("1//2 0 0 * * *", "seconds"),
        ("1-2-3 0 0 * * *", "seconds"),
        ("-1 0 0 * * *", "seconds"),
        ("1,,2 0 0 * * *", "seconds"),
        ("0 0 *", "six"),
        ("", "six"),
        ("0 0 0 30 2 ?", "never due"),
        ("0 0 0 31 4,6,9,11 *", "never due"),
        ("@fortnightly", "@fortnightly"),
        ("@every", "duration"),
        ("@every soon", "soon"),
        ("@every 1d", "1d"),
        ("@every 99999999h", "hundred years"),
        ("٣ 0 0 * * *", "seconds"),
    ],
)
def test_what_is_no_schedule_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(named)):
        parse_schedule(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 0 0 * * *", "at 00:00:00 every day, UTC"),
        ("0 30 2 * * MON-FRI", "at 02:30:00 on Mon to Fri, UTC"),
        ("0 0 3 1 */6 *", "at 03:00:00 on day 1 of the month in Jan, Jul, UTC"),
        ("0 0 3 1 * SUN", "at 03:00:00 on day 1 of the month or on Sun, UTC"),
        ("0 */15 * * * *", "at second 0 of minute 0, 15, 30, 45 of hour any every day, UTC"),
        ("@every 90s", "every 0:01:30 (hours:minutes:seconds), counted from the Unix epoch"),
    ],
)
def test_a_schedule_in_words(text: str, words: str) -> None:
    assert in_words(parse_schedule(text)) == words


def test_every_below_a_second_is_a_second() -> None:
    assert parse_schedule("@every 1ms") == EverySchedule(1)
