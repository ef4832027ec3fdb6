"""What every process of the service is started with."""

import pytest

from athena_backup.settings import Settings
from deployments.service import service_environment


@pytest.mark.parametrize(("given", "expected"), [(None, "2"), ("7", "7")])
def test_the_c_library_is_kept_to_few_heaps_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if given is not None:
        monkeypatch.setenv("MALLOC_ARENA_MAX", given)
    assert service_environment(Settings(), "http://127.0.0.1:1/api")["MALLOC_ARENA_MAX"] == expected
