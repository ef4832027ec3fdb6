"""`backupurl` for each kind of store, word for word as the contract has it (section 2)."""

import pytest

from adapter.records import backup_url
from athena_backup.names import SetId
from athena_backup.store import StoreLocation
from athena_backup.store.clients import Keys, Way, open_azure, open_gcs, open_s3

SET = SetId.parse("2023-02-02t16-00-00", "app")


@pytest.mark.parametrize(
    ("location", "url"),
    [
        (
            open_s3(
                "athena-ondemand-backup", "https://s3.us-west-2.amazonaws.com", "us-west-2", Keys("k", "s")
            ).location,
            "https://s3.console.aws.amazon.com/s3/buckets/athena-ondemand-backup?region=us-west-2&prefix=app/2023-02-02t16-00-00/&showversions=false",
        ),
        (
            open_azure("acc", "https://acc.blob.core.windows.net/", "athena-ondemand-backup", "a2V5").location,
            "https://acc.blob.core.windows.net/athena-ondemand-backup/app/2023-02-02t16-00-00/",
        ),
        (
            open_gcs(
                "athena-ondemand-backup", '{"gcs_base_url": "http://127.0.0.1:1"}', way=Way(allow_http=True)
            ).location,
            "https://console.cloud.google.com/storage/browser/athena-ondemand-backup/app/2023-02-02t16-00-00",
        ),
        (StoreLocation("local", "/backup"), "/backup"),
        (StoreLocation("local", "./backup/"), "./backup/"),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_the_backupurl_of_each_kind_of_store(location: StoreLocation, url: str) -> None:
    assert backup_url(location, SET) == url
