"""The restore: claim the slot, find every fault first, build each component beside the live one, switch it.

Each component is switched alone, as soon as it is staged and proven: a restore that fails leaves the components whose
switch came before as at the backup, and the others as they were; its status says which are which.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import httpx
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectHTTPStatusError
from prefect.futures import wait
from prefect.states import Cancelled, Completed, Failed

from athena_backup.catalog import whole_manifest
from athena_backup.errors import AthenaError, Fault, FinalError, UnavailableError, fault_of
from athena_backup.manifest import Component, Manifest
from athena_backup.postgres.preflight import preflight_database
from athena_backup.postgres.rename import switch_database
from athena_backup.postgres.roles import discard_roles, roles_of
from athena_backup.postgres.staging import await_server, discard_staging, stage_database
from athena_backup.settings import load_settings, masked_url
from athena_backup.store import look_at, look_into
from athena_backup.volume_exchange import discard_volume, stage_volume, switch_volume
from athena_backup.volume_preflight import preflight_room, preflight_volume
from flows.components import database_of, omissions, volume_of
from flows.operating import (
    RETRYING,
    SlotTakenError,
    Working,
    component_work,
    free_slot,
    operating,
    run_log,
    task_threads,
)
from flows.recovery import half_switched_volumes, recover_after_crash, recover_after_kill, recover_from_the_dead
from flows.requests import RestoreRequest, unknown_names
from flows.runs import RESTORE, SKIPPED


@flow(
    name=RESTORE,
    task_runner=task_threads(),
    persist_result=False,
    on_crashed=[free_slot, recover_after_crash],
    on_cancellation=[recover_after_kill],
)
def restore(request: RestoreRequest) -> State[Any]:
    """Overwrite this service's databases and volumes with the state of a backup set. Use with extreme caution.

    Every component is built beside the live one and then switched by itself; nothing live is touched before preflight has
    found no fault in any of them.
    """
    try:
        with operating(RESTORE, request.set_id(load_settings().athena_namespace)) as working:
            if not request.skip_health_check_before:
                check_health(
                    working,
                    "before the restore",
                    "start these services, or restore without asking them: --skip-health-checks, or"
                    ' "disablePreRestoreChecks": true and "disablePostRestoreChecks": true',
                )
            skipped = [name for name in working.settings.athena_volumes if request.skips(name, is_database=False)]
            unrecovered = recover_from_the_dead(working, skipped)
            manifest = whole_manifest(working.store, working.set_id)
            chosen, faults = choose(manifest, request, working)
            faults += [fault for fault in unrecovered if fault.component in {one.name for one in chosen}]
            faults = faults or preflight(chosen, request, working)
            switched = [] if faults else stage_and_switch(chosen, request)
            faults = faults or working.fault_list()
            # A volume that could not even be looked at has nothing of this restore, and its mount may not answer.
            reached = [one for one in chosen if one.name not in {fault.component for fault in unrecovered}]
            discard_all(reached, switched, working)
            if not faults and not request.skip_health_check_after:
                faults = health_faults(working)
    except SlotTakenError:
        return Completed(name=SKIPPED, message="skipped: another backup or restore of the namespace is running")
    except Exception as error:  # noqa: BLE001 - here the flow ends, and its last state has to say why
        run_log().error("the restore failed", exc_info=True)
        return Failed(message=str(fault_of(error, step="preparing the restore")))
    left_alone = [name for name in configured(working) if name not in {one.name for one in chosen}]
    volumes = [volume_of(one.name, working.settings) for one in reached if one.name in working.settings.athena_volumes]
    states = states_of(chosen, switched, half_switched_volumes(volumes))
    # Also where others failed: what was switched is live, and no later restore tells of it.
    told = [*omissions([one for one in chosen if one.name in switched]), *notes(working, switched)]
    if request.report:
        write_report(report(manifest, chosen, states, left_alone, told, working))
    if faults or len(switched) < len(chosen):
        ended = Cancelled if working.was_cancelled() else Failed
        return ended(message="; ".join([failure_text(faults, states), *told]))
    message = f"{working.set_id}: restored {' '.join(switched) or 'nothing'}"
    message += f"; left alone: {' '.join(left_alone)}" if left_alone else ""
    return Completed(message="; ".join([message, *told]))


def choose(manifest: Manifest, request: RestoreRequest, working: Working) -> tuple[list[Component], list[Fault]]:
    """The set's components that are to be restored, and a fault for each that has no place to go, and for unknown names."""
    places = configured(working)
    unknown = unknown_names(request.skip, {one.name for one in manifest.components} | set(places))
    chosen = [one for one in manifest.components if not request.skips(one.name, is_database=one.kind == "database")]
    homeless = [one.name for one in chosen if places.get(one.name) != one.kind]
    faults = [
        FinalError(
            "the set has it, this service does not configure it",
            next_step=f'configure it, or leave it out with "svcs": {{"{name}": {{"disable": true}}}}',
        ).fault(component=name, step="checking before the restore")
        for name in homeless
    ]
    if unknown:
        faults.append(FinalError(unknown, next_step="correct skip").fault(step="checking before the restore"))
    return chosen, faults


def preflight(chosen: Sequence[Component], request: RestoreRequest, working: Working) -> list[Fault]:
    """Every fault that can be found before anything live is touched, of all components at once."""
    faults: list[Fault] = []
    for component in chosen:
        try:
            if component.kind == "database":
                target = database_of(component.name, working.settings)
                found = preflight_database(component, target, restore_id(working), working.settings.athena_pg_bin)
            else:
                found = preflight_volume(
                    component,
                    volume_of(component.name, working.settings).directory,
                    restore_id(working),
                    allow_devices=request.allow_devices,
                    accept_metadata_loss=request.accept_metadata_loss,
                )
        except AthenaError as error:
            found = [error]
        faults += [error.fault(component=component.name, step="checking before the restore") for error in found]
    volumes = [(one, volume_of(one.name, working.settings).directory) for one in chosen if one.kind == "volume"]
    faults += [error.fault(step="checking before the restore") for error in preflight_room(volumes)]
    parts = [part for component in chosen for part in component.parts]
    standing = set()
    for part, entry in zip(parts, look_at(working.store, [part.key for part in parts]), strict=True):
        if entry is None or entry.size_bytes != part.size_bytes:
            damaged = FinalError(f"{part.key} is not in the store as it was written", next_step="restore another set")
            faults.append(damaged.fault(step="checking before the restore"))
        else:
            standing.add(part.key)
    if working.store.location.type != "local":  # a directory has no archive class
        for component in chosen:
            refused = look_into(working.store, [part.key for part in component.parts if part.key in standing])
            if refused is not None:
                faults.append(refused.fault(component=component.name, step="checking before the restore"))
    return faults


def stage_and_switch(chosen: Sequence[Component], request: RestoreRequest) -> list[str]:
    """Stage every component beside the live one and switch it once it is proven; the names of those switched."""
    switches = {}
    for component in chosen:
        staged = stage.with_options(task_run_name=component.name, tags=[component.kind, "step:stage"]).submit(
            component.name,
            allow_devices=request.allow_devices,
            accept_metadata_loss=request.accept_metadata_loss,
        )
        switches[component.name] = switch.with_options(
            task_run_name=component.name, tags=[component.kind, "step:switch"]
        ).submit(component.name, wait_for=[staged], return_state=False)
    wait(list(switches.values()))
    return [name for name, future in switches.items() if future.state.is_completed()]


@task(name="stage", **RETRYING)
def stage(name: str, *, allow_devices: bool = False, accept_metadata_loss: bool = False) -> None:
    """Build one component beside the live one; what a failed try has built is thrown away at once."""

    def work(working: Working) -> None:
        component = component_of(name, working)
        if component.kind == "volume":
            place = volume_of(name, working.settings).directory
            restored = stage_volume(
                component,
                working.store,
                place,
                restore_id(working),
                working.operation,
                crew=working.crew,
                allow_devices=allow_devices,
                accept_metadata_loss=accept_metadata_loss,
            )
            working.notes[name] = [f"could not be set here: {loss}" for loss in restored.losses]
            return
        target = database_of(name, working.settings)
        if name in working.begun:
            await_server(target, working.operation)
            # It is there still if the server was away when it was to be dropped: nothing is loaded into what was half loaded.
            discard_staging(target, restore_id(working))
        working.begun.add(name)
        try:
            working.staged[name] = stage_database(
                component,
                target,
                working.store,
                restore_id(working),
                working.operation,
                crew=working.crew,
                client_directories=working.settings.athena_pg_bin,
            )
            working.notes[name] = working.staged[name].notes
        except BaseException:
            with contextlib.suppress(AthenaError):
                discard_staging(target, restore_id(working))
            raise

    component_work(name, "staging", work)


@task(name="switch", **RETRYING)
def switch(name: str) -> None:
    """Let one staged component take the live one's place; what it replaced goes when it has."""

    def work(working: Working) -> None:
        if component_of(name, working).kind == "volume":
            place = volume_of(name, working.settings).directory
            told = switch_volume(place, restore_id(working), working.operation)
            working.notes[name] = [*working.notes.get(name, ()), *told]
            return
        target = database_of(name, working.settings)
        namespace = working.settings.athena_namespace
        switch_database(target, working.staged[name].oid, restore_id(working), namespace, working.operation)
        # For the room's sake already now; what can't be dropped is no failure of a switch that is done, and is told below.
        with contextlib.suppress(AthenaError):
            discard_staging(target, restore_id(working))

    component_work(name, "switching", work)


def discard_all(chosen: Sequence[Component], switched: Sequence[str], working: Working) -> None:
    """Throw away every staging of this restore that was not switched, and the roles that were made for those alone.

    What has no place here was never staged.
    """
    places = configured(working)
    own = [one for one in chosen if places.get(one.name) == one.kind]
    kept = {role for one in own if one.database and one.name in switched for role in roles_of(one.database)}

    def tidy(
        component: Component, discard: Callable[[], object], otherwise: str = "the next restore tries again"
    ) -> None:
        try:
            discard()
        except AthenaError as error:
            reason = fault_of(error, component=component.name, step="cleaning up")
            run_log().warning("%s; %s", reason, otherwise)

    for component in own:
        if component.kind == "database":
            target = database_of(component.name, working.settings)
            tidy(component, partial(discard_staging, target, restore_id(working)))
        else:
            place = volume_of(component.name, working.settings).directory
            tidy(component, partial(discard_volume, place, restore_id(working)))
    for component in own:
        if component.kind == "database" and component.name not in switched:
            target = database_of(component.name, working.settings)
            discard = partial(discard_roles, target, restore_id(working), kept)
            tidy(component, discard, "roles that this restore has made may be left, without a login")


def check_health(working: Working, when: str, otherwise: str) -> None:
    """Ask every URL of ATHENA_HEALTH_URLS until it answers 2xx; raises `UnavailableError` naming those that don't.

    ``when`` is what the error says of the time, ``otherwise`` is its next step.
    """
    waiting = list(working.settings.athena_health_urls)
    deadline = time.monotonic() + working.settings.athena_health_seconds
    while True:
        waiting = [url for url in waiting if not _is_healthy(url)]
        if not waiting:
            return
        if time.monotonic() >= deadline:
            break
        working.operation.pause(1)
    raise UnavailableError(f"not healthy {when}: {', '.join(map(masked_url, waiting))}", next_step=otherwise)


def health_faults(working: Working) -> list[Fault]:
    """What is not healthy once everything was switched: a fault of the whole, told beside what was restored."""
    try:
        check_health(working, "after the restore", "what was restored is in place: look at what these services say")
    except AthenaError as error:
        return [error.fault(step="checking health after the restore")]
    return []


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return False


def restore_id(working: Working) -> str:
    """What this restore's side databases and stagings are named after: 12 hex digits of its run."""
    return working.run_id.hex[:12]


def configured(working: Working) -> dict[str, str]:
    """The destination's components by name, with their kinds, in the order of the configuration."""
    settings = working.settings
    return dict.fromkeys(settings.athena_databases, "database") | dict.fromkeys(settings.athena_volumes, "volume")


def component_of(name: str, working: Working) -> Component:
    """A component of the set that is restored."""
    component = whole_manifest(working.store, working.set_id).component(name)
    if component is None:
        raise FinalError(f"the set has no component {name}")
    return component


def states_of(
    chosen: Sequence[Component], switched: Sequence[str], half_switched: Sequence[str]
) -> dict[str, list[str]]:
    """The components' names, by the state in which each is now."""
    names = [component.name for component in chosen]
    return {
        "restored": list(switched),
        "neither wholly old nor wholly new": [name for name in names if name in half_switched],
        "left as they were": [name for name in names if name not in switched and name not in half_switched],
    }


def failure_text(faults: Sequence[Fault], states: Mapping[str, Sequence[str]]) -> str:
    """What failed, and in which state every component is now."""
    text = "; ".join(str(fault) for fault in faults) or "not every component was restored"
    return "; ".join([text, *(f"{state}: {' '.join(found)}" for state, found in states.items() if found)])


def write_report(text: str) -> None:
    """Leave the report as an artifact of the run; a server that fails it does not make the restore a failure."""
    try:
        create_markdown_artifact(text, description="Disaster-recovery report")
    except (httpx.HTTPError, PrefectHTTPStatusError):
        run_log().warning("the report could not be kept; this is it:\n%s", text, exc_info=True)


def report(
    manifest: Manifest,
    chosen: Sequence[Component],
    states: Mapping[str, Sequence[str]],
    left_alone: Sequence[str],
    told: Sequence[str],
    working: Working,
) -> str:
    """The disaster-recovery report: what was restored from where, and how long each component took."""
    lines = [
        f"# Restore of {manifest.set_id}",
        "",
        f"Taken {manifest.began:%Y-%m-%d %H:%M:%S} UTC, restored into namespace {working.settings.athena_namespace}.",
        "",
        "| component | kind | bytes | seconds | outcome |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for component in chosen:
        outcome = next(state for state, names in states.items() if component.name in names)
        seconds = working.seconds.get(component.name, 0.0)
        lines.append(
            f"| {component.name} | {component.kind} | {component.raw_size_bytes} | {seconds:.1f} | {outcome} |"
        )
    for name in left_alone:
        why = "not in the set, left alone" if manifest.component(name) is None else "left alone, as was asked for"
        lines.append(f"| {name} | | | | {why} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in told)])


def notes(working: Working, switched: Sequence[str]) -> list[str]:
    """What of those that were switched did not come back as it was, with the components' names."""
    return [f"{name}: {note}" for name, found in working.notes.items() if name in switched for note in found]
