"""Settings: environment over .env over the file; what is wrong is named, and no secret is ever shown."""

import base64
import json
from pathlib import Path

import pytest

from athena_backup.settings import ConfigurationError, Settings, load_settings, masked_url, shown

DATABASES = '{"asp": "postgresql://user:hunter2@db/asp"}'


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*(field.upper() for field in Settings.model_fields), "ATHENA_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_documented_defaults() -> None:
    settings = load_settings()
    assert (settings.enable_regular_backups, settings.backup_frequency, settings.object_store_location_type) == (
        False,
        "0 0 0 * * *",
        "local",
    )
    assert (settings.object_store_location_local, settings.athena_namespace, settings.backup_retention_count) == (
        "/backup",
        "app",
        30,
    )
    assert (settings.aws_s3_bucket_name, settings.aws_s3_endpoint) == (
        "athena-ondemand-backup",
        "https://s3.us-west-2.amazonaws.com",
    )
    assert (settings.athena_api_host, settings.athena_api_port) == ("127.0.0.1", 8080)


def test_the_environment_goes_over_dotenv_which_goes_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "athena.toml"
    file.write_text(
        'athena_namespace = "file"\nathena_jobs = 3\nbackup_frequency = "@hourly"\n[athena_volumes]\nedweb = "/data/edweb"\n'
    )
    (tmp_path / ".env").write_text("ATHENA_NAMESPACE=dotenv\nATHENA_JOBS=4\n")
    monkeypatch.setenv("ATHENA_CONFIG", str(file))
    monkeypatch.setenv("ATHENA_NAMESPACE", "environment")
    settings = load_settings()
    assert (settings.athena_namespace, settings.athena_jobs, settings.backup_frequency) == ("environment", 4, "@hourly")
    assert settings.athena_volumes == {"edweb": Path("/data/edweb")}


def test_a_variable_of_the_environment_replaces_that_of_the_file_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "athena.toml"
    file.write_text('[athena_volumes]\nedweb = "/of/the/file"\n[athena_databases]\nasp = "postgresql://file/asp"\n')
    (tmp_path / ".env").write_text('ATHENA_DATABASES={"gogs": "postgresql://dotenv/gogs"}\n')
    monkeypatch.setenv("ATHENA_CONFIG", str(file))
    monkeypatch.setenv("ATHENA_VOLUMES", '{"gitserver": "/of/the/environment"}')
    settings = load_settings()
    assert settings.athena_volumes == {"gitserver": Path("/of/the/environment")}
    assert list(settings.athena_databases) == ["gogs"]


def test_the_platforms_json_is_read_nested_and_dotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "athena.json"
    file.write_text(
        json.dumps(
            {
                "backupConfig": {"backupFrequency": "@daily", "backupRetentionCount": 7, "enableRegularBackups": True},
                "objectStoreConfig": {
                    "locationType": "local",
                    "localLocation": "/mnt/b",
                    "aws.s3.bucketName": "b",
                    "aws": {"accessKey": "key", "secretKey": "s3cret"},
                },
            }
        )
    )
    monkeypatch.setenv("ATHENA_CONFIG", str(file))
    settings = load_settings()
    assert (settings.backup_frequency, settings.backup_retention_count, settings.enable_regular_backups) == (
        "@daily",
        7,
        True,
    )
    assert (settings.object_store_location_local, settings.aws_s3_bucket_name) == ("/mnt/b", "b")
    assert settings.aws_secret_key is not None
    assert settings.aws_secret_key.get_secret_value() == "s3cret"


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("BACKUP_FREQUENCY", "0 0 25 * * *", "hours"),
        ("BACKUP_FREQUENCY", "0 0 0 30 2 ?", "BACKUP_FREQUENCY"),
        ("OBJECT_STORE_LOCATION_TYPE", "ftp", "OBJECT_STORE_LOCATION_TYPE"),
        ("ATHENA_NAMESPACE", "../x", "ATHENA_NAMESPACE"),
        ("ATHENA_DATABASES", "not json", "ATHENA_DATABASES"),
        ("ATHENA_DATABASES", '{"postgres": "postgresql://x/y"}', "reserved"),
        ("ATHENA_API_PORT", "99999", "ATHENA_API_PORT"),
        ("GCP_SERVICE_ACCOUNT", "hunter2", "GCP_SERVICE_ACCOUNT"),
        ("GCP_SERVICE_ACCOUNT", "WyJodW50ZXIyIl0=", "GCP_SERVICE_ACCOUNT"),
        ("AWS_ACCESS_KEY", "hunter2", "AWS_ACCESS_KEY is given without AWS_SECRET_KEY"),
        ("AWS_SECRET_KEY", "hunter2", "AWS_SECRET_KEY is given without AWS_ACCESS_KEY"),
        ("ATHENA_COPY_TO", "athena-s3-store/second", "ATHENA_COPY_TO"),
        (
            "ATHENA_CONFIG",
            "/nowhere/x.toml",
            "/nowhere/x.toml can't be read: No such file or directory (correct the path",
        ),
        ("ATHENA_VOLUMES", '{"edweb": "data/edweb"}', "edweb: 'data/edweb'"),
        ("ATHENA_VOLUMES", '{"edweb": ""}', "absolute"),
        ("ATHENA_API_KEYS", '["hunter2", ""]', "a key is empty"),
        ("ATHENA_API_KEYS", '["hunter2 "]', "white space"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert named in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_name_that_is_both_database_and_volume_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHENA_DATABASES", DATABASES)
    monkeypatch.setenv("ATHENA_VOLUMES", '{"asp": "/data"}')
    with pytest.raises(ConfigurationError, match="asp"):
        load_settings()


def test_an_unknown_member_of_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text('athena_namspace = "x"\n')
    monkeypatch.setenv("ATHENA_CONFIG", str(tmp_path / "a.toml"))
    with pytest.raises(ConfigurationError, match="athena_namspace"):
        load_settings()


def test_a_json_file_that_holds_no_object_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("[]")
    monkeypatch.setenv("ATHENA_CONFIG", str(tmp_path / "a.json"))
    with pytest.raises(ConfigurationError, match=r"a\.json is not JSON: a JSON object is needed"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATHENA_DATABASES", '{"asp": "postgresql://u:hunter2@h/d?sslmode=require&password=hunter2"}'),
        ("PREFECT_API_URL", "https://u:hunter2@prefect/api/"),
        ("ATHENA_HEALTH_URLS", '["http://u:hunter2@edweb/health?token=hunter2&x=1"]'),
        ("AWS_S3_ENDPOINT", "https://u:hunter2@s3/"),
    ],
)
def test_a_password_in_an_address_is_masked(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    text = str(shown(load_settings())[name])
    assert "hunter2" not in text
    assert "://u:***" in text


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://user:pa/ssword@host:4200/api", "http://user:********@host:4200/api"),
        ("http://user:p@ss@host/api", "http://user:********@host/api"),
        ("http://me@home:p?a#s:/@s@[::1]:4200/api", "http://me@home:********@[::1]:4200/api"),
        ("https://h:8443/health?token=abc@def", "https://h:********@"),
        ("https://u:pw@h/x?token=abc@def", "https://u:********@"),
        ("http://user:p?password=x@h/db", "http://user:********@"),
        ("user:pass@host/api", "user:********@host/api"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://host:8080/a", "https://host:8080/a"),
        # The same as a user "host" with the password "8080/a".
        ("https://host:8080/a@b", "https://host:********@b"),
        ("/foo@bar", "/foo@bar"),
        ("/backup/12:00@home", "/backup/12:00@home"),
    ],
)
def test_a_password_that_is_not_encoded_is_masked_as_a_whole(url: str, expected: str) -> None:
    assert masked_url(url) == expected


@pytest.mark.parametrize("kind", ["local", "s3", "azure-blob-storage", "gcp-cloud-storage"])
def test_every_kind_of_store_can_be_chosen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBJECT_STORE_LOCATION_TYPE", kind)
    assert load_settings().object_store_location_type == kind


def test_keys_that_a_file_leaves_empty_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"aws.accessKey": "", "aws.secretKey": "", "azure.accessKey": " ", "gcp.serviceAccount": ""}
    (tmp_path / "a.json").write_text(json.dumps({"objectStoreConfig": members}))
    monkeypatch.setenv("ATHENA_CONFIG", str(tmp_path / "a.json"))
    settings = load_settings()
    assert settings.aws_access_key is settings.aws_secret_key is settings.gcp_service_account is None
    assert settings.azure_account_key is None


def test_a_managed_identity_goes_over_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCESS_KEY", "a2V5")
    assert load_settings().azure_account_key == "a2V5"
    monkeypatch.setenv("AZURE_USE_MANAGED_IDENTITY", "true")
    assert load_settings().azure_account_key is None


def test_a_service_account_is_decoded_as_encoders_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().gcp_service_account_json is None
    document = json.dumps({"type": "service_account", "private_key": "x" * 100})
    monkeypatch.setenv("GCP_SERVICE_ACCOUNT", base64.encodebytes(document.encode()).decode())
    assert load_settings().gcp_service_account_json == document


def test_the_ca_bundle_is_that_of_aws_unless_there_is_an_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    assert load_settings().athena_ca_bundle is None
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/of-aws.pem")
    assert load_settings().athena_ca_bundle == Path("/etc/of-aws.pem")
    monkeypatch.setenv("ATHENA_CA_BUNDLE", "/etc/own.pem")
    assert load_settings().athena_ca_bundle == Path("/etc/own.pem")


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    account = base64.b64encode(b'{"private_key": "hunter2"}').decode()
    for name, value in (
        ("ATHENA_DATABASES", DATABASES),
        ("AWS_ACCESS_KEY", "hunter2"),
        ("AWS_SECRET_KEY", "hunter2"),
        ("AZURE_STORAGE_ACCESS_KEY", "hunter2"),
        ("ATHENA_API_KEYS", '["hunter2"]'),
        ("GCP_SERVICE_ACCOUNT", account),
    ):
        monkeypatch.setenv(name, value)
    settings = load_settings()
    for text in (str(shown(settings)), repr(settings), str(settings.database_urls)):
        assert "hunter2" not in text
        assert account not in text
    assert shown(settings)["AWS_SECRET_KEY"] == "********"


def test_a_database_url_that_is_none_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("mysql://u:hunter2@h/d", "postgresql://u:hunter2@h", "u:hunter2@h/d"):
        monkeypatch.setenv("ATHENA_DATABASES", json.dumps({"asp": url}))
        with pytest.raises(Exception, match="asp") as refused:
            _ = load_settings().database_urls
        assert "hunter2" not in str(refused.value)
