"""Names from outside are parsed in one place, and hostile ones stop there."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athena_backup.names import InvalidNameError, SetId, Timestamp, parse_component_name, parse_namespace, shortened


@given(st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31)))  # noqa: DTZ001 - made aware below
def test_a_timestamp_survives_being_written_and_read(naive: datetime) -> None:
    timestamp = Timestamp.of(naive.replace(tzinfo=UTC))
    assert Timestamp.parse(str(timestamp)) == timestamp


def test_timestamps_sort_by_time_as_their_texts_do() -> None:
    texts = ["2023-02-02t16-00-00", "2023-02-02t15-59-59", "2022-12-31t23-59-59"]
    assert [str(one) for one in sorted(Timestamp.parse(text) for text in texts)] == sorted(texts)


@pytest.mark.parametrize(
    "text",
    [
        "2023-02-02T16-00-00",
        "2023-02-30t16-00-00",
        "2023-02-02t16:00:00",
        "2023-02-02t16-00-00Z",
        " 2023-02-02t16-00-00",
        "",
        "../etc",
    ],
)
def test_what_is_no_timestamp_is_refused_with_its_text_and_a_right_one(text: str) -> None:
    with pytest.raises(InvalidNameError) as refused:
        Timestamp.parse(text)
    assert repr(text) in str(refused.value)


def test_of_what_is_very_long_an_error_quotes_the_beginning() -> None:
    for parse in (Timestamp.parse, parse_namespace, parse_component_name):
        with pytest.raises(InvalidNameError) as refused:
            parse("2023" * 15_000)
        assert "'20232023" in str(refused.value)
        assert "... (60002 characters)" in str(refused.value)
        assert len(str(refused.value)) < 400
    assert shortened("x" * 100) == "x" * 100


@pytest.mark.parametrize("text", ["..", ".", "", "a/b", "a\0b", "-a", "ä", "a" * 64, "a b", ".athena-x", "a\n"])
def test_a_name_that_could_leave_its_folder_is_refused(text: str) -> None:
    for parse in (parse_namespace, parse_component_name):
        with pytest.raises(InvalidNameError):
            parse(text)


def test_no_component_may_be_called_postgres() -> None:
    with pytest.raises(InvalidNameError, match="reserved"):
        parse_component_name("postgres")


def test_a_set_of_another_namespace_is_written_with_a_slash() -> None:
    own = SetId.parse("2023-02-02t16-00-00", "app")
    other = SetId.parse("prod/2023-02-02t16-00-00", "app")
    assert (own.namespace, other.namespace, other.prefix) == ("app", "prod", "prod/2023-02-02t16-00-00/")
    with pytest.raises(InvalidNameError):
        SetId.parse("../2023-02-02t16-00-00", "app")
