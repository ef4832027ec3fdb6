"""What goes wrong between client and store ends in a clear error or in success after another try; never in a false success.

Each fault happens to a real server, by a proxy before it (`fault_proxy`), with the client's patience scaled down
(`object_stores.QUICK`). After each, a set is closed over what was written: it becomes one only if every byte is right.
"""

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from fault_proxy import Fault, FaultProxy, Request, fault_proxy
from object_stores import PATIENT, QUICK, Server, s3_server
from service import await_true

from athena_backup.backup import Expected, close_set, put_component
from athena_backup.errors import (
    AbsentError,
    AthenaError,
    DamagedError,
    DeniedError,
    FinalError,
    FullError,
    PassingError,
    UnavailableError,
)
from athena_backup.manifest import Component, Manifest, Stream, component_folder
from athena_backup.names import SetId, Timestamp, new_attempt
from athena_backup.operation import Operation
from athena_backup.pipeline import Source, read_part, write_stream
from athena_backup.store import Store, StoreLocation, UnsettledError, look_into, read_document
from athena_backup.store.clients import Keys, open_azure, open_s3
from athena_backup.store.objects import UPLOAD_PART_BYTES, ObjectStore
from athena_backup.store.refusals import cause_of, is_denied, told
from deployments.embedded_stores import EmbeddedAzure, EmbeddedS3

SET = SetId("app", Timestamp.parse("2026-11-23t12-00-00"))
ASP = Expected("asp", "volume")
BIG = random.Random(4).randbytes(2 * UPLOAD_PART_BYTES + 3_000_000)
"""Three upload parts; it does not compress."""
SMALL = BIG[:100_000]


def chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 1 << 20):
        yield data[start : start + (1 << 20)]


def back_up(store: Store, data: bytes) -> Component:
    """One try at a component, as a backup makes it."""
    attempt = new_attempt()
    folder = component_folder(SET, ASP.kind, ASP.name, attempt)
    source = Source(ASP.name, lambda operation: chunks(data))
    parts = write_stream(source, store, lambda number: f"{folder}0000.tar.zst.{number:04}", Operation())
    now = datetime.now(UTC)
    component = Component(name=ASP.name, kind=ASP.kind, attempt=attempt, run_id="run", state="complete", began=now, ended=now,
                          streams=(Stream(name="0000.tar.zst", parts=parts),))  # fmt: skip
    put_component(store, SET, component)
    return component


def back_up_patiently(store: Store, data: bytes, tries: int = 3) -> Component:
    """As the flow's tasks do: what may pass is tried again, under a new attempt."""
    for _ in range(tries - 1):
        try:
            return back_up(store, data)
        except PassingError:
            pass
    return back_up(store, data)


def is_whole(server: Server, data: bytes) -> bool:
    """Whether closing the set makes one; asserts, without any proxy, that one that is made holds every byte."""
    store = server.open()
    outcome = close_set(store, SET, [ASP], [], run_id="run", began=datetime.now(UTC))
    if not isinstance(outcome, Manifest):
        return False
    (component,) = outcome.components
    assert b"".join(raw for part in component.parts for raw in read_part(part, store, Operation())) == data
    return True


def parts_but_the_first() -> Callable[[Request], bool]:
    seen: list[str] = []

    def matches(request: Request) -> bool:
        if request.is_part:
            seen.append(request.target)
        return request.is_part and len(seen) > 1

    return matches


class TestPassing:
    """A backup that succeeds after another try."""

    @pytest.mark.parametrize("times", [1, 3])
    def test_a_connection_that_is_cut_in_an_upload_part(
        self, object_server: Server, proxy: FaultProxy, times: int
    ) -> None:
        cut = proxy.inject(Fault(on=parts_but_the_first(), times=times, cut_request_after=1_000_000))
        back_up_patiently(object_server.open(through=proxy), BIG)
        assert cut.hits == times
        assert is_whole(object_server, BIG)

    @pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")])
    def test_a_burst_of_refusals_at_every_kind_of_request(
        self, object_server: Server, proxy: FaultProxy, status: int, code: str
    ) -> None:
        kinds = ("GET", "HEAD", "PUT", "POST")
        faults = [
            proxy.inject(Fault(on=lambda request, method=method: request.method == method, times=3, status=status, code=code))
            for method in kinds
        ]  # fmt: skip
        store = object_server.open(through=proxy)
        component = back_up_patiently(store, BIG)
        assert list(store.folders("app/")) == [str(SET.timestamp)]
        assert b"".join(read_part(component.parts[0], store, Operation())) == BIG
        assert all(fault.hits == 3 for fault in faults if fault is not faults[3] or object_server.kind != "azure")
        assert is_whole(object_server, BIG)

    def test_silence_that_ends_and_silence_that_lasts(self, object_server: Server, proxy: FaultProxy) -> None:
        short = proxy.inject(Fault(on=lambda request: request.is_part, silent_seconds=1))
        lasting = proxy.inject(Fault(on=lambda request: request.is_part, silent_seconds=3))
        back_up_patiently(object_server.open(through=proxy), BIG)
        assert (short.hits, lasting.hits) == (1, 1)
        assert is_whole(object_server, BIG)

    def test_a_read_resumes_in_the_middle(self, object_server: Server, proxy: FaultProxy) -> None:
        object_server.open().write("app/part", chunks(BIG))
        store = object_server.open(through=proxy)
        cut = proxy.inject(Fault(on=lambda request: request.method == "GET", times=3, cut_answer_after=500_000))
        stalled = proxy.inject(Fault(on=lambda request: request.method == "GET", silent_seconds=3))
        assert b"".join(store.read("app/part")) == BIG
        assert (cut.hits, stalled.hits) == (3, 1)

    def test_a_read_that_stalls_is_begun_anew_long_before_its_time_is_over(
        self, object_server: Server, proxy: FaultProxy
    ) -> None:
        object_server.open().write("app/part", chunks(BIG))
        store = object_server.open(replace(PATIENT, stall_seconds=1), through=proxy)
        stalled = proxy.inject(Fault(on=lambda request: request.method == "GET", silent_seconds=30))
        began = time.monotonic()
        assert b"".join(store.read("app/part")) == BIG
        assert stalled.hits == 1
        assert time.monotonic() - began < 15

    @pytest.mark.parametrize("object_server", ["s3"], indirect=True)
    def test_a_slow_and_distant_line(self, object_server: Server, proxy: FaultProxy) -> None:
        proxy.bytes_per_second, proxy.latency_seconds = 1 << 20, 0.1
        store = object_server.open(replace(QUICK, timeout_seconds=60, read_back=False), through=proxy)
        sent = BIG[: UPLOAD_PART_BYTES + 1_000_000]
        store.write("app/part", chunks(sent))
        proxy.bytes_per_second = None
        assert b"".join(store.read("app/part")) == sent

    @pytest.mark.parametrize("object_server", ["s3"], indirect=True)
    def test_sixteen_streams_share_a_slow_and_distant_line(self, object_server: Server, proxy: FaultProxy) -> None:
        proxy.bytes_per_second, proxy.latency_seconds = 1 << 20, 0.1
        way = replace(QUICK, timeout_seconds=60, read_back=False, streams=16)
        store = object_server.open(way, through=proxy)
        sent = {f"app/{number}": BIG[number * 700_000 :][:700_000] for number in range(16)}
        with ThreadPoolExecutor(len(sent)) as pool:
            list(pool.map(lambda key: store.write(key, chunks(sent[key])), sent))
        proxy.bytes_per_second = None
        assert {key: b"".join(store.read(key)) for key in sent} == sent

    @pytest.mark.parametrize("object_server", ["s3"], indirect=True)
    def test_upload_parts_that_time_out_side_by_side_go_one_by_one(
        self, object_server: Server, proxy: FaultProxy
    ) -> None:
        proxy.bytes_per_second = 8 << 20
        store = object_server.open(replace(QUICK, timeout_seconds=1.6, retry_seconds=1), through=proxy)
        back_up_patiently(store, BIG)
        assert is_whole(object_server, BIG)


class TestLostAnswers:
    """An error of a put or a completion means that nobody knows ("stores", section 2)."""

    @pytest.mark.parametrize("kind", ["is_put", "is_part", "is_completion"])
    @pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
    def test_every_answer_lost_once(self, object_server: Server, proxy: FaultProxy, kind: str, data: bytes) -> None:
        lost: set[str] = set()

        def first_time(request: Request) -> bool:
            is_new = getattr(request, kind) and request.target not in lost
            lost.add(request.target if is_new else "")
            return is_new

        fault = proxy.inject(Fault(on=first_time, times=1_000, lose_answer=True))
        store = object_server.open(through=proxy)
        back_up_patiently(store, data)
        outcome = close_set(store, SET, [ASP], [], run_id="run", began=datetime.now(UTC))
        assert isinstance(outcome, Manifest)
        assert fault.hits >= 1 or data is SMALL
        assert is_whole(object_server, data)

    def test_a_completion_whose_answers_all_are_lost_is_settled_by_reading(
        self, object_server: Server, proxy: FaultProxy
    ) -> None:
        proxy.inject(Fault(on=lambda request: request.is_completion, times=1_000, lose_answer=True))
        store = object_server.open(through=proxy)
        with pytest.raises(UnsettledError) as told:
            store.write("app/part", chunks(BIG))
        assert told.value.entry.size_bytes == len(BIG)
        proxy.heal()
        proxy.inject(Fault(on=lambda request: request.is_completion, times=1_000, lose_answer=True))
        back_up(store, BIG)
        assert is_whole(object_server, BIG)


class TestFlippedBytes:
    """A byte that is changed on the way up is refused by the store, or seen when the part is read back."""

    @pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
    def test_on_the_way_up(self, object_server: Server, proxy: FaultProxy, data: bytes) -> None:
        flip = proxy.inject(Fault(on=lambda request: request.is_part or request.is_put, times=1, flip_request_at=5_000))
        # moto takes a checksum and never looks at it: of such a server only reading back tells the truth.
        store = object_server.open(replace(QUICK, read_back=object_server.kind == "moto"), through=proxy)
        with pytest.raises(AthenaError):
            back_up(store, data)
        assert flip.hits == 1
        assert not is_whole(object_server, data)
        back_up(store, data)
        assert is_whole(object_server, data)

    def test_on_the_way_down(self, object_server: Server, proxy: FaultProxy) -> None:
        component = back_up(object_server.open(), BIG)
        store = object_server.open(through=proxy)
        proxy.inject(Fault(on=lambda request: request.method == "GET", flip_answer_at=5_000))
        with pytest.raises(DamagedError):
            list(read_part(component.parts[0], store, Operation()))

    def test_s3_refuses_them_by_signature_and_checksum(self, seaweed: EmbeddedS3) -> None:
        server = s3_server(seaweed)
        server.clean()
        with fault_proxy(server.address) as proxy:
            proxy.inject(Fault(on=lambda request: request.is_put, times=100, flip_request_at=50))
            store = server.open(through=proxy)
            with pytest.raises(AthenaError):
                store.write("app/part", [SMALL])
            put = next(request for request in proxy.seen if request.is_put)
            assert put.headers["x-amz-content-sha256"] == hashlib.sha256(SMALL).hexdigest()
            assert "x-amz-checksum-sha256" in put.headers
        assert server.open().head("app/part") is None


class TestReplacedWhileRead:
    def test_it_is_told_and_nothing_is_mixed(self, object_server: Server, proxy: FaultProxy) -> None:
        object_server.open().write("app/part", chunks(BIG))
        other = bytes(len(BIG))
        proxy.inject(
            Fault(
                on=lambda request: request.method == "GET" and request.headers.get("range", "").startswith("bytes=0-"),
                then=lambda: object_server.open().put("app/part", other) and None,
            )
        )
        with pytest.raises(DamagedError, match="replaced while it was read"):
            list(object_server.open(through=proxy).read("app/part"))


class TestFinal:
    """Errors that no retry helps, each with what to do next."""

    def test_a_server_that_is_not_there(self) -> None:
        quickly = replace(QUICK, retry_seconds=0.2)
        store = open_s3("bucket", "http://127.0.0.1:9", "r", Keys("a", "b"), way=quickly)
        with pytest.raises(UnavailableError, match="check the store's address"):
            store.write("app/part", [SMALL])

    @pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
    def test_a_wrong_key_of_s3(self, seaweed: EmbeddedS3, data: bytes) -> None:
        for keys in (Keys("AKIAWRONG", "wrong"), replace(seaweed.keys, secret_key="wrong")):
            store = open_s3(seaweed.bucket, seaweed.endpoint, seaweed.region, keys, way=QUICK)
            self._denied(store, data)

    @pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
    def test_a_wrong_key_of_azure(self, azurite: EmbeddedAzure, data: bytes) -> None:
        self._denied(open_azure(azurite.account, azurite.service_url, azurite.container, "d3Jvbmc=", way=QUICK), data)

    @staticmethod
    def _denied(store: ObjectStore, data: bytes) -> None:
        for call in (lambda: store.write("app/part", chunks(data)), lambda: store.put("app/x", b"", if_absent=True),
                     lambda: list(store.entries("app/")), lambda: list(store.read("app/part"))):  # fmt: skip
            with pytest.raises(DeniedError, match="check the store's keys"):
                call()

    @pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
    def test_keys_that_may_not_write(self, seaweed: EmbeddedS3, data: bytes) -> None:
        server = s3_server(seaweed)
        server.clean()
        server.open().put("app/old", b"old")
        store = open_s3(seaweed.bucket, seaweed.endpoint, seaweed.region, seaweed.reader, way=QUICK)
        with pytest.raises(DeniedError, match="may read, write and list"):
            back_up(store, data)
        with pytest.raises(DeniedError):
            store.put("app/new", b"", if_absent=True)
        assert [entry.key for entry in store.entries("app/")] == ["app/old"]
        assert not is_whole(server, data)

    @pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
    def test_a_bucket_that_does_not_exist(self, seaweed: EmbeddedS3, data: bytes) -> None:
        self._missing(open_s3("no-such-bucket", seaweed.endpoint, seaweed.region, seaweed.keys, way=QUICK), data)

    @pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
    def test_a_container_that_does_not_exist(self, azurite: EmbeddedAzure, data: bytes) -> None:
        self._missing(open_azure(azurite.account, azurite.service_url, "none-such", azurite.key, way=QUICK), data)

    @staticmethod
    def _missing(store: ObjectStore, data: bytes) -> None:
        for call in (lambda: store.write("app/part", chunks(data)), lambda: store.put("app/x", b"", if_absent=True),
                     lambda: list(store.entries("app/")), lambda: list(store.folders("app/"))):  # fmt: skip
            with pytest.raises(FinalError, match="there is no bucket or container"):
                call()

    def test_a_bucket_that_is_deleted_in_the_middle(self, seaweed: EmbeddedS3) -> None:
        server = s3_server(seaweed)
        server.clean()
        client = seaweed.access.client()

        def delete() -> None:
            while True:  # other upload parts are on their way
                try:
                    for upload in client.list_multipart_uploads(Bucket=seaweed.bucket).get("Uploads", []):
                        client.abort_multipart_upload(
                            Bucket=seaweed.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                    client.delete_bucket(Bucket=seaweed.bucket)
                except client.exceptions.NoSuchBucket:
                    return
                except client.exceptions.ClientError:
                    continue

        with fault_proxy(server.address) as proxy:
            proxy.inject(Fault(on=parts_but_the_first(), then=delete))
            store = server.open(through=proxy)
            try:
                with pytest.raises(AthenaError) as told:
                    back_up(store, BIG)

                def is_told() -> bool:
                    delete()
                    for call in (lambda: back_up(store, SMALL), lambda: is_whole(server, BIG)):
                        try:
                            call()
                        except FinalError as error:
                            if "there is no bucket" in str(error):
                                continue
                        server.clean()
                        return False
                    return True

                # An upload part that was still on its way makes SeaweedFS lay the bucket's folder anew.
                await_true(is_told, "the store says that there is no bucket")
            finally:
                server.clean()
        assert told.value.cause
        assert not isinstance(told.value, UnsettledError)

    def test_clocks_that_differ(self, seaweed: EmbeddedS3) -> None:
        """The answer is S3's; no clock of this machine is turned for it."""
        with fault_proxy(seaweed.endpoint) as proxy:
            proxy.inject(Fault(times=1_000, status=403, code="RequestTimeTooSkewed"))
            store = s3_server(seaweed).open(through=proxy)
            with pytest.raises(DeniedError, match="clocks of this machine and the store differ"):
                store.put("app/x", b"", if_absent=True)

    def test_a_full_store_is_told_as_such(self, seaweed: EmbeddedS3) -> None:
        with fault_proxy(seaweed.endpoint) as proxy:
            proxy.inject(Fault(on=lambda request: request.is_put, times=1_000, status=507, code="InsufficientStorage"))
            with pytest.raises(FullError, match="make room in the store"):
                s3_server(seaweed).open(replace(QUICK, retry_seconds=0.5), through=proxy).write("app/part", [SMALL])

    def test_a_full_quota_is_told_as_such_and_not_as_bad_keys(self, seaweed: EmbeddedS3) -> None:
        """As Ceph answers it: 403, as it does to wrong keys."""
        with fault_proxy(seaweed.endpoint) as proxy:
            proxy.inject(Fault(on=lambda request: request.is_put, times=1_000, status=403, code="QuotaExceeded"))
            store = s3_server(seaweed).open(through=proxy)
            for call in (lambda: store.put("app/x", b"", if_absent=True), lambda: store.write("app/part", [SMALL])):
                proxy.seen.clear()
                with pytest.raises(FullError, match=r"QuotaExceeded.*make room in the store, or raise its quota"):
                    call()
                # No other credentials help.
                assert sum(request.is_put for request in proxy.seen) == 1

    @pytest.mark.parametrize(
        ("status", "code", "told"),
        [
            (
                403,
                "InvalidObjectState",
                r"app/part lies in an archive class of the store \(restore it from the archive",
            ),
            (400, "KMS.DisabledException", r"KMS\.DisabledException.*have the key enabled"),
        ],
    )
    def test_an_object_that_nobody_can_read_now(self, seaweed: EmbeddedS3, status: int, code: str, told: str) -> None:
        server = s3_server(seaweed)
        server.clean()
        server.open().put("app/part", SMALL)
        with fault_proxy(seaweed.endpoint) as proxy:
            refused = proxy.inject(
                Fault(on=lambda request: request.method == "GET", times=1_000, status=status, code=code)
            )
            store = server.open(through=proxy)
            assert store.head("app/part") is not None
            with pytest.raises(FinalError, match=told) as raised:
                list(store.read("app/part", 0, 1))
        assert not isinstance(raised.value, DeniedError)
        assert refused.hits == 1

    def test_of_many_objects_that_nobody_can_read_the_first_is_told_and_how_many_there_are(
        self, seaweed: EmbeddedS3
    ) -> None:
        server = s3_server(seaweed)
        server.clean()
        keys = [f"app/{number}" for number in range(5)]
        for key in keys:
            server.open().put(key, b"x")
        with fault_proxy(seaweed.endpoint) as proxy:
            store = server.open(through=proxy)
            assert look_into(store, keys) is None
            archived = proxy.inject(
                Fault(
                    on=lambda request: not request.target.endswith("/0"),
                    times=1_000,
                    status=403,
                    code="InvalidObjectState",
                )
            )
            refused = look_into(store, keys)
        assert archived.hits == 4
        assert refused is not None
        assert "app/1 lies in an archive class" in refused.cause
        assert refused.cause.endswith("; 3 more objects can't be read either")

    def test_a_denied_look_asks_for_all_that_it_can_be_of(self, seaweed: EmbeddedS3) -> None:
        with fault_proxy(seaweed.endpoint) as proxy:
            proxy.inject(Fault(times=1_000, status=403, code="AccessDenied"))
            store = s3_server(seaweed).open(through=proxy)
            with pytest.raises(DeniedError, match=r"keys and region, that they may .* and this machine's clock"):
                store.head("app/part")
            with pytest.raises(DeniedError, match="check the store's keys, and that they may read"):
                store.put("app/x", b"", if_absent=True)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("<Code>QuotaExceeded</Code><RequestId>1</RequestId>", " (QuotaExceeded)"),
        ("<Code>QuotaExceeded</Code><Message></Message>", " (QuotaExceeded)"),
        (
            "<Code>KMS.DisabledException</Code><Message>it is disabled.</Message>",
            " (KMS.DisabledException: it is disabled.)",
        ),
    ],
)
def test_a_code_is_told_with_or_without_a_message(body: str, told: str) -> None:
    said = "Server returned non-2xx status code: 403 Forbidden"
    assert (
        cause_of(ValueError(f"{said}: <?xml version='1.0'?>\n<Error>{body}</Error>\n\nDebug source:\n…")) == said + told
    )


@pytest.mark.parametrize(
    "said",
    [
        "409 This operation is not permitted as the blob is immutable due to a policy.",
        "status code: 409 Conflict: <Error><Code>BlobImmutableDueToPolicy</Code></Error>",
        "status code: 403 Forbidden: <Error><Code>RetentionPolicyNotMet</Code></Error>",
    ],
)
def test_what_a_rule_of_the_store_keeps_is_denied_and_no_fault_of_the_keys(said: str) -> None:
    error = ValueError(said)
    refused = told(StoreLocation("azure-blob-storage", "container"), "app/x/RESTORE.md", error)
    assert isinstance(refused, DeniedError)
    assert "a rule of the store keeps it" in refused.next_step
    assert not is_denied(error)


class TestWhatABreakLeaves:
    def test_a_source_that_fails_leaves_neither_object_nor_upload(self, object_server: Server) -> None:
        def broken() -> Iterator[bytes]:
            yield from chunks(BIG)
            raise FinalError("the source died")

        store = object_server.open()
        with pytest.raises(FinalError, match=r"^the source died$"):
            store.write("app/part", broken())
        assert list(store.entries("")) == []
        assert store.sweep("app/") == 0

    @pytest.mark.parametrize("object_server", ["s3"], indirect=True)
    def test_a_cancel_ends_a_write_that_hangs(self, object_server: Server, proxy: FaultProxy) -> None:
        proxy.inject(Fault(on=lambda request: request.is_part, times=1_000, silent_seconds=20))
        store = object_server.open(replace(QUICK, timeout_seconds=60), through=proxy)
        operation = Operation()
        threading.Timer(1, lambda: operation.cancel("cancelled by request")).start()
        began = time.monotonic()
        with pytest.raises(AthenaError, match="cancelled by request"):
            write_stream(Source("asp", lambda _: chunks(BIG)), store, lambda number: f"app/{number}", operation)
        assert time.monotonic() - began < 10
        assert list(object_server.open().entries("")) == []


def test_absent_is_no_error_of_the_way(object_server: Server, proxy: FaultProxy) -> None:
    proxy.inject(Fault(times=2, status=503, code="SlowDown"))
    store = object_server.open(through=proxy)
    assert store.head("app/nothing") is None
    with pytest.raises(AbsentError):
        read_document(store, "app/nothing")
