"""The routes of the Athena API, first generation, as an ASGI application (contract, section 2).

The adapter keeps no state: each answer is derived from Prefect's runs and the store's catalog, so it can be restarted or
run several times over. What an answer looks like stands in `adapter.records`, what a body may say in `adapter.bodies`.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
import pydantic
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import APIKeyHeader
from fastapi_offline import FastAPIOffline
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import PrefectHTTPStatusError
from starlette.exceptions import HTTPException

from adapter import records
from adapter.bodies import (
    Body,
    BodyError,
    backup_request,
    parse_body,
    restore_body,
    set_id_of,
    status_request,
)
from adapter.metrics import CONTENT_TYPE, metrics
from adapter.patience import patient_client
from athena_backup.backup import software
from athena_backup.catalog import delete_set, find_set, list_sets, whole_manifest
from athena_backup.errors import AbsentError, AthenaError, UnusableSetError
from athena_backup.names import InvalidNameError, SetId, Timestamp, shortened
from athena_backup.settings import Settings
from athena_backup.store import Store
from blocks.keys import is_known
from blocks.stores import KeptStore
from flows.copies import bury_dead_copies, is_being_copied
from flows.dead_runs import reconcile
from flows.requests import RestoreRequest, unknown_names
from flows.runs import (
    BACKUP,
    COPY,
    RESTORE,
    OperationRun,
    OperationRunningError,
    finished_components,
    forget_backups,
    is_being_restored,
    list_runs,
    ongoing_run,
    start_backup,
    start_restore,
)
from flows.stuck_slot import StuckSlots

PREFIX = "/athena/api/v1"
RECONCILE_SECONDS = 20

logger = logging.getLogger("athena_backup.adapter")


class Message(pydantic.BaseModel):
    """Every answer that is not one of the documented shapes."""

    code: int
    message: str


class Ongoing(pydantic.BaseModel):
    """A running operation."""

    status: str


class BackupRecord(pydantic.BaseModel):
    """One backup or restore that has ended."""

    backupurl: str
    namespace: str
    status: str
    timestamp: str


class BackupList(pydantic.BaseModel):
    """All backups of the service's own namespace, oldest first, failed ones too."""

    model_config = pydantic.ConfigDict(populate_by_name=True)

    backup_list: list[BackupRecord] = pydantic.Field(alias="backup-list")


class Deleted(pydantic.BaseModel):
    """A set is gone."""

    success: bool
    message: str


class _AnswerError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class _Service:
    """What the routes work with: one HTTP client to Prefect and one to the store for all of them, and the keys' hashes."""

    settings: Settings
    client: SyncPrefectClient
    kept: KeptStore
    key_hashes: Sequence[str]

    @property
    def namespace(self) -> str:
        return self.settings.athena_namespace

    def store(self) -> Store:
        return self.kept.get()


def create_app(settings: Settings, key_hashes: Sequence[str]) -> FastAPI:
    """The application; ``key_hashes`` are those of `blocks.keys`. Prefect is reached where PREFECT_API_URL says."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with patient_client() as client:
            app.state.service = _Service(settings, client, KeptStore(settings), key_hashes)
            burying = asyncio.create_task(_bury_the_dead(app.state.service))
            try:
                yield
            finally:
                burying.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await burying

    # With the page's program on board: FastAPI's own page loads it from afar, where an on-premises cluster has no way to.
    app = FastAPIOffline(
        title="Athena Backup",
        version=software().split()[-1],
        description="Backups and restores of the platform's databases and volumes.",
        lifespan=lifespan,
        docs_url=f"{PREFIX}/docs",
        static_url=f"{PREFIX}/docs-assets",
        redoc_url=None,
        openapi_url=f"{PREFIX}/openapi.json",
    )
    _add_routes(app)
    _add_error_answers(app)
    return app


async def _bury_the_dead(service: _Service) -> None:
    stuck = StuckSlots(service.namespace)
    duties: tuple[Callable[[], object], ...] = (
        lambda: reconcile(service.client, service.store(), service.namespace),
        lambda: bury_dead_copies(service.client, service.namespace),
        lambda: stuck.free(service.client),
    )
    while True:
        for duty in duties:
            try:
                await asyncio.to_thread(duty)
            except (AthenaError, httpx.HTTPError, PrefectHTTPStatusError) as error:
                logger.warning("could not look for dead operations: %s", error)
            except Exception:
                # Whatever it is: with this loop a dead operation would be ongoing until the next start.
                logger.exception("could not look for dead operations")
        await asyncio.sleep(RECONCILE_SECONDS)


_key_header = APIKeyHeader(
    name="Authorization", auto_error=False, description="The API key as it stands, or `Bearer KEY`."
)


def _service(request: Request) -> _Service:
    service: _Service = request.app.state.service
    return service


def _authorized(
    service: Annotated[_Service, Depends(_service)], header: Annotated[str | None, Depends(_key_header)]
) -> None:
    # Starlette reads a header's bytes as Latin-1; a key of other characters arrives in UTF-8, as a terminal sends it.
    key = (header or "").encode("latin-1").decode("utf-8", "surrogateescape").strip()
    if key[:7].lower() == "bearer ":
        key = key[7:].strip()
    if not key or not is_known(key, service.key_hashes):
        raise _AnswerError(401, "the API key in the Authorization header is missing or wrong")


async def _body(request: Request) -> Body:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > 2 * 65_536:
            break
    return parse_body(bytes(raw))


Service = Annotated[_Service, Depends(_service)]
JsonBody = Annotated[Body, Depends(_body)]


def _latest(service: Service) -> object:
    """The status of the running backup, else of the last one."""
    ongoing = ongoing_run(service.client, service.namespace, [BACKUP])
    if ongoing is not None:
        return _ongoing(service, ongoing)
    found = _backup_records(service, ongoing)
    if not found:
        raise _AnswerError(404, "no backup was taken yet")
    return found[-1]


def _backup_status(service: Service, body: JsonBody, timestamp: str | None = None) -> object:
    """The status of the backup with the timestamp in body or query; without one, of the running backup."""
    set_id = set_id_of(status_request(body, timestamp), service.namespace)
    ongoing = ongoing_run(service.client, service.namespace, [BACKUP])
    if ongoing is not None and set_id in (None, ongoing.set_id):
        return _ongoing(service, ongoing)
    if set_id is None:
        raise _AnswerError(404, "no backup is running; name a timestamp to ask for an earlier one")
    for one in _backup_records(service, ongoing, set_id):
        return one
    raise _AnswerError(404, f"there is no backup {set_id.timestamp} in namespace {set_id.namespace}")


def _backup_list(service: Service) -> object:
    """All backups, oldest first, failed ones too."""
    ongoing = ongoing_run(service.client, service.namespace, [BACKUP])
    return {"backup-list": _backup_records(service, ongoing)}


def _start_backup(service: Service, body: JsonBody) -> object:
    """Start a backup; its timestamp is the key by which it is asked for and restored."""
    request = backup_request(body)
    run = _unless_running(service, lambda: start_backup(service.client, service.store(), service.namespace, request))
    return Message(code=202, message=f"Request Accepted with timestamp {run.set_id.timestamp}")


def _start_restore(service: Service, body: JsonBody) -> object:
    """Start a restore: what is live is overwritten with the set's state. Use with extreme caution."""
    asked = restore_body(body, service.namespace)
    manifest = whole_manifest(service.store(), asked.request.set_id(service.namespace))
    unknown = unknown_names(asked.named, service.settings.component_names | {one.name for one in manifest.components})
    if unknown:
        raise _AnswerError(422, f"svcs: {unknown}")
    _unless_running(service, lambda: start_restore(service.client, service.namespace, asked.request))
    return Message(code=202, message="Request Accepted")


def _restore_status(service: Service, body: JsonBody, timestamp: str | None = None) -> object:
    """The status of the newest restore of the timestamp in body or query; without one, of the running restore."""
    asked = status_request(body, timestamp, with_source=True)
    if asked.timestamp is None:
        ongoing = ongoing_run(service.client, service.namespace, [RESTORE])
        if ongoing is None:
            raise _AnswerError(404, "no restore is running; name a timestamp to ask for an earlier one")
        return _ongoing(service, ongoing)
    for run in list_runs(service.client, RESTORE, service.namespace, timestamp=asked.timestamp):
        if asked.source_namespace in (None, run.set_id.namespace):
            if not run.ended:
                return _ongoing(service, run)
            return records.record(service.store().location, run.set_id, records.run_status(run))
    raise _AnswerError(404, f"there was no restore of {asked.timestamp}")


def _delete(service: Service, body: JsonBody, timestamp: str | None = None) -> object:
    """Delete the backup set with the timestamp in body or query."""
    set_id = set_id_of(status_request(body, timestamp), service.namespace)
    if set_id is None:
        raise _AnswerError(422, "timestamp is missing: which backup set is to be deleted?")
    return _delete_set(service, set_id)


def _delete_by_path(service: Service, timestamp: str) -> object:
    """Delete the backup set with the timestamp in the path."""
    return _delete_set(service, SetId(service.namespace, Timestamp.parse(timestamp)))


def _delete_set(service: _Service, set_id: SetId) -> Deleted:
    ongoing = ongoing_run(service.client, service.namespace, [BACKUP])
    if ongoing is not None and ongoing.set_id == set_id:
        raise _AnswerError(409, f"backup set {set_id} can't be deleted now: a backup is writing it")
    if is_being_restored(service.client, set_id):
        raise _AnswerError(409, f"backup set {set_id} can't be deleted now: a restore reads it")
    if is_being_copied(service.client, set_id):
        raise _AnswerError(409, f"backup set {set_id} can't be deleted now: it is being copied")
    try:
        delete_set(service.store(), set_id)
    except AbsentError:
        # A backup that died before it wrote anything is a record without a set.
        if not forget_backups(service.client, set_id):
            raise
    else:
        forget_backups(service.client, set_id)
    return Deleted(success=True, message="Deleted backup entry successfully")


def _unless_running(service: _Service, start: Callable[[], OperationRun]) -> OperationRun:
    try:
        return start()
    except OperationRunningError as error:
        ongoing = ongoing_run(service.client, service.namespace)
        # Between the claim of a slot and the creation of its run there is nothing to tell but that.
        raise _AnswerError(409, _ongoing(service, ongoing).status if ongoing else str(error)) from None


def _ongoing(service: _Service, run: OperationRun) -> Ongoing:
    settings = service.settings
    databases = [name for name in settings.athena_databases if _takes_part(run, name, is_database=True)]
    volumes = [name for name in settings.athena_volumes if _takes_part(run, name, is_database=False)]
    if run.kind == RESTORE:
        with contextlib.suppress(AthenaError):
            in_set = {component.name for component in whole_manifest(service.store(), run.set_id).components}
            databases, volumes = [n for n in databases if n in in_set], [n for n in volumes if n in in_set]
    return Ongoing(status=records.ongoing_line(databases, volumes, finished_components(service.client, run)))


def _takes_part(run: OperationRun, name: str, *, is_database: bool) -> bool:
    if run.kind == BACKUP:
        return is_database or not run.only_databases
    return not RestoreRequest(timestamp=str(run.set_id.timestamp), skip=list(run.skip)).skips(
        name, is_database=is_database
    )


def _backup_records(service: _Service, ongoing: OperationRun | None, only: SetId | None = None) -> list[records.Record]:
    store = service.store()
    runs = list_runs(service.client, BACKUP, service.namespace, timestamp=only.timestamp if only else None)
    if only is None:
        sets = list(list_sets(store, service.namespace))
    else:
        entry = find_set(store, only)
        sets = [entry] if entry is not None else []
    return records.backup_records(store.location, sets, [run for run in runs if run.ended and not run.deleted], ongoing)


def _metrics(service: Service) -> Response:
    """Metrics of backups and copies for Prometheus; the key as a bearer token."""
    copies = [run for run in list_runs(service.client, COPY, service.namespace) if run.ended]
    sets = list_sets(service.store(), service.namespace)
    page = metrics(service.namespace, sets, copies, service.settings.athena_copy_to)
    return Response(page, media_type=CONTENT_TYPE)


def _add_routes(app: FastAPI) -> None:
    answers: dict[int | str, dict[str, Any]] = {code: {"model": Message} for code in (401, 404, 409, 422, 503)}
    status = BackupRecord | Ongoing
    timestamp_body = _documented_body({"timestamp": "2023-02-02t16-00-00"})
    # path, method, route, what it answers, its code, its documented body
    table: list[tuple[str, str, Callable[..., object], Any, int, dict[str, Any]]] = [
        ("/ondemandbackup", "POST", _start_backup, Message, 202, _documented_body({})),
        ("/backup/latest", "GET", _latest, status, 200, {}),
        ("/backup/status", "GET", _backup_status, status, 200, timestamp_body),
        ("/backup/list", "GET", _backup_list, BackupList, 200, {}),
        ("/backup/delete", "GET", _delete, Deleted, 200, timestamp_body),
        ("/backup/{timestamp}", "DELETE", _delete_by_path, Deleted, 200, {}),
        (
            *("/ondemandrestore", "POST", _start_restore, Message, 202),
            _documented_body(
                {
                    "timestamp": "2022-11-22t10-00-00",
                    "sourceNamespace": "app",
                    "svcs": {"gitserver": {"disable": False}},
                }
            ),
        ),
        ("/restore/status", "GET", _restore_status, status, 200, timestamp_body),
        ("/backupstatus", "GET", _backup_status, status, 200, timestamp_body),
        ("/backuplist", "GET", _backup_list, BackupList, 200, {}),
        ("/restorestatus", "GET", _restore_status, status, 200, timestamp_body),
    ]
    app.add_api_route(
        PREFIX + "/metrics", _metrics, response_class=PlainTextResponse, dependencies=[Depends(_authorized)]
    )
    for path, method, route, model, code, documented in table:
        app.add_api_route(
            PREFIX + path,
            route,
            methods=[method],
            response_model=model,
            status_code=code,
            responses=answers,
            openapi_extra=documented,
            dependencies=[Depends(_authorized)],
            operation_id=f"{method.lower()}{path.replace('/', '_').replace('{', '').replace('}', '')}",
        )


def _documented_body(example: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": {"type": "object"}, "example": example}}}}


def _add_error_answers(app: FastAPI) -> None:
    def answer(code: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        # A body's JSON can spell half of a surrogate pair, which no answer that quotes it could be encoded with.
        message = message.encode("utf-8", "backslashreplace").decode()
        return JSONResponse({"code": code, "message": message}, status_code=code, headers=headers)

    @app.exception_handler(_AnswerError)
    async def _(request: Request, error: _AnswerError) -> JSONResponse:
        del request
        return answer(error.code, error.message)

    @app.exception_handler(BodyError)
    @app.exception_handler(InvalidNameError)
    async def _(request: Request, error: Exception) -> JSONResponse:
        del request
        return answer(422, str(error))

    @app.exception_handler(AthenaError)
    async def _(request: Request, error: AthenaError) -> JSONResponse:
        if isinstance(error, AbsentError):
            return answer(404, str(error))
        if isinstance(error, UnusableSetError):
            return answer(422, str(error))
        # Whatever else it is, of the store, of Prefect or of the settings, is no fault of the request.
        logger.error("%s %s failed: %s", request.method, request.url.path, error, exc_info=error)
        return answer(503, str(error))

    @app.exception_handler(httpx.HTTPError)
    @app.exception_handler(PrefectHTTPStatusError)
    async def _(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s: Prefect does not answer", request.method, request.url.path, exc_info=error)
        return answer(503, "the Prefect server does not answer as it should: try again, or look at its log")

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return answer(404, f"there is no {shortened(request.url.path)}; the API is described under {PREFIX}/docs")
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(500, "an unforeseen error: the service's log has its trace; please report it")
