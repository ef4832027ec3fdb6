"""The contract, answer by answer, against the running service over HTTP."""

import json
import os
import re
import signal
import statistics
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from service import KEY, ODD_KEY, Service, await_true

ONGOING = re.compile(
    r"backup/restore operation ongoing with pending DBs: \[[a-z ]*\] and pending Volumes: \[[a-z ]*\]"
    r" and completed DBs: \[[a-z ]*\] and completed Volumes: \[[a-z ]*\]"
)
ALL_PENDING = (
    "backup/restore operation ongoing with pending DBs: [asp gogs] and pending Volumes: [edweb gitserver]"
    " and completed DBs: [] and completed Volumes: []"
)
FORM = r"\d{4}-\d\d-\d\dt\d\d-\d\d-\d\d"


@pytest.fixture(scope="module")
def backed_up(service: Service) -> str:
    """The timestamp of a successful backup."""
    timestamp, status = service.back_up()
    assert status == "Success"
    return timestamp


def message(response: httpx.Response) -> str:
    """Every answer that is no documented shape is a code and a message, the code being the HTTP status."""
    answer = response.json()
    assert set(answer) == {"code", "message"}
    assert answer["code"] == response.status_code
    return str(answer["message"])


def store_of(service: Service) -> Path:
    return Path(service.environment["OBJECT_STORE_LOCATION_LOCAL"])


def volumes_of(service: Service) -> dict[str, Path]:
    return {
        name: Path(path) / "folder" / "file" for name, path in json.loads(service.environment["ATHENA_VOLUMES"]).items()
    }


class TestKeys:
    """Only who has a key is answered."""

    @pytest.mark.parametrize("given", ["", "wrong", "Bearer wrong", "Bearer", KEY + "x", KEY[:-1], "Basic " + KEY])
    def test_a_missing_or_wrong_key_is_refused_everywhere(self, service: Service, given: str) -> None:
        for method, path in (
            ("GET", "/backup/latest"),
            ("POST", "/ondemandbackup"),
            ("POST", "/ondemandrestore"),
            ("DELETE", "/backup/x"),
            ("GET", "/metrics"),
        ):
            assert "API key" in message(service.call(method, path, Authorization=given))
            assert service.call(method, path, Authorization=given).status_code == 401

    @pytest.mark.parametrize("given", [KEY, f"Bearer {KEY}", f"bearer {KEY}", ODD_KEY, f"Bearer {ODD_KEY}"])
    def test_the_key_is_taken_as_it_stands_and_as_a_bearer(self, service: Service, given: str) -> None:
        url = f"{service.api_url}/athena/api/v1/backup/list"
        # As curl sends it: the bytes of the terminal's UTF-8.
        answer = httpx.get(url, headers={b"Authorization": given.encode()}, trust_env=False)
        assert answer.status_code == 200


class TestBackup:
    """From the POST to the record."""

    def test_a_backup_is_accepted_seen_moving_and_recorded(self, service: Service, backed_up: str) -> None:
        posted = time.monotonic()
        answer = service.call("POST", "/ondemandbackup", "{\n}")
        assert answer.status_code == 202
        assert re.fullmatch(f"Request Accepted with timestamp {FORM}", message(answer))
        timestamp = answer.json()["message"].rpartition(" ")[2]
        first = service.call("GET", "/backup/latest")
        # It takes a tenth of that: only what is slow by its nature fails here, not a busy machine.
        assert time.monotonic() - posted < 5
        assert first.json() == {"status": ALL_PENDING}
        assert service.call("GET", "/backup/status").json().keys() == {"status"}
        lines = set()
        while ONGOING.fullmatch(line := service.status("/backup/status", json.dumps({"timestamp": timestamp}))):
            lines.add(line)
        assert line == "Success"
        assert len(lines) > 1
        expected = {
            "backupurl": str(store_of(service)),
            "namespace": "app",
            "status": "Success",
            "timestamp": timestamp,
        }
        assert service.call("GET", "/backup/latest").json() == expected

    def test_only_one_operation_runs_at_a_time_and_the_refusal_is_the_ongoing_line(
        self, service: Service, backed_up: str
    ) -> None:
        timestamp = service.start_backup()
        with service.stopped_child("pg_dump"):
            assert ONGOING.fullmatch(message(service.call("POST", "/ondemandbackup")))
            second = service.call(
                "POST", "/ondemandrestore", json.dumps({"timestamp": backed_up, "sourceNamespace": "app"})
            )
            assert second.status_code == 409
            assert ONGOING.fullmatch(message(second))
            assert service.call("DELETE", f"/backup/{timestamp}").status_code == 409
            assert (
                service.call("GET", "/backup/status", json.dumps({"timestamp": backed_up})).json()["status"]
                == "Success"
            )
        await_true(lambda: service.status() == "Success", "the backup's end")

    def test_only_config_leaves_the_volumes_out(self, service: Service, backed_up: str) -> None:
        answer = service.call("POST", "/ondemandbackup", json.dumps({"onlyConfig": True}))
        assert answer.status_code == 202
        assert "pending Volumes: []" in service.status()
        await_true(lambda: service.status() == "Success", "the backup's end")
        manifest = json.loads(
            (store_of(service) / "app" / answer.json()["message"][-19:] / "manifest.json").read_text()
        )
        assert [component["name"] for component in manifest["components"]] == ["asp", "gogs"]
        assert manifest["only_databases"] is True

    def test_the_status_of_an_unknown_backup_is_a_404(self, service: Service, backed_up: str) -> None:
        answer = service.call("GET", "/backup/status", '{"timestamp": "2001-01-01t00-00-00"}')
        assert answer.status_code == 404
        assert "2001-01-01t00-00-00" in message(answer)

    def test_a_status_without_timestamp_when_nothing_runs_says_so(self, service: Service, backed_up: str) -> None:
        for path in ("/backup/status", "/restore/status"):
            answer = service.call("GET", path)
            assert answer.status_code == 404
            assert "is running" in message(answer)

    def test_the_timestamp_is_taken_from_the_query_too(self, service: Service, backed_up: str) -> None:
        assert service.call("GET", f"/backup/status?timestamp={backed_up}").json()["status"] == "Success"

    def test_the_list_is_oldest_first_and_wrapped(self, service: Service, backed_up: str) -> None:
        answer = service.call("GET", "/backup/list").json()
        assert set(answer) == {"backup-list"}
        stamps = [record["timestamp"] for record in answer["backup-list"]]
        assert backed_up in stamps
        assert stamps == sorted(stamps)
        assert all(set(record) == {"backupurl", "namespace", "status", "timestamp"} for record in answer["backup-list"])

    def test_the_older_names_answer_the_same(self, service: Service, backed_up: str) -> None:
        body = json.dumps({"timestamp": backed_up})
        assert service.call("GET", "/backupstatus", body).json() == service.call("GET", "/backup/status", body).json()
        assert service.call("GET", "/backuplist").json() == service.call("GET", "/backup/list").json()
        assert service.call("GET", "/restorestatus", '{"timestamp": "2001-01-01t00-00-00"}').status_code == 404

    def test_latest_answers_fast_while_a_backup_runs(self, service: Service, backed_up: str) -> None:
        taken: list[float] = []
        with httpx.Client(headers={"Authorization": KEY}, trust_env=False, timeout=30) as client:
            service.start_backup()
            with service.stopped_child("pg_dump"):
                for _ in range(100):
                    began = time.monotonic()
                    assert "ongoing" in client.get(f"{service.api_url}/athena/api/v1/backup/latest").text
                    taken.append(time.monotonic() - began)
            await_true(lambda: service.status() == "Success", "the backup's end")
        # The promise is 100 ms at the 95th percentile, which benchmarks/operations.py measures; the median here fails only
        # for what is slow by its nature, so that a busy machine fails nothing.
        assert statistics.median(taken) < 0.1

    def test_many_posts_at_once_start_one_backup(self, service: Service, backed_up: str) -> None:
        codes: list[int] = []
        threads = [
            threading.Thread(target=lambda: codes.append(service.call("POST", "/ondemandbackup").status_code))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        # Held, as it would be over before Prefect's server has let the last of them through.
        with service.stopped_child("pg_dump"):
            for thread in threads:
                thread.join()
        await_true(lambda: service.status() == "Success", "the backup's end")
        assert sorted(codes) == [202, *[409] * 7]

    def test_the_timestamp_is_the_present_in_utc(self, service: Service) -> None:
        before = datetime.now(UTC).replace(microsecond=0)
        timestamp, _ = service.back_up()
        assert before <= datetime.strptime(timestamp, "%Y-%m-%dt%H-%M-%S").replace(tzinfo=UTC) <= datetime.now(UTC)


class TestDelete:
    """A set goes when it is told to, and only then."""

    @pytest.mark.parametrize("how", ["get", "delete"])
    def test_a_deleted_set_is_gone_from_list_and_store(self, service: Service, backed_up: str, how: str) -> None:
        timestamp, status = service.back_up()
        assert status == "Success"
        if how == "get":
            answer = service.call("GET", "/backup/delete", json.dumps({"timestamp": timestamp}))
        else:
            answer = service.call("DELETE", f"/backup/{timestamp}")
        assert answer.status_code == 200
        assert answer.json() == {"success": True, "message": "Deleted backup entry successfully"}
        assert timestamp not in service.call("GET", "/backup/list").text
        assert not (store_of(service) / "app" / timestamp).exists()
        assert service.call("DELETE", f"/backup/{timestamp}").status_code == 404

    def test_a_failed_set_is_gone_too_and_its_run_speaks_of_it_no_more(self, service: Service) -> None:
        timestamp = service.start_backup()
        with service.stopped_child("pg_dump") as pid:
            os.kill(pid, signal.SIGKILL)
        await_true(lambda: "ongoing" not in service.status(), "the backup's end")
        assert timestamp in service.call("GET", "/backup/list").text
        assert service.call("DELETE", f"/backup/{timestamp}").status_code == 200
        assert timestamp not in service.call("GET", "/backup/list").text
        assert service.call("GET", "/backup/status", json.dumps({"timestamp": timestamp})).status_code == 404
        assert service.call("DELETE", f"/backup/{timestamp}").status_code == 404

    def test_a_backup_that_died_before_it_wrote_anything_can_be_asked_for_and_deleted(self, service: Service) -> None:
        run = service.press_run("backup", {"request": {"nonsense": True}})
        await_true(lambda: service.run_state(run) == "FAILED", "the run's end")
        record = service.call("GET", "/backup/list").json()["backup-list"][-1]
        assert "nonsense" in record["status"]
        asked = json.dumps({"timestamp": record["timestamp"]})
        assert service.call("GET", "/backup/status", asked).json() == record
        assert service.call("GET", "/backup/delete", asked).status_code == 200
        assert record not in service.call("GET", "/backup/list").json()["backup-list"]

    def test_a_set_that_a_restore_reads_is_kept_even_if_it_is_another_namespace_s_restore(
        self, service: Service, backed_up: str
    ) -> None:
        run = service.press_run("restore", {"request": {"timestamp": backed_up}})
        with service.stopped_child("pg_restore"):
            service.prefect(
                "PATCH", f"/flow_runs/{run}", {"tags": ["namespace:other", "source:app", f"timestamp:{backed_up}"]}
            )
            answer = service.call("DELETE", f"/backup/{backed_up}")
            assert answer.status_code == 409
            assert "a restore reads it" in message(answer)
        await_true(lambda: service.run_state(run) == "COMPLETED", "the restore's end")

    def test_a_delete_without_or_with_a_wrong_timestamp_deletes_nothing(self, service: Service, backed_up: str) -> None:
        before = service.call("GET", "/backup/list").json()
        assert service.call("GET", "/backup/delete").status_code == 422
        assert service.call("DELETE", "/backup/..%2f..").status_code in (404, 422)
        assert service.call("GET", "/backup/delete", '{"timestamp": "../x"}').status_code == 422
        assert service.call("GET", "/backup/list").json() == before


class TestRestore:
    """The document's restore lines."""

    def test_the_documents_body_with_its_trailing_comma_is_taken(self, service: Service, backed_up: str) -> None:
        file = volumes_of(service)["gitserver"]
        file.write_text("destroyed")
        svcs = '"svcs": {\n        "gitserver": {\n            "disable": false\n        },\n    }'
        body = f'{{\n    "timestamp": "{backed_up}",\n    "sourceNamespace": "app",\n    {svcs}\n}}'
        answer = service.call("POST", "/ondemandrestore", body)
        assert answer.status_code == 202
        assert answer.json() == {"code": 202, "message": "Request Accepted"}
        assert service.status("/restore/status") == ALL_PENDING
        asked = json.dumps({"timestamp": backed_up})
        await_true(lambda: service.status("/restore/status", asked) == "Success", "the restore's end", 120)
        record = service.call(
            "GET", "/restore/status", json.dumps({"timestamp": backed_up, "sourceNamespace": "app"})
        ).json()
        assert record == {
            "backupurl": str(store_of(service)),
            "namespace": "app",
            "status": "Success",
            "timestamp": backed_up,
        }
        assert file.read_text() == "content of gitserver"

    def test_a_disabled_service_is_left_alone(self, service: Service, backed_up: str) -> None:
        files = volumes_of(service)
        for file in files.values():
            file.write_text("changed")
        status = service.restore(backed_up, svcs={"gitserver": {"disabled": True}, "postgres": {"disable": True}})
        assert status == "Success"
        assert files["gitserver"].read_text() == "changed"
        assert files["edweb"].read_text() == "content of edweb"
        files["gitserver"].write_text("content of gitserver")

    def test_an_unknown_set_is_a_404(self, service: Service) -> None:
        answer = service.call(
            "POST", "/ondemandrestore", '{"timestamp": "2001-01-01t00-00-00", "sourceNamespace": "app"}'
        )
        assert answer.status_code == 404
        assert "2001-01-01t00-00-00" in message(answer)
        assert service.call("GET", "/restore/status", '{"timestamp": "2001-01-01t00-00-00"}').status_code == 404

    def test_a_set_of_another_namespace_is_looked_for_there(self, service: Service, backed_up: str) -> None:
        answer = service.call(
            "POST", "/ondemandrestore", json.dumps({"timestamp": backed_up, "sourceNamespace": "elsewhere"})
        )
        assert answer.status_code == 404
        assert "elsewhere" in message(answer)


class TestBodies:
    """What is wrong with a body is named, all of it, and nothing is started."""

    @pytest.mark.parametrize(
        ("body", "named"),
        [
            (
                '{"timestamp": "{timestamp}", "sourceNamespace": "{Source namespace}"}',
                ["placeholder", "{timestamp}", "{Source"],
            ),
            ('{"sourceNamespace": "app"}', ["timestamp is missing"]),
            (
                '{"timestamp": "yesterday", "sourceNamespace": "../x", "foo": 1, "bar": 2}',
                ["yesterday", "../x", "bar, foo"],
            ),
            ('{"timestamp": 5}', ["timestamp has to be a text"]),
            ('{"timestamp": "2001-01-01t00-00-00", "svcs": {"gitserver": {"disable": "yes"}}}', ["svcs.gitserver"]),
            ('{"timestamp": "2001-01-01t00-00-00", "svcs": {"gitserver": {"off": true}}}', ["svcs.gitserver"]),
            ('{"timestamp": "2001-01-01t00-00-00", "svcs": []}', ["svcs has to be an object"]),
            ("not json", ["not JSON", "line 1"]),
            ("[]", ["JSON object"]),
            ('{"timestamp": "a", "timestamp": "b"}', ["twice"]),
            (b"\xff\xfe", ["UTF-8"]),
            ("[" * 60_000, ["body"]),
            (f'{{"timestamp": {"1" * 5_000}}}', ["too many digits"]),
            (r'{"\ud800": 1, "svcs": {"\ud801": 1}}', [r"\ud800", r"svcs.\ud801"]),
            (
                '{"timestamp": "2001-01-01t00-00-00", "svcs": {"gitserver": {"disable": [], "disabled": {}}}}',
                ["svcs.gitserver"],
            ),
            ('{"timestamp": "2001-01-01t00-00-00", "svcs": {"gitserver": {"disable": 1}}}', ["svcs.gitserver"]),
            ('{"x": "' + "y" * 70_000 + '"}', ["longer than"]),
            ('{"timestamp": "' + "2" * 60_000 + '"}', ["'2222", "... (60002 characters)"]),
            (
                '{"{' + "x" * 30_000 + '}": 1, "svcs": {"' + "y" * 30_000 + '": 1}}',
                ["{xxx", "... (30002 characters)", "svcs.yyy", "... (30000 characters)"],
            ),
        ],
    )
    def test_every_fault_of_a_restore_body_is_named(
        self, service: Service, body: str | bytes, named: list[str]
    ) -> None:
        answer = service.call("POST", "/ondemandrestore", body)
        assert answer.status_code == 422
        assert [word for word in named if word not in message(answer)] == []
        assert len(message(answer)) < 1_000

    @pytest.mark.parametrize(("typo", "shown"), [("gitsrever", "gitsrever"), ("\ud800", r"\ud800")])
    def test_a_typo_in_svcs_is_refused_because_it_would_overwrite(
        self, service: Service, backed_up: str, typo: str, shown: str
    ) -> None:
        body = json.dumps({"timestamp": backed_up, "sourceNamespace": "app", "svcs": {typo: {"disable": True}}})
        answer = service.call("POST", "/ondemandrestore", body)
        assert answer.status_code == 422
        assert shown in message(answer)

    def test_an_unknown_member_of_a_backup_body_is_refused(self, service: Service) -> None:
        answer = service.call("POST", "/ondemandbackup", '{"onlyconfig": true}')
        assert answer.status_code == 422
        assert "onlyconfig" in message(answer)

    def test_a_comma_inside_a_text_is_no_trailing_comma(self, service: Service) -> None:
        answer = service.call("GET", "/backup/status", '{"timestamp": "x,}", }')
        assert answer.status_code == 422
        assert "'x,}'" in message(answer)

    @pytest.mark.parametrize(
        ("method", "path", "code"),
        [("GET", "/nowhere", 404), ("PUT", "/backup/list", 405), ("GET", "/ondemandbackup", 405)],
    )
    def test_what_does_not_exist_answers_in_the_same_shape(
        self, service: Service, method: str, path: str, code: int
    ) -> None:
        answer = service.call(method, path)
        assert answer.status_code == code
        assert message(answer)
        assert ("allow" in answer.headers) is (code == 405)


def test_the_openapi_page_is_real_and_describes_every_call(service: Service) -> None:
    document = httpx.get(f"{service.api_url}/athena/api/v1/openapi.json", trust_env=False).json()
    calls = {path.removeprefix("/athena/api/v1") for path in document["paths"]}
    assert calls == {
        *("/ondemandbackup", "/ondemandrestore", "/backup/latest", "/backup/status", "/backup/list", "/backup/delete"),
        *("/backup/{timestamp}", "/restore/status", "/restorestatus", "/backupstatus", "/backuplist", "/metrics"),
    }
    page = httpx.get(f"{service.api_url}/athena/api/v1/docs", trust_env=False)
    assert page.status_code == 200
    assert "openapi.json" in page.text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) >= 2
    for address in loaded:
        # Nothing from afar: an on-premises cluster has no way out.
        assert address.startswith("/athena/api/v1/")
        assert httpx.get(f"{service.api_url}{address}", trust_env=False).status_code == 200


def test_no_secret_is_in_what_the_service_printed_or_gave_to_prefect(service: Service) -> None:
    service.back_up()
    runs = httpx.post(f"{service.prefect_url}/api/flow_runs/filter", json={}, trust_env=False).text
    tasks = httpx.post(f"{service.prefect_url}/api/task_runs/filter", json={}, trust_env=False).text
    for text in ("\n".join(service.output), runs, tasks):
        assert KEY not in text
        assert "postgresql://" not in text
