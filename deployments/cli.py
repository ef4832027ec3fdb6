"""The command `athena-backup`. Thin: each command reads settings, calls one function, and prints for a person.

Prefect is imported only by the commands that need it, and only after its address is known: it reads its settings when it
is imported.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Annotated
from uuid import UUID

import httpx
import typer

from athena_backup.catalog import list_sets, nothing_of
from athena_backup.errors import AthenaError, FinalError
from athena_backup.names import InvalidNameError, SetId, parse_namespace
from athena_backup.settings import Settings, load_settings, shown

app = typer.Typer(
    name="athena-backup",
    help="Backs up and restores a platform's databases and volumes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app()


def _told(command: Callable[..., int]) -> Callable[..., None]:
    """Errors as one clear line and exit code 1, never a trace; the trace is in the log of whoever asks for it."""

    @wraps(command)
    def run(*arguments: object, **options: object) -> None:
        try:
            code = command(*arguments, **options)
        except (AthenaError, InvalidNameError) as error:
            logging.getLogger("athena_backup").debug("the command failed", exc_info=True)
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except httpx.InvalidURL:
            # Its text has a part of the address, which may be one of the password.
            typer.echo(
                "error: PREFECT_API_URL is no URL: percent-encode what is special in user and password", err=True
            )
            raise typer.Exit(1) from None
        except httpx.HTTPError as error:
            typer.echo(f"error: the Prefect server does not answer ({error}); is `athena-backup up` running?", err=True)
            raise typer.Exit(1) from None
        raise typer.Exit(code)

    return run


@app.command()
@_told
def up() -> int:
    """Run the whole service in the foreground: Prefect server with UI, runner, API. Ctrl-C stops all of it."""
    from deployments.service import up as run_service

    return run_service(load_settings(), say=_say)


@app.command()
@_told
def check(
    *, show_settings: Annotated[bool, typer.Option("--settings", help="Show every setting first.")] = False
) -> int:
    """Say what is wrong before it hurts: databases, programs, volumes, store, schedule."""
    from deployments.checkup import findings

    settings = load_settings()
    if settings.athena_store_block is not None or settings.athena_copy_to:
        with contextlib.suppress(FinalError):  # the looks at the stores tell of it
            _with_prefect()
    if show_settings:
        for name, value in shown(settings).items():
            typer.echo(f"{name}={json.dumps(value) if isinstance(value, dict | list) else value}")
        typer.echo("")
    bad = 0
    for finding in findings(settings):
        typer.echo(str(finding))
        bad += not finding.good
    typer.echo("" if not bad else f"\n{bad} thing(s) to mend")
    return 1 if bad else 0


@app.command()
@_told
def init() -> int:
    """Make the directory of a local store a store, even if it is not empty, and remember it as the right one."""
    from pathlib import Path

    from athena_backup.store.local import initialize, remember
    from blocks.stores import local_directory

    settings = _with_store()
    place = local_directory(settings)
    if place is None:
        raise FinalError(
            "only a local store is made by init", next_step="create the bucket or container with its own tools"
        )
    identifier = initialize(Path(place))
    remember(place, identifier, settings.athena_home / "stores.json")
    typer.echo(f"{place} is the store {identifier}")
    return 0


@app.command()
@_told
def key() -> int:
    """Make a new API key in place of the kept one and show it; the API takes it after the service's next start."""
    settings = _with_prefect()
    if settings.athena_api_keys:
        raise FinalError(
            "the keys are given by ATHENA_API_KEYS", next_step="change them there, then start the service again"
        )
    from blocks.keys import make_key

    typer.echo(make_key(settings.athena_namespace))
    return 0


@app.command()
@_told
def backup(
    *,
    only_databases: Annotated[bool, typer.Option(help="Leave the volumes out.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait for the end and tell how it went.")] = True,
) -> int:
    """Take a backup now, through the running service."""
    settings = _with_prefect()
    from prefect.client.orchestration import get_client

    from blocks.stores import open_store
    from flows.requests import BackupRequest
    from flows.runs import start_backup

    request = BackupRequest(only_databases=only_databases)
    with get_client(sync_client=True) as client:
        run = start_backup(client, open_store(settings), settings.athena_namespace, request)
    typer.echo(f"backup {run.set_id} started")
    if not wait:
        return 0
    return _await(settings, run.set_id, "backup") or _await_all_copies(settings, run.set_id)


@app.command()
@_told
def restore(
    which: Annotated[str, typer.Argument(metavar="[NAMESPACE/]TIMESTAMP", help="The backup set.")],
    *,
    skip: Annotated[list[str] | None, typer.Option(help="A component to leave alone; may be repeated.")] = None,
    accept_metadata_loss: Annotated[
        bool,
        typer.Option("--accept-metadata-loss", help="Restore even where owners, modes or attributes can't be set."),
    ] = False,
    allow_devices: Annotated[bool, typer.Option("--allow-devices", help="Make the device nodes of the set.")] = False,
    skip_health_checks: Annotated[
        bool,
        typer.Option("--skip-health-checks", help="Don't ask ATHENA_HEALTH_URLS, neither before nor afterwards."),
    ] = False,
    wait: Annotated[bool, typer.Option(help="Wait for the end and tell how it went.")] = True,
) -> int:
    """Overwrite this service's databases and volumes with a backup set, through the running service."""
    settings = _with_prefect()
    from prefect.client.orchestration import get_client

    from athena_backup.catalog import whole_manifest
    from blocks.stores import open_store
    from flows.requests import RestoreRequest, unknown_names
    from flows.runs import start_restore

    set_id = SetId.parse(which, settings.athena_namespace)
    manifest = whole_manifest(open_store(settings), set_id)
    unknown = unknown_names(skip or [], settings.component_names | {one.name for one in manifest.components})
    if unknown:
        raise FinalError(f"--skip: {unknown}", next_step="nothing was touched")
    request = RestoreRequest(
        timestamp=str(set_id.timestamp),
        source_namespace=set_id.namespace,
        skip=skip or [],
        accept_metadata_loss=accept_metadata_loss,
        allow_devices=allow_devices,
        skip_health_check_before=skip_health_checks,
        skip_health_check_after=skip_health_checks,
    )
    with get_client(sync_client=True) as client:
        run = start_restore(client, settings.athena_namespace, request)
    typer.echo(f"restore {run.set_id} started")
    return _await(settings, run.set_id, "restore") if wait else 0


@app.command()
@_told
def copy(
    which: Annotated[str, typer.Argument(metavar="[NAMESPACE/]TIMESTAMP", help="The backup set.")],
    *,
    to: Annotated[str, typer.Option(help="The Prefect block of the store that gets the copy.")],
    wait: Annotated[bool, typer.Option(help="Wait for the end and tell how it went.")] = True,
) -> int:
    """Copy a backup set into another store, through the running service; one that was broken off is completed."""
    settings = _with_prefect()
    from prefect.client.orchestration import get_client

    from athena_backup.catalog import whole_manifest
    from blocks.stores import open_store
    from flows.copies import start_copy
    from flows.requests import CopyRequest

    set_id = SetId.parse(which, settings.athena_namespace)
    whole_manifest(open_store(settings), set_id)
    request = CopyRequest(timestamp=str(set_id.timestamp), source_namespace=set_id.namespace, to=to)
    with get_client(sync_client=True) as client:
        run = start_copy(client, settings.athena_namespace, request)
    typer.echo(f"copy of {set_id} to {to} started")
    return _await_copies(settings, {to: run.id}) if wait else 0


@app.command("list")
@_told
def list_(
    *, namespace: Annotated[str | None, typer.Option(help="Of another namespace than the service's own.")] = None
) -> int:
    """List the backup sets of a namespace, oldest first."""
    from blocks.stores import open_store

    settings = _with_store()
    namespace = settings.athena_namespace if namespace is None else parse_namespace(namespace)
    store = open_store(settings)
    is_empty = True
    for entry in list_sets(store, namespace):
        is_empty = False
        typer.echo(f"{entry.set_id.timestamp}  {entry.status}")
    if is_empty:
        # What is written to stdout is read by scripts, a set a line.
        typer.echo(nothing_of(store, namespace), err=True)
    return 0


def _await(settings: Settings, set_id: SetId, kind: str) -> int:
    from prefect.client.orchestration import get_client

    from flows.runs import BACKUP, RESTORE, finished_components, list_runs

    told: set[str] = set()
    with get_client(sync_client=True) as client:
        while True:
            operation = BACKUP if kind == "backup" else RESTORE
            [run, *_] = list_runs(client, operation, settings.athena_namespace, timestamp=set_id.timestamp, limit=1)
            for name in sorted(finished_components(client, run) - told):
                told.add(name)
                typer.echo(f"  {name} done")
            if run.ended:
                typer.echo(run.message or str(run.outcome))
                return 0 if run.outcome == "success" else 1
            time.sleep(1)


def _with_store() -> Settings:
    """The settings; with Prefect's address only where the store is a block, so that else its server may be down."""
    settings = load_settings()
    return settings if settings.athena_store_block is None else _with_prefect()


def _await_all_copies(settings: Settings, set_id: SetId) -> int:
    """The copies that the backup has started before its end, and those that it was to start."""
    from prefect.client.orchestration import get_client

    from flows.copies import copies_of

    with get_client(sync_client=True) as client:
        started = copies_of(client, settings.athena_namespace, set_id)
    missing = [to for to in settings.athena_copy_to if to not in started]
    for to in missing:
        typer.echo(f"not copied to {to}: no copy was started")
    return _await_copies(settings, {to: run.id for to, run in started.items()}) or (1 if missing else 0)


def _await_copies(settings: Settings, runs: dict[str, UUID]) -> int:
    from prefect.client.orchestration import get_client

    from flows.copies import read_copy

    code = 0
    with get_client(sync_client=True) as client:
        for to, run_id in runs.items():
            while not (run := read_copy(client, settings.athena_namespace, run_id)).ended:
                time.sleep(1)
            typer.echo(run.message or f"copy to {to}: {run.outcome}")
            code = code if run.outcome == "success" else 1
    return code


def _with_prefect() -> Settings:
    """The settings, with Prefect's address in the environment: PREFECT_API_URL, else that of the running service."""
    settings = load_settings()
    address = settings.prefect_api_url
    if address is None:
        try:
            address = json.loads((settings.athena_home / "service.json").read_text())["prefect_api_url"]
        except (OSError, ValueError, KeyError):
            raise FinalError(
                "no service runs here", next_step="start `athena-backup up`, or set PREFECT_API_URL to a Prefect server"
            ) from None
    os.environ["PREFECT_API_URL"] = str(address)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    return settings


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
