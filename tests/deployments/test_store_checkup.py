"""What `check` says of a store, against an S3 server that checks signatures and enforces IAM policies (moto)."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from service import ROOT, await_true

from athena_backup.catalog import delete_set, list_sets
from athena_backup.errors import DeniedError
from athena_backup.names import SetId
from athena_backup.settings import Settings
from athena_backup.store.clients import open_s3
from athena_backup.store.local import LocalStore, initialize
from athena_backup.store.sweep import abort_uploads
from blocks.stores import bucket_access, open_store
from deployments.embedded_stores import embedded_azure, embedded_s3
from deployments.looks import Finding
from deployments.store_checkup import check_store, store_findings

BUCKET = "athena-ondemand-backup"
POLICY = json.loads(re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0])
"""The README's, word for word."""


@dataclass(frozen=True)
class Server:
    """The S3 server, and its owner's way to its buckets and users."""

    url: str

    def client(self, name: str) -> Any:
        keys = {"aws_access_key_id": "owner", "aws_secret_access_key": "owner", "region_name": "us-west-2"}
        return boto3.client(name, endpoint_url=self.url, **keys)  # type: ignore[call-overload]

    def enforce(self, *, policies: bool) -> None:
        httpx.post(f"{self.url}/moto-api/reset-auth", content=b"0" if policies else b"inf", trust_env=False)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        made = Server(f"http://127.0.0.1:{port}")

        def answers() -> bool:
            try:
                return httpx.get(f"{made.url}/moto-api/", trust_env=False).is_success
            except httpx.HTTPError:
                return False

        await_true(answers, "the S3 server")
        yield made
        process.terminate()


Given = Callable[..., Settings]


@pytest.fixture
def given(server: Server) -> Iterator[Given]:
    """The settings of a user to whom the README's policy is given, less or more some actions, on an empty bucket."""

    def give(*, without: tuple[str, ...] = (), more: tuple[str, ...] = (), **settings: object) -> Settings:
        policy = json.loads(json.dumps(POLICY))
        for statement in policy["Statement"]:
            statement["Action"] = [action for action in statement["Action"] if action not in without]
        policy["Statement"].append(
            {"Effect": "Allow", "Action": ["s3:GetBucketLocation", *more], "Resource": f"arn:aws:s3:::{BUCKET}*"}
        )
        iam = server.client("iam")
        iam.create_user(UserName="backup")
        iam.put_user_policy(UserName="backup", PolicyName="readme", PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName="backup")["AccessKey"]
        server.enforce(policies=True)
        return Settings(
            _env_file=None,
            object_store_location_type="s3",
            aws_s3_endpoint=server.url,
            aws_access_key=key["AccessKeyId"],
            aws_secret_key=key["SecretAccessKey"],
            **settings,
        )

    httpx.post(f"{server.url}/moto-api/reset", trust_env=False)
    server.enforce(policies=False)
    server.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    yield give
    server.enforce(policies=False)


def seen(settings: Settings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in store_findings(settings)}


def test_the_policy_of_the_readme_is_enough_for_everything_but_deleting_sets(given: Given, server: Server) -> None:
    settings = given()
    store, access = open_store(settings), bucket_access(settings)
    assert access is not None
    store.write("app/set/part", [bytes(1 << 20)] * 20)
    assert sum(map(len, store.read("app/set/part"))) == 20 << 20
    assert store.put("app/set/manifest.json", b"x", if_absent=True)
    assert not store.put("app/set/manifest.json", b"y", if_absent=True)
    assert list(store.folders("app/")) == ["set"]
    server.enforce(policies=False)
    server.client("s3").create_multipart_upload(Bucket=BUCKET, Key="app/set/left")
    server.enforce(policies=True)
    assert len(access.list_uploads("app/")) == 1
    assert abort_uploads(access, "app/") == 1
    assert access.list_uploads("app/") == []
    found = seen(settings)
    assert all(finding.good for finding in found.values())
    assert str(found["store"]) == (
        f"ok    store: s3 {BUCKET}, writable and readable; each upload is sent with its SHA-256"
    )
    assert found["store, deleting"].mark == "note"
    assert "backups and restores need no such permission" in found["store, deleting"].text
    assert found["store, unfinished uploads"].mark == "ok"


def test_a_refused_delete_leaves_the_set_as_it_was(given: Given) -> None:
    store, set_id = open_store(given()), SetId.parse("2023-02-02t16-00-00", "app")
    store.put(f"{set_id.prefix}manifest.json", b"{}")
    before = [entry.key for entry in store.entries("app/")]
    with pytest.raises(DeniedError):
        delete_set(store, set_id)
    assert [entry.key for entry in store.entries("app/")] == before


def test_with_the_permission_to_delete_nothing_is_left_and_the_set_goes(given: Given) -> None:
    settings = given(more=("s3:DeleteObject",))
    store, set_id = open_store(settings), SetId.parse("2023-02-02t16-00-00", "app")
    assert seen(settings)["store, deleting"].text == "allowed"
    assert list(store.entries("app/")) == []
    store.put(f"{set_id.prefix}manifest.json", b"{}")
    delete_set(store, set_id)
    assert list(store.entries("app/")) == []


@pytest.mark.parametrize("missing", ["s3:PutObject", "s3:GetObject", "s3:ListBucket"])
def test_a_permission_that_backups_need_fails_the_check(given: Given, missing: str) -> None:
    [finding] = store_findings(given(without=(missing,)))
    assert finding.mark == "FAIL"
    assert "that they may read, write and list there" in finding.text


def test_where_uploads_cannot_be_listed_a_lifecycle_rule_is_asked_for(given: Given, server: Server) -> None:
    settings = given(without=("s3:ListBucketMultipartUploads",), more=("s3:GetLifecycleConfiguration",))
    asked = seen(settings)["store, unfinished uploads"]
    assert asked.mark == "note"
    assert "aborts incomplete uploads after 7 days; there is none" in asked.text
    rules = [
        {
            "ID": f"after-{days}",
            "Status": status,
            "Filter": {"Prefix": prefix},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
        }
        for days, status, prefix in ((1, "Enabled", "other/"), (2, "Disabled", ""), (7, "Enabled", "app/"))
    ]
    for count, mark in ((2, "note"), (3, "ok")):
        server.enforce(policies=False)
        server.client("s3").put_bucket_lifecycle_configuration(
            Bucket=BUCKET, LifecycleConfiguration={"Rules": rules[:count]}
        )
        server.enforce(policies=True)
        assert seen(settings)["store, unfinished uploads"].mark == mark
    assert "a lifecycle rule aborts them after 7 days" in seen(settings)["store, unfinished uploads"].text


def test_where_the_rules_cannot_be_seen_either_that_is_said(given: Given) -> None:
    asked = seen(given(without=("s3:ListBucketMultipartUploads",)))["store, unfinished uploads"]
    assert asked.mark == "note"
    assert "may not be looked at (s3:GetLifecycleConfiguration)" in asked.text


def test_a_bucket_that_keeps_versions_is_told_to_free_nothing(given: Given, server: Server) -> None:
    settings = given(more=("s3:GetBucketVersioning", "s3:GetLifecycleConfiguration"))
    assert seen(settings)["store, versions"].text == "the bucket keeps none: what is deleted is gone"
    server.enforce(policies=False)
    owner = server.client("s3")
    owner.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    server.enforce(policies=True)
    kept = seen(settings)["store, versions"]
    assert kept.mark == "note"
    assert "a deleted set frees no room before a lifecycle rule removes noncurrent versions" in kept.text
    server.enforce(policies=False)
    rule = {
        "ID": "old",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 7},
    }
    owner.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration={"Rules": [rule]})
    server.enforce(policies=True)
    assert seen(settings)["store, versions"].mark == "ok"


def test_a_server_that_does_not_look_at_checksums_is_told(given: Given) -> None:
    # moto is one.
    finding = seen(given())["store, checksums"]
    assert finding.mark == "note"
    assert "takes a SHA-256 without looking at it" in finding.text


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("aws_s3_bucket_name", "absent", "absent"),
        ("aws_s3_endpoint", "http://127.0.0.1:1", "check the store's address"),
        ("athena_ca_bundle", Path("/absent.pem"), "the CA bundle /absent.pem can't be read"),
    ],
)
def test_a_store_that_cannot_be_reached_fails_the_check(
    given: Given, setting: str, value: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the answer matters here: the patience with a server that comes back is tested elsewhere.
    monkeypatch.setattr("athena_backup.store.objects._TRIES", 1)
    [finding] = store_findings(given().model_copy(update={setting: value}))
    assert finding.mark == "FAIL"
    assert said in finding.text


def test_a_wrong_secret_key_fails_the_check_and_is_not_told(given: Given) -> None:
    settings = given()
    wrong = Settings(**{**settings.model_dump(), "aws_secret_key": "hunter2-wrong"}, _env_file=None)
    [finding] = store_findings(wrong)
    assert finding.mark == "FAIL"
    assert "hunter2" not in finding.text


def test_given_keys_are_used_whatever_aws_is_told_by_the_environment(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = given()
    for name in ("PROFILE", "SESSION_TOKEN", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "ENDPOINT_URL", "CONFIG_FILE"):
        monkeypatch.setenv(f"AWS_{name}", "http://127.0.0.1:1/nonsense")
    found = seen(settings)
    assert found["store"].mark == "ok"
    assert found["store, unfinished uploads"].text.startswith("0 there")


def test_a_store_that_lets_two_writers_create_one_object_is_refused(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = local_store.put
    monkeypatch.setattr(local_store, "put", lambda key, data, if_absent=False: put(key, data))
    with pytest.raises(Exception, match="it lets two writers create one object") as refused:
        check_store(local_store, "app/operations/probe")
    assert "use another file system" in str(refused.value)


def test_a_local_store_is_probed_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    initialize(tmp_path / "backup")
    settings = Settings(
        _env_file=None, object_store_location_local=str(tmp_path / "backup"), athena_home=tmp_path / "home"
    )
    assert [(finding.subject, finding.mark) for finding in store_findings(settings)] == [
        ("store", "ok"),
        ("store, deleting", "ok"),
    ]
    assert [path.name for path in (tmp_path / "backup").rglob("*") if path.is_file()] == [".athena-store"]


def test_a_server_that_looks_at_checksums_is_believed(tmp_path: Path) -> None:
    with embedded_s3(tmp_path / "seaweed") as server:
        settings = Settings(
            _env_file=None,
            object_store_location_type="s3",
            aws_s3_endpoint=server.endpoint,
            aws_access_key=server.keys.access_key,
            aws_secret_key=server.keys.secret_key,
        )
        found = seen(settings)
        assert {finding.mark for finding in found.values()} == {"ok"}
        assert found["store, checksums"].text == "an upload that does not match its SHA-256 is refused"


def test_azure_over_http_is_refused_and_where_it_is_allowed_read_back(tmp_path: Path) -> None:
    with embedded_azure(tmp_path / "azurite") as server:
        settings = Settings(
            _env_file=None,
            object_store_location_type="azure-blob-storage",
            azure_storage_account_name=server.account,
            azure_storage_account_service_url=server.service_url,
            azure_storage_access_key=server.key,
        )
        [finding] = store_findings(settings)
        assert finding.mark == "FAIL"
        assert "ATHENA_STORE_ALLOW_HTTP=true" in finding.text
        found = seen(settings.model_copy(update={"athena_store_allow_http": True}))
        assert [(subject, finding.mark) for subject, finding in found.items()] == [
            ("store", "ok"),
            ("store, deleting", "ok"),
        ]
        assert "every part is read back and hashed" in found["store"].text


def test_a_deleted_set_is_listed_no_more_although_the_server_still_shows_its_folder(tmp_path: Path) -> None:
    with embedded_s3(tmp_path / "seaweed") as server:
        store = open_s3(server.bucket, server.endpoint, server.region, server.keys)
        set_id = SetId.parse("2023-02-02t16-00-00", "app")
        store.put(f"{set_id.prefix}databases/asp/0123456789ab/part", b"x")
        assert [entry.set_id for entry in list_sets(store, "app")] == [set_id]
        delete_set(store, set_id)
        assert list(list_sets(store, "app")) == []
