"""What a store is not opened with: refused before anything is sent, and without telling a secret."""

from collections.abc import Callable

import pytest

from athena_backup.errors import FinalError
from athena_backup.store import Store
from athena_backup.store.clients import Keys, Way, open_azure, open_gcs, open_s3

KEYS = Keys("an-access-key", "hunter2")


@pytest.mark.parametrize(
    ("opened", "named"),
    [
        (lambda: open_s3("bucket", "https://u:hunter2@s3", "r", KEYS), "holds a user, password or signature"),
        (lambda: open_s3("bucket", "https://s3/?sig=hunter2", "r", KEYS), "holds a user, password or signature"),
        (lambda: open_s3("bucket", "s3.example.com", "r", KEYS), "'s3.example.com' is no address"),
        (lambda: open_s3("bucket/folder", "https://s3", "r", KEYS), "'bucket/folder' is no name of a bucket"),
        (lambda: open_s3("", "https://s3", "r", KEYS), "'' is no name of a bucket"),
        (lambda: open_azure("a", "https://a.example.com/?sv=1&sig=hunter2", "c", "a2V5"), "password or signature"),
        (lambda: open_azure("a", "https://a.example.com", "c", "hunter2 is no base64"), "key is not base64"),
        (lambda: open_azure("a", "http://a.example.com", "c", "a2V5"), "ATHENA_STORE_ALLOW_HTTP=true"),
        (lambda: open_gcs("bucket", "hunter2"), "is no JSON object"),
        (lambda: open_gcs("bucket", '["hunter2"]'), "is no JSON object"),
    ],
)
def test_a_store_that_cannot_be_meant_is_refused(opened: Callable[[], Store], named: str) -> None:
    with pytest.raises(FinalError) as refused:
        opened()
    assert named in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_service_account_that_is_none_is_a_fault_of_the_settings_and_not_of_the_network() -> None:
    store = open_gcs(
        "bucket", '{"private_key": "hunter2", "gcs_base_url": "http://127.0.0.1:1"}', way=Way(allow_http=True)
    )
    with pytest.raises(FinalError) as refused:
        store.head("app/key")
    assert "hunter2" not in str(refused.value)


def test_http_that_is_allowed_is_read_back() -> None:
    assert open_azure("a", "http://a.example.com", "c", "a2V5", way=Way(allow_http=True)).proof == "read-back"
    assert open_azure("a", "https://a.example.com", "c", "a2V5").proof == "tls+size"
    assert open_s3("bucket", "http://s3", "r", KEYS).proof == "digest"
    assert open_s3("bucket", "https://s3", "r", KEYS, way=Way(read_back=True)).proof == "read-back"
