"""What every process of the service is started with."""

import ssl
from pathlib import Path

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
    assert service_environment(Settings(), "http://127.0.0.1:1/api", own_server=False)["MALLOC_ARENA_MAX"] == expected


def test_clients_of_our_own_prefect_server_read_one_authority_and_those_of_another_what_its_operator_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PREFECT_API_SSL_CERT_FILE", raising=False)
    settings = Settings(athena_home=tmp_path)

    def file(*, own_server: bool) -> str | None:
        environment = service_environment(settings, "http://127.0.0.1:1/api", own_server=own_server)
        return environment.get("PREFECT_API_SSL_CERT_FILE")

    assert file(own_server=False) is None
    assert len(ssl.create_default_context(cafile=file(own_server=True)).get_ca_certs()) == 1
    monkeypatch.setenv("PREFECT_API_SSL_CERT_FILE", "/theirs.pem")
    assert file(own_server=True) == file(own_server=False) == "/theirs.pem"
