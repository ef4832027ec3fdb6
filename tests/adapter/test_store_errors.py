"""What a caller is told of a store that fails: never that the request was at fault."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from adapter.app import PREFIX, create_app
from athena_backup.errors import AbsentError, AthenaError, DeniedError, FinalError, UnavailableError, UnusableSetError
from athena_backup.settings import Settings
from athena_backup.store import Store
from blocks.keys import hash_of

RESTORE = {"timestamp": "2023-02-02t16-00-00", "sourceNamespace": "app"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeniedError("the store's keys are wrong"), 503),
        (UnavailableError("the store is gone"), 503),
        (FinalError("the store's directory does not exist"), 503),
        (UnusableSetError("that set can't be restored"), 422),
        (AbsentError("there is no such set"), 404),
    ],
)
def test_a_restore_from_a_store_that_fails_is_refused_as_what_it_is(
    error: AthenaError, code: int, tmp_path: Path
) -> None:
    def store() -> Store:
        raise error

    hashes = [hash_of("key")]
    app = create_app(Settings(athena_home=tmp_path), hashes)
    app.state.service = SimpleNamespace(namespace="app", key_hashes=hashes, store=store)

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(f"{PREFIX}/ondemandrestore", json=RESTORE, headers={"Authorization": "key"})

    answer = asyncio.run(asked())
    assert (answer.status_code, answer.json()) == (code, {"code": code, "message": str(error)})
