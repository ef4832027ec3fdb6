"""Whatever the writer of a volume lets through, the reader takes: a limit on one side alone is a Success without a restore."""

from pathlib import Path

import pytest

from athena_backup.errors import FinalError
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_pax import EXTENDED_LIMIT_BYTES, FILE, Member, header
from athena_backup.volume_read import verify_volume
from athena_backup.volume_walk import DEPTH_LIMIT


def test_a_repository_as_deep_as_the_walk_goes_can_be_restored(tmp_path: Path, local_store: LocalStore) -> None:
    root = tmp_path / "live"
    repository = root.joinpath(*["d"] * (DEPTH_LIMIT - 1))
    (repository / "refs").mkdir(parents=True)
    (repository / "objects" / "info" / "commit-graphs").mkdir(parents=True)
    (repository / "HEAD").touch()
    (repository / "objects" / "info" / "commit-graphs" / "commit-graph-chain").touch()
    set_id = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
    component = write_volume(Volume("gitserver", root), local_store, set_id, "run", Operation())
    verify_volume(component, local_store, Operation())


def test_attributes_that_no_restore_would_read_fail_the_component() -> None:
    few = {f"user.{number}": b"x" * (64 << 10) for number in range(250)}
    assert len(header(Member(b"a", FILE, 0o600, 0, 0, 0, xattrs=few))) < EXTENDED_LIMIT_BYTES
    with pytest.raises(FinalError, match="16 MiB"):
        header(Member(b"a", FILE, 0o600, 0, 0, 0, xattrs={f"user.{number}": few["user.0"] for number in range(260)}))
