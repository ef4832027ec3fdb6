"""What `athena-backup check` says of each thing, where it is asked by itself."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from relays import relayed

from athena_backup.errors import FinalError
from athena_backup.postgres.embedded import EmbeddedServer, binaries, embedded_server
from athena_backup.postgres.sessions import Database
from athena_backup.settings import Settings
from deployments.checkup import check_database, check_volume, findings

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def test_what_a_restore_makes_is_no_reason_to_make_it_by_hand(postgres: EmbeddedServer, tmp_path: Path) -> None:
    """On the worst day the databases are not there yet, and the volumes are empty."""
    with pytest.raises(FinalError, match="does not exist") as refused:
        check_database(Database("asp", postgres.url("not_restored_yet")), [binaries()])
    assert refused.value.next_step == "to back it up, correct its URL in ATHENA_DATABASES; a restore creates it"
    with pytest.raises(FinalError, match="is empty") as refused:
        check_volume(tmp_path, may_be_empty=False)
    assert refused.value.next_step.startswith("is it mounted? a restore fills it; ")
    (tmp_path / "lost+found").mkdir()
    with pytest.raises(FinalError, match="is empty"):
        check_volume(tmp_path, may_be_empty=False)


def test_an_address_that_leads_to_several_servers_is_told(postgres: EmbeddedServer, tmp_path: Path) -> None:
    with (
        embedded_server(tmp_path / "data") as second,
        relayed(postgres.port, second.port) as port,
        pytest.raises(FinalError, match="the address leads to several servers: name one of them"),
    ):
        check_database(Database("spread", postgres.url().set(port=port)), [binaries()])


def test_a_connection_pooler_is_told(postgres: EmbeddedServer) -> None:
    with (
        relayed(postgres.port, is_pooler=True) as port,
        pytest.raises(FinalError, match="reached through a connection pooler"),
    ):
        check_database(Database("pooled", postgres.url().set(port=port)), [binaries()])


@pytest.mark.parametrize(("frequency", "is_told"), [("0 0 * * *", True), ("0 0 0 * * *", False), ("@daily", False)])
def test_that_five_fields_begin_with_the_seconds_is_told(tmp_path: Path, frequency: str, is_told: bool) -> None:
    """Who is used to other crons would write midnight so, and get a backup every hour."""
    settings = Settings(
        athena_home=tmp_path / "home", object_store_location_local=str(tmp_path), backup_frequency=frequency
    )
    told = [one.mark for one in findings(settings, NOW) if "`0 0 0 * * *`" in one.text]
    assert told == ["note"] * is_told
