"""Stores as Prefect blocks: what Prefect's API shows of them, what they open, and a service that runs on one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from service import ROOT, Service, await_true

from athena_backup.errors import FinalError
from athena_backup.settings import Settings
from athena_backup.store import Store
from blocks.store_blocks import NoBlockError
from deployments import preparation
from deployments.embedded_stores import EmbeddedS3

SECRETS = {
    "s3": {"AWS_ACCESS_KEY": "an-access-key", "AWS_SECRET_KEY": "hunter2"},
    "azure-blob-storage": {"AZURE_STORAGE_ACCESS_KEY": "aHVudGVyMg=="},
    "gcp-cloud-storage": {"GCP_SERVICE_ACCOUNT": "eyJwcml2YXRlX2tleSI6ICJodW50ZXIyIn0="},
    "local": {},
}
SLUGS = {
    "s3": "athena-s3-store",
    "azure-blob-storage": "athena-azure-blob-store",
    "gcp-cloud-storage": "athena-gcs-store",
    "local": "athena-local-store",
}
CLEAR = ("hunter2", "aHVudGVyMg", "eyJwcml2")

# A process like the service's own: Prefect reads its address when it is imported. It takes environments, one a line.
_PROGRAM = """
import asyncio, json, os, sys
from athena_backup.errors import AthenaError
from athena_backup.settings import load_settings
from blocks import stores
from blocks.store_blocks import register
from blocks.stores import KeptStore, bucket_access, open_store

kept = last = None

async def inside_a_loop():
    return open_store(load_settings(), adopt=True)

def answer(what):
    global kept, last
    if what == "keep":
        kept = KeptStore(load_settings())
        return None
    if what.startswith("get"):
        stores.LOOK_AGAIN_SECONDS = int(what[3:])
        before, last = last, kept.get()
        return [last.location.place, last is before]
    if what == "register":
        return register(load_settings())
    store, access = open_store(load_settings(), adopt=True), bucket_access(load_settings())
    assert asyncio.run(inside_a_loop()).location == store.location
    place = store.location
    return [place.type, place.place, place.region, store.proof, getattr(getattr(access, "keys", None), "secret_key", None)]

before = dict(os.environ)
for line in sys.stdin:
    what, environment = json.loads(line)
    os.environ.clear()
    os.environ.update(before | environment)
    try:
        told = answer(what)
    except AthenaError as error:
        told = str(error)
    print(json.dumps(told), flush=True)
"""
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def ask(service: Service) -> Iterator[Ask]:
    """Register or open the store of an environment beside the service; what it is, or the error's text."""
    given = {**service.environment, "PREFECT_API_URL": f"{service.prefect_url}/api"}
    command = [sys.executable, "-c", _PROGRAM]
    with subprocess.Popen(
        command, env=given, cwd=service.home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(what: str, **environment: str) -> Any:
            process.stdin.write(json.dumps([what, environment]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def document(service: Service, slug: str, name: str) -> dict[str, Any]:
    """What Prefect's UI is given of a block."""
    found: dict[str, Any] = service.prefect("GET", f"/block_types/slug/{slug}/block_documents/name/{name}")
    return found


def make_by_hand(service: Service, slug: str, name: str, data: Mapping[str, object]) -> None:
    """Make a block as Prefect's UI does, in place of an older one of that name."""
    kind = service.prefect("GET", f"/block_types/slug/{slug}")["id"]
    [schema, *_] = service.prefect(
        "POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind]}}}
    )

    def is_made() -> bool:
        try:
            for one in service.prefect("GET", f"/block_types/slug/{slug}/block_documents"):
                if one["name"] == name:
                    service.prefect("DELETE", f"/block_documents/{one['id']}")
            body = {"name": name, "data": dict(data), "block_type_id": kind, "block_schema_id": schema["id"]}
            service.prefect("POST", "/block_documents/", body)
        except httpx.HTTPStatusError as error:
            # So it answers while its SQLite is busy.
            if error.response.status_code == 503:
                return False
            raise
        return True

    await_true(is_made, f"making the block {name}")


def test_the_service_makes_its_store_a_block_and_knows_all_forms(service: Service) -> None:
    assert document(service, "athena-local-store", "app")["data"] == {
        "directory": service.environment["OBJECT_STORE_LOCATION_LOCAL"]
    }
    for slug in SLUGS.values():
        kind = service.prefect("GET", f"/block_types/slug/{slug}")
        assert "ATHENA_STORE_BLOCK" in kind["description"]
        [schema, *_] = service.prefect(
            "POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
        )
        for field in schema["fields"]["properties"].values():
            assert field["title"]
            assert field["description"]


@pytest.mark.parametrize("kind", list(SLUGS))
def test_a_block_of_the_settings_hides_its_secrets_and_opens_the_same_store(
    service: Service, ask: Ask, kind: str
) -> None:
    environment = {"OBJECT_STORE_LOCATION_TYPE": kind, "ATHENA_NAMESPACE": f"made-{kind}", **SECRETS[kind]}
    assert ask("register", **environment) is None
    shown = json.dumps(document(service, SLUGS[kind], f"made-{kind}"))
    listed = json.dumps(service.prefect("POST", "/block_documents/filter", {}))
    assert not any(secret in shown + listed for secret in CLEAR)
    assert ("********" in shown) is (kind != "local")
    by_settings = ask("open", **environment)
    assert by_settings[0] == kind
    assert ask("open", ATHENA_STORE_BLOCK=f"{SLUGS[kind]}/made-{kind}") == by_settings


def test_a_second_start_says_what_the_environment_says_now(service: Service, ask: Ask) -> None:
    for bucket in ("first", "second"):
        environment = {"OBJECT_STORE_LOCATION_TYPE": "s3", "AWS_S3_BUCKET_NAME": bucket, "ATHENA_NAMESPACE": "again"}
        assert ask("register", **environment) is None
        assert document(service, "athena-s3-store", "again")["data"]["bucket_name"] == bucket


def test_a_process_keeps_its_client_until_somebody_changes_the_block(service: Service, ask: Ask) -> None:
    make_by_hand(service, "athena-s3-store", "kept", {"bucket_name": "first", "credentials": KEYS})
    ask("keep", ATHENA_STORE_BLOCK="kept")
    assert [ask("get0"), ask("get0")] == [["first", False], ["first", True]]
    make_by_hand(service, "athena-s3-store", "kept", {"bucket_name": "second", "credentials": KEYS})
    assert [ask("get60"), ask("get0"), ask("get0")] == [["first", True], ["second", False], ["second", True]]
    ask("keep", OBJECT_STORE_LOCATION_TYPE="s3", **SECRETS["s3"])
    assert [ask("get0")[1], ask("get0")[1]] == [False, True]


KEYS = {"aws_access_key_id": "an-access-key", "aws_secret_access_key": "hunter2", "block_type_slug": "aws-credentials"}
AZURE = {"block_type_slug": "azure-blob-storage-credentials"}


@pytest.mark.parametrize(
    ("slug", "data", "opened"),
    [
        (
            "athena-s3-store",
            {"bucket_name": "b3", "region": "eu-central-1", "credentials": KEYS},
            ["s3", "b3", "eu-central-1", "digest", "hunter2"],
        ),
        (
            "athena-azure-blob-store",
            {
                "container_name": "c",
                "credentials": {
                    **AZURE,
                    "connection_string": "AccountName=acc;AccountKey=aHVudGVyMg==;EndpointSuffix=x.org",
                },
            },
            ["azure-blob-storage", "https://acc.blob.x.org/c/", "", "tls+size", None],
        ),
        (
            "athena-azure-blob-store",
            {"container_name": "c", "credentials": {**AZURE, "account_url": "https://acc.blob.core.windows.net/"}},
            ["azure-blob-storage", "https://acc.blob.core.windows.net/c/", "", "tls+size", None],
        ),
        ("athena-gcs-store", {"bucket_name": "g"}, ["gcp-cloud-storage", "g", "", "tls+size", None]),
    ],
)
def test_a_block_that_a_person_made_is_opened(
    service: Service, ask: Ask, slug: str, data: dict[str, object], opened: list[object]
) -> None:
    make_by_hand(service, slug, "by-hand", data)
    assert ask("open", ATHENA_STORE_BLOCK=f"{slug}/by-hand") == opened


@pytest.mark.parametrize(
    ("slug", "data", "named"),
    [
        (
            "athena-s3-store",
            {"credentials": {**KEYS, "aws_secret_access_key": None}},
            "only one of access key ID and secret",
        ),
        ("athena-s3-store", {"credentials": {**KEYS, "assume_role_arn": "arn:x"}}, "a session token, profile or role"),
        ("athena-s3-store", {"bucket_name": None, "credentials": KEYS}, "has faults in: bucket_name"),
        (
            "athena-azure-blob-store",
            {
                "container_name": "c",
                "credentials": {**AZURE, "connection_string": "hunter2;SharedAccessSignature=hunter2"},
            },
            "lacks AccountName or AccountKey",
        ),
        ("athena-local-store", {"directory": "backup"}, "'backup' is no absolute path"),
    ],
)
def test_a_block_with_a_fault_is_refused_without_its_secrets(
    service: Service, ask: Ask, slug: str, data: dict[str, object], named: str
) -> None:
    make_by_hand(service, slug, "faulty", {"bucket_name": "b", **data} if slug == "athena-s3-store" else data)
    refused = ask("open", ATHENA_STORE_BLOCK=f"{slug}/faulty")
    assert named in refused
    assert "hunter2" not in refused


def test_a_name_that_several_kinds_bear_has_to_be_told_in_full(service: Service, ask: Ask, tmp_path: Path) -> None:
    make_by_hand(service, "athena-gcs-store", "twice", {"bucket_name": "g"})
    make_by_hand(service, "athena-local-store", "twice", {"directory": str(tmp_path)})
    assert "athena-gcs-store/twice, athena-local-store/twice" in ask("open", ATHENA_STORE_BLOCK="twice")
    assert ask("open", ATHENA_STORE_BLOCK="athena-local-store/twice")[1] == str(tmp_path)


def test_a_block_that_nobody_made_and_a_server_that_is_down_are_told_apart(service: Service, tmp_path: Path) -> None:
    assert "Prefect has no store block missing" in service.command("list", ATHENA_STORE_BLOCK="missing").stderr
    down = {"ATHENA_STORE_BLOCK": "missing", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    checked = service.command("check", PREFECT_API_URL="http://127.0.0.1:1/api", **down)
    assert "FAIL  store: the store block missing can't be read: the Prefect server does not answer" in checked.stdout
    checked = service.command("check", ATHENA_HOME=str(tmp_path), **down)
    assert "FAIL  store: the store block missing is kept by a Prefect server, and none is known here" in checked.stdout


@pytest.mark.parametrize("address", [None, "http://127.0.0.1:1/api"])
def test_a_start_whose_own_prefect_server_has_no_such_block_does_not_send_anybody_to_its_ui(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str | None
) -> None:
    """The server ends with that start; the block went with its database, on the worst day."""

    def absent(settings: Settings, *, adopt: bool) -> Store:
        assert adopt
        raise NoBlockError(f"Prefect has no store block {settings.athena_store_block}", next_step="make it")

    monkeypatch.setattr(preparation, "register", lambda settings: None)
    monkeypatch.setattr(preparation, "open_store", absent)
    with pytest.raises(FinalError, match="Prefect has no store block lost") as refused:
        preparation.prepare(Settings(athena_home=tmp_path, athena_store_block="lost", prefect_api_url=address))
    assert refused.value.next_step.startswith("make it" if address else "unset ATHENA_STORE_BLOCK and give the store's")


def test_sets_are_listed_with_prefect_down_when_the_store_is_no_block(service: Service) -> None:
    timestamp, _ = service.back_up()
    listed = service.command("list", PREFECT_API_URL="http://127.0.0.1:1/api")
    assert f"{timestamp}  Success" in listed.stdout
    down = {"PREFECT_API_URL": "http://127.0.0.1:1/api"}
    of_new = service.command("list", ATHENA_NAMESPACE="new", **down)
    assert (of_new.returncode, of_new.stdout) == (0, "")
    assert "no set of namespace new in this store; its folders, each of which may be a namespace: app" in of_new.stderr
    assert service.command("list", "--namespace", "app", ATHENA_NAMESPACE="new", **down).stdout == listed.stdout


def test_a_service_runs_on_a_block_and_not_on_its_variables(
    service: Service, make_service: Callable[..., Service], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    make_by_hand(service, "athena-local-store", "chosen", {"directory": str(place)})
    chosen = make_service(
        "chosen",
        PREFECT_API_URL=f"{service.prefect_url}/api",
        ATHENA_NAMESPACE="chosen",
        ATHENA_STORE_BLOCK="chosen",
        OBJECT_STORE_LOCATION_LOCAL="/nowhere",
    )
    chosen.start()
    timestamp, status = chosen.back_up()
    assert status == "Success"
    assert (place / "chosen" / timestamp / "manifest.json").exists()
    assert chosen.call("GET", "/backup/latest").json()["backupurl"] == str(place)
    assert f"{timestamp}  Success" in chosen.command("list").stdout
    assert f"store: local {place}, writable and readable" in chosen.command("check").stdout
    file = Path(json.loads(chosen.environment["ATHENA_VOLUMES"])["edweb"]) / "folder" / "file"
    file.write_text("destroyed")
    assert chosen.restore(timestamp, sourceNamespace="chosen") == "Success"
    assert file.read_text() == "content of edweb"
    # No block of its own was made of the variables that are not used.
    assert service.prefect("POST", "/block_documents/filter", {"block_documents": {"name": {"any_": ["chosen"]}}}) == [
        document(service, "athena-local-store", "chosen")
    ]
    chosen.close()


def test_a_store_block_inside_a_volume_is_refused(service: Service, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "backup").mkdir(parents=True)
    make_by_hand(service, "athena-local-store", "inside", {"directory": str(volume / "backup")})
    given = {
        "ATHENA_HOME": str(tmp_path / "home"),
        "PREFECT_API_URL": f"{service.prefect_url}/api",
        "ATHENA_NAMESPACE": "inside",
        "ATHENA_STORE_BLOCK": "inside",
        "ATHENA_VOLUMES": json.dumps({"edweb": str(volume)}),
    }
    for command in ("up", "check"):
        said = service.command(command, **given)
        assert said.returncode == 1
        assert "volume edweb and the store lie in one another" in said.stdout + said.stderr


def test_the_forms_can_be_registered_without_the_service(service: Service) -> None:
    command = [str(Path(sys.executable).parent / "prefect"), "block", "register", "-m", "blocks.store_blocks"]
    environment = {**service.environment, "PREFECT_API_URL": f"{service.prefect_url}/api"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Athena S3 store" in done.stdout


def test_a_service_whose_store_is_refused_does_not_say_that_it_runs(
    make_service: Callable[..., Service], seaweed: EmbeddedS3
) -> None:
    made = make_service(
        "refused",
        OBJECT_STORE_LOCATION_TYPE="s3",
        AWS_S3_ENDPOINT=seaweed.endpoint,
        AWS_S3_BUCKET_NAME="nobody-made-this-one",
        AWS_ACCESS_KEY=seaweed.keys.access_key,
        AWS_SECRET_KEY=seaweed.keys.secret_key,
    )
    ended = made.command("up")
    assert ended.returncode == 1
    assert "error: there is no bucket or container nobody-made-this-one" in ended.stderr
